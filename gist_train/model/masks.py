"""Which candidates of the guided contrastive loss leave the partition function whatever the student says.

Pure torch, with the legend of `loss.py`: R rows that are computed together, N candidates of a block, G width of the guide.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Side:
    """One kind of candidate: the student's embeddings, and what else is known of them, or None."""

    students: tuple[Tensor, ...]
    """(N, d) unit vectors, for each dimension d that the loss is taken over; only the whole embedding where none are given."""
    guide: Tensor | None
    """(N, G) unit vectors."""
    ids: Tensor | None
    """(N,) text ids."""
    labels: Tensor | None
    """(N,), -1 for none."""
    rows: Tensor | None
    """(N,) the row of the batch that a candidate belongs to."""

    def __len__(self) -> int:
        return len(self.students[0])

    def between(self, first: int, last: int) -> "Side":
        """Those of rows first to last, of a side that has one a row."""
        students = tuple(x[first:last] for x in self.students)
        guide, ids, labels, rows = (None if x is None else x[first:last] for x in (self.guide, self.ids, self.labels, self.rows))
        return Side(students, guide, ids, labels, rows)


@dataclass(frozen=True, slots=True)
class Rows:
    """R rows of the batch that are computed together."""

    first: int
    """The number of the first: row i's own positive is in column first + i."""
    anchors: Side
    positives: Side
    threshold: Tensor | None
    """(R, 1) the guide's similarity above which a candidate leaves; None without a guide."""
    alone: Tensor | None
    """(R,) bool: those that contrast with their own negatives alone."""


@dataclass(frozen=True, slots=True)
class Look:
    """One block of candidates, as R rows see it."""

    block: str
    from_side: Side
    """Those that look, R of them."""
    to_side: Side
    """Those that they look at, N of them."""
    leaves: Tensor
    """(R, N) bool: no candidates, and those that leave."""
    candidates: Tensor
    """Scalar int64: pairs that were candidates before any left."""


def look(block: str, from_side: Side, to_side: Side, rows: Rows) -> Look:
    """A block's masks. The row's own positive stays, and is not counted; the diagonals of aa and pp are no candidates."""
    leaves = _leaves(from_side, to_side, rows)
    stands = _stands(to_side, rows)  # what is no candidate at all counts neither as one nor as masked
    if block != "an":  # column i belongs to row i itself
        stands.diagonal(rows.first).fill_(False)
    candidates = stands.sum()
    leaves |= ~stands
    if block == "ap":
        leaves.diagonal(rows.first).fill_(False)
    return Look(block, from_side, to_side, leaves, candidates)


def threshold(own: Tensor, margin: float, strategy: str) -> Tensor:
    """(R, 1): the guide's similarity above which a candidate leaves, from that of the row's own pair, (R,)."""
    lowered_by = margin if strategy == "absolute" else own.abs() * margin
    return (own - lowered_by + similarity_tolerance(own))[:, None]


def similarity_tolerance(similarities: Tensor) -> float:
    """How far two roundings of one similarity may lie apart.

    An exact duplicate of the positive has the similarity of the threshold, and stays (where ids are given, its id removes it).
    Without this tolerance the last bit would decide, which differs from one block size or number of processes to the next.
    """
    return 8 * torch.finfo(similarities.dtype).eps


def _stands(to_side: Side, rows: Rows) -> Tensor:
    """(R, N) bool: what is a candidate at all, before anything leaves."""
    if rows.alone is None or rows.anchors.rows is None or to_side.rows is None:
        return torch.ones(len(rows.anchors), len(to_side), dtype=torch.bool, device=to_side.students[0].device)
    return ~rows.alone[:, None] | (to_side.rows[None, :] == rows.anchors.rows[:, None])


def _leaves(from_side: Side, to_side: Side, rows: Rows) -> Tensor:
    """(R, N) bool: candidates that the guide, their text id or their label removes."""
    anchors, positives = rows.anchors, rows.positives
    leaves = torch.zeros(len(from_side), len(to_side), dtype=torch.bool, device=to_side.students[0].device)
    if rows.threshold is not None and from_side.guide is not None and to_side.guide is not None:
        leaves |= from_side.guide @ to_side.guide.T > rows.threshold
    if to_side.ids is not None and anchors.ids is not None and positives.ids is not None:
        leaves |= to_side.ids[None, :] == anchors.ids[:, None]
        leaves |= to_side.ids[None, :] == positives.ids[:, None]
    if to_side.labels is not None and anchors.labels is not None:
        leaves |= (to_side.labels[None, :] == anchors.labels[:, None]) & (anchors.labels >= 0)[:, None]
    return leaves
