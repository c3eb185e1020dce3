"""The guided contrastive loss of GISTEmbed (Solatorio 2024, arXiv 2402.16829), pure torch.

Legend of shapes: B rows (anchor, positive) of the whole batch over all processes, R of them computed here, M negatives in one
flat pool, D width of the student, G width of the guide. Every row contrasts with four blocks of candidates:

    ap  s(anchor_i, positive_j)    an  s(anchor_i, negative_k)    aa  s(anchor_i, anchor_j)    pp  s(positive_i, positive_j)

A candidate leaves the partition function where the guide finds it more similar than the row's own pair.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize
from torch.utils.checkpoint import checkpoint

BLOCKS = ("ap", "an", "aa", "pp")


@dataclass(frozen=True, slots=True)
class LossOutput:
    """What a call of `guided_contrastive_loss` found."""

    loss: Tensor
    """Scalar: sum of `row_losses` over B. With all rows computed here it is their mean."""
    row_losses: Tensor
    """(R,) cross entropy of each row computed here, detached."""
    masked: Tensor
    """(4,) int64: candidates of each of `BLOCKS` that left the partition function: too similar, a duplicate, or not hard."""
    candidates: Tensor
    """(4,) int64: candidates of each of `BLOCKS` before masking, a row's own column not counted."""


@dataclass(frozen=True, slots=True)
class _Side:
    """One kind of candidate: unit vectors of student (N, D), and what else is known of them, or None."""

    student: Tensor
    guide: Tensor | None
    """(N, G) unit vectors."""
    ids: Tensor | None
    """(N,) text ids."""
    labels: Tensor | None
    """(N,), -1 for none."""
    rows: Tensor | None
    """(N,) the row of the batch that a candidate belongs to."""

    def between(self, first: int, last: int) -> "_Side":
        """Those of rows first to last, of a side that has one a row."""
        guide, ids, labels, rows = (None if x is None else x[first:last] for x in (self.guide, self.ids, self.labels, self.rows))
        return _Side(self.student[first:last], guide, ids, labels, rows)


@dataclass(frozen=True, slots=True)
class _Options:
    temperature: float
    margin: float
    margin_strategy: str
    contrast_anchors: bool
    contrast_positives: bool
    hard_only: bool
    own_only: Tensor | None
    """(B,) bool: rows that contrast with their own negatives alone."""


def guided_contrastive_loss(
    anchor: Tensor,
    positive: Tensor,
    negative: Tensor | None,
    *,
    guide_anchor: Tensor | None,
    guide_positive: Tensor | None,
    guide_negative: Tensor | None,
    temperature: float = 0.01,
    margin: float = 0.0,
    margin_strategy: Literal["absolute", "relative"] = "absolute",
    contrast_anchors: bool = True,
    contrast_positives: bool = True,
    negatives: Literal["all", "hard"] = "all",
    block_size: int | None = None,
    anchor_ids: Tensor | None = None,
    positive_ids: Tensor | None = None,
    negative_ids: Tensor | None = None,
    labels: Tensor | None = None,
    negative_labels: Tensor | None = None,
    own_negatives_only: Tensor | None = None,
    negative_rows: Tensor | None = None,
    rows: tuple[int, int] | None = None,
) -> LossOutput:
    """Cross entropy of s / temperature against each row's own positive, over the candidates that the guide lets stand.

    Args:
        anchor, positive: (B, D) embeddings of the student, of any length: they are normalised here.
        negative: (M, D), a pool that all rows share, or None.
        guide_anchor, guide_positive, guide_negative: (B, G), (B, G), (M, G), or all None for no guide.
        temperature: divides the similarities (the inverse of sentence-transformers' `scale`).
        margin, margin_strategy: a candidate of row i leaves where the guide's similarity is greater than
            g_i - margin ("absolute") or g_i - |g_i| margin ("relative"), g_i the guide's similarity of the row's own pair.
        contrast_anchors, contrast_positives: whether the blocks aa and pp take part.
        negatives: "hard" also drops candidates that the student already finds less similar than the row's own positive.
        block_size: rows whose similarities are in memory at a time, forward and backward; None for all at once.
        anchor_ids, positive_ids, negative_ids: (B,), (B,), (M,) text ids; given, candidates that are the same text as the
            row's anchor or positive leave.
        labels, negative_labels: (B,) of anchor and positive, (M,), -1 for none; given, candidates with the anchor's label leave,
            guide or no guide.
        own_negatives_only: (B,) bool: rows that keep their own positive and negatives as candidates and nothing else of the
            batch (FlagEmbedding's `no_in_batch_neg`, by row); `negative_rows` (M,), the row of each negative, comes with it.
        rows: (start, stop) of the rows to compute where several processes share the batch; None for all B. The sum of
            `.loss` over processes that share all rows among them is the loss of the whole batch.

    Returns:
        LossOutput. Similarities and softmax are float32 at least, whatever the dtype of the embeddings or an autocast around.

    Raises:
        ValueError: shapes that do not fit, or a guide or ids given for some of the texts only.

    The row's own positive never leaves; the diagonals of aa and pp always do. In the authors' code (avsolatorio/GISTEmbed)
    these diagonals leave only because guide(x, x) is the largest similarity there is, which rounding or a negative margin undoes.
    """
    _check_options(temperature, margin_strategy, negatives, block_size)
    batch = len(anchor)
    own = None if own_negatives_only is None else torch.arange(batch, device=anchor.device)
    anchors, positives, pool = _sides(
        student=(anchor, positive, negative),
        guide=(guide_anchor, guide_positive, guide_negative),
        ids=(anchor_ids, positive_ids, negative_ids),
        labels=(labels, labels, negative_labels),
        rows=(own, own, negative_rows),
    )
    options = _Options(
        temperature, margin, margin_strategy, contrast_anchors, contrast_positives, negatives == "hard", own_negatives_only
    )
    start, stop = rows or (0, batch)
    if not 0 <= start <= stop <= batch:
        raise ValueError(f"rows must be (start, stop) within the {batch} rows, not {rows}")
    with torch.autocast(anchor.device.type, enabled=False):
        return _loss_of_rows(anchors, positives, pool, start, stop, block_size, options)


