"""What the student learns of how the guide orders a batch: the divergence of its distribution over candidates from the guide's.

For each anchor i, over the candidates j of the batch (all positives, all negatives, the other anchors),

    sum_j p_ij (log p_ij - log q_ij),    p_i = softmax(g_ij / guide_temperature),    q_i = softmax(s_ij / temperature)

with g the guide's similarities and s the student's: the Kullback-Leibler divergence of knowledge distillation (Hinton et al.
2015, arXiv 1503.02531), over similarities in a batch. No candidate is masked for being similar: that is what is to be learned.

Beside it, `regression_loss` has the student's embeddings follow the guide's own (as in LEAF, Vujanic and Rueckstiess 2025, arXiv
2509.12539, which learns a map between the two; here it is fixed).

Pure torch, with the legend of `loss.py`: B rows of the whole batch, R of them computed here, M negatives, D and G widths.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cosine_similarity

from gist_train.model.blockwise import parts_of
from gist_train.model.masks import Rows, Side, eligible
from gist_train.model.sides import sides_of, span_of, weighted_dimensions


@dataclass(frozen=True, slots=True)
class DistillationOutput:
    """What a call of `distillation_loss` gives."""

    loss: Tensor
    """Scalar: sum(row_losses) / B, so that ranks' losses add up to the batch mean."""
    row_losses: Tensor
    """(R,) divergence of each row computed here, detached; with dimensions their weighted sum."""


@dataclass(frozen=True, slots=True)
class _Scales:
    """What similarities are divided by, and the weight of each of the dimensions."""

    student: float
    guide: float
    weights: tuple[float, ...]


def distillation_loss(
    anchor: Tensor,
    positive: Tensor,
    negative: Tensor | None,
    *,
    guide_anchor: Tensor,
    guide_positive: Tensor,
    guide_negative: Tensor | None,
    temperature: float = 0.05,
    guide_temperature: float | None = None,
    block_size: int | None = None,
    dimensions: Sequence[int] | None = None,
    dimension_weights: Sequence[float] | None = None,
    anchor_ids: Tensor | None = None,
    positive_ids: Tensor | None = None,
    negative_ids: Tensor | None = None,
    own_negatives_only: Tensor | None = None,
    negative_rows: Tensor | None = None,
    rows: tuple[int, int] | None = None,
) -> DistillationOutput:
    """The divergence of the student's distribution over each anchor's candidates from the guide's.

    Args:
        anchor, positive, negative: (B, D), (B, D), (M, D) or None: embeddings of the student, of any length.
        guide_anchor, guide_positive, guide_negative: (B, G), (B, G), (M, G) or None. They get no gradient.
        temperature, guide_temperature: divide the student's similarities and the guide's; the latter None for the same.
        block_size: the similarities of so many rows with so many candidates are in memory at a time; None for all at once.
        dimensions, dimension_weights: as in `guided_contrastive_loss`: the guide's embeddings are not cut.
        anchor_ids, positive_ids, negative_ids: (B,), (B,), (M,) text ids; given, what is the anchor's own text is no candidate:
            its similarity is 1, whoever is asked, and tells nothing.
        own_negatives_only, negative_rows: as in `guided_contrastive_loss`: such rows keep their own positive and negatives.
        rows: (start, stop) of the rows to compute, as there.

    Returns:
        DistillationOutput. Similarities and softmax are float32 at least. A row without a candidate has the divergence 0.

    Raises:
        ValueError: shapes, temperatures, dimensions or weights that do not fit.
    """
    guide_temperature = temperature if guide_temperature is None else guide_temperature
    if not (temperature > 0 and guide_temperature > 0):
        raise ValueError(f"temperatures must be greater than 0, not {temperature} and {guide_temperature}")
    widths, weights = weighted_dimensions(dimensions, dimension_weights, anchor.shape[-1])
    scales = _Scales(temperature, guide_temperature, weights)
    start, stop = span_of(rows, len(anchor), block_size)
    own = None if own_negatives_only is None else torch.arange(len(anchor), device=anchor.device)
    sides = sides_of(
        widths,
        student=(anchor, positive, negative),
        guide=(guide_anchor, guide_positive, guide_negative),
        ids=(anchor_ids, positive_ids, negative_ids),
        labels=(None, None, None),
        rows=(own, own, negative_rows),
    )
    with torch.autocast(anchor.device.type, enabled=False):
        if block_size is None:
            row_losses = _whole(sides, start, stop, scales, own_negatives_only)
        else:
            students = [student for side in sides for student in side.students]
            fixed = [replace(side, students=tuple(student.detach() for student in side.students)) for side in sides]
            span = start, stop, block_size
            row_losses = _Blockwise.apply(fixed, span, scales, own_negatives_only, *students)  # type: ignore[no-untyped-call]
        return DistillationOutput(row_losses.sum() / len(anchor), row_losses.detach())


