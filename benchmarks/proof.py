"""The proof that both sides of the benchmark do the same work: the same texts in the same rows, and the same loss."""

from dataclasses import replace
from typing import Any

import torch

from benchmarks.sides import Bench, Seen, run_ours, run_theirs

TOLERANCE = 1e-4
"""Largest difference of a batch's loss that counts as the same."""


def compare(bench: Bench) -> dict[str, Any]:
    """Whether both sides read the same texts in the same rows and get the same losses, in float32, without dropout.

    The learning rate is 0, so that all batches meet the same weights on both sides. Flash attention has no float32 and is off.
    """
    peer = replace(bench.peer, attention=None)
    still = replace(bench, dropout=0.0, learning_rate=0.0, precision="float32", peer=peer)
    ours, theirs = Seen([], []), Seen([], [])
    count = bench.plan.steps_per_epoch
    _, records = run_ours(still, count, ours)
    run_theirs(still, count, theirs)
    same_rows = len(ours.texts) == count and ours.texts == theirs.texts
    apart = max(abs(a - b) for a, b in zip(ours.losses, theirs.losses, strict=True))
    blocks = records[0].masked
    return {
        "equal": same_rows and apart <= TOLERANCE,
        "same_rows": same_rows,
        "largest_loss_difference": apart,
        "losses_ours": ours.losses,
        "losses_theirs": theirs.losses,
        "masked_by_guide": {block: sum(record.masked[block] for record in records) / count for block in blocks},
        "closest_decision": _closest_decision(bench),
    }


def _closest_decision(bench: Bench) -> float | None:
    """How near the guide's similarities come to a threshold: where it is under 1e-6, rounding may part the two sides' losses."""
    if bench.guide is None:
        return None
    nearest = []
    for batch in bench.batches:
        a, p, n = (bench.guide.anchor.embeddings(ids).double() for ids in (batch.anchor, batch.positive, batch.negative))
        gaps = torch.cat([a @ p.T, a @ n.T, a @ a.T, p @ p.T], dim=1) - (a * p).sum(dim=1, keepdim=True)
        gaps[:, : len(a)].fill_diagonal_(torch.inf)  # the row's own pair, which is the threshold
        nearest.append(gaps.abs().min().item())
    return min(nearest)