def _loss_of_rows(
    anchors: _Side, positives: _Side, pool: _Side, start: int, stop: int, block_size: int | None, options: _Options
) -> LossOutput:
    """The loss of rows start to stop, `block_size` of them at a time."""
    device = anchors.student.device
    losses, masked, candidates = [], [], []
    for first, last in _row_blocks(start, stop, block_size):
        arguments = (anchors, positives, pool, first, last, options)
        # Checkpointing keeps no similarity of a block between forward and backward: it is computed again there.
        part = _block_of_rows(*arguments) if block_size is None else checkpoint(_block_of_rows, *arguments, use_reentrant=False)
        losses.append(part[0])
        masked.append(part[1])
        candidates.append(part[2])
    # With no rows here the (empty) sum still depends on all embeddings, so that every process has a backward pass.
    row_losses = torch.cat(losses or [side.student[:0].sum(dim=1) for side in (anchors, positives, pool)])
    nothing = torch.zeros(4, dtype=torch.int64, device=device)
    return LossOutput(
        loss=row_losses.sum() / len(anchors.student),
        row_losses=row_losses.detach(),
        masked=torch.stack(masked).sum(dim=0) if masked else nothing,
        candidates=torch.stack(candidates).sum(dim=0) if candidates else nothing,
    )


def _check_options(temperature: float, margin_strategy: str, negatives: str, block_size: int | None) -> None:
    if not temperature > 0:
        raise ValueError(f"temperature must be greater than 0, not {temperature}")
    if margin_strategy not in ("absolute", "relative"):
        raise ValueError(f'margin_strategy must be "absolute" or "relative", not "{margin_strategy}"')
    if negatives not in ("all", "hard"):
        raise ValueError(f'negatives must be "all" or "hard", not "{negatives}"')
    if block_size is not None and block_size < 1:
        raise ValueError(f"block_size must be 1 or more, or None, not {block_size}")


def _row_blocks(start: int, stop: int, block_size: int | None) -> Iterator[tuple[int, int]]:
    size = block_size or max(stop - start, 1)
    for first in range(start, stop, size):
        yield first, min(first + size, stop)


def _sides(**given: tuple[Tensor | None, Tensor | None, Tensor | None]) -> tuple[_Side, _Side, _Side]:
    """Anchors, positives and negatives, checked against one another; absent negatives become a pool of none.

    Args:
        given: by field of `_Side`, what is given of anchors, positives and negatives.
    """
    anchor, _, negative = given["student"]
    assert anchor is not None
    for field, of in given.items():
        if of[0] is None and any(value is not None for value in of):
            raise ValueError(f"{field} must be given for anchor, positive and negative, or for none: anchor differs")
    sides = []
    for at, name in enumerate(("anchor", "positive", "negative")):
        # For absent negatives, an empty part of what the anchors have.
        values = {
            field: None if of[0] is None else of[0][:0] if at == 2 and negative is None else of[at] for field, of in given.items()
        }
        student = values["student"]
        assert student is not None
        if student.ndim != 2 or student.shape[1] != anchor.shape[1] or (name == "positive" and len(student) != len(anchor)):
            raise ValueError(f"{name} is {tuple(student.shape)}, but anchor is {tuple(anchor.shape)}")
        for field, value in values.items():
            if (value is not None) != (given[field][0] is not None):
                raise ValueError(f"{field} must be given for anchor, positive and negative, or for none: {name} differs")
            if value is not None and len(value) != len(student):
                raise ValueError(f"{field} of {name} has {len(value)} rows, the student's embeddings have {len(student)}")
        guide = values["guide"]
        sides.append(
            _Side(_unit(student), None if guide is None else _unit(guide), values["ids"], values["labels"], values["rows"])
        )
    return sides[0], sides[1], sides[2]


