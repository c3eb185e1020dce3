"""A model of a training step's time on many processes, from measured parts; what it says of H100s, and a picture of that.

Legend: B triplets a step, r processes.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gist_train.training.distributed import share
from gist_train.training.inputs import deal

RANKS = tuple(2**power for power in range(11))
SIZES = (16, 128, 1024, 8192, 65536)
"""What is predicted."""
DRAWS = 4
"""Batches whose dealing is looked at."""
WORTH = 0.5
"""Of what each process alone would do: below that another one is hardly worth its price."""
Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Parts:
    """What a step is made of on one kind of machine. Seconds and bytes."""

    name: str
    seconds_a_token: float
    """Forward and backward."""
    fixed: float
    """Of every step: the optimizer, and kernels that a few tokens don't fill."""
    host: float
    """At least, whatever the device takes, on several processes: one alone may replay a graph."""
    seconds_a_pair: float
    """Of the loss, forward and backward, for each of B x B / r pairs of rows, all of their comparisons together."""
    width: int
    """Of an embedding."""
    weight_bytes: int
    """Of all gradients."""
    latency: float
    """Of a collective on two processes; it grows with log2 r."""
    bandwidth: float
    """Bytes a second out of a process."""
    hidden: float
    """Share of the backward pass behind which the weights' gradients travel."""
    crowd: float = 1.0
    """How much slower a process computes beside r - 1 others that share the machine's cores."""

    def step(self, size: int, ranks: int, tokens: float) -> dict[str, float]:
        """Seconds of each part of a step.

        Args:
            size: B.
            ranks: r.
            tokens: of the process that has the most.
        """
        encoder = self.crowd * self.seconds_a_token * tokens
        loss = self.crowd * self.seconds_a_pair * size * size / ranks
        seconds = {
            "encoder": encoder,
            "fixed": max(self.crowd * self.fixed, (self.host if ranks > 1 else 0.0) - encoder),
            "loss": loss,
            "wire": 0.0,
        }
        if ranks > 1:
            rounds = math.log2(ranks)
            embeddings = 3 * size * self.width * 4  # a triplet has three
            # Gathered once, their gradients summed; beside these two the counts of the loss are summed.
            gathered = ((ranks - 1) / ranks + ring(ranks)) * embeddings / self.bandwidth + 3 * self.latency * rounds
            gradients = ring(ranks) * self.weight_bytes / self.bandwidth + self.latency * rounds
            # The last of some six buckets leaves when the backward pass is over.
            exposed = max(gradients - self.hidden * encoder * 2 / 3, gradients / 6 if self.hidden else gradients)
            seconds["wire"] = gathered + exposed
        return seconds


def ring(ranks: int) -> float:
    """Times that a process sends each byte of a sum over all processes, in a ring."""
    return 2 * (ranks - 1) / ranks


H100 = Parts(
    name="H100, bf16, bge-small's shape",
    # Between 16 and 1,024 triplets in graphs: 4.76 ms at 2,166 tokens, 62.8 ms at 81,396.
    seconds_a_token=(62.8e-3 - 4.76e-3) / (81_396 - 2_166),
    fixed=4.76e-3 - 2_166 * (62.8e-3 - 4.76e-3) / (81_396 - 2_166),
    host=31.2e-3,  # `compile`, 16 triplets: several processes take no graphs yet
    # Four comparisons of 384 dimensions forward and twice backward, and of the guide's 1,024, at half of 67 TFLOP/s in float32.
    seconds_a_pair=4 * 2 * (3 * 384 + 1024) / 33e12,
    width=384,
    weight_bytes=4 * 33_360_000,
    latency=30e-6,
    bandwidth=50e9,  # 400 Gbit/s a GPU between hosts
    hidden=0.9,
)
"""Measured: docs/benchmarks.md. Data sheets: 67 TFLOP/s, 400 Gbit/s. Guessed: the latency, and that half of the rate is had."""


def most_tokens(tokens: Ints, ranks: int) -> int:
    """Of rows of these tokens (B,), dealt to `ranks` processes as a training deals them: what the fullest process has."""
    dealt = tokens[deal(tokens, ranks)] if ranks > 1 else tokens
    return max(int(dealt[slice(*share(len(tokens), rank, ranks))].sum()) for rank in range(ranks))


def predict(parts: Parts, row_tokens: Ints) -> list[dict[str, Any]]:
    """A row for each of `SIZES` and `RANKS`: seconds a step by part, triplets a second, and their share of r times one process'.

    Args:
        row_tokens: (R,) of each row of the data, from which batches are drawn.
    """
    random, rows = np.random.default_rng(0), []
    for size in SIZES:
        batches = [random.choice(row_tokens, size) for _ in range(DRAWS)]
        alone = 0.0
        for ranks in RANKS:
            tokens = sum(most_tokens(batch, ranks) for batch in batches) / DRAWS
            seconds = parts.step(size, ranks, tokens)
            speed = size / sum(seconds.values())
            alone = alone or speed
            rows.append(
                {"size": size, "ranks": ranks, **seconds, "triplets_a_second": speed, "efficiency": speed / alone / ranks}
            )
    return rows


def last_worth(rows: list[dict[str, Any]], size: int) -> int:
    """The most processes that still do `WORTH` of what each would do alone, at this batch size."""
    return max(row["ranks"] for row in rows if row["size"] == size and row["efficiency"] >= WORTH)


def draw(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """The prediction as an SVG: triplets a second over processes, a line a batch size; the same bytes each time."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"svg.hashsalt": "scaling", "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure = Figure(figsize=(8, 5), layout="constrained")
        axes = figure.subplots()
        for size in SIZES:
            line = [row for row in rows if row["size"] == size]
            speeds = [row["triplets_a_second"] for row in line]
            (drawn,) = axes.loglog(RANKS, speeds, marker="o", markersize=4, base=2, label=f"{size:,} triplets a step")
            worth = last_worth(rows, size)
            axes.plot(worth, speeds[RANKS.index(worth)], marker="o", markersize=10, fillstyle="none", color=drawn.get_color())
        axes.set_xticks(RANKS, [f"{ranks:,}" for ranks in RANKS])
        axes.set_xlabel("processes, a GPU each (circle: the last that do half of what each would do alone)")
        axes.set_ylabel("triplets a second")
        axes.set_yscale("log", base=10)
        axes.set_title(f"predicted: {title}")
        axes.grid(alpha=0.3)
        axes.legend()
        figure.savefig(path, format="svg", metadata={"Date": None})
