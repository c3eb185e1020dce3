"""Times checkpoints that are written beside the training against checkpoints that the training waits for.

    python -m benchmarks.checkpoint               # a student of bge-small's shape, some minutes on two cores
    python -m benchmarks.checkpoint --layers 3    # a smaller one

In each round the real loop takes the same batches twice, once alone and once while a checkpoint of its weights and moments is
written, and one checkpoint is written in line. A write takes cores and memory from the steps beside it: what it adds to them is
counted as its cost, like the time that the loop stands still for the copy. Checkpoints go to the disk of TMPDIR. First both ways
save the same weights: the folders must be the same, byte for byte.
Exit code: 0; 1 where they are not; 2 where the data are missing.
"""

import argparse
import hashlib
import json
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.machine import header, told
from benchmarks.options import add_common, begin
from benchmarks.sides import BATCH_SIZE, make_model
from gist_train.config.errors import UserError
from gist_train.config.schema import Config
from gist_train.data.files import folder_bytes
from gist_train.run_folder import Run
from gist_train.training.checkpoint import LogSums, moments_of, save_checkpoint
from gist_train.training.checkpoint_writer import CheckpointWriter
from gist_train.training.distributed import make_accelerator
from gist_train.training.loop import steps
from gist_train.training.setup import Job
from gist_train.training_run import open_job

