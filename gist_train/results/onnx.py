"""An exported folder -> the same model in ONNX beside it, in 8 bits where that is asked for, and how far each is from torch's.

Layout and names are those that sentence-transformers' `backend="onnx"`, optimum and transformers.js look for: `onnx/model.onnx`,
int64 inputs (batch, sequence), output `last_hidden_state`. Pooling and normalisation stay with whoever runs it, as in the folder.

Written by torch's own exporter: optimum-onnx holds transformers under 4.58 and does not install beside ours. Of the exporter's
two ways the one over torch.export is taken (`dynamo=True`): the other, over TorchScript, is deprecated and warns that it takes
for constants what transformers decides in Python.
"""

import contextlib
import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from rich.table import Table
from torch import Tensor, nn

from gist_train.config.errors import Fault, UserError, listed, shown
from gist_train.config.evaluation import StsTask
from gist_train.config.models import ModelConfig
from gist_train.config.schema import Config
from gist_train.evaluation.measuring import values
from gist_train.evaluation.sts import LoadedSts, read_sts
from gist_train.evaluation.tasks import measure
from gist_train.model.encoder import Tokens
from gist_train.model.loading import load_trained
from gist_train.model.pretrained import Pretrained
from gist_train.progress import others_silent

Format: TypeAlias = Literal["sentence-transformers", "onnx"]

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
FLOAT32 = Path("onnx", "model.onnx")
INT8 = Path("onnx", "model_int8.onnx")
TOLERANCE = 1e-4
"""The largest difference from torch in any dimension of an embedding with which an export passes."""
CHECKED_TOKENS = 1024
"""Where longer texts of the check are cut. The exported attention holds (tokens, tokens) per head: 8,192 would take gigabytes."""
BATCH_TOKENS = 4096
"""Tokens of a batch of `OnnxEncoder`, padding included."""


@dataclass(frozen=True, slots=True)
class OnnxPlan:
    """What an export in ONNX is to do, its inputs read and its packages there."""

    model: ModelConfig
    """That the exported weights were trained from."""
    quantize: bool
    sts: tuple[LoadedSts, ...]
    """Tasks that the loss by 8 bits is measured on."""
    max_length: int | None
    """Tokens to which the texts of these are cut; None for the model's own."""


@dataclass(frozen=True, slots=True)
class Int8Report:
    """What 8 bits save and cost."""

    size: int
    """Bytes of the file."""
    scores: dict[str, tuple[float, float]]
    """<task>/<metric> -> (float32, int8), fractions; empty where the config has no sts task."""
    lowest_cosine: float
    mean_cosine: float
    """Between the float32 and the int8 vectors of the check's texts."""


@dataclass(frozen=True, slots=True)
class OnnxReport:
    """What was found out about an ONNX model while it was written."""

    difference: float
    """The largest from torch in any dimension of an embedding, at most `TOLERANCE`."""
    size: int
    """Bytes of model.onnx, with its data file where torch keeps weights over 1.5 GiB apart."""
    int8: Int8Report | None


