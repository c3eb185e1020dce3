"""Attention within each text of a packed sequence, as one Triton kernel each way, for CUDA.

Torch's variable-length flash attention works in squares of 128 tokens and gives each text at least one. Most texts that
embeddings are trained on are shorter: of 32 tokens, one in sixteen of a square's pairs is real. Here a square of 64 tokens lies
over the packed sequence as it is, whatever texts are in it, and meets only the squares that hold tokens of these same texts.
The texts are sorted by length, so that neighbours are alike. The softmax is added up as FlashAttention-2 has it (Dao 2023, arXiv
2307.08691).

Nothing here depends on a number that the host must know of a batch, beside its size: a CUDA graph can hold it.

Legend: T tokens of all texts, H heads, W width of a head.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 64
"""Tokens on a side of a square."""


def attention(qkv: Tensor, begin: Tensor, end: Tensor, seed: Tensor, heads: int, dropout: float) -> Tensor:
    """(T, H W) softmax(q k^T W ** -0.5) v within each text, with dropout on the weights.

    Args:
        qkv: (T, 3 H W) queries, keys and values, contiguous.
        begin, end: (T,) int32, the first token of each token's text and the one after its last.
        seed: (1,) int64 of the dropout.
        heads: H, of a width that is a power of 2 and at least 16.
        dropout: rate on the attention weights.
    """
    out: Tensor = _attention(qkv, begin, end, seed, heads, dropout)[0]
    return out


@torch.library.custom_op("gist_train::attention", mutates_args=())
def _attention(qkv: Tensor, begin: Tensor, end: Tensor, seed: Tensor, heads: int, dropout: float) -> tuple[Tensor, Tensor]:
    """`attention`, and (H, T) float32 the base-2 logarithm of each query's sum of exponentials."""
    tokens, width = len(qkv), qkv.shape[1] // 3 // heads
    out = qkv.new_empty(tokens, heads * width)
    sums = qkv.new_empty(heads, tokens, dtype=torch.float32)
    _forward[(triton.cdiv(tokens, BLOCK), heads)](
        qkv, begin, end, seed, out, sums, tokens, width**-0.5, _zeroed(dropout), 1 / (1 - dropout),
        HEADS=heads, WIDTH=width, DROPS=dropout > 0, BLOCK=BLOCK, num_warps=4, num_stages=2,
    )  # fmt: skip
    return out, sums


@torch.library.custom_op("gist_train::attention_backward", mutates_args=())
def _attention_backward(
    gradient: Tensor, qkv: Tensor, begin: Tensor, end: Tensor, seed: Tensor, out: Tensor, sums: Tensor, heads: int, dropout: float
) -> Tensor:
    """(T, 3 H W) gradient of `qkv`."""
    tokens, width = len(qkv), qkv.shape[1] // 3 // heads
    of_qkv = torch.empty_like(qkv)
    _backward[(triton.cdiv(tokens, BLOCK), heads)](
        qkv, begin, end, seed, out, sums, gradient, of_qkv, tokens, width**-0.5, _zeroed(dropout), 1 / (1 - dropout),
        HEADS=heads, WIDTH=width, DROPS=dropout > 0, BLOCK=BLOCK, num_warps=4, num_stages=2,
    )  # fmt: skip
    return of_qkv


@_attention.register_fake
def _like_attention(qkv: Tensor, begin: Tensor, end: Tensor, seed: Tensor, heads: int, dropout: float) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    return qkv.new_empty(qkv.shape[0], qkv.shape[1] // 3), qkv.new_empty(heads, qkv.shape[0], dtype=torch.float32)


@_attention_backward.register_fake
def _like_backward(gradient: Tensor, qkv: Tensor, *_: Any) -> Tensor:  # noqa: ARG001
    return torch.empty_like(qkv)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, begin, end, seed, ctx.heads, ctx.dropout = inputs
    ctx.save_for_backward(qkv, begin, end, seed, *output)
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx: Any, gradient: Tensor, _: None) -> tuple[Tensor | None, ...]:
    of_qkv = _attention_backward(gradient.contiguous(), *ctx.saved_tensors, ctx.heads, ctx.dropout)
    return of_qkv, None, None, None, None, None


_attention.register_autograd(_gradients, setup_context=_remember)


