"""What the student learns of scores that rows came with: the divergence of its distribution over scored texts from theirs.

A row whose positive and negatives are scored, as by a reranker (FlagEmbedding's `pos_scores` and `neg_scores`), is compared
within itself; rows of a scored pair each (such as 0 to 5 by people) are compared with one another:

    sum_j t_j (log t_j - log q_j),   t = softmax(scores / score_temperature),   q = softmax(s / temperature)

over the own positive and negatives j of the row, or over the n pairs j of the batch, n times. Pure torch, with the legend of
`loss.py`: B rows of the whole batch, R of them computed here, M negatives, D width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from gist_train.model.sides import span_of, weighted_dimensions


def score_loss(
    anchor: Tensor,
    positive: Tensor,
    negative: Tensor | None,
    *,
    positive_scores: Tensor,
    negative_scores: Tensor,
    negative_rows: Tensor,
    temperature: float = 0.05,
    score_temperature: float = 1.0,
    dimensions: Sequence[int] | None = None,
    dimension_weights: Sequence[float] | None = None,
    rows: tuple[int, int] | None = None,
) -> Tensor:
    """Scalar: the sum over rows / B, so that ranks' losses add up to the batch mean.

    Args:
        anchor, positive, negative: (B, D), (B, D), (M, D) or None: embeddings of the student, of any length.
        positive_scores, negative_scores: (B,) and (M,), NaN for none. Of a row without a score of its positive none counts.
        negative_rows: (M,) the row of each negative.
        temperature, score_temperature: divide the student's similarities and the scores.
        dimensions, dimension_weights, rows: as in `guided_contrastive_loss`.

    Raises:
        ValueError: temperatures, dimensions or weights that do not fit.
    """
    if not (temperature > 0 and score_temperature > 0):
        raise ValueError(f"temperatures must be greater than 0, not {temperature} and {score_temperature}")
    widths, weights = weighted_dimensions(dimensions, dimension_weights, anchor.shape[-1])
    start, stop = span_of(rows, len(anchor), None)
    texts = positive if negative is None else torch.cat([positive, negative])
    own = torch.arange(len(anchor), device=anchor.device)
    with torch.autocast(anchor.device.type, enabled=False):
        wide = torch.promote_types(anchor.dtype, torch.float32)
        scores = torch.cat([positive_scores, negative_scores]).to(wide)
        row = torch.cat([own, negative_rows])
        there = scores.isfinite() & positive_scores.isfinite()[row]
        in_row = torch.zeros(len(anchor), device=anchor.device, dtype=wide).index_add_(0, row, there.to(wide))
        # Rows with more than one scored text are groups of their own; all others together are the last one.
        group = torch.where(in_row > 1, own, len(anchor))[row]
        size = torch.zeros(len(anchor) + 1, device=anchor.device, dtype=wide).index_add_(0, group, there.to(wide))
        times = torch.where(torch.arange(len(size), device=size.device) < len(anchor), 1.0, size)
        here = there & (row >= start) & (row < stop)
        target = _log_softmax(scores.nan_to_num() / score_temperature, group, there, len(size))
        loss = anchor.new_zeros((), dtype=wide)
        for width, weight in zip(widths, weights, strict=True):
            anchors, others = (normalize(x[:, :width].to(wide), dim=1) for x in (anchor, texts))
            learned = _log_softmax((anchors[row] * others).sum(dim=1) / temperature, group, there, len(size))
            apart = times[group] * target.exp() * (target - learned)
            loss = loss + weight * apart.masked_fill(~here, 0.0).sum()
        return loss / len(anchor)


def _log_softmax(logits: Tensor, group: Tensor, there: Tensor, groups: int) -> Tensor:
    """(N,) over each group's members that are there; of no account elsewhere."""
    lowest = torch.finfo(logits.dtype).min
    peak = logits.new_full((groups,), lowest).scatter_reduce(0, group, logits.detach().masked_fill(~there, lowest), "amax")
    lowered = (logits - peak[group]).masked_fill(~there, 0.0)
    total = logits.new_zeros(groups).index_add(0, group, lowered.exp() * there)
    return lowered - total.clamp(min=torch.finfo(logits.dtype).tiny).log()[group]
