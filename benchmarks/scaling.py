"""Predicts the speed of 1 to 1,024 processes from measured parts, and holds that against what 1, 2 and 4 processes do here.

    python -m benchmarks.scaling                             # some 9 minutes on two cores
    python -m benchmarks.scaling --picture docs/scaling.svg  # the prediction for H100s alone, as a picture: seconds

A step of B triplets on r processes takes

    max(host, fixed + crowd(r) * seconds_a_token * tokens(B, r)) + seconds_a_pair * B * B / r + wire(B, r)

where tokens(B, r) are those of the process that has the most of them, by our own dealing of real rows; crowd(r) is how much
slower a process trains beside r - 1 others of this machine that it says nothing to; host is what Python takes to launch a step's
kernels on a GPU. The loss of a process is over its B / r rows against all B. What travels is the embeddings and their gradients,
and the gradients of the weights; on a GPU these hide behind the backward pass.

Here: 3 layers of 384 dimensions (random weights) on medi_like_train, float32, a thread a process, the student as its own guide.
`seconds_a_token` and `fixed` are of one process at the smallest and the largest batch; no part is of more than one process' run.
H100: measured parts from docs/benchmarks.md, the rest from data sheets (step_model.H100 says which).
Exit code: 0; 1 where a training failed; 2 where the data are missing.
"""

import argparse
import json
import math
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import yaml
from rich.console import Console
from rich.table import Table

from benchmarks import step_model
from benchmarks.machine import environment_of_children, header, told
from benchmarks.options import add_common, begin, count
from benchmarks.sides import make_model
from benchmarks.step_model import H100, Ints, Parts, draw, last_worth, most_tokens, predict
from gist_train.config.schema import Config
from gist_train.data.batches import BatchPlan
from gist_train.model.loading import load_student
from gist_train.model.loss import guided_contrastive_loss
from gist_train.preparation import prepare_corpus, prepare_tokens
from gist_train.training.batching import batch_plan

