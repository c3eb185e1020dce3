"""Times the loss alone, forward and backward, and its peak memory: whole, in blocks, and sentence-transformers' GISTEmbedLoss.

    python -m benchmarks.loss                 # 256 to 4,096 triplets
    python -m benchmarks.loss --large         # to 32,768: many minutes
    python -m benchmarks.loss --sizes 1024 --pairs 1

All three get the very same random embeddings: of the student 384 numbers, of the guide 1,024, float32, one negative a row. Peak
memory is that of a new process for each way and size, once forward and backward. Seconds are medians of runs in turn, in one
process. A way that would need more memory than `--memory` is left out, and what it would need is
calculated. All must give the same loss to 1e-4, and blocks the gradients of the whole to 1e-5 of the largest of them.
On a machine that is busy with other work, small blocks look slower than they are: threads wait for each other at every tile.
Exit code: 0; 1 where they do not.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.machine import environment_of_children, header, told
from gist_train.model.loss import guided_contrastive_loss

PACKAGES = ("torch", "sentence-transformers")
WAYS = {"blocks": "gist-train in blocks", "whole": "gist-train whole", "peer": "GISTEmbedLoss"}
WIDTH, GUIDE_WIDTH, TEMPERATURE = 384, 1024, 0.01
SIZES, LARGE = [256, 512, 1024, 2048, 4096], [8192, 16384, 32768]
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-4, 1e-5
BYTES_A_PAIR_OF_ROWS = {"blocks": 0, "whole": 75, "peer": 25_000}
"""What a way needs over the inputs, divided by the square of the rows; measured at 4,096 and at 512."""
Embeddings = tuple[list[Tensor], list[Tensor]]
"""Anchors, positives and negatives of the student, and of the guide."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark and returns the exit code."""
    options = _options(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.peak_of:
        print(json.dumps(_peak_of(options.peak_of, options.sizes[0], options.block_size)))
        return 0
    console = Console(stderr=True, quiet=options.json, highlight=False)
    rows = [_measure(size, options, console) for size in options.sizes]
    settings = {"width": WIDTH, "guide_width": GUIDE_WIDTH, "block_size": options.block_size, "pairs": options.pairs}
    result = {"machine": told(torch.device("cpu"), PACKAGES), "settings": settings, "rows": rows}
    if options.json:
        print(json.dumps(result, indent=2))
    else:
        show(result, Console(width=130, highlight=False))
    unequal = [row for row in rows if not row["equal"]]
    for row in unequal:
        told_of = {key: row[key] for key in ("losses", "largest_gradient_difference")}
        print(f"{row['triplets']} triplets: not the same loss or gradients: {json.dumps(told_of)}", file=sys.stderr)
    return 1 if unequal else 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", help="triplets in a batch (default: 256 to 4096)")
    parser.add_argument("--large", action="store_true", help="sizes to 32,768")
    parser.add_argument("--block-size", type=int, default=2048, help="of the loss in blocks (default 2048)")
    parser.add_argument("--pairs", type=int, default=3, help="runs of each way, in turn; 1 above 4,096 triplets")
    parser.add_argument("--memory", type=float, help="GB that a way may need (default: half of what is available)")
    parser.add_argument("--threads", type=int, help="of torch (default: its own choice)")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout and nothing else")
    parser.add_argument("--peak-of", choices=tuple(WAYS), help=argparse.SUPPRESS)  # what a process for one peak is called with
    options = parser.parse_args(arguments)
    options.sizes = options.sizes or (SIZES + LARGE if options.large else SIZES)
    options.memory = options.memory or psutil.virtual_memory().available / 2e9
    return options


def _embeddings(size: int) -> Embeddings:
    """A positive is its anchor and so much noise that the softmax is not decided, and that the guide masks a fifth or so."""
    random = torch.Generator().manual_seed(0)

    def three(width: int, noise: float) -> list[Tensor]:
        anchor, positive, negative = (torch.randn(size, width, generator=random) for _ in range(3))
        return [anchor, positive.mul_(noise).add_(anchor), negative]

    return [x.requires_grad_() for x in three(WIDTH, 6.0)], three(GUIDE_WIDTH, 30.0)


class _Given(nn.Module):
    """Stands for a SentenceTransformer: its embeddings are a part of the features."""

    def __init__(self, key: str):
        from tokenizers import Tokenizer
        from tokenizers.models import WordLevel
        from transformers import PreTrainedTokenizerFast

        super().__init__()
        self.key, self.max_seq_length = key, 8
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"?": 0}, unk_token="?")), unk_token="?")

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """The embeddings that were given."""
        return {"sentence_embedding": features[self.key]}


def _loss(way: str, embeddings: Embeddings, block_size: int) -> Tensor:
    """The loss over these embeddings, with its graph."""
    students, guides = embeddings
    if way == "peer":
        from sentence_transformers.sentence_transformer.losses import GISTEmbedLoss

        loss = GISTEmbedLoss(_Given("student"), _Given("guide"), temperature=TEMPERATURE)
        columns = [{"student": student, "guide": guide} for student, guide in zip(students, guides, strict=True)]
        return loss(columns, torch.empty(0))
    of_guide = dict(zip(("guide_anchor", "guide_positive", "guide_negative"), guides, strict=True))
    size = block_size if way == "blocks" else None
    return guided_contrastive_loss(*students, **of_guide, temperature=TEMPERATURE, block_size=size).loss


