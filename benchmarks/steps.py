"""The rows of the benchmark that time a training step: what each compares, its runs, its bars and its line in the table."""

import argparse
import inspect
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import CachedGISTEmbedLoss
from transformers.utils import is_flash_attn_2_available

from benchmarks.cases import open_bench, write_long_tails
from benchmarks.options import Shape
from benchmarks.proof import compare
from benchmarks.sides import BATCH_SIZE, MAX_LENGTH, Bench, Peer, fill_guide, make_model, run_ours, run_theirs
from gist_train.config.models import ModelConfig
from gist_train.model.loading import load_student
from gist_train.training.loop import StepRecord
from gist_train.training.throughput import matmul_rate, training_flops

BGE_SMALL: Shape = (12, 384, 12, 1536)
UAE_LARGE: Shape = (24, 1024, 16, 4096)
QUICK_GUIDE_LAYERS, QUICK_TRIPLETS = 2, 8
"""What `--quick` cuts guide and batches to; it takes one batch and one pair of runs."""
MATMUL_BARS = {"float32": 0.8, "bf16": 0.5}
"""Share of a matrix multiplication's rate that our model FLOP/s are to reach on a CPU."""
CACHED: tuple[dict[str, int], ...] = ({}, {"mini_batch_size": 32}, {"mini_batch_num_tokens": 1024})
"""Options of the peer's loss that are tried for its best settings: none is GISTEmbedLoss, the others are CachedGISTEmbedLoss."""


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table."""

    name: str
    """On the command line."""
    told: str
    """In the table."""
    guided: bool
    batching: str
    """"task": rows of one task in a batch, each task a data set of its own for the peer; "mixed": one data set, shuffled."""
    precision: str = "float32"
    bar: float | None = None
    """Times faster than the peer, on a CPU with the whole student and guide."""
    lengths: str = "medi"
    """"medi": of medi_like_train; "tails": log-normal."""
    peer: str = "default"
    """"default", "best" (documented settings) or "original" (the recipe's own way, padded)."""
    batches: int = 4
    """In a run; fewer where the peer takes long, for which a step with a guide is half a minute or more on two cores."""
    pairs: int = 3
    triplets: int = BATCH_SIZE
    fixed: bool = False
    """Whether `--batches` and `--pairs` do not count."""

    def of(self, options: argparse.Namespace) -> "Row":
        """The row with what the command line says of it."""
        batches, pairs = (self.batches, self.pairs) if self.fixed else (options.batches, options.pairs)
        if options.quick:
            return replace(self, batches=batches or 1, pairs=pairs or 1, triplets=min(self.triplets, QUICK_TRIPLETS))
        return replace(self, batches=batches or self.batches, pairs=pairs or self.pairs)


STEP_ROWS = (
    Row("guide-task", "guide, one task a batch", guided=True, batching="task", bar=7.0, batches=2),
    Row("guide-mixed", "guide, tasks mixed", guided=True, batching="mixed", bar=14.0, batches=2),
    Row("task", "no guide, one task a batch", guided=False, batching="task", bar=1.9),
    Row("mixed", "no guide, tasks mixed", guided=False, batching="mixed", bar=4.0),
    Row("task-bf16", "no guide, one task, bf16", guided=False, batching="task", precision="bf16", bar=2.0),
    Row("best", "guide, one task, bf16, peer's best", guided=True, batching="task", precision="bf16", peer="best", batches=2),
    # A whole batch of 16, padded, keeps some 25 GB of attention for the backward pass on a CPU.
    Row(
        "original",
        "guide, padded to 512",
        guided=True,
        batching="task",
        peer="original",
        batches=1,
        pairs=1,
        triplets=4,
        fixed=True,
    ),
    Row("tails", "long tails, no guide, mixed", guided=False, batching="mixed", lengths="tails", batches=2, pairs=1),
    Row("guide-tails", "long tails, guide, mixed", guided=True, batching="mixed", lengths="tails", batches=1, pairs=1),
)


@dataclass(slots=True)
class Opened:
    """What rows share: models, batches and the guide's store, each made when a row first needs it."""

    rows: Sequence[Row]
    source: Path
    folder: Path
    device: torch.device
    console: Console
    student: Path
    guide: Path
    benches: dict[tuple[str, str], Bench]
    guided: dict[tuple[str, str], Bench]
    passes: dict[tuple[str, str], dict[str, Any]]
    peer_guide: SentenceTransformer | None = None

    def bench(self, row: Row) -> tuple[Bench, dict[str, Any] | None]:
        """The row's batches, with the guide where it has one, and what the guide's pass over their texts took."""
        key = row.lengths, row.batching
        if key not in self.benches:
            same = [other for other in self.rows if (other.lengths, other.batching) == key]
            count, source, data = max(other.batches for other in same), self.source, self.folder / row.lengths
            data.mkdir(exist_ok=True)
            if row.lengths == "tails":
                source = write_long_tails(data / "tails.json.gz", (count + 1) * BATCH_SIZE)
            self.benches[key] = open_bench(data, source, self.student, count, row.batching, self.device, self.console)
        if not row.guided:
            return self.benches[key].first(row.batches, row.triplets), None
        if key not in self.guided:
            same = [other for other in self.rows if other.guided and (other.lengths, other.batching) == key]
            needed = max(other.batches for other in same)  # the guide reads no more than that
            self.guided[key], self.passes[key] = self._with_guide(self.benches[key].first(needed), "-".join(key))
        return self.guided[key].first(row.batches, row.triplets), self.passes[key]

    def _with_guide(self, bench: Bench, name: str) -> tuple[Bench, dict[str, Any]]:
        ids = np.unique(np.concatenate([np.concatenate([b.anchor, b.positive, b.negative]) for b in bench.batches]))
        self.console.print(f"the guide's one pass over {len(ids)} texts")
        lookup, seconds = fill_guide(self.folder / f"store-{name}", self.guide, bench.corpus, ids, self.device)
        if self.peer_guide is None:
            self.peer_guide = SentenceTransformer(str(self.guide), device=str(self.device))
        told = {"texts": len(ids), "seconds": seconds, "seconds_per_text": seconds / len(ids)}
        return replace(bench, guide=lookup, peer_guide=self.peer_guide), told


def measure_steps(
    rows: Sequence[Row], options: argparse.Namespace, source: Path, folder: Path, device: torch.device, console: Console
) -> dict[str, Any]:
    """All figures of `rows`, as `--json` prints them; `folder` takes models, corpora and stores.

    Raises:
        UserError: the data can't be read, or has too few rows.
    """
    guide_layers = min(QUICK_GUIDE_LAYERS, options.guide[0]) if options.quick else options.guide[0]
    student = make_model(folder / "student", options.student, 0)
    guide = make_model(folder / "guide", (guide_layers, *options.guide[1:]), 1)
    rows = [row.of(options) for row in rows]
    opened = Opened(rows, source, folder, device, console, student, guide, {}, {}, {})
    figures = {}
    for row in rows:
        bench, guide_pass = opened.bench(row)
        whole = options.student == BGE_SMALL and (not row.guided or (guide_layers, *options.guide[1:]) == UAE_LARGE)
        console.print(f"{row.name}: {row.told}")
        timed, peer_told = _peer_of(row, bench, guide, console)
        console.print(f"{row.name}: do both sides do the same work?")
        proof = compare(replace(timed, peer_guide=bench.peer_guide))
        timings = _time_pairs(row.name, timed, row.pairs, console)
        figures[row.name] = {
            "told": row.told,
            "precision": row.precision,
            "batching": row.batching,
            "lengths": row.lengths,
            "peer_settings": peer_told,
            "batches": bench.plan.steps_per_epoch,
            "triplets": row.triplets,
            "tasks": [bench.tasks(batch) for batch in bench.batches],
            "pairs": row.pairs,
            **timings,
            **_judged(row, timings, judged=whole and device.type == "cpu" and not options.quick),
            "guide_pass": None if guide_pass is None else _paid_off(guide_pass, row, timings),
            "equality": proof,
        }
    return {
        "settings": {
            "quick": options.quick,
            "student": options.student,
            "guide": options.guide,
            "guide_layers_used": guide_layers,
        },
        "rows": figures,
    }


def _judged(row: Row, timings: dict[str, Any], *, judged: bool) -> dict[str, Any]:
    """The bars, and whether they are met: None where the shapes or the device are not those that the bars are for."""
    ratio, share, of_matmul = timings["ratio"]["median"], timings["of_matmul"]["median"], MATMUL_BARS[row.precision]
    return {
        "bar": row.bar if judged else None,
        "met": ratio >= row.bar if judged and row.bar else None,
        "matmul_bar": of_matmul if judged else None,
        "matmul_met": share >= of_matmul if judged else None,
    }


def _paid_off(guide_pass: dict[str, Any], row: Row, timings: dict[str, Any]) -> dict[str, Any]:
    """The guide's pass, and after how many epochs over its texts the steps have saved its seconds."""
    saved = timings["theirs_seconds_per_step"] - timings["ours_seconds_per_step"]
    an_epoch = saved * guide_pass["texts"] / (3 * row.triplets)
    return {**guide_pass, "break_even_epochs": guide_pass["seconds"] / an_epoch if an_epoch > 0 else None}


def _peer_of(row: Row, bench: Bench, guide: Path, console: Console) -> tuple[Bench, str]:
    """The row's bench with the peer's settings, and these in words."""
    timed = replace(bench, precision=row.precision)
    if row.peer == "original":
        return replace(timed, peer=Peer(padded=True)), f"every text padded to {MAX_LENGTH} tokens, for the live guide too"
    if row.peer == "default":
        datasets = "one data set a batch, in turn" if row.batching == "task" else "one data set"
        return timed, f"{'GISTEmbedLoss' if row.guided else 'MultipleNegativesRankingLoss'}, {datasets}"
    return _best_peer(timed, guide, console)


def _best_peer(bench: Bench, guide: Path, console: Console) -> tuple[Bench, str]:
    """The peer as its documentation has it for speed: the fastest of its losses, a guide in bf16, unpadded where that works."""
    flash = bench.device.type == "cuda" and is_flash_attn_2_available()
    attention = {"attn_implementation": "flash_attention_2"} if flash else {}
    loading = {"dtype": torch.bfloat16, **attention}
    loaded = SentenceTransformer(str(guide), device=str(bench.device), model_kwargs=loading)
    few = replace(bench, peer_guide=loaded).first(1, bench.plan.triplets)
    tried: dict[str, tuple[float, Peer]] = {}
    known = inspect.signature(CachedGISTEmbedLoss).parameters  # not every version can count tokens
    for cached in CACHED:
        if not cached.keys() <= known.keys():
            continue
        peer = Peer(cached, attention=attention.get("attn_implementation"))
        name = "CachedGISTEmbedLoss with " + ", ".join(f"{key} {value}" for key, value in cached.items())
        case = replace(few, peer=peer)
        run_theirs(case, 1)
        tried[name if cached else "GISTEmbedLoss"] = run_theirs(case, 1), peer
    fastest = min(tried, key=lambda name: tried[name][0])
    seconds = "; ".join(f"{name} {took:.2f} s" for name, (took, _) in tried.items())
    console.print(f"the peer's losses on one batch: {seconds}", soft_wrap=True)
    unpadded = "flash attention without padding" if flash else "padded: flash attention needs CUDA and its package"
    told = f"{fastest}, the fastest of {len(tried)}; bf16, guide loaded in bf16, one data set a batch; {unpadded}"
    return replace(bench, peer_guide=loaded, peer=tried[fastest][1]), told


def _time_pairs(name: str, bench: Bench, pairs: int, console: Console) -> dict[str, Any]:
    """Seconds of both sides, pair for pair; who goes first changes from pair to pair.

    Each run has one step more than it counts, the first, in which both sides make AdamW's moments: a training run does so once.
    """
    count, warmed_up = bench.plan.steps_per_epoch, bench.warmed_up
    if bench.precision != "float32":  # else the proof has warmed up both sides, with these batches
        run_ours(bench, 1)
        run_theirs(bench, 1)
    encoder = load_student(ModelConfig(name=str(bench.student))).encoder.to(bench.device)
    dtype = torch.bfloat16 if bench.precision == "bf16" else torch.float32
    ours, theirs, rates = [], [], []
    records: list[StepRecord] = []
    for pair in range(pairs):
        if pair % 2:
            theirs.append(run_theirs(warmed_up, count + 1, untimed=1))
        seconds, records = run_ours(warmed_up, count + 1, untimed=1)
        ours.append(seconds)
        tokens = sum(record.tokens for record in records) // count
        rates.append(matmul_rate(encoder, tokens, dtype))  # beside the run, for a machine's speed changes
        if not pair % 2:
            theirs.append(run_theirs(warmed_up, count + 1, untimed=1))
        ratio = theirs[-1] / ours[-1]
        console.print(f"{name}: pair {pair + 1} of {pairs}: ours {ours[-1]:.2f} s, theirs {theirs[-1]:.2f} s, {ratio:.2f} times")
    flops = sum(training_flops(encoder, record.groups) for record in records)
    return {
        "ours_seconds_per_step": statistics.median(ours) / count,
        "theirs_seconds_per_step": statistics.median(theirs) / count,
        "ratio": _spread([b / a for a, b in zip(ours, theirs, strict=True)]),
        "tokens_per_batch": sum(record.tokens for record in records) / count,
        "matmul_flops": statistics.median(rates),
        "of_matmul": _spread([flops / seconds / rate for seconds, rate in zip(ours, rates, strict=True)]),
        "runs_ours": ours,
        "runs_theirs": theirs,
    }


def _spread(of: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(of), "min": min(of), "max": max(of)}


def show_steps(result: dict[str, Any], console: Console) -> None:
    """The figures for people."""
    settings, rows = result["settings"], result["rows"]
    layers, used = settings["guide"][0], settings["guide_layers_used"]
    if used < layers and any(row["guide_pass"] for row in rows.values()):
        console.print(f"guide cut to {used} of {layers} layers: its rows say nothing about the whole one", style="bold")
    if settings["quick"]:
        console.print(f"quick: at most {QUICK_TRIPLETS} triplets of a batch: no figure for the bars", style="bold")
    table = Table(title="seconds per training step, gist-train and sentence-transformers (peer), medians over pairs of runs")
    for column in ("", "gist-train", "peer", "times faster", "min - max", "bar", "tokens", "of matmul", "bar"):
        table.add_column(column, justify="right" if column else "left")
    for row in rows.values():
        ratio = row["ratio"]
        table.add_row(
            row["told"],
            f"{row['ours_seconds_per_step']:.3f}",
            f"{row['theirs_seconds_per_step']:.3f}",
            f"{ratio['median']:.2f}",
            f"{ratio['min']:.2f} - {ratio['max']:.2f}",
            _told_bar(row["bar"], row["met"], "{}"),
            f"{row['tokens_per_batch']:,.0f}",
            f"{row['of_matmul']['median']:.0%}",
            _told_bar(row["matmul_bar"], row["matmul_met"], "{:.0%}"),
        )
    console.print(table)
    console.print("of matmul: gist-train's model FLOP/s over the rate of multiplying the same shapes")
    console.print("-: no bar, or none for these models or this device")
    for name, row in rows.items():
        proof, once = row["equality"], row["guide_pass"]
        same = "the same rows" if proof["same_rows"] else "NOT the same rows"
        counts = f"batches: {row['batches']} of {row['triplets']} triplets, pairs of runs: {row['pairs']}"
        counts += " (always: --batches and --pairs do not count)" if name == "original" else ""
        lengths = "log-normal lengths, mean 60, cut at 512; " if row["lengths"] == "tails" else ""
        proved = f"{same}, losses at most {proof['largest_loss_difference']:.1e} apart (dropout off, float32)"
        console.print(f"{name}: {counts}; {lengths}{proved}", soft_wrap=True)
        console.print(f"    sentence-transformers: {row['peer_settings']}", soft_wrap=True)
        if once is not None:
            epochs = once["break_even_epochs"]
            pays = "it never pays off" if epochs is None else f"it pays off after {epochs:.2f} epochs"
            took = f"{once['seconds_per_text']:.4f} s a text over {once['texts']} texts"
            console.print(f"    the guide's one pass, not counted above: {took}; {pays}", soft_wrap=True)
    rates = ", ".join(f"{name} {row['matmul_flops'] / 1e9:,.0f}" for name, row in rows.items())
    console.print(f"multiplying the same shapes, GFLOP/s here: {rates}", soft_wrap=True)


def _told_bar(bar: float | None, met: bool | None, form: str) -> str:
    return "-" if bar is None else f"{form.format(bar)} {'met' if met else 'NOT MET'}"
