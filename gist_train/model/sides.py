"""What a loss over a batch is given, checked: embeddings of anchors, positives and negatives, their dimensions, the rows at hand.

With the legend of `loss.py`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from gist_train.model.masks import Side


def span_of(rows: tuple[int, int] | None, batch: int, block_size: int | None) -> tuple[int, int]:
    """(start, stop) of the rows to compute of B, and in blocks of at least one.

    Raises:
        ValueError: they are not within the batch, or the blocks are of none.
    """
    if block_size is not None and block_size < 1:
        raise ValueError(f"block_size must be 1 or more, or None, not {block_size}")
    start, stop = rows or (0, batch)
    if not 0 <= start <= stop <= batch:
        raise ValueError(f"rows must be (start, stop) within the {batch} rows, not {rows}")
    return start, stop


def weighted_dimensions(
    dimensions: Sequence[int] | None, weights: Sequence[float] | None, width: int
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Dimensions, the largest first, and the weight of each."""
    if dimensions is None:
        if weights is not None:
            raise ValueError(f"dimension_weights {list(weights)} need dimensions to weigh")
        return (width,), (1.0,)
    if not dimensions or len(set(dimensions)) < len(dimensions) or not all(1 <= d <= width for d in dimensions):
        raise ValueError(f"dimensions must be different numbers from 1 to {width}, the width, not {list(dimensions)}")
    weights = [1.0] * len(dimensions) if weights is None else weights
    if len(weights) != len(dimensions) or not all(weight > 0 for weight in weights):
        raise ValueError(f"dimension_weights must be {len(dimensions)} numbers above 0, not {list(weights)}")
    descending = sorted(zip(dimensions, weights, strict=True), reverse=True)
    return tuple(d for d, _ in descending), tuple(weight for _, weight in descending)


def sides_of(
    dimensions: Sequence[int],
    guide_widths: Sequence[int] | None = None,
    **given: tuple[Tensor | None, Tensor | None, Tensor | None],
) -> tuple[Side, Side, Side]:
    """Anchors, positives and negatives, checked against one another; absent negatives become a pool of none.

    Args:
        dimensions: how many of the student's dimensions, counted from the first, are taken.
        guide_widths: given, the guide's embeddings are those of guides of these widths, side by side.
        given: by field of `Side`, what is given of anchors, positives and negatives.
    """
    anchor, _, negative = given["student"]
    assert anchor is not None
    for field, triple in given.items():
        if triple[0] is None and any(value is not None for value in triple):
            raise ValueError(f"{field} must be given for anchor, positive and negative, or for none: anchor differs")
    sides = []
    for side, name in enumerate(("anchor", "positive", "negative")):
        values = {field: triple[side] for field, triple in given.items()}
        if name == "negative" and negative is None:  # an empty part of what the anchors have
            values = {field: None if of_anchors is None else of_anchors[:0] for field, (of_anchors, _, _) in given.items()}
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
        students = tuple(_unit(student[:, :d]) for d in dimensions)  # all of them is an alias, and copies nothing
        sides.append(
            Side(
                students,
                () if guide is None else _of_guides(guide.to(torch.promote_types(guide.dtype, student.dtype)), guide_widths),
                values["ids"],
                values["labels"],
                values["rows"],
            )
        )
    return sides[0], sides[1], sides[2]


def _of_guides(guide: Tensor, widths: Sequence[int] | None) -> tuple[Tensor, ...]:
    """The unit vectors of each of the guides whose embeddings (N, G) are side by side; of one, where no widths are given."""
    if widths is None:
        return (_unit(guide),)
    if sum(widths) != guide.shape[1]:
        raise ValueError(f"guide_widths {list(widths)} must add up to {guide.shape[1]}, the width of the guide's embeddings")
    return tuple(map(_unit, torch.split(guide, list(widths), dim=1)))


def _unit(vectors: Tensor) -> Tensor:
    return normalize(vectors.to(torch.promote_types(vectors.dtype, torch.float32)), dim=1)