def _run(way: str, embeddings: Embeddings, block_size: int) -> dict[str, Any]:
    """Seconds, loss and gradients of once forward and backward."""
    for student in embeddings[0]:
        student.grad = None
    began = time.perf_counter()
    loss = _loss(way, embeddings, block_size)
    loss.backward()
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "loss": loss.item(), "gradients": [student.grad for student in embeddings[0]]}


def _peak_of(way: str, size: int, block_size: int) -> dict[str, Any]:
    """Of this process, which must be new: GB before (the inputs among them) and at the peak; seconds and loss of the one run."""
    small = _embeddings(2)
    _run(way, small, block_size)  # what is loaded when first used is there before
    embeddings = _embeddings(size)
    before = _highest_gigabytes()
    found = _run(way, embeddings, block_size)
    del found["gradients"]
    peak = _highest_gigabytes()
    return {**found, "peak_gb": peak, "over_inputs_gb": peak - before}


def _highest_gigabytes() -> float:
    """Of resident memory since this program began. `getrusage` would count the parent's, from before it began."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    (kilobytes,) = (int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    return kilobytes * 1024 / 1e9


def _measure(size: int, options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Peaks, seconds, ratios and losses at one size."""
    needs = {way: BYTES_A_PAIR_OF_ROWS[way] * size**2 / 1e9 for way in WAYS}
    ways = [way for way in WAYS if needs[way] <= options.memory]
    command = [sys.executable, "-m", "benchmarks.loss", "--sizes", str(size), "--block-size", str(options.block_size)]
    command += ["--threads", str(torch.get_num_threads())]
    peaks = {}
    for way in ways:
        ended = subprocess.run(
            [*command, "--peak-of", way], env=environment_of_children(), check=True, stdout=subprocess.PIPE, text=True
        )
        peaks[way] = json.loads(ended.stdout)
        console.print(f"{size}: {WAYS[way]}: {peaks[way]['over_inputs_gb']:.2f} GB over the inputs, {peaks[way]['loss']:.6f}")
    seconds = {way: [peak["seconds"]] for way, peak in peaks.items()}
    apart = None
    if size <= SIZES[-1]:
        seconds, apart = _in_turn(size, ways, options, console)
    losses = {way: peak["loss"] for way, peak in peaks.items()}
    spread = max(losses.values()) - min(losses.values())
    return {
        "triplets": size,
        "over_inputs_gb": {way: peak["over_inputs_gb"] for way, peak in peaks.items()},
        "peak_gb": {way: peak["peak_gb"] for way, peak in peaks.items()},
        "left_out": {way: needs[way] for way in WAYS if way not in ways},
        "seconds": {way: statistics.median(of) for way, of in seconds.items()},
        "times_blocks": {way: _ratios(of, seconds["blocks"]) for way, of in seconds.items() if way != "blocks"},
        "losses": losses,
        "largest_gradient_difference": apart,
        "equal": spread <= LOSS_TOLERANCE and (apart is None or apart <= GRADIENT_TOLERANCE),
    }


def _in_turn(
    size: int, ways: Sequence[str], options: argparse.Namespace, console: Console
) -> tuple[dict[str, list[float]], float | None]:
    """Seconds of each way, round by round, and how far blocks' gradients are from the whole's; the order turns."""
    embeddings = _embeddings(size)
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    gradients: dict[str, list[Tensor]] = {}
    for number in range(options.pairs + 1):
        for way in ways[:: 1 if number % 2 else -1]:
            found = _run(way, embeddings, options.block_size)
            gradients[way] = found["gradients"]
            if number:  # the first warms up
                seconds[way].append(found["seconds"])
        if number:
            told_of = ", ".join(f"{WAYS[way]} {of[-1]:.2f} s" for way, of in seconds.items())
            console.print(f"{size}: round {number} of {options.pairs}: {told_of}")
    if "whole" not in ways:
        return seconds, None
    pairs = zip(gradients["blocks"], gradients["whole"], strict=True)
    return seconds, max(((ours - whole).abs().max() / whole.abs().max()).item() for ours, whole in pairs)


def _ratios(of: Sequence[float], blocks: Sequence[float]) -> dict[str, float]:
    ratios = [a / b for a, b in zip(of, blocks, strict=True)]
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}


def show(result: dict[str, Any], console: Console) -> None:
    """The figures for people."""
    machine, settings = result["machine"], result["settings"]
    console.print(header(machine), soft_wrap=True)
    table = Table(title=f"loss forward and backward, blocks of {settings['block_size']:,}; in brackets: calculated, not run")
    for column in ("triplets", *(f"{way}, {unit}" for way in WAYS for unit in ("GB", "s")), "whole / blocks"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in result["rows"]:
        cells = [f"{row['triplets']:,}"]
        for way in WAYS:
            run = way in row["seconds"]
            cells.append(f"{row['over_inputs_gb'][way]:.2f}" if run else f"({row['left_out'][way]:,.1f})")
            cells.append(f"{row['seconds'][way]:.2f}" if run else "")
        ratio = row["times_blocks"].get("whole")
        table.add_row(*cells, f"{ratio['median']:.2f} ({ratio['min']:.2f} - {ratio['max']:.2f})" if ratio else "")
    console.print(table)
    last = result["rows"][-1]
    console.print("; ".join(f"{way}: {name}" for way, name in WAYS.items()))
    console.print("GB: peak resident memory over what the process had with its inputs.")
    console.print(f"Whole process, inputs and torch too, in blocks at {last['triplets']:,}: {last['peak_gb']['blocks']:.2f} GB")


if __name__ == "__main__":
    sys.exit(main())