EVERY = 500
"""Steps from one checkpoint to the next, of which the shares are told."""
BAR = 0.02
"""Share of the time that checkpoints may take on a CPU."""
SHAPE = (384, 12, 1536)
"""Hidden size, attention heads and intermediate size of bge-small."""
PACKAGES = ("torch", "transformers", "sentence-transformers", "safetensors", "accelerate")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark and returns the exit code."""
    options = _options(arguments)
    source = begin(options)
    if not source.is_file():
        print(f"--data: no file {source}; give the folder that has medi/medi_like_train.json.gz in it", file=sys.stderr)
        return 2
    console = Console(stderr=True, quiet=options.json, highlight=False)
    try:
        with TemporaryDirectory(prefix="gist-train-benchmark-") as folder:
            student = make_model(Path(folder) / "student", (options.layers, *SHAPE), seed=0)
            settings: dict[str, Any] = {"name": "benchmark", "output_dir": folder, "model": {"name": str(student)}}
            settings["data"] = {"train": [{"source": "medi", "path": str(source)}], "batching": "task"}
            settings["training"] = {"batch_size": options.batch_size, "precision": options.precision}
            config = Config.model_validate(settings)
            accelerator, _ = make_accelerator(config.training.precision)
            bench = Bench(open_job(config, accelerator, console), Path(folder), options.steps)
            result = {"machine": told(accelerator.device, PACKAGES), **_measure(bench, options.rounds, console)}
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    result["settings"] = {name: value for name, value in vars(options).items() if name not in ("data", "json")}
    if options.json:
        print(json.dumps(result, indent=2))
    else:
        show(result, Console(width=110, highlight=False))
    if not result["equal"]:
        print("the two ways did not write the same checkpoint", file=sys.stderr)
    return 0 if result["equal"] else 1


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12, help="of the student (default 12)")
    parser.add_argument("--batch-size", type=int, default=BATCH_SIZE, help=f"triplets of a step (default {BATCH_SIZE})")
    parser.add_argument("--steps", type=int, default=4, help="steps that are taken beside a write (default 4)")
    parser.add_argument("--rounds", type=int, default=3, help="checkpoints of each kind (default 3)")
    parser.add_argument("--precision", choices=("float32", "bf16"), default="float32")
    add_common(parser)
    return parser.parse_args(arguments)


@dataclass(slots=True)
class Bench:
    """A job, and a folder of its own for each checkpoint."""

    job: Job
    folder: Path
    steps: int
    """In a row."""
    saved: int = 0

    def writer(self, run: Run) -> CheckpointWriter:
        """That of a run, whose buffers are still fresh."""
        return CheckpointWriter(run, self.job.student, self.job.training.optimizer, self.job.facts, self.job.training.state)

    def train(self) -> float:
        """Seconds that the loop takes for its first steps, which are the same batches each time."""
        began = time.perf_counter()
        for _ in steps(self.job.training, 0, self.steps):
            pass
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return time.perf_counter() - began

    def next_sums(self) -> LogSums:
        """Of the next checkpoint. The one before is deleted, which is no part of what is timed."""
        shutil.rmtree(self.folder / "run", ignore_errors=True)
        self.saved += 1
        return LogSums(self.saved)

    def save_in_line(self, run: Run, sums: LogSums) -> float:
        """Seconds to write the live weights and moments."""
        student, adamw = self.job.student, self.job.training.optimizer
        began = time.perf_counter()
        save_checkpoint(run, student, moments_of(student, adamw, self.job.training.state), sums, self.job.facts)
        return time.perf_counter() - began


def _measure(bench: Bench, rounds: int, console: Console) -> dict[str, Any]:
    """All figures: medians over the rounds, seconds, and shares of the time at a checkpoint every `EVERY` steps."""
    run, marks = Run(bench.folder / "run"), {"begins": (0.0, 0.0), "ends": (0.0, 0.0)}

    def mark(name: str) -> None:  # in the thread that writes
        marks[name] = time.perf_counter(), time.thread_time()

    bench.train()  # to warm up, and to have moments
    times: dict[str, list[float]] = {name: [] for name in ("copy", "write", "write_cpu", "in_line", "alone", "beside")}
    with bench.writer(run) as writer:

        def copy_and_write() -> float:
            began = time.perf_counter()
            writer.save(bench.next_sums(), before=lambda: mark("begins"), after=lambda: mark("ends"))
            return time.perf_counter() - began

        def wait() -> None:
            if (failure := writer.wait()) is not None:
                raise failure

        first = copy_and_write()
        wait()
        twin_run = Run(bench.folder / "twin")
        bench.save_in_line(twin_run, LogSums(bench.saved))
        ours, twin = run.checkpoint(bench.saved), twin_run.checkpoint(bench.saved)
        equal, size = _hashes(ours) == _hashes(twin), folder_bytes(ours)
        for number in range(rounds):
            for side in ("alone", "beside") if number % 2 else ("beside", "alone"):
                if side == "beside":
                    times["copy"].append(copy_and_write())
                began = time.perf_counter()
                bench.train()
                wait()  # where the steps were too few, the rest of the write counts too
                times[side].append(time.perf_counter() - began)
            for name, began, ended in zip(("write", "write_cpu"), marks["begins"], marks["ends"], strict=True):
                times[name].append(ended - began)
            times["in_line"].append(bench.save_in_line(run, bench.next_sums()))
            console.print(f"round {number + 1} of {rounds}: {', '.join(f'{key} {of[-1]:.2f} s' for key, of in times.items())}")
    seconds = {name: statistics.median(of) for name, of in times.items()}
    extra = statistics.median(b - a for a, b in zip(times["alone"], times["beside"], strict=True))
    step = seconds["alone"] / bench.steps
    return {
        "equal": equal,
        "checkpoint_bytes": size,
        "seconds": {
            "first_copy": first,
            "copy": seconds["copy"],
            "write": seconds["write"],
            "write_cpu": seconds["write_cpu"],
            "in_line": seconds["in_line"],
            "step": step,
            "step_beside_a_write": seconds["beside"] / bench.steps,
            "added_to_steps": extra,
        },
        "rounds": times,
        "share": {
            "in_line": _share(seconds["in_line"], step),
            "standing_still": _share(seconds["copy"], step),
            "overlapped": _share(seconds["copy"] + max(extra, 0.0), step),
        },
        "every": EVERY,
        "bar": BAR,
    }


def _share(seconds: float, step: float) -> float:
    return seconds / (EVERY * step + seconds)


def _hashes(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def show(result: dict[str, Any], console: Console) -> None:
    """The figures for people."""
    seconds, share, settings = result["seconds"], result["share"], result["settings"]
    console.print(header(result["machine"], settings["precision"]), soft_wrap=True)
    console.print(
        f"{settings['layers']} layers of bge-small's shape, {settings['batch_size']} triplets a step, "
        f"{seconds['step']:.3f} s a step; a checkpoint of {result['checkpoint_bytes'] / 1e6:,.0f} MB\n"
        f"both ways write the same bytes: {'yes' if result['equal'] else 'NO'}"
    )
    table = Table(title=f"cost of a checkpoint, medians of {settings['rounds']}")
    for column in ("", "seconds", f"of the time, one every {EVERY} steps"):
        table.add_column(column, justify="right" if column else "left")
    table.add_row("in line: the loop waits for the write", f"{seconds['in_line']:.2f}", f"{share['in_line']:.2%}")
    table.add_row("overlapped: the loop waits for the copy", f"{seconds['copy']:.2f}", f"{share['standing_still']:.2%}")
    cost = seconds["copy"] + max(seconds["added_to_steps"], 0.0)
    table.add_row("overlapped, and steps are slower meanwhile", f"{cost:.2f}", f"{share['overlapped']:.2%}")
    console.print(table)
    added, beside = seconds["added_to_steps"], seconds["step_beside_a_write"]
    console.print(
        f"the thread writes for {seconds['write']:.2f} s, {seconds['write_cpu']:.2f} s of them on a core; "
        f"{settings['steps']} steps beside it take {added:+.2f} s ({beside:.3f} s each)\n"
        f"the first copy of a run takes {seconds['first_copy']:.2f} s; bar on a CPU: {BAR:.0%}",
        soft_wrap=True,
    )


if __name__ == "__main__":
    sys.exit(main())
