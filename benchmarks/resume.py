"""Times what a run waits for its first batch when it resumes at step 100,000, against a start at step 1, beside the peer's way.

    python -m benchmarks.resume               # 1,818,688 rows, batches of 16: the published size
    python -m benchmarks.resume --rows 20000 --step 1000

Ours opens its batch plan and asks it for the step's rows. The peer is SentenceTransformerTrainer's own data loader, which a
resumed run skips forward (accelerate's `skip_first_batches`, as transformers' Trainer calls it): with the default batch sampler,
and with the one that its losses with in-batch negatives recommend, NO_DUPLICATES, which goes through the rows that it skips; of
that one `--skipped` batches are skipped and the seconds scaled, which is said. Medians of `--pairs` runs in turn. Loading weights
and moments, which both sides do, is not in it. The peer's time has one batch read and tokenised in it: see its start at step 1.
Exit code: 0; 2 where an argument is wrong.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import transformers
from accelerate import skip_first_batches
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.base.sampler import BatchSamplers
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

from benchmarks.machine import header, told
from benchmarks.sides import BATCH_SIZE, make_model
from gist_train.data.batches import BatchPlan

PACKAGES = ("torch", "transformers", "sentence-transformers", "accelerate", "datasets", "numpy")
ROWS, STEP, TASKS = 1_818_688, 100_000, 341
BATCHINGS = ("reference", "task", "mixed")
SAMPLERS = {"default": BatchSamplers.BATCH_SAMPLER, "no duplicates": BatchSamplers.NO_DUPLICATES}
"""Of the peer; the second goes through the rows that it skips."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark and returns the exit code."""
    options = _options(arguments)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    console = Console(stderr=True, quiet=options.json, highlight=False)
    with TemporaryDirectory(prefix="gist-train-resume-") as folder:
        result = measure(options, Path(folder), console)
    if options.json:
        print(json.dumps(result, indent=2))
    else:
        show(result, Console(width=110, highlight=False))
    return 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=ROWS, help="of the data (default %(default)s)")
    parser.add_argument("--step", type=int, default=STEP, help="the resumed run's first (default %(default)s)")
    parser.add_argument("--skipped", type=int, default=2000, help="batches that NO_DUPLICATES skips (default %(default)s)")
    parser.add_argument("--pairs", type=int, default=3, help="runs of each (default %(default)s)")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout and nothing else")
    options = parser.parse_args(arguments)
    if not 1 < options.step <= options.rows // BATCH_SIZE:
        parser.error(f"--step: {options.step}, but 2 to {options.rows // BATCH_SIZE}, the steps of an epoch, are needed")
    options.skipped = min(options.skipped, options.step - 1)
    return options


def measure(options: argparse.Namespace, folder: Path, console: Console) -> dict[str, Any]:
    """All figures, as `--json` prints them; `folder` takes a model."""
    trainers = _trainers(options.rows, folder)
    runs: dict[str, Callable[[int], float]] = {f"ours, {name}": _ours(name, options.rows) for name in BATCHINGS}
    runs |= {f"peer, {name}": _peer(trainer) for name, trainer in trainers.items()}
    seconds: dict[str, dict[str, list[float]]] = {name: {"start": [], "resume": []} for name in runs}
    steps = {name: options.skipped + 1 if name.endswith("no duplicates") else options.step for name in runs}
    for first_batch in runs.values():
        first_batch(1)  # warms up
    for pair in range(options.pairs):
        for name, first_batch in list(runs.items())[:: 1 if pair % 2 == 0 else -1]:
            seconds[name]["start"].append(first_batch(1))
            seconds[name]["resume"].append(first_batch(steps[name]))
        console.print(f"pair {pair + 1} of {options.pairs}")
    rows = {}
    for name, of in seconds.items():
        start, reached = (statistics.median(of[key]) for key in ("start", "resume"))
        scale = (options.step - 1) / (steps[name] - 1)
        resume = start + (reached - start) * scale if scale > 1 else reached
        rows[name] = {"start_seconds": start, "resume_seconds": resume, "ratio": resume / start, "scaled_by": scale}
    settings = {"rows": options.rows, "step": options.step, "skipped": options.skipped, "pairs": options.pairs}
    return {"machine": told(torch.device("cpu"), PACKAGES), "settings": settings, "rows": rows}


def _ours(batching: str, rows: int) -> Callable[[int], float]:
    """Seconds from nothing opened to the rows of a step in hand. Tasks are of one size, texts stand in one row each."""
    task = np.repeat(np.arange(TASKS, dtype=np.int32), -(-rows // TASKS))[:rows]
    texts = np.arange(2 * rows, dtype=np.int32)
    offsets = np.arange(rows + 1, dtype=np.int64)

    def first_batch(step: int) -> float:
        began = time.perf_counter()
        plan = BatchPlan(
            task=task,
            anchor=texts[:rows],
            positive=texts[rows:],
            positive_offsets=offsets,
            batching=batching,  # type: ignore[arg-type]
            batch_size=BATCH_SIZE,
            seed=0,
        )
        plan.batch(min(step, plan.steps_per_epoch))  # windows of mixed tasks are no steps
        return time.perf_counter() - began

    return first_batch


def _trainers(rows: int, folder: Path) -> dict[str, SentenceTransformerTrainer]:
    """The peer's trainer over so many rows of short texts, for each of its batch samplers."""
    columns = {name: pa.array([f"{name} {number}" for number in range(rows)]) for name in ("anchor", "positive", "negative")}
    data = Dataset(pa.table(columns))
    model = SentenceTransformer(str(make_model(folder / "model", (1, 32, 2, 64), 0)), device="cpu")
    model.model_card_data.widget = [{}]  # examples that it would otherwise compute for the card
    loss = MultipleNegativesRankingLoss(model)
    return {
        name: SentenceTransformerTrainer(
            model,
            SentenceTransformerTrainingArguments(
                str(folder / "run"),
                per_device_train_batch_size=BATCH_SIZE,
                batch_sampler=sampler,
                use_cpu=True,
                report_to="none",
                disable_tqdm=True,
            ),
            train_dataset=data,
            loss=loss,
        )
        for name, sampler in SAMPLERS.items()
    }


def _peer(trainer: SentenceTransformerTrainer) -> Callable[[int], float]:
    """Seconds from no loader to the batch of a step in hand, tokenised."""

    def first_batch(step: int) -> float:
        began = time.perf_counter()
        loader = trainer.get_train_dataloader()
        next(iter(skip_first_batches(loader, step - 1) if step > 1 else loader))
        return time.perf_counter() - began

    return first_batch


def show(result: dict[str, Any], console: Console) -> None:
    """The figures for people."""
    console.print(header(result["machine"]), soft_wrap=True)
    settings = result["settings"]
    table = Table(title=f"seconds to the first batch, {settings['rows']:,} rows, batches of {BATCH_SIZE}, medians")
    for column in ("", "start at step 1", f"resume at step {settings['step']:,}", "resume / start"):
        table.add_column(column, justify="right" if column else "left")
    for name, row in result["rows"].items():
        scaled = "*" if row["scaled_by"] > 1 else ""
        table.add_row(name, f"{row['start_seconds']:.3f}", f"{row['resume_seconds']:.3f}{scaled}", f"{row['ratio']:.2f}{scaled}")
    console.print(table)
    console.print(f"ours: by data.batching; peer: by batch sampler; medians of {settings['pairs']}")
    if any(row["scaled_by"] > 1 for row in result["rows"].values()):
        console.print(f"*: {settings['skipped']:,} batches were skipped, and the seconds that this took scaled")


if __name__ == "__main__":
    sys.exit(main())
