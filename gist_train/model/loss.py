"""The guided contrastive loss of GISTEmbed (Solatorio 2024, arXiv 2402.16829), pure torch.

Legend of shapes: B rows (anchor, positive) of the whole batch over all processes, R of them computed here, M negatives in one
flat pool, D width of the student, G width of the guide. Every row contrasts with four blocks of candidates:

    ap  s(anchor_i, positive_j)    an  s(anchor_i, negative_k)    aa  s(anchor_i, anchor_j)    pp  s(positive_i, positive_j)

A candidate is masked, that is, left out of the sum, where the guide finds it more similar than the row's own pair.

With dimensions given, the loss is a weighted sum of losses over the first dimensions of the embeddings alone (Matryoshka
representation learning, Kusupati et al. 2022, arXiv 2205.13147). What the guide masks is the same for all of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from gist_train.model.blockwise import blockwise_losses
from gist_train.model.masks import BLOCKS as BLOCKS
from gist_train.model.masks import SIDES, Options, Rows, Side, Tile, rows_between, similarity_tolerance, tile_of
from gist_train.model.sides import sides_of, span_of, weighted_dimensions


@dataclass(frozen=True, slots=True)
class LossOutput:
    """What a call of `guided_contrastive_loss` gives."""

    loss: Tensor
    """Scalar: sum(row_losses) / B, so that ranks' losses add up to the batch mean."""
    row_losses: Tensor
    """(R,) cross entropy of each row computed here, detached; with dimensions their weighted sum."""
    masked: Tensor
    """(4,) int64: candidates of each of `BLOCKS` that were masked: too similar, a duplicate, or not hard (which
    is counted for the largest of the dimensions)."""
    candidates: Tensor
    """(4,) int64: candidates of each of `BLOCKS` before masking, a row's own column not counted; the same for all dimensions."""


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
    mask: Literal["hard", "soft"] = "hard",
    softness: float = 0.05,
    votes: Literal["any", "majority", "all"] | None = None,
    guide_widths: Sequence[int] | None = None,
    hardness: float = 0.0,
    negatives: Literal["all", "hard"] = "all",
    block_size: int | None = None,
    dimensions: Sequence[int] | None = None,
    dimension_weights: Sequence[float] | None = None,
    anchor_ids: Tensor | None = None,
    positive_ids: Tensor | None = None,
    negative_ids: Tensor | None = None,
    labels: Tensor | None = None,
    negative_labels: Tensor | None = None,
    own_negatives_only: Tensor | None = None,
    negative_rows: Tensor | None = None,
    rows: tuple[int, int] | None = None,
) -> LossOutput:
    """Cross entropy of s / temperature against each row's own positive, over the candidates that the guide does not mask.

    Args:
        anchor, positive: (B, D) embeddings of the student, of any length: they are normalised here.
        negative: (M, D), a pool that all rows share, or None.
        guide_anchor, guide_positive, guide_negative: (B, G), (B, G), (M, G), or all None for no guide.
        temperature: divides the similarities (the inverse of sentence-transformers' `scale`).
        margin, margin_strategy: a candidate of row i is masked where the guide's similarity is greater than
            g_i - margin ("absolute") or g_i - |g_i| margin ("relative"), g_i the guide's similarity of the row's own pair.
        mask, softness: "hard" leaves candidates above that threshold out; "soft" adds to every candidate's logit
            log sigmoid((threshold - guide's similarity) / softness): far above it nothing is left of a candidate, far below all,
            and the hard mask is its limit.
        votes, guide_widths: given, the guide's embeddings are those of guides of these widths, side by side, each with a
            threshold of its own; a candidate is masked where any of them, over a half or all find it above. Under a soft mask
            the guide counts whose excess over its threshold decides that.
        hardness: a candidate's logit gains this times its similarity, without gradient, so that candidates which the student
            finds similar count more (Lan et al. 2025, arXiv 2503.04812; Schechter Vera et al. 2025, arXiv 2509.20354).
        contrast_anchors, contrast_positives: whether the blocks aa and pp take part.
        negatives: "hard" also masks candidates that the student already finds less similar than the row's own positive.
            With dimensions each has negatives of its own: which are hard depends on the similarities at hand.
        block_size: the similarities of so many rows with so many candidates are in memory at a time, forward and backward, and
            a bit for every candidate in between; None for all at once. Small blocks are slow: 2,048 is a good number on a CPU.
        dimensions: given, the loss is the sum over d of its weight times the loss over the first d dimensions of the
            student's embeddings, normalised anew, as in sentence-transformers' MatryoshkaLoss around its GISTEmbedLoss. Their
            order is of no account. The guide's embeddings are not cut: its masks are made once and serve all dimensions.
        dimension_weights: one for each of the dimensions; None for 1 each.
        anchor_ids, positive_ids, negative_ids: (B,), (B,), (M,) text ids; given, candidates that are the same text as the
            row's anchor or positive are masked.
        labels, negative_labels: (B,) of anchor and positive, (M,), -1 for none; given, candidates with the anchor's label are
            masked, guide or no guide.
        own_negatives_only: (B,) bool: rows that keep their own positive and negatives as candidates and nothing else of the
            batch (FlagEmbedding's `no_in_batch_neg`, by row); `negative_rows` (M,), the row of each negative, comes with it.
        rows: (start, stop) of the rows to compute where several processes share the batch; None for all B. The sum of
            `.loss` over processes that share all rows among them is the loss of the whole batch.

    Returns:
        LossOutput. Similarities and softmax are float32 at least, whatever the dtype of the embeddings or an autocast around.

    Raises:
        ValueError: shapes, dimensions or weights that do not fit, or a guide or ids given for some of the texts only.

    The row's own positive is never masked; the diagonals of aa and pp always are. In the authors' code (avsolatorio/GISTEmbed)
    these diagonals are masked only because guide(x, x) is the largest similarity there is, which rounding or a negative margin
    undoes.
    """
    _check_options(temperature, margin_strategy, mask, softness, hardness, negatives)
    if (votes is None) != (guide_widths is None):
        raise ValueError("votes and guide_widths come together: give both, or none")
    widths, weights = weighted_dimensions(dimensions, dimension_weights, anchor.shape[-1])
    start, stop = span_of(rows, len(anchor), block_size)
    own = None if own_negatives_only is None else torch.arange(len(anchor), device=anchor.device)
    sides = sides_of(
        widths,
        guide_widths,
        student=(anchor, positive, negative),
        guide=(guide_anchor, guide_positive, guide_negative),
        ids=(anchor_ids, positive_ids, negative_ids),
        labels=(labels, labels, negative_labels),
        rows=(own, own, negative_rows),
    )
    options = Options(
        temperature=temperature,
        margin=margin,
        margin_strategy=margin_strategy,
        contrast_anchors=contrast_anchors,
        contrast_positives=contrast_positives,
        softness=softness if mask == "soft" else None,
        needed=1 if votes is None else _needed(votes, len(sides[0].guides)),
        hardness=hardness,
        hard_only=negatives == "hard",
        weights=weights,
        own_only=own_negatives_only,
    )
    with torch.autocast(anchor.device.type, enabled=False):
        if block_size is None:
            row_losses, masked, candidates = _whole_losses(sides, start, stop, options)
        else:
            row_losses, masked, candidates = blockwise_losses(sides, start, stop, block_size, options)
        # With no rows here the (empty) sum still depends on all embeddings, so that every process has a backward pass.
        return LossOutput(row_losses.sum() / len(anchor), row_losses.detach(), masked, candidates)


