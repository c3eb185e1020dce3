"""Models, corpus and trainings that the stages of `check_gpu.sh` share. No package with a model, and no network, is needed."""

import gc
import gzip
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from pydantic import ValidationError
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from benchmarks.gpu.report import Report, Setup
from benchmarks.options import Shape
from benchmarks.sides import LEARNING_RATE, MAX_LENGTH, TEMPERATURE, ChosenSteps, make_model
from gist_train.checks import check_device
from gist_train.config.errors import UserError
from gist_train.config.models import ModelConfig
from gist_train.config.schema import Config
from gist_train.data.corpus import Corpus, TokenTable
from gist_train.model.loading import load_student
from gist_train.preparation import prepare_corpus, prepare_tokens
from gist_train.training.batching import batch_plan
from gist_train.training.distributed import make_accelerator
from gist_train.training.guides import StoredGuide
from gist_train.training.setup import Prepared, open_training
from gist_train.training.step_context import Training

SPECIAL = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
VOCABULARY, TEXTS_OF_TOKENIZER = 30_522, 60_000
SHAPES: dict[str, tuple[Shape, Shape]] = {
    "bge-small": ((12, 384, 12, 1536), (2, 64, 4, 128)),
    "uae-large": ((24, 1024, 16, 4096), (2, 64, 4, 128)),
    "small": ((3, 128, 4, 512), (1, 32, 2, 64)),
    "small-guide": ((2, 128, 4, 512), (1, 32, 2, 64)),
}
"""Layers, hidden size, heads and intermediate size, and those of the tiny stand-in."""
GUIDE_WIDTH = 1024
LARGE_BATCH = 128
"""From so many triplets on a batch may hold a text twice: few batches do not."""
MODES = {
    "eager": {},
    "graph": {"cuda_graph": True},
    "compile": {"compile": True},
    "compile+graph": {"compile": True, "cuda_graph": True},
}
"""What they set in `training`."""


class NotAvailableError(Exception):
    """This package, or this device, has no such mode."""


def be_quiet() -> None:
    """Silences progress bars and warnings of the libraries, and keeps what is there from being collected again and again."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    gc.collect()
    gc.freeze()


def free_memory() -> None:
    """Gives back what nobody refers to."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def synchronise(device: torch.device) -> None:
    """Waits for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def fresh_accelerator(setup: Setup, precision: str | None = None) -> Accelerator:
    """One that no trainer before has set up. Older ones share its state from here on."""
    AcceleratorState._reset_state(reset_partial_state=True)
    return make_accelerator(precision or setup.precision)[0]


def model_folder(setup: Setup, name: str) -> Path:
    """A sentence-transformers folder of one of `SHAPES` with random weights, made if no stage has."""

    def make(partial: Path) -> None:
        make_model(partial, SHAPES[name][setup.tiny], list(SHAPES).index(name), _tokenizer(setup))
        shutil.rmtree(partial.with_name(partial.name + "-plain"))

    return _made(setup.work / name, make)


def _tokenizer(setup: Setup) -> PreTrainedTokenizerFast:
    """BERT's kind of tokenizer, trained on the training texts."""

    def make(partial: Path) -> None:
        tokenizer = Tokenizer(models.WordPiece(unk_token=SPECIAL["unk"]))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        texts = training_texts(setup, 3_000 if setup.tiny else TEXTS_OF_TOKENIZER)
        vocabulary = 1_000 if setup.tiny else VOCABULARY
        trainer = trainers.WordPieceTrainer(vocab_size=vocabulary, special_tokens=list(SPECIAL.values()), show_progress=False)
        tokenizer.train_from_iterator(texts, trainer)
        ids = [(SPECIAL[name], tokenizer.token_to_id(SPECIAL[name])) for name in ("cls", "sep")]
        tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ids)
        named = {f"{name}_token": token for name, token in SPECIAL.items()}
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=MAX_LENGTH, **named).save_pretrained(partial)

    return PreTrainedTokenizerFast.from_pretrained(_made(setup.work / "tokenizer", make))


def _made(folder: Path, make: Callable[[Path], None]) -> Path:
    """The folder, made if it is not there; never half made, whoever stops it."""
    if not folder.exists():
        partial = folder.with_name(folder.name + "-partial")
        shutil.rmtree(partial, ignore_errors=True)
        make(partial)
        partial.rename(folder)
    return folder