PACKAGES = ("torch", "accelerate", "numpy")
SHAPE = (3, 384, 12, 1536)
SIZES, RANKS, CROWD_SIZE = (16, 64, 128), (1, 2, 4), 64
STEPS = 8
WARM_UP = 2
"""Steps of a training that are not counted."""
LOSS_TRIPLETS, LOSS_TIMES = 1024, 4
WIRE_BYTES, WIRE_TIMES = (1 << 16, 1 << 25), 8
PARTS = ("encoder", "fixed", "loss", "wire")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--picture", type=Path, help="a file to draw the prediction to; then nothing is measured")
    parser.add_argument("--sizes", type=count, nargs="+", default=SIZES, help="triplets a step, to be held against")
    parser.add_argument("--ranks", type=count, nargs="+", default=RANKS, help="processes, to be held against")
    parser.add_argument("--steps", type=count, default=STEPS, help="counted of a training (default %(default)s)")
    parser.add_argument("--wire", action="store_true", help=argparse.SUPPRESS)
    add_common(parser)
    options = parser.parse_args(arguments)
    if options.wire:
        return _time_wire()
    source = begin(options)
    if not source.is_file():
        print(f"--data: no file {source}; give the folder that has medi/medi_like_train.json.gz in it", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    with TemporaryDirectory(prefix="gist-train-scaling-") as folder:
        console = Console(stderr=True, quiet=options.json, highlight=False)
        bench = Bench.opened(Path(folder), source, options.steps, console)
        result: dict[str, Any] = {"machine": told(torch.device("cpu"), PACKAGES)}
        try:
            result["runs"] = [] if options.picture else measure(bench, options.sizes, options.ranks)
        except subprocess.CalledProcessError as failed:
            print(f"{failed.stderr.strip()}\nexit code {failed.returncode}: {' '.join(failed.cmd)}", file=sys.stderr)
            return 1
    result["predicted"] = predict(H100, bench.row_tokens)
    if options.picture:
        draw(result["predicted"], H100.name, options.picture)
    if options.json:
        print(json.dumps(result, indent=2))
    else:
        show(result, Console(width=130, highlight=False))
    return 0


@dataclass(frozen=True, slots=True)
class Bench:
    """What is trained, and how far."""

    folder: Path
    settings: dict[str, Any]
    """Of a config, but for name, batch size and steps."""
    steps: int
    """Counted of a training."""
    console: Console
    row_tokens: Ints
    """(R,) of each row of the data."""

    @classmethod
    def opened(cls, folder: Path, source: Path, steps: int, console: Console) -> "Bench":
        """Prepares the data in `folder`."""
        settings = {
            "output_dir": str(folder),
            "model": {"name": str(make_model(folder / "student", SHAPE, 0)), "max_length": 128},
            "guide": "self",
            "data": {"train": [{"source": "medi", "path": str(source)}], "batching": "mixed"},
            "optimizer": {"lr": 1e-5},
            "tracking": {"log_every": 1},
        }
        bench = cls(folder, settings, steps, console, np.empty(0, np.int64))
        config = bench.config("run", 1)
        corpus = prepare_corpus(config, torch.device("cpu"), console)
        lengths = prepare_tokens(corpus, load_student(config.model), console).lengths
        batch = corpus.batch(np.arange(corpus.row_count), corpus.positive[corpus.positive_offsets[:-1]])
        of_negatives = np.concatenate([[0], np.cumsum(lengths(batch.negative_views))])[batch.negative_offsets]
        row_tokens = lengths(batch.anchor_views) + lengths(batch.positive_views) + np.diff(of_negatives)
        return replace(bench, row_tokens=row_tokens)

    def config(self, name: str, size: int) -> Config:
        """The config of a run."""
        training = {"batch_size": size, "max_steps": WARM_UP + self.steps, "precision": "float32"}
        return Config.model_validate({**self.settings, "name": name, "training": training})

    def plan(self, size: int) -> BatchPlan:
        """The rows of each step."""
        config = self.config("run", size)
        return batch_plan(config, prepare_corpus(config, torch.device("cpu"), Console(quiet=True)))

    def train(self, names: Sequence[str], size: int, ranks: int) -> list[tuple[float, float]]:
        """Trains on `ranks` processes, a run a name, all runs at the same time.

        Returns:
            Of each run, seconds of a step and tokens of its fullest process.
        """
        self.console.print(f"{len(names)} x {size} triplets on {ranks} {'process' if ranks == 1 else 'processes'}")
        started = []
        for name in names:
            path = self.folder / f"{name}.yaml"
            path.write_text(yaml.safe_dump(self.config(name, size).model_dump(mode="json", exclude_unset=True)))
            started.append(start(ranks, ["-m", "gist_train", "train", str(path)]))
        for processes in started:
            finish(processes)
        return [self._pace(name, size, ranks) for name in names]

    def _pace(self, name: str, size: int, ranks: int) -> tuple[float, float]:
        rows = [json.loads(line) for line in (self.folder / name / "metrics.jsonl").read_text().splitlines()][WARM_UP:]
        plan = self.plan(size)
        most = [most_tokens(self.row_tokens[plan.batch(row["step"])], ranks) for row in rows]
        # A median of what a token takes: steps have other tokens, and one that another program held up says nothing.
        a_token = statistics.median(row["step_seconds"] / tokens for row, tokens in zip(rows, most, strict=True))
        return a_token * statistics.mean(most), statistics.mean(most)


def measure(bench: Bench, sizes: Sequence[int], several: Sequence[int]) -> list[dict[str, Any]]:
    """The parts of this machine, and every run beside what they predict of it."""
    small, large = min(sizes), max(sizes)
    alone = {size: bench.train([f"alone-{size}"], size, 1)[0] for size in sorted({*sizes, CROWD_SIZE})}
    pair = seconds_a_pair()
    # Two batches, two unknowns, once what the loss took is known.
    (few_seconds, few), (many_seconds, many) = ((alone[size][0] - pair * size * size, alone[size][1]) for size in (small, large))
    a_token = (many_seconds - few_seconds) / (many - few)
    student = load_student(bench.config("run", small).model).encoder
    weight_bytes = sum(weights.numel() * weights.element_size() for weights in student.parameters())
    rows = []
    for ranks in several:
        crowd, latency, bandwidth = 1.0, 0.0, math.inf
        if ranks > 1:
            beside = bench.train([f"beside-{ranks}-{number}" for number in range(ranks)], CROWD_SIZE, 1)
            crowd = statistics.median(seconds for seconds, _ in beside) / alone[CROWD_SIZE][0]
            latency, bandwidth = wire(ranks)
        fixed = max(0.0, few_seconds - a_token * few)
        parts = Parts("here", a_token, fixed, 0.0, pair, SHAPE[1], weight_bytes, latency, bandwidth, 0.0, crowd)
        for size in sizes:
            seconds, tokens = alone[size] if ranks == 1 else bench.train([f"run-{ranks}-{size}"], size, ranks)[0]
            predicted = parts.step(size, ranks, tokens)
            error = sum(predicted.values()) / seconds - 1
            row = {
                "size": size,
                "ranks": ranks,
                "seconds": seconds,
                "most_tokens": tokens,
                "predicted": predicted,
                "error": error,
            }
            rows.append({**row, "error": error, "parts": asdict(parts)})
    return rows


def seconds_a_pair() -> float:
    """Of the loss of a student that is its own guide, forward and backward on one thread, for each of B x B pairs of triplets."""
    anchor, positive, negative = (torch.randn(LOSS_TRIPLETS, SHAPE[1], requires_grad=True) for _ in range(3))
    guide = {"guide_anchor": anchor.detach(), "guide_positive": positive.detach(), "guide_negative": negative.detach()}
    seconds = []
    for _ in range(LOSS_TIMES):
        began = time.perf_counter()
        guided_contrastive_loss(anchor, positive, negative, **guide).loss.backward()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:]) / LOSS_TRIPLETS**2


