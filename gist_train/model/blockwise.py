"""The guided contrastive loss a tile of similarities at a time, forward and backward, pure torch.

With the legend of `loss.py`. A tile is some rows by some columns of one of the four blocks. Going forward, a row keeps two
numbers: its largest logit so far, and the sum of the exponentials of its logits less that one (the online softmax of Milakov and
Gimelshein 2018, arXiv 1805.02867). A candidate keeps one bit: whether it left. Going backward, the student's similarities are
computed again, and the guide's embeddings are not needed any more, unless the mask is soft.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gist_train.model.masks import BLOCKS, SIDES, Options, Side, rows_between, similarity_tolerance, tile_of

_GATHER = 0x0102040810204080
"""Times 8 bytes of 0 or 1, read as one number, this has them all in its highest byte; what is higher is lost, as it should be."""


def blockwise_losses(
    sides: Sequence[Side], start: int, stop: int, block_size: int, options: Options
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses (R,), masked (4,) and candidates (4,) of rows start to stop, from tiles of at most `block_size` rows and columns.

    What is kept for backward beside the student's embeddings: three numbers a row for each of the dimensions, and R x N / 8 bytes
    of each block (for each of the dimensions where each has hard negatives of its own).

    Raises:
        RuntimeError: in backward, with create_graph: there is no second derivative.
    """
    students = [student for side in sides for student in side.students]
    out: tuple[Tensor, Tensor, Tensor] = _Blockwise.apply(sides, (start, stop, block_size), options, *students)  # type: ignore[no-untyped-call]
    return out