def training_texts(setup: Setup, count: int) -> list[str]:
    """The first texts of the training rows."""
    with gzip.open(setup.source, "rt", encoding="utf-8") as file:
        rows = json.load(file)
    return [row[column][1] for row in rows[: count // 3 + 1] for column in ("query", "pos", "neg")][:count]


class _StandIn:
    """Stands for a guide's store: random vectors of length 1, in float16 as the store has them."""

    fingerprint = "stand-in"

    def __init__(self, texts: int):
        random = np.random.default_rng(0)
        self._vectors = np.empty((texts, GUIDE_WIDTH), np.float16)
        for first in range(0, texts, 8192):
            part = random.standard_normal((min(8192, texts - first), GUIDE_WIDTH), dtype=np.float32)
            self._vectors[first : first + 8192] = part / np.linalg.norm(part, axis=1, keepdims=True)

    def read(self, positions: Any) -> Any:
        """(n, G) float32."""
        return self._vectors[positions].astype(np.float32)


@dataclass(slots=True)
class Opened:
    """Student, data, stand-in guide, and a training for each mode that was asked for. Sizes and modes share them."""

    setup: Setup
    student: Path
    corpus: Corpus
    tokens: TokenTable
    guide: StoredGuide
    trainings: dict[str, Training]

    @property
    def device(self) -> torch.device:
        """Where steps run."""
        return torch.device("cuda", torch.cuda.current_device()) if self.setup.device == "cuda" else torch.device("cpu")

    def config(self, triplets: int, mode: str = "eager", *, guided: bool = True) -> Config:
        """The config of a training.

        Raises:
            NotAvailableError: this version of the package has no such mode.
        """
        settings = {
            "name": "check",
            "output_dir": str(self.setup.work),
            "model": {"name": str(self.student)},
            "data": {"train": [_rows(self.setup)], "batching": "task"},
            # Those of the other side.
            "loss": {"temperature": TEMPERATURE, "mask_duplicates": False, **self._blocks(guided)},
            "training": {"batch_size": triplets, "precision": self.setup.precision, **MODES[mode]},
            "optimizer": {"lr": LEARNING_RATE},
            "schedule": {"type": "constant", "warmup_ratio": 0.0},
        }
        try:
            return Config.model_validate(settings)
        except ValidationError as error:
            raise NotAvailableError(f"{mode}: {error.errors()[0]['msg']}") from None

    @staticmethod
    def _blocks(guided: bool) -> dict[str, bool]:
        """MultipleNegativesRankingLoss has no blocks of anchors among themselves and of positives."""
        return {"contrast_anchors": guided, "contrast_positives": guided}

    def chosen(self, triplets: int, count: int) -> ChosenSteps:
        """The first `count` batches of one task, and at small sizes without a text twice, or as many as there are."""
        plan = batch_plan(self.config(triplets), self.corpus)
        steps: list[int] = []
        for step in range(1, plan.steps_per_epoch + 1):
            rows = plan.batch(step)
            batch = self.corpus.batch(rows, plan.positives(rows, 0))
            texts = np.concatenate([batch.anchor, batch.positive, batch.negative])
            different = len(np.unique(texts)) == len(texts) == 3 * triplets
            if len(np.unique(self.corpus.task[rows])) == 1 and (different or triplets >= LARGE_BATCH):
                steps.append(step)
            if len(steps) == count:
                break
        return ChosenSteps(plan, steps, triplets)

    def training(self, mode: str, plan: ChosenSteps, *, guided: bool) -> Training:
        """What the loop takes, over the batches of `plan`. Weights, moments and what was compiled are those of the mode.

        Raises:
            NotAvailableError: there is no such mode here.
        """
        config = self.config(plan.triplets, mode, guided=guided)
        accelerator = fresh_accelerator(self.setup)
        if mode not in self.trainings:
            student = load_student(config.model)
            try:
                check_device(config, student, accelerator.device)
            except UserError as error:
                raise NotAvailableError(f"{mode}: {' '.join(str(error).split())}") from None
            prepared = Prepared(student, self.corpus, plan.plan, self.tokens, self.guide)
            job = open_training(config, accelerator, prepared)
            self.trainings[mode] = job.training
        changes = {"accelerator": accelerator, "plan": plan, "loss": config.loss, "guide": self.guide if guided else None}
        return replace(self.trainings[mode], **changes)


def _rows(setup: Setup) -> dict[str, Any]:
    """The source of training rows."""
    return {"source": "medi", "path": str(setup.source), **({"max_rows": 600} if setup.tiny else {})}


def open_all(setup: Setup, report: Report) -> Opened:
    """Student, corpus, tokens and stand-in guide, made or found."""
    be_quiet()
    student = model_folder(setup, "bge-small")
    report.say("student made")
    opened = Opened(setup, student, None, None, None, {})  # type: ignore[arg-type]
    device = fresh_accelerator(setup).device
    console = Console(quiet=True)
    opened.corpus = prepare_corpus(opened.config(16), device, console)
    opened.tokens = prepare_tokens(opened.corpus, load_student(ModelConfig(name=str(student))), console)
    report.say(f"corpus of {opened.corpus.row_count:,} rows, {opened.corpus.text_count:,} texts, made and tokenised")
    stand_in: Any = _StandIn(opened.corpus.text_count)
    opened.guide = StoredGuide.alike(stand_in, np.arange(opened.corpus.text_count))
    return opened


def repeated(plan: ChosenSteps, passes: int) -> ChosenSteps:
    """The same batches again and again."""
    return replace(plan, chosen=plan.chosen * passes)


def modes_for(setup: Setup) -> list[str]:
    """Those that a device can have, what takes no compiler first."""
    return list(MODES) if setup.device == "cuda" else ["eager"]
