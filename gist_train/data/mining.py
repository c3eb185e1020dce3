"""Labelled texts -> triplets, by the procedure of the MTEB classification triplets that GIST-small was trained with. Pure.

Legend: N rows, G the embeddings' width, C rows of one class. Similarities are computed in blocks: no (N, N) matrix is ever whole.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

Ints = NDArray[np.int64]
SIMILARITIES = 1 << 24
"""Similarities of a block: 4 bytes each, and some 20 while the largest of them are looked for."""


@dataclass(frozen=True, slots=True)
class Mined:
    """T triplets as row numbers, in the order of the seed, and why other rows gave none."""

    anchor: Ints
    """(T,)"""
    positive: Ints
    """(T,) rows of the anchor's class."""
    negative: Ints
    """(T,) rows of other classes."""
    alone: int
    """Rows without another of their class."""
    same_text: int
    """Rows whose positive or negative is the same text as they are."""


def mine_triplets(
    embeddings: NDArray[np.float32],
    labels: Ints,
    text_ids: Ints,
    *,
    seed: int = 1029,
    positives: int = 100,
    temperature: float = 0.05,
    negatives: Literal["uniform", "least_similar"] = "uniform",
    negative_pool: int = 100,
) -> Mined:
    """Every row is an anchor once; the same rows, embeddings and seed give the same triplets.

    Args:
        embeddings: (N, G), of any length: cosines are taken.
        labels: (N,) class numbers, two different ones at least.
        text_ids: (N,) the same number where two rows have the same text.
        seed: of the rows' order and of every draw.
        positives: the positive is drawn from softmax(cosine / temperature) over so many of the most similar rows of the
            anchor's class, itself excluded; over all of them where there are fewer.
        negatives: "uniform": any row of another class; "least_similar": a draw from softmax(-cosine / temperature) over the
            `negative_pool` least similar of them.

    Raises:
        ValueError: arrays of unlike length, or one class only.

    Source: how avsolatorio/medi-data-mteb_avs_triplets was made (authors' code, avsolatorio/GISTEmbed at 26a9f73).
    """
    count = len(labels)
    if len(embeddings) != count or len(text_ids) != count:
        raise ValueError(f"{len(embeddings)} embeddings, {count} labels and {len(text_ids)} text ids")
    by_class = np.argsort(labels, kind="stable")
    sizes = np.unique(labels, return_counts=True)[1]
    if len(sizes) < 2:
        raise ValueError("one class: a negative is a row of another class")
    rng = np.random.default_rng(seed)
    order = rng.permutation(count)
    # Two numbers a row, drawn in the rows' order: how rows are cut into blocks does not decide what a row gets.
    for_positive, for_negative = torch.from_numpy(rng.random((2, count)))
    unit = normalize(torch.from_numpy(embeddings).float(), dim=1)

    positive, negative = np.full(count, -1), np.full(count, -1)
    ordered = unit[by_class]
    starts = np.cumsum(sizes) - sizes
    for start, size in zip(starts.tolist(), sizes.tolist(), strict=True):
        own = by_class[start : start + size]
        if size == 1:
            continue
        members = ordered[start : start + size]
        for first, last in _blocks(size, size):
            here = own[first:last]
            similarity = members[first:last] @ members.T
            similarity[torch.arange(last - first), torch.arange(first, last)] = -torch.inf
            positive[here] = own[_softmax_draw(similarity, min(positives, size - 1), temperature, for_positive[here])]
        if negatives == "uniform":
            # Numbered in the order of classes, the rows of the others are those before the own ones and those after.
            drawn = (for_negative[own] * (count - size)).long().numpy()
            negative[own] = by_class[np.where(drawn < start, drawn, drawn + size)]
            continue
        for first, last in _blocks(size, count):
            here = own[first:last]
            unlikeness = -(members[first:last] @ ordered.T)
            unlikeness[:, start : start + size] = -torch.inf
            drawn = _softmax_draw(unlikeness, min(negative_pool, count - size), temperature, for_negative[here])
            negative[here] = by_class[drawn]

    mined = order[positive[order] >= 0]
    texts = text_ids[mined], text_ids[positive[mined]], text_ids[negative[mined]]
    distinct = (texts[0] != texts[1]) & (texts[0] != texts[2]) & (texts[1] != texts[2])
    kept = mined[distinct]
    return Mined(kept, positive[kept], negative[kept], alone=count - len(mined), same_text=len(mined) - len(kept))


def _blocks(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    """(first, last) of so many of `rows` at a time that a block has `SIMILARITIES` with `columns` at most."""
    size = max(1, SIMILARITIES // columns)
    for first in range(0, rows, size):
        yield first, min(first + size, rows)


def _softmax_draw(scores: Tensor, count: int, temperature: float, uniform: Tensor) -> Ints:
    """(n,) columns: for each row of `scores` (n, columns) one draw from softmax(score / temperature) over its `count` largest.

    `uniform` (n,) in [0, 1) decides the draw, by the inverse of the cumulative distribution.
    """
    best, columns = scores.topk(count, dim=1)
    cumulative = torch.softmax(best.double() / temperature, dim=1).cumsum(dim=1)
    place = torch.searchsorted(cumulative, (uniform * cumulative[:, -1])[:, None], right=True).clamp(max=count - 1)
    drawn: Ints = columns.gather(1, place)[:, 0].numpy()
    return drawn
