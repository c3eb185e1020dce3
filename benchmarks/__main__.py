"""Times gist-train against sentence-transformers: the training step on the very same batches, and what is around it.

    python -m benchmarks                             # all but guide-tails: some 35 minutes on two cores
    python -m benchmarks --quick                     # rows of the step and the resume, small: under 3 minutes
    python -m benchmarks --only guide-mixed loss     # some rows or sections

A student of bge-small's shape (random weights, dropout on) trains on batches of 16 triplets, of one task or mixed: of
medi_like_train, or of synthetic texts with long tails (log-normal, mean 60 tokens, cut at 512); with a guide of UAE-Large's shape
(GISTEmbedLoss) or without (MultipleNegativesRankingLoss). Rows of the step:
{rows}
First both sides run a row's batches with dropout off and a learning rate of 0: they must read the same tokens in the same rows
and get the same losses. Then they are timed pair by pair, in turn. Sections, each a script of its own beside this one:
{sections}
Exit code: 0, whether bars are met or not; 1 where two sides did not do the same work; 2 where the data are missing or too few.
"""

import argparse
import gc
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import datasets
import torch
from rich.console import Console

from benchmarks.machine import header, told
from benchmarks.options import SHAPE, add_common, begin, count, shape
from benchmarks.sections import SECTIONS, run_section, show_bars
from benchmarks.steps import BGE_SMALL, QUICK_GUIDE_LAYERS, QUICK_TRIPLETS, STEP_ROWS, UAE_LARGE, measure_steps, show_steps
from benchmarks.synthetic_corpus import ArgumentError
from gist_train.config.errors import UserError

PACKAGES = ("torch", "transformers", "sentence-transformers", "accelerate", "numpy")
QUICK = {"guide-task", "guide-mixed", "task", "mixed", "task-bf16"} | {section.name for section in SECTIONS if section.in_quick}
LONG = {"guide-tails"}
"""A step of which takes the peer minutes: only when asked for."""
NAMES = [row.name for row in STEP_ROWS] + [section.name for section in SECTIONS]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark and returns the exit code."""
    options = _options(arguments)
    source = begin(options)
    datasets.disable_progress_bars()
    if not source.is_file():
        print(f"--data: no file {source}; give the folder that has medi/medi_like_train.json.gz in it", file=sys.stderr)
        return 2
    gc.collect()
    gc.freeze()  # both sides collect after each run, and need not go through all modules each time
    progress = Console(stderr=True, quiet=options.json, highlight=False)
    console = Console(width=130, highlight=False, quiet=options.json)
    device = torch.device(options.device)
    result: dict[str, Any] = {"machine": told(device, PACKAGES), "left_out": [n for n in NAMES if n not in options.only]}
    console.print(header(result["machine"], "float32 where nothing else is said"), soft_wrap=True)
    codes = []
    with TemporaryDirectory(prefix="gist-train-benchmark-") as folder:
        rows = [row for row in STEP_ROWS if row.name in options.only]
        try:
            if rows:
                result["steps"] = measure_steps(rows, options, source, Path(folder), device, progress)
                show_steps(result["steps"], console)
                codes.append(_unequal(result["steps"]["rows"]))
            for section in SECTIONS:
                if section.name in options.only:
                    progress.print(f"{section.name}: {section.told}")
                    code, figures = run_section(section, options, Path(folder))
                    codes.append(code)
                    if figures is not None:
                        result[section.name] = {**figures, "bars": section.bars(figures)}
                        console.print()
                        section.script.show(figures, console)
                        show_bars(result[section.name]["bars"], console)
        except (UserError, ArgumentError) as error:
            print(error, file=sys.stderr)
            return 2
    if result["left_out"]:
        console.print(f"left out: {', '.join(result['left_out'])}", soft_wrap=True)
    if options.json:
        print(json.dumps(result, indent=2))
    return 1 if any(code not in (0, 2) for code in codes) else max(codes)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    rows = "\n".join(f"    {row.name:12} {row.told}" for row in STEP_ROWS)
    sections = "\n".join(f"    {section.name:12} {section.told}: {section.command[-1]}" for section in SECTIONS)
    description = (__doc__ or "").format(rows=rows, sections=sections)
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only",
        nargs="+",
        choices=NAMES,
        metavar="ROW",
        help="names from above (default: all but guide-tails; with --quick some)",
    )
    parser.add_argument("--pairs", type=count, help="pairs of runs of the step, ours and theirs (default 3, or 1)")
    parser.add_argument("--batches", type=count, help="batches in a run of the step (default 1 to 4, by row)")
    quick = f"1 pair, 1 batch of {QUICK_TRIPLETS}, the guide cut to {QUICK_GUIDE_LAYERS} layers; leaves out what takes long"
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--student", type=shape, default=BGE_SMALL, metavar=SHAPE)
    parser.add_argument("--guide", type=shape, default=UAE_LARGE, metavar=SHAPE)
    add_common(parser)
    options = parser.parse_args(arguments)
    options.only = options.only or [name for name in NAMES if (name in QUICK if options.quick else name not in LONG)]
    return options


def _unequal(rows: dict[str, Any]) -> int:
    """1 where a row's sides did not do the same work, which is told; else 0."""
    proofs = {name: row["equality"] for name, row in rows.items()}
    unequal = {name: proof for name, proof in proofs.items() if not proof["equal"]}
    for name, proof in unequal.items():
        print(f"{name}: the two sides did not do the same work: {json.dumps(proof)}", file=sys.stderr)
    return 1 if unequal else 0


if __name__ == "__main__":
    sys.exit(main())
