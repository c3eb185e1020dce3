"""The parts of the benchmark that are scripts of their own: how each is called, and what its figures say to its bars."""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from rich.console import Console

from benchmarks import checkpoint, encode, guide, large_batch, loss, prepare, resume, synthetic_corpus, trainer_step
from benchmarks.machine import environment_of_children

Found = dict[str, Any]
LOSS_GIGABYTES = 3.0
"""Peak of a process that takes the loss over 32,768 triplets forward and backward."""
LOSS_TIMES_WHOLE = 1.4
"""Times that the loss in blocks may take as long as the whole one, at 4,096 triplets."""


@dataclass(frozen=True, slots=True)
class Section:
    """One script. It is run in a process of its own: peaks of memory are of it alone."""

    name: str
    """On the command line, and in the JSON."""
    told: str
    script: ModuleType
    """With `show(result, console)`."""
    arguments: Callable[[argparse.Namespace, Path], list[str]]
    """From `python -m benchmarks`'s options and a folder for what it needs."""
    bars: Callable[[Found], list[Found]]
    """What its figures are held against."""
    in_quick: bool = False

    @property
    def command(self) -> list[str]:
        """What Python runs it by."""
        return ["-m", self.script.__name__]


def run_section(section: Section, options: argparse.Namespace, folder: Path) -> tuple[int, Found | None]:
    """Exit code and figures of a script; these are None where it printed none.

    Raises:
        ArgumentError: a file that it needs can't be made.
    """
    command = [sys.executable, *section.command, "--json", *section.arguments(options, folder)]
    ended = subprocess.run(command, env=environment_of_children(), stdout=subprocess.PIPE, text=True, check=False)
    return ended.returncode, json.loads(ended.stdout) if ended.stdout.strip() else None


def _resume(options: argparse.Namespace, folder: Path) -> list[str]:  # noqa: ARG001
    return ["--pairs", "1", "--rows", "200000", "--step", "10000", "--skipped", "500"] if options.quick else []


def _large_batch(options: argparse.Namespace, folder: Path) -> list[str]:  # noqa: ARG001
    # Its default: 128 texts at a time were as fast on the small batch, and half as fast on the large one in 3.5 times the memory.
    sizes = ["--batch-size", "128", "--small-batch-size", "32", "--mini-batch-sizes", "32"]
    return ["--data", str(options.data), "--device", options.device, *sizes, *_threads(options)]


def _loss(options: argparse.Namespace, folder: Path) -> list[str]:  # noqa: ARG001
    return ["--large", *_threads(options)]


def _encode(options: argparse.Namespace, folder: Path) -> list[str]:  # noqa: ARG001
    few = ["--texts", "200", "--pairs", str(options.pairs or 3)]
    return ["--data", str(options.data), "--device", options.device, *few, *_threads(options)]


def _prepare(options: argparse.Namespace, folder: Path) -> list[str]:
    corpus, like = folder / "corpus", options.data / "medi" / "medi_like_train.json.gz"
    synthetic_corpus.write(corpus, like, windows=2500, tasks=50, texts=88_000, seed=0, form="parquet")
    return [str(corpus)]


def _guide_building(options: argparse.Namespace, folder: Path) -> list[str]:  # noqa: ARG001
    few = ["--texts", "400", "--pairs", str(options.pairs or 3)]
    return ["--data", str(options.data), "--device", options.device, *few, *_threads(options)]


def _checkpoint(options: argparse.Namespace, folder: Path) -> list[str]:  # noqa: ARG001
    return ["--data", str(options.data), "--device", options.device, *_threads(options)]


def _trainer_step(options: argparse.Namespace, folder: Path) -> list[str]:  # noqa: ARG001
    return ["--data", str(options.data), "--device", options.device, "--pairs", str(options.pairs or 3), *_threads(options)]


def _threads(options: argparse.Namespace) -> list[str]:
    return ["--threads", str(options.threads)] if options.threads else []


def _bar(what: str, found: float, bar: float, *, met: bool) -> Found:
    return {"what": what, "found": found, "bar": bar, "met": met}


def _no_bars(result: Found) -> list[Found]:  # noqa: ARG001
    return []


def _large_batch_bars(result: Found) -> list[Found]:
    over, cached = result["peer_over_ours"], result["cached_over_plain"]
    return [
        _bar("CachedGISTEmbedLoss' seconds over ours, over 1", over["seconds"], 1.0, met=over["seconds"] > 1),
        _bar("CachedGISTEmbedLoss' peak memory over ours, over 1", over["peak_bytes"], 1.0, met=over["peak_bytes"] > 1),
        _bar("a cached step over an uncached one, under 1.4", cached, result["bar"], met=cached < result["bar"]),
    ]


def _loss_bars(result: Found) -> list[Found]:
    bars = []
    for row in result["rows"]:
        if row["triplets"] == 4096 and "whole" in row["times_blocks"]:
            times = 1 / row["times_blocks"]["whole"]["median"]
            bars.append(_bar("4,096: blocks over whole, 1.4 at most", times, LOSS_TIMES_WHOLE, met=times <= LOSS_TIMES_WHOLE))
        if row["triplets"] == 32768:
            peak = row["peak_gb"]["blocks"]
            bars.append(_bar("32,768: peak GB in blocks, under 3", peak, LOSS_GIGABYTES, met=peak < LOSS_GIGABYTES))
    return bars


def _guide_bars(result: Found) -> list[Found]:
    times = result["ratio_of_a_text"]["median"]
    return [_bar("times as fast a text as encode, 1 at least", times, 1.0, met=times >= 1)]


def _checkpoint_bars(result: Found) -> list[Found]:
    share = 100 * result["share"]["overlapped"]
    return [_bar("% of the time for a checkpoint every 500 steps, under 2", share, 2.0, met=share < 2)]


SECTIONS = (
    Section("resume", "the first batch of a resumed run", resume, _resume, _no_bars, in_quick=True),
    Section("large-batch", "a large batch, gradients cached", large_batch, _large_batch, _large_batch_bars),
    Section("loss", "the loss alone", loss, _loss, _loss_bars),
    Section("encode", "encoding for evaluation", encode, _encode, _no_bars),
    Section("prepare", "preparing data", prepare, _prepare, _no_bars),
    Section("guide-building", "the guide's pass", guide, _guide_building, _guide_bars),
    Section("trainer-step", "our loss in their trainer, and a packed model", trainer_step, _trainer_step, _no_bars),
    Section("checkpoint", "checkpoints beside the training", checkpoint, _checkpoint, _checkpoint_bars),
)


def show_bars(bars: list[Found], console: Console) -> None:
    """Each bar of a section, with what was found."""
    for bar in bars:
        console.print(f"bar: {bar['what']}: {bar['found']:.2f}, {'met' if bar['met'] else 'NOT MET'}")