def wire(ranks: int) -> tuple[float, float]:
    """(latency in seconds, bytes a second) of a sum over processes of this machine."""
    medians = json.loads(finish(start(ranks, ["-m", "benchmarks.scaling", "--wire"]))[0])
    (few, least), (many, most) = ((int(size), seconds) for size, seconds in medians.items())
    ring = step_model.ring(ranks)
    bandwidth = ring * (many - few) / (most - least)
    return max(0.0, least - ring * few / bandwidth) / math.log2(ranks), bandwidth


def _time_wire() -> int:
    """A process of `wire`: the first one prints the median seconds of a sum, by bytes."""
    dist.init_process_group("gloo")
    medians = {}
    for size in WIRE_BYTES:
        values, seconds = torch.ones(size // 4), []
        for _ in range(WIRE_TIMES):
            dist.barrier()
            began = time.perf_counter()
            dist.all_reduce(values)
            seconds.append(time.perf_counter() - began)
        medians[size] = statistics.median(seconds)
    if dist.get_rank() == 0:
        print(json.dumps(medians))
    dist.destroy_process_group()
    return 0


def start(ranks: int, arguments: Sequence[str]) -> list["subprocess.Popen[str]"]:
    """Python with these arguments as each of `ranks` processes of one launch, a thread each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(ranks):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
        launched = {"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in place.items()}} if ranks > 1 else {}
        passed = {**environment_of_children(), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", **launched}
        command = [sys.executable, *arguments]
        started.append(subprocess.Popen(command, env=passed, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    return started


def finish(processes: Sequence["subprocess.Popen[str]"]) -> list[str]:
    """What each of them printed; CalledProcessError where one failed."""
    printed = []
    for process in processes:
        out, err = process.communicate()
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, list(process.args), out, err)  # type: ignore[arg-type]
        printed.append(out)
    return printed


def show(result: dict[str, Any], console: Console) -> None:
    """The figures for people."""
    if result["runs"]:
        console.print(header(result["machine"]), soft_wrap=True)
        table = Table(title="seconds a step here, predicted and measured")
        for column in ("triplets", "processes", "tokens, fullest", "crowd", *PARTS, "predicted", "measured", "error"):
            table.add_column(column, justify="right")
        for row in result["runs"]:
            predicted, crowd = row["predicted"], row["parts"]["crowd"]
            seconds = [predicted[part] for part in PARTS] + [sum(predicted.values()), row["seconds"]]
            figures = [f"{row['most_tokens']:,.0f}", f"{crowd:.2f}", *(f"{value:.3f}" for value in seconds)]
            table.add_row(f"{row['size']:,}", str(row["ranks"]), *figures, f"{100 * row['error']:+.0f} %")
        console.print(table)
    table = Table(title=f"triplets a second and share of what each process alone would do, predicted: {H100.name}")
    for column in ("processes", *(f"{size:,} a step" for size in step_model.SIZES)):
        table.add_column(column, justify="right")
    for ranks in step_model.RANKS:
        rows = [row for row in result["predicted"] if row["ranks"] == ranks]
        table.add_row(f"{ranks:,}", *(f"{row['triplets_a_second']:,.0f} ({100 * row['efficiency']:.0f} %)" for row in rows))
    console.print(table)
    for size in step_model.SIZES:
        worth = last_worth(result["predicted"], size)
        console.print(f"{size:,} triplets a step: up to {worth:,} processes do half of what each would do alone")


if __name__ == "__main__":
    sys.exit(main())