class OnnxEncoder:
    """An ONNX file run by onnxruntime on the CPU: a `TextEncoder`.

    Args:
        file: takes input_ids and attention_mask (and token_type_ids), gives last_hidden_state.
        model: whose tokenizer, maximum length, pooling and normalisation are used; its weights are not.
    """

    def __init__(self, file: Path, model: Pretrained):
        import onnxruntime  # an extra

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors
        options.intra_op_num_threads = torch.get_num_threads()
        self._session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        self._takes_types = "token_type_ids" in [taken.name for taken in self._session.get_inputs()]
        self._model = model
        # The tokenizer's and not the config's: this is what everybody else pads with.
        self._padding_id = model.tokenizer.pad_token_id or 0

    @property
    def prompts(self) -> Mapping[str, str]:
        """Those of the model's folder, by name."""
        return self._model.prompts

    def encode(self, texts: Sequence[str], prompt: str | None = None) -> NDArray[np.float32]:
        """(N, D) embeddings, texts of like length in one padded batch, after `prompt`, or else the folder's default."""
        before = self._model.default_prompt if prompt is None else prompt
        tokens = self._model.tokens([before + text for text in texts])
        order = np.argsort([len(ids) for ids in tokens], kind="stable")[::-1]
        out = np.empty((len(texts), self._model.dimensions), np.float32)
        start = 0
        while start < len(order):
            rows = order[start : start + max(1, BATCH_TOKENS // len(tokens[order[start]]))]
            out[rows] = self._embed([tokens[row] for row in rows])[:, : self._model.dimensions]
            start += len(rows)
        return out

    def _embed(self, texts: Sequence[Tokens]) -> NDArray[np.float32]:
        """(N, D) embeddings of one batch, padded to its longest text."""
        input_ids = np.full((len(texts), max(map(len, texts))), self._padding_id, np.int64)
        mask = np.zeros_like(input_ids)
        for row, ids in enumerate(texts):
            input_ids[row, : len(ids)] = ids
            mask[row, : len(ids)] = 1
        fed = {"input_ids": input_ids, "attention_mask": mask}
        if self._takes_types:
            fed["token_type_ids"] = np.zeros_like(input_ids)
        (hidden,) = self._session.run(["last_hidden_state"], fed)  # (N, L, D)
        encoder = self._model.encoder
        if encoder.pooling == "cls":
            vectors = hidden[:, 0]
        elif encoder.pooling == "last":
            vectors = hidden[np.arange(len(texts)), mask.sum(axis=1) - 1]
        else:
            vectors = (hidden * mask[:, :, None]).sum(axis=1) / mask.sum(axis=1, keepdims=True)
        if encoder.normalized:
            vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        return np.asarray(vectors, np.float32)


def plan_onnx(config: Config, format_: Format, *, quantize: bool) -> OnnxPlan | None:
    """What an export in `format_` has to do beyond a sentence-transformers folder; None for nothing.

    Raises:
        UserError: the packages are not installed, an sts task's file is at fault, or `quantize` of what is not ONNX.
    """
    if format_ not in get_args(Format):
        raise UserError(Fault("--format", shown(format_), f"one of {listed(get_args(Format))}", "name one of these"))
    if format_ != "onnx":
        if quantize:
            raise UserError(Fault("--quantize", f"--format {format_}", "--format onnx", "add --format onnx, or take it out"))
        return None
    if missing := [name for name in PACKAGES if find_spec(name) is None]:
        expected = f"{', '.join(PACKAGES)}, which an export in ONNX needs"
        raise UserError(Fault("--format onnx", f"{', '.join(missing)} not installed", expected, 'pip install "gist-train[onnx]"'))
    faults: list[Fault] = []
    numbered = [(index, task) for index, task in enumerate(config.evaluation.tasks) if quantize and isinstance(task, StsTask)]
    # Not `load_tasks`: of these alone, under the places that they have in the config.
    loaded = [read_sts(task, f"evaluation.tasks[{index}] ({task.name})", faults) for index, task in numbered]
    if faults:
        raise UserError(*faults)
    return OnnxPlan(config.model, quantize, tuple(task for task in loaded if task is not None), config.evaluation.max_length)


def add_onnx(folder: Path, plan: OnnxPlan) -> OnnxReport:
    """Writes onnx/model.onnx, and onnx/model_int8.onnx where it is to be, into a sentence-transformers folder, and checks them.

    Raises:
        ArithmeticError: its embeddings differ from torch's by more than `TOLERANCE`.
        UserError: a model that torch can't export or onnxruntime can't run.
    """
    model = load_trained(folder, plan.model)
    (folder / FLOAT32).parent.mkdir()
    with _refused(model):
        _write(folder)
        difference = _difference(folder, model)
        int8 = _quantized(folder, model, plan) if plan.quantize else None
    return OnnxReport(difference, _size(folder / FLOAT32), int8)


def onnx_table(report: OnnxReport) -> Table:
    """The sizes and scores of an export, int8 beside float32 and what it loses."""
    table = Table(title="ONNX", caption_justify="left")
    for column in ("", "float32", *(["int8", "difference"] if report.int8 else [])):
        table.add_column(column, justify="right" if column else "left")
    sizes = [f"{size / 1e6:,.1f}" for size in (report.size, *([report.int8.size] if report.int8 else []))]
    table.add_row("size, MB", *sizes)
    table.add_row("largest difference from torch", f"{report.difference:.1e}")
    if report.int8 is not None:
        for key, (before, after) in report.int8.scores.items():
            table.add_row(key, f"{before:.4f}", f"{after:.4f}", f"{after - before:+.4f}")
        table.add_row("cosine with float32, mean", "", f"{report.int8.mean_cosine:.4f}")
        table.add_row("cosine with float32, lowest", "", f"{report.int8.lowest_cosine:.4f}")
        if not report.int8.scores:
            table.caption = "evaluation.tasks has no sts task to measure the loss on"
    return table


class _LastHiddenState(nn.Module):
    """A transformer that gives nothing but its last hidden state: a pooler's output would be a second one."""

    def __init__(self, transformer: Any):
        super().__init__()
        self.transformer = transformer

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        """(B, L, D) from (B, L) each."""
        types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        out = self.transformer(input_ids=input_ids, attention_mask=attention_mask, **types)
        return out.last_hidden_state  # type: ignore[no-any-return]


def _write(folder: Path) -> None:
    """Has torch write onnx/model.onnx of the transformer in `folder`."""
    with others_silent():
        # Loaded anew as anybody would: our packed attention is no part of ONNX. Eager makes a plainer graph than sdpa.
        from transformers import AutoModel

        transformer = AutoModel.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
        ids = torch.arange(14).view(2, 7) % transformer.config.vocab_size
        example = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        example["attention_mask"][1, 5:] = 0
        # As in optimum: RoBERTa's kin takes the types too, but has one only.
        takes_types = "token_type_ids" in inspect.signature(transformer.forward).parameters
        if takes_types and transformer.config.to_dict().get("type_vocab_size", 0) > 1:
            example["token_type_ids"] = torch.zeros_like(ids)
        program = torch.onnx.export(
            _LastHiddenState(transformer).eval(),
            kwargs=example,
            input_names=list(example),
            output_names=["last_hidden_state"],
            dynamic_shapes={name: {0: "batch_size", 1: "sequence_length"} for name in example},
            dynamo=True,
            verbose=False,
        )
        if program is None:
            raise RuntimeError("torch's exporter gave no program")
        for node in program.model.graph.all_nodes():
            node.metadata_props.clear()  # stack traces, with this machine's paths
        program.save(folder / FLOAT32)


def _difference(folder: Path, model: Pretrained) -> float:
    """The largest difference from torch in any dimension of an embedding of the check's texts."""
    model = model.with_max_length(min(model.max_length, CHECKED_TOKENS))
    texts = _check_texts()
    difference = float(np.abs(OnnxEncoder(folder / FLOAT32, model).encode(texts) - model.encode(texts)).max())
    if not difference <= TOLERANCE:  # nan is not either
        raise ArithmeticError(
            f"{FLOAT32} gives other embeddings than torch: they differ by up to {difference:.1e}, "
            f"more than {TOLERANCE:.0e}. Nothing was exported."
        )
    return difference


def _quantized(folder: Path, model: Pretrained, plan: OnnxPlan) -> Int8Report:
    """Writes onnx/model_int8.onnx and measures it against onnx/model.onnx.

    Weights of dense layers and embeddings are in 8 bits, activations are cut to 8 bits as they come. all-MiniLM-L6-v2 on STS-B
    dev, Spearman of float32 0.8672 (90 MB): dense layers per channel 0.8661, 0.8673 in 7 of the 8 bits (59 MB); with the
    embeddings 0.8657 and 0.8665 (23 MB); one scale per matrix 0.8644 and 0.8574. So the embeddings too, per channel.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic  # an extra

    with others_silent():
        quantize_dynamic(
            folder / FLOAT32,
            folder / INT8,
            op_types_to_quantize=["MatMul", "Gemm", "Gather"],
            per_channel=True,
            # 7 of the 8 bits: a CPU without VNNI adds in 16 bits, which overflow, and would lose more than is measured here.
            reduce_range=True,
            weight_type=QuantType.QInt8,
        )
    model = model.with_max_length(plan.max_length)
    full, small = OnnxEncoder(folder / FLOAT32, model), OnnxEncoder(folder / INT8, model)
    before, after = values(measure(full, plan.sts)), values(measure(small, plan.sts))
    short = model.with_max_length(min(model.max_length, CHECKED_TOKENS))
    texts = _check_texts()
    a, b = (OnnxEncoder(folder / file, short).encode(texts).astype(np.float64) for file in (FLOAT32, INT8))
    cosines = (a * b).sum(axis=1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
    scores = {key: (value, after[key]) for key, value in before.items()}
    return Int8Report(_size(folder / INT8), scores, float(cosines.min()), float(cosines.mean()))


def _check_texts() -> list[str]:
    """Utterances of the quickstart, and runs of them of doubling length up to all 1,280, which any model has to cut."""
    lines = (files("gist_train") / "quickstart" / "intents.train.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    return texts[::40] + [" ".join(texts[: 2**power]) for power in range(1, 8)] + [" ".join(texts)]


def _size(file: Path) -> int:
    """Bytes of an ONNX file, with the data file that torch puts beside a large one."""
    return sum(part.stat().st_size for part in file.parent.glob(f"{file.name}*"))


@contextlib.contextmanager
def _refused(model: Pretrained) -> Iterator[None]:
    """Says what torch's exporter or onnxruntime fails on. Neither has one class for its errors."""
    try:
        yield
    except (UserError, ArithmeticError, OSError, MemoryError):
        raise
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), "")
        family = model.encoder.transformer.config.model_type
        found = f"a model of the family {family}, which can't be exported: {shown(f'{type(error).__name__}: {reason}', 200)}"
        expected = "a model that torch can export and onnxruntime can run, such as BERT's and RoBERTa's kin"
        raise UserError(Fault("--format onnx", found, expected, "export it with --format sentence-transformers")) from error
