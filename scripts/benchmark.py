"""Times a training step of gist-train against sentence-transformers' own trainer, on the very same batches.

    python scripts/benchmark.py            # both comparisons, three pairs of runs each
    python scripts/benchmark.py --quick    # one pair, 2 batches, guide cut to 2 layers: minutes on two cores

A student of bge-small's shape (random weights, dropout on) trains on eight one-task batches of 16 triplets, once without a guide
(MultipleNegativesRankingLoss) and once with a guide of UAE-Large's shape (GISTEmbedLoss). First both sides run the batches with
dropout off and a learning rate of 0: they must read the same tokens in the same rows and get the same losses.
Exit code: 0; 1 where the two sides did not do the same work; 2 where the data are missing or too few.
"""

import argparse
import json
import os
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import datasets
import numpy as np
import torch
import transformers
from benchmark_sides import BATCH_SIZE, Bench, Shape, compare, fill_guide, make_model, open_bench, run_ours, run_theirs
from machine import header, told
from rich.console import Console
from rich.table import Table
from sentence_transformers import SentenceTransformer

from gist_train.config.errors import UserError
from gist_train.config.models import ModelConfig
from gist_train.model.pretrained import load_student
from gist_train.training.throughput import matmul_rate, training_flops

BARS = {"no guide": 1.2, "guide": 5.0}
"""Times that a step of gist-train is to be faster."""
QUICK_GUIDE_LAYERS, QUICK_BATCHES = 2, 2
PACKAGES = ("torch", "transformers", "sentence-transformers", "accelerate", "numpy")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark and returns the exit code."""
    options = _options(arguments)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.device == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
    source = options.data / "medi" / "medi_like_train.json.gz"
    if not source.is_file():
        print(f"--data: no file {source}; give the folder that has medi/medi_like_train.json.gz in it", file=sys.stderr)
        return 2
    try:
        with TemporaryDirectory(prefix="gist-train-benchmark-") as folder:
            result = _run(options, source, Path(folder), Console(stderr=True, quiet=options.json, highlight=False))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps(result, indent=2))
    else:
        _print(result, Console(width=110, highlight=False))
    unequal = [name for name, proof in result["equality"].items() if not proof["equal"]]
    for name in unequal:
        print(f"{name}: the two sides did not do the same work: {json.dumps(result['equality'][name])}", file=sys.stderr)
    return 1 if unequal else 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(os.environ.get("GIST_TRAIN_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
    shape = "LAYERS,HIDDEN,HEADS,INTERMEDIATE"
    parser.add_argument("--data", type=Path, default=default, help="folder of the test data (default: $GIST_TRAIN_DATA)")
    parser.add_argument("--pairs", type=_count, help="pairs of runs, ours and theirs (default 3; 1 with --quick)")
    parser.add_argument("--batches", type=_count, help=f"batches in a run (default 8; {QUICK_BATCHES} with --quick)")
    parser.add_argument(
        "--quick", action="store_true", help=f"cut the guide to {QUICK_GUIDE_LAYERS} layers, the warm-up to 1 step"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=("float32", "bf16"), default="float32", help="of the timed runs")
    parser.add_argument("--threads", type=_count, help="of torch (default: its own choice)")
    parser.add_argument("--student", type=_shape, default=(12, 384, 12, 1536), metavar=shape)
    parser.add_argument("--guide", type=_shape, default=(24, 1024, 16, 4096), metavar=shape)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout and nothing else")
    options = parser.parse_args(arguments)
    options.pairs = options.pairs or (1 if options.quick else 3)
    options.batches = options.batches or (QUICK_BATCHES if options.quick else 8)
    return options


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}, but a whole number of at least 1 is needed")
    return int(text)


def _shape(text: str) -> Shape:
    numbers = [_count(part) for part in text.split(",")]
    if len(numbers) != 4 or numbers[1] % numbers[2]:
        raise argparse.ArgumentTypeError(f"{text!r}, but four numbers are needed, the hidden size divisible by the heads")
    return numbers[0], numbers[1], numbers[2], numbers[3]


def _run(options: argparse.Namespace, source: Path, folder: Path, console: Console) -> dict[str, Any]:
    """All figures, as `--json` prints them; `folder` takes models, corpus and store."""
    device = torch.device(options.device)
    guide_layers = min(QUICK_GUIDE_LAYERS, options.guide[0]) if options.quick else options.guide[0]
    student = make_model(folder / "student", options.student, 0)
    guide = make_model(folder / "guide", (guide_layers, *options.guide[1:]), 1)
    bench = open_bench(folder, source, student, options.batches, options.precision, device, console)
    text_ids = np.unique(np.concatenate([np.concatenate([b.anchor, b.positive, b.negative]) for b in bench.batches]))
    console.print(f"the guide's one pass over {len(text_ids)} texts")
    lookup, pass_seconds = fill_guide(folder / "store", guide, bench.corpus, text_ids, device)
    guided = replace(bench, guide=lookup, peer_guide=SentenceTransformer(str(guide), device=str(device)))

    equality, timed = {}, {}
    for name, case in {"no guide": bench, "guide": guided}.items():
        console.print(f"{name}: do both sides do the same work?")
        equality[name] = compare(case)
        timed[name] = _time_pairs(name, case, options.pairs, 1 if options.quick else options.batches, console)
    saved = (timed["guide"]["theirs_seconds_per_step"] - timed["guide"]["ours_seconds_per_step"]) * options.batches
    return {
        "machine": told(device, PACKAGES),
        "settings": {
            "precision": options.precision,
            "pairs": options.pairs,
            "batches": options.batches,
            "batch_size": BATCH_SIZE,
            "student": options.student,
            "guide": options.guide,
            "guide_layers_used": guide_layers,
            "tasks": [bench.task(batch) for batch in bench.batches],
        },
        "equality": equality,
        "rows": timed,
        "guide_pass": {
            "texts": len(text_ids),
            "seconds": pass_seconds,
            "seconds_per_text": pass_seconds / len(text_ids),
            "break_even_epochs": pass_seconds / saved if saved > 0 else None,
        },
    }


def _time_pairs(name: str, bench: Bench, pairs: int, warm_up: int, console: Console) -> dict[str, Any]:
    """Seconds of both sides, pair for pair; who goes first changes from pair to pair."""
    count = bench.plan.steps_per_epoch
    console.print(f"{name}: warm-up")
    run_ours(bench, warm_up)
    run_theirs(bench, warm_up)
    encoder = load_student(ModelConfig(name=str(bench.student))).encoder.to(bench.device)
    rate = matmul_rate(encoder, 2048, torch.bfloat16 if bench.precision == "bf16" else torch.float32, seconds=1.0)
    ours, theirs = [], []
    for pair in range(pairs):
        if pair % 2:
            theirs.append(run_theirs(bench, count))
        seconds, records = run_ours(bench, count)
        ours.append(seconds)
        if not pair % 2:
            theirs.append(run_theirs(bench, count))
        ratio = theirs[-1] / ours[-1]
        console.print(f"{name}: pair {pair + 1} of {pairs}: ours {ours[-1]:.2f} s, theirs {theirs[-1]:.2f} s, {ratio:.2f} times")
    ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
    flops = sum(training_flops(encoder, record.groups) for record in records)
    return {
        "ours_seconds_per_step": statistics.median(ours) / count,
        "theirs_seconds_per_step": statistics.median(theirs) / count,
        "ratio": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)},
        "bar": BARS[name],
        "tokens_per_batch": sum(record.tokens for record in records) / count,
        "matmul_flops": rate,
        "mfu_ours": flops / statistics.median(ours) / rate,
        "runs_ours": ours,
        "runs_theirs": theirs,
    }


def _print(result: dict[str, Any], console: Console) -> None:
    """The figures for people."""
    machine, settings, once = result["machine"], result["settings"], result["guide_pass"]
    console.print(header(machine, settings["precision"]), soft_wrap=True)
    layers, used = settings["guide"][0], settings["guide_layers_used"]
    if used < layers:
        console.print(
            f"guide cut to {used} of {layers} layers: its row and its pass say nothing about the whole one", style="bold"
        )
    console.print(f"{settings['batches']} batches of {BATCH_SIZE} triplets: {', '.join(settings['tasks'])}")
    table = Table(title=f"seconds per training step, medians; pairs of runs: {settings['pairs']}")
    for column in ("", "gist-train", "sentence-transformers", "times faster", "min - max", "bar", "tokens", "of matmul"):
        table.add_column(column, justify="right" if column else "left")
    for name, row in result["rows"].items():
        ratio = row["ratio"]
        table.add_row(
            name,
            f"{row['ours_seconds_per_step']:.3f}",
            f"{row['theirs_seconds_per_step']:.3f}",
            f"{ratio['median']:.2f}",
            f"{ratio['min']:.2f} - {ratio['max']:.2f}",
            f"{row['bar']}",
            f"{row['tokens_per_batch']:,.0f}",
            f"{row['mfu_ours']:.0%}",
        )
    console.print(table)
    rates = " and ".join(f"{row['matmul_flops'] / 1e9:,.1f}" for row in result["rows"].values())
    console.print(f"of matmul: gist-train's model FLOP/s over those of a matrix multiply, {rates} GFLOP/s here")
    for name, proof in result["equality"].items():
        rows = "the same rows" if proof["same_rows"] else "NOT the same rows"
        console.print(f"{name}: {rows} in all batches, losses at most {proof['largest_loss_difference']:.1e} apart (dropout off)")
    epochs = once["break_even_epochs"]
    console.print(
        f"the guide's one pass, not counted above: {once['seconds_per_text']:.4f} s a text, {once['seconds']:.1f} s for these "
        f"{once['texts']}; " + ("it never pays off" if epochs is None else f"it pays off after {epochs:.2f} epochs")
    )


if __name__ == "__main__":
    sys.exit(main())
