"""Which candidates of the guided contrastive loss are masked, that is, left out of its sums, whatever the student says.

Pure torch, with the legend of `loss.py`: R rows that are computed together, N candidates of a block, G width of the guide.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

SIDES = {"ap": (0, 1), "an": (0, 2), "aa": (0, 0), "pp": (1, 1)}
"""By block, the sides of its queries and of its candidates: 0 for anchors, 1 for positives, 2 for negatives."""
BLOCKS = tuple(SIDES)


@dataclass(frozen=True, slots=True)
class Options:
    """What the caller of the loss chose."""

    temperature: float
    margin: float
    margin_strategy: str
    contrast_anchors: bool
    contrast_positives: bool
    softness: float | None
    """Of the guide's mask; None where it is hard."""
    needed: int
    """Guides that must find a candidate too similar for it to be masked."""
    hardness: float
    """A candidate's similarity, without gradient, times this is added to its logit."""
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
    guides: tuple[Tensor, ...]
    """(N, G) unit vectors of each guide that has a say of its own; none without a guide."""
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
        guides = tuple(x[first:last] for x in self.guides)
        ids, labels, rows = (None if x is None else x[first:last] for x in (self.ids, self.labels, self.rows))
        return Side(students, guides, ids, labels, rows)


@dataclass(frozen=True, slots=True)
class Rows:
    """R rows of the batch that are computed together."""

    first: int
    """The number of the first: row i's own positive is in column first + i."""
    anchors: Side
    positives: Side
    thresholds: tuple[Tensor, ...]
    """(R, 1) of each guide: its similarity above which a candidate is masked."""
    alone: Tensor | None
    """(R,) bool: those that contrast with their own negatives alone."""


@dataclass(frozen=True, slots=True)
class Tile:
    """R rows of a block, and all or some of its columns."""

    block: str
    queries: Side
    """R of them."""
    candidates: Side
    """N of them."""
    mask: Tensor
    """(R, N) bool: True where a pair is masked or never was a candidate."""
    soft: Tensor | None
    """(R, N) what is added to the logits under a soft mask; None under a hard one."""
    left_out: Tensor
    """(R, N) bool: what counts as masked; under a soft mask also what has less than half of its weight left."""
    count: Tensor
    """Scalar int64: pairs that are candidates, masked ones included."""


def rows_between(sides: Sequence[Side], first: int, last: int, options: Options) -> Rows:
    """Rows first to last of the batch; `sides` are anchors, positives and negatives."""
    a, p = sides[0].between(first, last), sides[1].between(first, last)
    own = [(x * y).sum(dim=1) for x, y in zip(a.guides, p.guides, strict=True)]
    limits = tuple(threshold(of_guide, options.margin, options.margin_strategy) for of_guide in own)
    return Rows(first, a, p, limits, None if options.own_only is None else options.own_only[first:last])


def tile_of(block: str, sides: Sequence[Side], rows: Rows, left: int, right: int, options: Options) -> Tile:
    """Columns left to right of a block. A row's own positive is not masked and not counted; the diagonals of aa and pp are no
    candidates."""
    query_side, candidate_side = SIDES[block]
    queries, candidates = (rows.anchors, rows.positives)[query_side], sides[candidate_side].between(left, right)
    own = rows.first - left  # the column of the first row's own positive, anchor or itself, here or not
    excess = _excess(queries, candidates, rows, options.needed)
    similar = None if excess is None else excess > 0
    mask = _known(candidates, rows)
    if similar is not None and options.softness is None:
        mask |= similar
    allowed = eligible(candidates, rows)
    if allowed is None:
        count = torch.full((), mask.numel() - (0 if block == "an" else mask.diagonal(own).numel()), device=mask.device)
    else:  # what is no candidate at all counts neither as one nor as masked
        if block != "an":
            allowed.diagonal(own).fill_(False)
        count = allowed.sum()
        mask |= ~allowed
    if block != "an":  # column i belongs to row i itself
        mask.diagonal(own).fill_(block != "ap")
    if excess is None or similar is None or options.softness is None:
        return Tile(block, queries, candidates, mask, None, mask, count)
    soft = logsigmoid(-excess / options.softness)
    if block == "ap":
        soft.diagonal(own).fill_(0.0)
        similar.diagonal(own).fill_(False)
    return Tile(block, queries, candidates, mask, soft, mask | similar, count)


def _excess(queries: Side, candidates: Side, rows: Rows, needed: int) -> Tensor | None:
    """(R, N) by how much a candidate is above the threshold in the eyes of `needed` guides at least; None without a guide."""
    guides = zip(queries.guides, candidates.guides, rows.thresholds, strict=True)
    excess = [(x @ y.T).sub_(limit) for x, y, limit in guides]
    if len(excess) < 2:
        return excess[0] if excess else None
    return torch.stack(excess).kthvalue(len(excess) - needed + 1, dim=0).values


def threshold(own: Tensor, margin: float, strategy: str) -> Tensor:
    """(R, 1): the guide's similarity above which a candidate is masked, from that of the row's own pair, (R,)."""
    lowered_by = margin if strategy == "absolute" else own.abs() * margin
    return (own - lowered_by + similarity_tolerance(own))[:, None]


def similarity_tolerance(similarities: Tensor) -> float:
    """How far two roundings of one similarity may be apart.

    An exact duplicate of the positive has the similarity of the threshold, and is not masked (where ids are given, its id masks
    it). Without this tolerance the last bit would decide, which differs from one block size or number of processes to the next.
    """
    return 8 * torch.finfo(similarities.dtype).eps


def eligible(candidates: Side, rows: Rows) -> Tensor | None:
    """(R, N) bool: what is a candidate at all, masked or not; None where everything is."""
    if rows.alone is None or rows.anchors.rows is None or candidates.rows is None:
        return None
    return ~rows.alone[:, None] | (candidates.rows[None, :] == rows.anchors.rows[:, None])


def _known(candidates: Side, rows: Rows) -> Tensor:
    """(R, N) bool: candidates that their text id or their label masks."""
    anchors, positives = rows.anchors, rows.positives
    masked = torch.zeros(len(anchors), len(candidates), dtype=torch.bool, device=candidates.students[0].device)
    if candidates.ids is not None and anchors.ids is not None and positives.ids is not None:
        masked |= candidates.ids[None, :] == anchors.ids[:, None]
        masked |= candidates.ids[None, :] == positives.ids[:, None]
    if candidates.labels is not None and anchors.labels is not None:
        masked |= (candidates.labels[None, :] == anchors.labels[:, None]) & (anchors.labels >= 0)[:, None]
    return masked