class _Blockwise(torch.autograd.Function):
    """Twice over the same tiles in the same order. No tile has a graph: its gradients are added where they belong."""

    @staticmethod
    def forward(
        ctx: Any, sides: Sequence[Side], span: tuple[int, int, int], options: Options, *students: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        start, stop, size = span
        own, peak, total = students[0].new_empty(3, len(options.weights), stop - start)
        masked, candidates = torch.zeros(2, len(BLOCKS), dtype=torch.int64, device=own.device)
        lengths = [len(side) for side in sides]
        bits = _Bits(own.new_empty(_bytes_of_bits(start, stop, size, lengths, options), dtype=torch.uint8))
        for first, last in parts_of(start, stop, size):
            rows = rows_between(sides, first, last, options)
            here = slice(first - start, last - start)
            for d, (anchors, positives) in enumerate(zip(rows.anchors.students, rows.positives.students, strict=True)):
                # A row's own pair is in its sum from the beginning, and in no tile.
                own[d, here] = (anchors * positives).sum(dim=1) / options.temperature
            peak[:, here], total[:, here] = own[:, here], 1.0
            for block, left, right in _columns(lengths, size, options):
                tile = tile_of(block, sides, rows, left, right, options)
                if block == "ap":
                    tile.mask.diagonal(first - left).fill_(True)
                index = BLOCKS.index(block)
                candidates[index] += tile.count
                masked[index] += tile.count
                for d in range(len(options.weights)):
                    logits = _logits(tile.queries.students[d], tile.candidates.students[d], options.temperature)
                    mask = tile.mask
                    if options.hard_only:
                        border = own[d, here] - similarity_tolerance(own) / options.temperature
                        mask = mask | (logits < border[:, None])
                    if d == 0:
                        left_out = mask if tile.soft is None else mask | tile.left_out
                        masked[index] -= mask.numel() - left_out.count_nonzero()
                    if d == 0 or options.hard_only:
                        bits.write(mask)
                    logits = _weighed(logits, tile.soft, options)
                    _add(logits.masked_fill_(mask, -torch.inf), peak[d, here], total[d, here])
        ctx.save_for_backward(*students, own, peak, total, bits.packed)
        ctx.span, ctx.options = span, options
        # Under a soft mask the guide's similarities are computed again; a hard one is in the bits.
        soft = options.softness is not None and bool(sides[0].guides)
        ctx.guided = [replace(side, students=tuple(x.detach() for x in side.students)) for side in sides] if soft else None
        ctx.mark_non_differentiable(masked, candidates)
        return (_weights(options, own) * (peak - own + total.log())).sum(dim=0), masked, candidates

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # asked for with create_graph; without an error the tiles would count as constants
            raise RuntimeError("the loss in blocks has no second derivative: give no block_size, or no create_graph")
        (start, stop, size), options = ctx.span, ctx.options
        dimensions = len(options.weights)
        count = 3 * dimensions
        students, (own, peak, total, packed) = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
        bits = _Bits(packed)
        # Number d of a side is what it is over that dimension.
        sides = [students[n : n + dimensions] for n in range(0, count, dimensions)]
        gradients = [[torch.zeros_like(student) for student in side] for side in sides]
        # Of a candidate's logit: its share of the row's sum, times the row's gradient and the loss's weight.
        scale = _weights(options, own) * gradient / total / options.temperature
        with torch.autocast(own.device.type, enabled=False):
            for first, last in parts_of(start, stop, size):
                here = slice(first - start, last - start)
                rows = None if ctx.guided is None else rows_between(ctx.guided, first, last, options)
                for block, left, right in _columns([len(side[0]) for side in sides], size, options):
                    query, candidate = SIDES[block]
                    soft = None if rows is None else tile_of(block, ctx.guided, rows, left, right, options).soft
                    for d in range(dimensions):
                        if d == 0 or options.hard_only:
                            mask = bits.read(last - first, right - left)
                        x, y = sides[query][d][first:last], sides[candidate][d][left:right]
                        slopes = _weighed(_logits(x, y, options.temperature), soft, options).sub_(peak[d, here, None]).exp_()
                        slopes.masked_fill_(mask, 0.0).mul_(scale[d, here, None])
                        gradients[query][d][first:last].addmm_(slopes, y)
                        gradients[candidate][d][left:right].addmm_(slopes.T, x)
        own_slopes = scale * ((own - peak).exp() - total)
        for d in range(dimensions):
            for side, other in ((0, 1), (1, 0)):
                gradients[side][d][start:stop].addcmul_(own_slopes[d, :, None], sides[other][d][start:stop])
        return None, None, None, *(of_student for of_side in gradients for of_student in of_side)


def _weights(options: Options, like: Tensor) -> Tensor:
    """(dimensions, 1), filled in where it is: a list copied to a GPU would wait for it."""
    return torch.cat([like.new_full((1, 1), weight) for weight in options.weights])


def parts_of(start: int, stop: int, size: int) -> Iterator[tuple[int, int]]:
    """(first, the one after the last) of parts of at most `size`, from start to stop."""
    for first in range(start, stop, size):
        yield first, min(first + size, stop)


def _columns(lengths: Sequence[int], size: int, options: Options) -> Iterator[tuple[str, int, int]]:
    """The tiles of one part of the rows: block, first column and the one after the last."""
    for block in options.blocks:
        for left, right in parts_of(0, lengths[SIDES[block][1]], size):
            yield block, left, right


class _Bits:
    """Flags of tile after tile, written or read in order. One tensor: one for each tile would fall into the holes that tiles
    leave when they are freed, the next tile would not fit in there, and the heap would grow to many times of what it holds."""

    def __init__(self, packed: Tensor):
        self.packed, self._at = packed, 0

    def write(self, flags: Tensor) -> None:
        self._next(flags.numel()).copy_(pack_bits(flags))

    def read(self, rows: int, columns: int) -> Tensor:
        return unpack_bits(self._next(rows * columns), rows, columns)

    def _next(self, flags: int) -> Tensor:
        begin, self._at = self._at, self._at + _bytes(flags)
        return self.packed[begin : self._at]


def _bytes(flags: int) -> int:
    return -(-flags // 8)


def _bytes_of_bits(start: int, stop: int, size: int, lengths: Sequence[int], options: Options) -> int:
    """What `_Bits` of all tiles need."""
    one = sum(
        _bytes((last - first) * (right - left))
        for first, last in parts_of(start, stop, size)
        for _, left, right in _columns(lengths, size, options)
    )
    return one * (len(options.weights) if options.hard_only else 1)


def _logits(x: Tensor, y: Tensor, temperature: float) -> Tensor:
    """(R, N): the matrix product divides by the temperature on its way."""
    return torch.addmm(x.new_zeros(1), x, y.T, beta=0.0, alpha=1 / temperature)


def _weighed(logits: Tensor, soft: Tensor | None, options: Options) -> Tensor:
    """The logits with what hardness and a soft mask add to them, in place."""
    if options.hardness:
        logits.mul_(1 + options.hardness * options.temperature)
    return logits if soft is None else logits.add_(soft)


def _add(logits: Tensor, peak: Tensor, total: Tensor) -> None:
    """Takes the logits (R, N) of a tile into the sums (R,) of its rows, in place; the logits are used up."""
    higher = torch.maximum(peak, logits.amax(dim=1))
    total.mul_(peak.sub_(higher).exp_()).add_(logits.sub_(higher[:, None]).exp_().sum(dim=1))
    peak.copy_(higher)


def pack_bits(flags: Tensor) -> Tensor:
    """(ceil(n / 8),) uint8 of n flags of any shape, a bit each."""
    padded = torch.nn.functional.pad(flags.flatten(), (0, -flags.numel() % 8))
    return (padded.view(torch.int64) * _GATHER >> 56).to(torch.uint8)


def unpack_bits(bits: Tensor, rows: int, columns: int) -> Tensor:
    """(rows, columns) bool: what `pack_bits` was given."""
    every, place = torch.arange(256, device=bits.device), torch.arange(8, device=bits.device)
    flags_of = (every[:, None] >> place & 1).to(torch.bool)
    # The eight flags of a byte as one number: they come with one look-up.
    eight = flags_of.view(torch.int64).flatten().index_select(0, bits.int())
    return eight.view(torch.bool)[: rows * columns].view(rows, columns)