def _whole(sides: Sequence[Side], start: int, stop: int, scales: _Scales, alone: Tensor | None) -> Tensor:
    """(R,) all at once: the slow, obvious twin of the tiles."""
    rows = _rows(sides, start, stop, alone)
    masks = [_no_candidates(side, sides[side], rows, 0) for side in range(3)]
    none = torch.cat(masks, dim=1)
    guides = torch.cat([_guide_logits(rows, candidates, scales) for candidates in sides], dim=1)
    target = _log_softmax(guides, none)
    losses = target.new_zeros(stop - start)
    for d, weight in enumerate(scales.weights):
        scores = [rows.anchors.students[d] @ candidates.students[d].T for candidates in sides]
        student = _log_softmax(torch.cat(scores, dim=1) / scales.student, none)
        losses = losses + weight * (target.exp() * (target - student)).masked_fill(none, 0.0).sum(dim=1)
    return losses


def _log_softmax(logits: Tensor, none: Tensor) -> Tensor:
    """Over what is a candidate; finite everywhere, and of no account where there is none."""
    return torch.log_softmax(logits.masked_fill(none, torch.finfo(logits.dtype).min), dim=1)


def _rows(sides: Sequence[Side], first: int, last: int, alone: Tensor | None) -> Rows:
    anchors, positives = (side.between(first, last) for side in sides[:2])
    return Rows(first, anchors, positives, (), None if alone is None else alone[first:last])


def _no_candidates(side: int, candidates: Side, rows: Rows, left: int) -> Tensor:
    """(R, N) bool: True where one of `candidates`, of anchors (side 0), positives (1) or negatives (2), is none of the row.

    Args:
        left: the number of the first of the candidates.
    """
    allowed = eligible(candidates, rows)
    shape = len(rows.anchors), len(candidates)
    none = torch.zeros(shape, dtype=torch.bool, device=candidates.students[0].device) if allowed is None else ~allowed
    if candidates.ids is not None and rows.anchors.ids is not None:
        none |= candidates.ids[None, :] == rows.anchors.ids[:, None]
    if side == 0:
        none.diagonal(rows.first - left).fill_(True)
    return none


def _guide_logits(rows: Rows, candidates: Side, scales: _Scales) -> Tensor:
    (anchors,), (others,) = rows.anchors.guides, candidates.guides
    return anchors @ others.T / scales.guide


