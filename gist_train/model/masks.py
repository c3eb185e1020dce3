"""Which candidates of the guided contrastive loss leave the partition function whatever the student says.

Pure torch, with the legend of `loss.py`: R rows that are computed together, N candidates of a block, G width of the guide.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SIDES = {"ap": (0, 1), "an": (0, 2), "aa": (0, 0), "pp": (1, 1)}
"""By block, the side that looks and the one that it looks at: 0 for anchors, 1 for positives, 2 for negatives."""
BLOCKS = tuple(SIDES)


@dataclass(frozen=True, slots=True)
class Options:
    """What the caller of the loss chose."""

    temperature: float
    margin: float
    margin_strategy: str
    contrast_anchors: bool
    contrast_positives: bool
    hard_only: bool
    weights: tuple[float, ...]
    """Of the loss over each dimension."""
    own_only: Tensor | None
    """(B,) bool: rows that contrast with their own negatives alone."""

    @property
    def blocks(self) -> list[str]:
        """Those of `BLOCKS` that take part."""
        left_out = {"aa": not self.contrast_anchors, "pp": not self.contrast_positives}
        return [block for block in BLOCKS if not left_out.get(block)]


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
        """Those of number first to last."""
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
    """One block of candidates, or some of its columns, as R rows see it."""

    block: str
    from_side: Side
    """Those that look, R of them."""
    to_side: Side
    """Those that they look at, N of them."""
    leaves: Tensor
    """(R, N) bool: no candidates, and those that leave."""
    candidates: Tensor
    """Scalar int64: pairs that were candidates before any left."""


def rows_between(sides: Sequence[Side], first: int, last: int, options: Options) -> Rows:
    """Rows first to last of the batch; `sides` are anchors, positives and negatives."""
    a, p = sides[0].between(first, last), sides[1].between(first, last)
    limit = None
    if a.guide is not None and p.guide is not None:
        limit = threshold((a.guide * p.guide).sum(dim=1), options.margin, options.margin_strategy)
    return Rows(first, a, p, limit, None if options.own_only is None else options.own_only[first:last])


def look(block: str, sides: Sequence[Side], rows: Rows, left: int, right: int) -> Look:
    """The masks of columns left to right of a block. A row's own positive stays, and is not counted; the diagonals of aa and pp
    are no candidates."""
    from_side, to_side = (rows.anchors, rows.positives)[SIDES[block][0]], sides[SIDES[block][1]].between(left, right)
    own = rows.first - left  # the column of the first row's own positive, anchor or itself, here or not
    leaves = _leaves(from_side, to_side, rows)
    stands = _stands(to_side, rows)
    if stands is None:
        count = leaves.numel() - (0 if block == "an" else leaves.diagonal(own).numel())
        candidates = torch.full((), count, dtype=torch.int64, device=leaves.device)
    else:  # what is no candidate at all counts neither as one nor as masked
        if block != "an":
            stands.diagonal(own).fill_(False)
        candidates = stands.sum()
        leaves |= ~stands
    if block != "an":  # column i belongs to row i itself
        leaves.diagonal(own).fill_(block != "ap")
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


def _stands(to_side: Side, rows: Rows) -> Tensor | None:
    """(R, N) bool: what is a candidate at all, before anything leaves; None where everything is."""
    if rows.alone is None or rows.anchors.rows is None or to_side.rows is None:
        return None
    return ~rows.alone[:, None] | (to_side.rows[None, :] == rows.anchors.rows[:, None])


def _leaves(from_side: Side, to_side: Side, rows: Rows) -> Tensor:
    """(R, N) bool: candidates that the guide, their text id or their label removes."""
    anchors, positives = rows.anchors, rows.positives
    if rows.threshold is not None and from_side.guide is not None and to_side.guide is not None:
        leaves = from_side.guide @ to_side.guide.T > rows.threshold
    else:
        leaves = torch.zeros(len(from_side), len(to_side), dtype=torch.bool, device=to_side.students[0].device)
    if to_side.ids is not None and anchors.ids is not None and positives.ids is not None:
        leaves |= to_side.ids[None, :] == anchors.ids[:, None]
        leaves |= to_side.ids[None, :] == positives.ids[:, None]
    if to_side.labels is not None and anchors.labels is not None:
        leaves |= (to_side.labels[None, :] == anchors.labels[:, None]) & (anchors.labels >= 0)[:, None]
    return leaves