def _zeroed(dropout: float) -> int:
    """Of 2**31 values that a pair's draw may have, those that zero it."""
    return round(dropout * 2**31)


@triton.jit
def _mixed(x):
    """A uint32 with every bit stirred into every other: the last steps of MurmurHash3 (Appleby, in the public domain)."""
    x ^= x >> 16
    x *= 0x85EBCA6B
    x ^= x >> 13
    x *= 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def _stirred(seed, head, rows, HEADS: tl.constexpr):
    """What a query's draws begin with. Seed, token and head go in one after the other: no two queries share a row of draws."""
    low, high = (seed & 0xFFFFFFFF).to(tl.uint32), ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    return _mixed(_mixed(rows.to(tl.uint32) * HEADS + head + low) ^ high)


@triton.jit
def _kept(stirred, columns, zeroed):
    """Whether the weights of some queries on some keys stay: one draw of 31 bits for each pair, the same whoever asks."""
    return (_mixed(stirred ^ (columns.to(tl.uint32) * 0x9E3779B1)) >> 1).to(tl.int32) >= zeroed


@triton.jit(do_not_specialize=["tokens", "zeroed"])
def _forward(
    qkv, begin, end, seed, out, sums, tokens, scale, zeroed, kept_scale,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, DROPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """64 queries of one head against all keys of their texts."""
    first, head = tl.program_id(0) * BLOCK, tl.program_id(1)
    stride = 3 * HEADS * WIDTH
    rows, numbers = first + tl.arange(0, BLOCK), tl.arange(0, WIDTH)
    real = rows < tokens
    starts = tl.load(begin + rows, mask=real, other=0)
    stops = tl.load(end + rows, mask=real, other=0)
    at = qkv + head * WIDTH + numbers[None, :]
    q = tl.load(at + rows[:, None].to(tl.int64) * stride, mask=real[:, None], other=0.0)
    if DROPS:
        stirred = _stirred(tl.load(seed), head, rows, HEADS)
    peak = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    sum_of_values = tl.zeros((BLOCK, WIDTH), tl.float32)
    for left in range(tl.load(begin + first), tl.max(stops, axis=0), BLOCK):
        columns = left + tl.arange(0, BLOCK)
        there = (columns < tokens)[:, None]
        at_column = at + columns[:, None].to(tl.int64) * stride
        k = tl.load(at_column + HEADS * WIDTH, mask=there, other=0.0)
        v = tl.load(at_column + 2 * HEADS * WIDTH, mask=there, other=0.0)
        seen = (columns[None, :] >= starts[:, None]) & (columns[None, :] < stops[:, None])
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * 1.4426950408889634)  # log2(e): exp2 is the fast one
        scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(peak, tl.max(scores, axis=1))
        level = tl.where(higher == float("-inf"), 0.0, higher)  # of a query that has met no key yet
        weights = tl.exp2(scores - level[:, None])
        shrunk = tl.exp2(peak - level)
        total = total * shrunk + tl.sum(weights, axis=1)
        if DROPS:
            weights = tl.where(_kept(stirred[:, None], columns[None, :], zeroed), weights, 0.0)
        sum_of_values = sum_of_values * shrunk[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        peak = higher
    total = tl.where(real, total, 1.0)
    values = sum_of_values / total[:, None]
    if DROPS:
        values *= kept_scale
    at_out = out + head * WIDTH + numbers[None, :] + rows[:, None].to(tl.int64) * (HEADS * WIDTH)
    tl.store(at_out, values.to(q.dtype), mask=real[:, None])
    tl.store(sums + head.to(tl.int64) * tokens + rows, peak + tl.log2(total), mask=real)


@triton.jit(do_not_specialize=["tokens", "zeroed"])
def _backward(
    qkv, begin, end, seed, out, sums, gradient, of_qkv, tokens, scale, zeroed, kept_scale,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, DROPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """64 tokens of one head, as queries against all keys of their texts and as keys against all queries."""
    first, head = tl.program_id(0) * BLOCK, tl.program_id(1)
    stride, out_stride = 3 * HEADS * WIDTH, HEADS * WIDTH
    rows, numbers = first + tl.arange(0, BLOCK), tl.arange(0, WIDTH)
    real = rows < tokens
    starts = tl.load(begin + rows, mask=real, other=0)
    stops = tl.load(end + rows, mask=real, other=0)
    at, at_out = head * WIDTH + numbers[None, :], head * WIDTH + numbers[None, :]
    at_row = at + rows[:, None].to(tl.int64) * stride
    out_at_row = at_out + rows[:, None].to(tl.int64) * out_stride
    q = tl.load(qkv + at_row, mask=real[:, None], other=0.0)
    k = tl.load(qkv + at_row + out_stride, mask=real[:, None], other=0.0)
    v = tl.load(qkv + at_row + 2 * out_stride, mask=real[:, None], other=0.0)
    g = tl.load(gradient + out_at_row, mask=real[:, None], other=0.0)
    o = tl.load(out + out_at_row, mask=real[:, None], other=0.0)
    own_sum = tl.load(sums + head.to(tl.int64) * tokens + rows, mask=real, other=0.0)
    own_dot = tl.sum(g.to(tl.float32) * o.to(tl.float32), axis=1)
    if DROPS:
        stirred = _stirred(tl.load(seed), head, rows, HEADS)
    of_q = tl.zeros((BLOCK, WIDTH), tl.float32)
    of_k = tl.zeros((BLOCK, WIDTH), tl.float32)
    of_v = tl.zeros((BLOCK, WIDTH), tl.float32)
    log2_scale = scale * 1.4426950408889634
    for left in range(tl.load(begin + first), tl.max(stops, axis=0), BLOCK):
        others = left + tl.arange(0, BLOCK)
        there = others < tokens
        at_other = at + others[:, None].to(tl.int64) * stride
        out_at_other = at_out + others[:, None].to(tl.int64) * out_stride
        other_k = tl.load(qkv + at_other + out_stride, mask=there[:, None], other=0.0)
        other_v = tl.load(qkv + at_other + 2 * out_stride, mask=there[:, None], other=0.0)
        # One text holds both or neither of a pair: who sees whom is the same both ways.
        seen = (others[None, :] >= starts[:, None]) & (others[None, :] < stops[:, None])

        # These tokens as queries, the others as keys.
        scores = tl.dot(q, tl.trans(other_k), input_precision="ieee") * log2_scale
        weights = tl.where(seen, tl.exp2(scores - own_sum[:, None]), 0.0)
        slopes = tl.dot(g, tl.trans(other_v), input_precision="ieee")
        if DROPS:
            slopes = tl.where(_kept(stirred[:, None], others[None, :], zeroed), slopes * kept_scale, 0.0)
        slopes = weights * (slopes - own_dot[:, None])
        of_q += tl.dot(slopes.to(k.dtype), other_k, input_precision="ieee")

        # These tokens as keys, the others as queries: a row for each key.
        other_q = tl.load(qkv + at_other, mask=there[:, None], other=0.0)
        other_g = tl.load(gradient + out_at_other, mask=there[:, None], other=0.0)
        other_o = tl.load(out + out_at_other, mask=there[:, None], other=0.0)
        other_sum = tl.load(sums + head.to(tl.int64) * tokens + others, mask=there, other=0.0)
        other_dot = tl.sum(other_g.to(tl.float32) * other_o.to(tl.float32), axis=1)
        scores = tl.dot(k, tl.trans(other_q), input_precision="ieee") * log2_scale
        weights = tl.where(seen, tl.exp2(scores - other_sum[None, :]), 0.0)
        slopes = tl.dot(v, tl.trans(other_g), input_precision="ieee")
        dropped = weights
        if DROPS:
            kept = _kept(_stirred(tl.load(seed), head, others, HEADS)[None, :], rows[:, None], zeroed)
            slopes = tl.where(kept, slopes * kept_scale, 0.0)
            dropped = tl.where(kept, weights * kept_scale, 0.0)
        of_v += tl.dot(dropped.to(v.dtype), other_g, input_precision="ieee")
        slopes = weights * (slopes - other_dot[None, :])
        of_k += tl.dot(slopes.to(k.dtype), other_q, input_precision="ieee")
    tl.store(of_qkv + at_row, (of_q * scale).to(q.dtype), mask=real[:, None])
    tl.store(of_qkv + at_row + out_stride, (of_k * scale).to(q.dtype), mask=real[:, None])
    tl.store(of_qkv + at_row + 2 * out_stride, of_v.to(q.dtype), mask=real[:, None])
