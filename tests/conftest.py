"""Tiny models with random weights and small data, made here: this suite needs no network and no download."""

import json
import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when the hub's package is imported: a test that would use the network fails at once

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from support.families import FAMILIES, tiny_config
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

transformers_logging.disable_progress_bar()
ROOT = Path(__file__).resolve().parent.parent
QUICKSTART = ROOT / "gist_train" / "quickstart"
ADDED = {"mistral": "$A", "qwen3": "$A [SEP]"}
"""What a tokenizer adds to a text, where it isn't BERT's: decoders' add what ends it, or nothing."""

MakeModel = Callable[..., Path]


@pytest.fixture(scope="session", autouse=True)
def trackio_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where trackio keeps its runs: it reads that once, when it is imported."""
    folder = tmp_path_factory.mktemp("trackio")
    os.environ["TRACKIO_DIR"] = str(folder)
    return folder


@pytest.fixture(scope="session")
def quickstart_texts() -> list[str]:
    """1,280 real utterances, the package's own."""
    return [json.loads(line)["text"] for line in (QUICKSTART / "intents.train.jsonl").open(encoding="utf-8")]


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory, quickstart_texts: list[str]) -> MakeModel:
    """Builds a sentence-transformers folder with a tiny random transformer; the same arguments give the same folder."""
    built: dict[str, Path] = {}

    def make(
        family: str = "bert",
        *,
        width: int = 32,
        layers: int = 2,
        pooling: str = "mean",
        normalize: bool = True,
        cased: bool = False,
        vocabulary: int = 400,
        dropout: float = 0.1,
        seed: int = 0,
        length: int = 64,
    ) -> Path:
        key = f"{family}-{width}-{layers}-{pooling}-{normalize}-{cased}-{vocabulary}-{dropout}-{seed}-{length}"
        if key not in built:
            folder = tmp_path_factory.mktemp("models") / key
            _build(folder, quickstart_texts, family, width, layers, pooling, normalize, cased, vocabulary, dropout, seed, length)
            built[key] = folder
        return built[key]

    return make


def _build(
    folder: Path,
    texts: list[str],
    family: str,
    width: int,
    layers: int,
    pooling: str,
    normalize: bool,
    cased: bool,
    vocabulary: int,
    dropout: float,
    seed: int,
    length: int,
) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

    special = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=not cased)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.train_from_iterator(texts, trainers.WordPieceTrainer(vocab_size=vocabulary, special_tokens=list(special.values())))
    # The trainer numbers tokens otherwise in each process: with them the model, and every number of a test, would be another.
    others = sorted({*tokenizer.get_vocab()} - {*special.values()})
    numbered = {token: number for number, token in enumerate([*special.values(), *others])}
    tokenizer.model = models.WordPiece(numbered, unk_token="[UNK]")
    ids = {name: tokenizer.token_to_id(token) for name, token in special.items()}
    tokenizer.post_processor = processors.TemplateProcessing(
        single=ADDED.get(family, "[CLS] $A [SEP]"), special_tokens=[("[CLS]", ids["cls"]), ("[SEP]", ids["sep"])]
    )
    torch.manual_seed(seed)
    config = tiny_config(
        family,
        vocabulary=tokenizer.get_vocab_size(),
        width=width,
        layers=layers,
        intermediate=2 * width,
        positions=length + 16,
        dropout=dropout,
        pad_token_id=ids["pad"],
        bos_token_id=ids["cls"],
        eos_token_id=ids["sep"],
    )
    plain = folder.with_name(folder.name + "-plain")
    FAMILIES[family][1](config).save_pretrained(plain)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=length,
        padding_side="left" if family in ADDED else "right",
        eos_token="[SEP]",
        **{f"{name}_token": token for name, token in special.items()},
    ).save_pretrained(plain)
    transformer = Transformer(str(plain), max_seq_length=length)
    modules = [transformer, Pooling(width, pooling), *([Normalize()] if normalize else [])]
    SentenceTransformer(modules=modules, device="cpu").save_pretrained(str(folder), create_model_card=False)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Tensors of a few numbers gain nothing from threads, and on a busy machine wait for them: 30 times as long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Runs in this process use the CPU and one thread, whatever the machine has: their bits can be compared."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    AcceleratorState._reset_state(reset_partial_state=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., Path]:
    """Writes rows as JSONL: `write_rows("a.jsonl", [{"anchor": ..., "positive": ...}, ...])`."""

    def write(name: str, rows: list[dict[str, Any]]) -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="session")
def triplets() -> list[dict[str, Any]]:
    """96 rows over 3 tasks of unlike size: pairs, triplets and rows with several positives and negatives."""
    lines = [json.loads(line) for line in (QUICKSTART / "intents.train.jsonl").open(encoding="utf-8")]
    rows: list[dict[str, Any]] = []
    for i, line in enumerate(lines[: 96 * 12 : 12]):
        negatives = [lines[(i * 12 + 40 * (k + 1)) % len(lines)]["text"] for k in range(i % 4)]
        rows.append(
            {
                "anchor": line["text"],
                "positive": line["positive"][: 1 + i % 2],
                "negative": negatives,
                "task": "abc"[min(i // 40, 2)],
            }
        )
    return rows


@pytest.fixture
def write_config(tmp_path: Path, make_model: MakeModel, triplets: list[dict[str, Any]]) -> Callable[..., Path]:
    """Writes the YAML of a tiny run over `triplets` into tmp_path; keyword arguments replace top-level sections."""

    def write(name: str = "run", **sections: Any) -> Path:
        rows = tmp_path / "rows.jsonl"
        if not rows.exists():
            rows.write_text("".join(json.dumps(row) + "\n" for row in triplets), encoding="utf-8")
        config = {
            "name": name,
            "output_dir": str(tmp_path / "runs"),
            "model": {"name": str(make_model())},
            "guide": {"name": str(make_model(width=48, layers=1, cased=True, vocabulary=300, seed=1)), "dtype": "float32"},
            "data": {"train": [{"source": "jsonl", "path": str(rows)}]},
            "training": {"batch_size": 8, "max_steps": 12, "precision": "float32"},
            "optimizer": {"lr": 1e-3},
            "checkpoint": {"every": 4, "keep_last": 10},
            "tracking": {"log_every": 1},
            **sections,
        }
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(config), encoding="utf-8")
        return path

    return write


@pytest.fixture
def write_pairs(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Writes texts as the pairs of an STS file, and returns the section `evaluation` with it as its only task, "pairs"."""

    def write(texts: list[str]) -> dict[str, Any]:
        path = tmp_path / "pairs.tsv"
        lines = [f"{text}\tnobody trains on this {i}\t{i % 5}\n" for i, text in enumerate(texts)]
        path.write_text("sentence1\tsentence2\tscore\nthe first\tof all\t5\n" + "".join(lines), encoding="utf-8")
        return {"tasks": [{"type": "sts", "name": "pairs", "path": str(path)}]}

    return write


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real text for tests, from GIST_TRAIN_DATA (default ../shared/data beside the checkout)."""
    folder = Path(os.environ.get("GIST_TRAIN_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"GIST_TRAIN_DATA: no folder {folder}")
    return folder
