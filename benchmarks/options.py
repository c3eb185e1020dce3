"""Options that the benchmarks share."""

import argparse
import os
from pathlib import Path

import torch
import transformers

from benchmarks.machine import ROOT

Shape = tuple[int, int, int, int]
"""Layers, hidden size, attention heads, intermediate size."""


def count(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}, but a whole number of at least 1 is needed")
    return int(text)


def shape(text: str) -> Shape:
    """`SHAPE`."""
    numbers = [count(part) for part in text.split(",")]
    if len(numbers) != 4 or numbers[1] % numbers[2]:
        raise argparse.ArgumentTypeError(f"{text!r}, but four numbers are needed, the hidden size divisible by the heads")
    return numbers[0], numbers[1], numbers[2], numbers[3]


SHAPE = "LAYERS,HIDDEN,HEADS,INTERMEDIATE"


def add_common(parser: argparse.ArgumentParser) -> None:
    """--data, --device, --threads and --json."""
    default = Path(os.environ.get("GIST_TRAIN_DATA", ROOT.parent / "shared" / "data"))
    parser.add_argument("--data", type=Path, default=default, help="folder of the test data (default: $GIST_TRAIN_DATA)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=count, help="of torch (default: its own choice)")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout and nothing else")


def begin(options: argparse.Namespace) -> Path:
    """Makes the libraries quiet, sets threads and device, and returns the file of MEDI-like rows, which may be missing."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.device == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
    source: Path = options.data / "medi" / "medi_like_train.json.gz"
    return source