class _Blockwise(torch.autograd.Function):
    """A tile of similarities at a time, forward and, computed again, backward; sums over a row's tiles as in `blockwise`."""

    @staticmethod
    def forward(
        ctx: Any, sides: Sequence[Side], span: tuple[int, int, int], scales: _Scales, alone: Tensor | None, *students: Tensor
    ) -> Tensor:
        start, stop, size = span
        count, rows_here = len(scales.weights), stop - start
        lowest = torch.finfo(students[0].dtype).min
        # Of the guide, then of the student over each dimension: the largest logit so far, and the sum of exponentials less that.
        peak, total = students[0].new_full((count + 1, rows_here), lowest), students[0].new_zeros(count + 1, rows_here)
        apart = students[0].new_zeros(count, rows_here)  # sum of exp(guide - its peak) * (guide - student)
        for first, last in parts_of(start, stop, size):
            rows, here = _rows(sides, first, last, alone), slice(first - start, last - start)
            for guide, logits, none in _tiles(sides, rows, size, scales):
                before = peak[0, here].clone()
                shares = _add(guide, none, peak[0, here], total[0, here])
                apart[:, here] *= (before - peak[0, here]).exp()
                for d in range(count):
                    apart[d, here] += (shares * (guide - logits[d])).sum(dim=1)
                    _add(logits[d], none, peak[d + 1, here], total[d + 1, here])
        # Without a candidate all sums are 0: the divergence is 0 too.
        log_total = peak + total.clamp(min=torch.finfo(total.dtype).tiny).log()
        there = total[0] > 0
        losses = (apart / total[0].clamp(min=torch.finfo(total.dtype).tiny) - log_total[0] + log_total[1:]).where(there, 0.0)
        ctx.save_for_backward(log_total)
        ctx.sides, ctx.span, ctx.scales, ctx.alone = sides, span, scales, alone
        weights = torch.tensor(scales.weights, dtype=losses.dtype, device=losses.device)
        return (weights[:, None] * losses).sum(dim=0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("the distillation in blocks has no second derivative: give no block_size, or no create_graph")
        (start, stop, size), scales = ctx.span, ctx.scales
        (log_total,) = ctx.saved_tensors
        gradients = [torch.zeros_like(student) for side in ctx.sides for student in side.students]
        count = len(scales.weights)
        with torch.autocast(gradient.device.type, enabled=False):
            for first, last in parts_of(start, stop, size):
                rows, here = _rows(ctx.sides, first, last, ctx.alone), slice(first - start, last - start)
                tiles = zip(_tiles(ctx.sides, rows, size, scales), _columns(ctx.sides, size), strict=True)
                for (guide, logits, none), (side, left, right) in tiles:
                    shares = (guide - log_total[0, here, None]).exp_().masked_fill_(none, 0.0)
                    for d, weight in enumerate(scales.weights):
                        slopes = (logits[d] - log_total[d + 1, here, None]).exp_().masked_fill_(none, 0.0).sub_(shares)
                        slopes.mul_(gradient[here, None] * weight / scales.student)
                        candidates, anchors = ctx.sides[side].students[d][left:right], rows.anchors.students[d]
                        gradients[d][first:last].addmm_(slopes, candidates)
                        gradients[side * count + d][left:right].addmm_(slopes.T, anchors)
        return None, None, None, None, *gradients


def _columns(sides: Sequence[Side], size: int) -> Iterator[tuple[int, int, int]]:
    """(side, first candidate, the one after the last) of each tile of some rows."""
    for side, candidates in enumerate(sides):
        for left, right in parts_of(0, len(candidates), size):
            yield side, left, right


def _tiles(sides: Sequence[Side], rows: Rows, size: int, scales: _Scales) -> Iterator[tuple[Tensor, list[Tensor], Tensor]]:
    """Of each tile the guide's logits (R, N), the student's over each dimension, and (R, N) what is no candidate."""
    for side, left, right in _columns(sides, size):
        candidates = sides[side].between(left, right)
        students = zip(rows.anchors.students, candidates.students, strict=True)
        logits = [anchors @ others.T / scales.student for anchors, others in students]
        yield _guide_logits(rows, candidates, scales), logits, _no_candidates(side, candidates, rows, left)


def _add(logits: Tensor, none: Tensor, peak: Tensor, total: Tensor) -> Tensor:
    """Takes a tile's logits (R, N) into the sums (R,) of its rows, in place; returns the exponentials less the new peak."""
    higher = torch.maximum(peak, logits.masked_fill(none, torch.finfo(logits.dtype).min).amax(dim=1))
    total.mul_((peak - higher).exp())
    peak.copy_(higher)
    shares = (logits - higher[:, None]).masked_fill(none, -torch.inf).exp()
    total.add_(shares.sum(dim=1))
    return shares


def regression_loss(students: Tensor, guides: Tensor, guide_map: Tensor | None) -> Tensor:
    """Scalar: the sum over n texts of 1 - cos(student's embedding, guide's embedding in the student's dimensions).

    Args:
        students: (n, D), of any length.
        guides: (n, G), of any length.
        guide_map: (G, D) from `map_to_width`; None where G is D.
    """
    with torch.autocast(students.device.type, enabled=False):
        wide = torch.promote_types(students.dtype, torch.float32)
        targets = guides.to(wide) if guide_map is None else guides.to(wide) @ guide_map.to(guides.device, wide)
        return (1 - cosine_similarity(students.to(wide), targets, dim=1)).sum()


def map_to_width(vectors: NDArray[np.float32], width: int) -> Tensor | None:
    """(G, D) that takes a guide's vectors into D dimensions and keeps their similarities as far as D can; None where G is D.

    Into fewer: the D directions in which `vectors` (n, G) are longest (their principal components, uncentred, since similarities
    are cosines of the vectors themselves). Into more: as they are, and 0 in the rest. It is computed anew from the same vectors
    by every run and process, and is no state.
    """
    own = vectors.shape[1]
    if own == width:
        return None
    if own < width:
        return torch.eye(own, width)
    moments = vectors.astype(np.float64).T @ vectors.astype(np.float64)
    directions = np.linalg.eigh(moments)[1][:, ::-1][:, :width]
    # Of a direction and its opposite, the one whose largest part is positive.
    largest = np.abs(directions).argmax(axis=0)
    signs = np.sign(directions[largest, np.arange(width)])
    return torch.from_numpy(np.ascontiguousarray(directions * signs)).float()