def _unit(vectors: Tensor) -> Tensor:
    return normalize(vectors.to(torch.promote_types(vectors.dtype, torch.float32)), dim=1)


def _block_of_rows(
    anchors: _Side, positives: _Side, pool: _Side, first: int, last: int, options: _Options
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses (R,), masked (4,) and candidates (4,) of rows first to last."""
    a, p = anchors.between(first, last), positives.between(first, last)
    device = a.student.device
    own = torch.arange(first, last, device=device)
    here = torch.arange(last - first, device=device)
    threshold = None if a.guide is None or p.guide is None else _threshold((a.guide * p.guide).sum(dim=1), options)
    own_score = (a.student * p.student).sum(dim=1)

    # block, the side that looks, the side it looks at, whether column i belongs to row i itself
    looks = [("ap", a, positives, True), ("an", a, pool, False)]
    if options.contrast_anchors:
        looks.append(("aa", a, anchors, True))
    if options.contrast_positives:
        looks.append(("pp", p, positives, True))

    scores, masked, candidates = [], *torch.zeros(2, 4, dtype=torch.int64, device=device)
    for block, from_side, to_side, has_own_column in looks:
        score = from_side.student @ to_side.student.T
        leaves = _leaves(from_side, to_side, a, p, threshold, device)
        if options.hard_only:
            leaves |= score.detach() < own_score.detach()[:, None] - similarity_tolerance(own_score)
        stands = _stands(a, to_side, options)  # what is no candidate at all counts neither as one nor as masked
        if has_own_column:
            stands[here, own] = False
        index = BLOCKS.index(block)
        candidates[index], masked[index] = stands.sum(), (leaves & stands).sum()
        leaves |= ~stands
        if block == "ap":
            leaves[here, own] = False
        scores.append(score.masked_fill(leaves, -torch.inf))
    logits = torch.cat(scores, dim=1) / options.temperature
    return cross_entropy(logits, own, reduction="none"), masked, candidates


def _threshold(own: Tensor, options: _Options) -> Tensor:
    """(R, 1): the guide's similarity above which a candidate leaves."""
    margin = options.margin if options.margin_strategy == "absolute" else own.abs() * options.margin
    return (own - margin + similarity_tolerance(own))[:, None]


def similarity_tolerance(similarities: Tensor) -> float:
    """How far two roundings of one similarity may lie apart.

    An exact duplicate of the positive has the similarity of the threshold, and stays (where ids are given, its id removes it).
    Without this tolerance the last bit would decide, which differs from one block size or number of processes to the next.
    """
    return 8 * torch.finfo(similarities.dtype).eps


def _stands(from_side: _Side, to_side: _Side, options: _Options) -> Tensor:
    """(R, N) bool: what is a candidate at all, before anything leaves."""
    shape = len(from_side.student), len(to_side.student)
    if options.own_only is None or from_side.rows is None or to_side.rows is None:
        return torch.ones(shape, dtype=torch.bool, device=to_side.student.device)
    return ~options.own_only[from_side.rows, None] | (to_side.rows[None, :] == from_side.rows[:, None])


def _leaves(
    from_side: _Side, to_side: _Side, anchors: _Side, positives: _Side, threshold: Tensor | None, device: torch.device
) -> Tensor:
    """(R, N) bool: candidates that the guide, their text id or their label removes."""
    leaves = torch.zeros(len(from_side.student), len(to_side.student), dtype=torch.bool, device=device)
    if threshold is not None and from_side.guide is not None and to_side.guide is not None:
        leaves |= from_side.guide @ to_side.guide.T > threshold
    if to_side.ids is not None and anchors.ids is not None and positives.ids is not None:
        leaves |= to_side.ids[None, :] == anchors.ids[:, None]
        leaves |= to_side.ids[None, :] == positives.ids[:, None]
    if to_side.labels is not None and anchors.labels is not None:
        leaves |= (to_side.labels[None, :] == anchors.labels[:, None]) & (anchors.labels >= 0)[:, None]
    return leaves