def _check_options(temperature: float, margin_strategy: str, mask: str, softness: float, hardness: float, negatives: str) -> None:
    if not temperature > 0:
        raise ValueError(f"temperature must be greater than 0, not {temperature}")
    if margin_strategy not in ("absolute", "relative"):
        raise ValueError(f'margin_strategy must be "absolute" or "relative", not "{margin_strategy}"')
    if mask not in ("hard", "soft"):
        raise ValueError(f'mask must be "hard" or "soft", not "{mask}"')
    if not softness > 0 or not hardness >= 0:
        raise ValueError(f"softness must be greater than 0 and hardness 0 or more, not {softness} and {hardness}")
    if negatives not in ("all", "hard"):
        raise ValueError(f'negatives must be "all" or "hard", not "{negatives}"')


def _needed(votes: str, guides: int) -> int:
    """How many of the guides must find a candidate too similar."""
    needed = {"any": 1, "majority": guides // 2 + 1, "all": guides}
    if votes not in needed:
        raise ValueError(f'votes must be "any", "majority" or "all", or None, not "{votes}"')
    return needed[votes]


def _whole_losses(sides: Sequence[Side], start: int, stop: int, options: Options) -> tuple[Tensor, Tensor, Tensor]:
    """Losses (R,), masked (4,) and candidates (4,) of rows start to stop, all at once: the slow, obvious twin of the tiles."""
    rows = rows_between(sides, start, stop, options)
    tiles = [tile_of(block, sides, rows, 0, len(sides[SIDES[block][1]]), options) for block in options.blocks]
    losses, kept = _over_dimension(0, tiles, rows, options)
    for d in range(1, len(options.weights)):
        losses = losses + _over_dimension(d, tiles, rows, options)[0]
    masked, candidates = torch.zeros(2, 4, dtype=torch.int64, device=losses.device)
    for tile, kept_in_tile in zip(tiles, kept, strict=True):
        index = BLOCKS.index(tile.block)
        candidates[index], masked[index] = tile.count, tile.count - kept_in_tile
    return losses, masked, candidates


def _over_dimension(d: int, tiles: Sequence[Tile], rows: Rows, options: Options) -> tuple[Tensor, list[Tensor]]:
    """Over dimension number `d`: cross entropies (R,) times its weight, and how many candidates of each tile are not masked."""
    own_score = (rows.anchors.students[d] * rows.positives.students[d]).sum(dim=1).detach()
    scores, kept, added = [], [], []
    for tile in tiles:
        score = tile.queries.students[d] @ tile.candidates.students[d].T
        mask = tile.mask
        if options.hard_only:
            mask = mask | (score.detach() < own_score[:, None] - similarity_tolerance(own_score))
            if tile.block == "ap":
                mask.diagonal(rows.first).fill_(False)
        # A row's own positive is in the sum, and is no candidate.
        kept.append((~(mask | tile.left_out)).sum() - (len(own_score) if tile.block == "ap" else 0))
        scores.append(score.masked_fill(mask, -torch.inf))
        added.append(_added(score.detach(), tile, rows, options))
    logits = torch.cat(scores, dim=1) / options.temperature
    if options.hardness or options.softness is not None:
        logits = logits + torch.cat(added, dim=1)
    own = torch.arange(rows.first, rows.first + len(own_score), device=own_score.device)
    return options.weights[d] * cross_entropy(logits, own, reduction="none"), kept


def _added(score: Tensor, tile: Tile, rows: Rows, options: Options) -> Tensor:
    """(R, N) what hardness and a soft mask add to the logits of a tile; nothing to that of a row's own positive."""
    added = options.hardness * score
    if tile.block == "ap":
        added.diagonal(rows.first).fill_(0.0)
    return added if tile.soft is None else added + tile.soft
