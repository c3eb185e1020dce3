"""Attention within each text of a packed sequence, as one Triton kernel each way, for CUDA in half precision.

Torch's variable-length flash attention works in squares of 128 tokens and gives each text at least one. Most texts that
embeddings are trained on are shorter: of 32 tokens, one in sixteen of a square's pairs is real. Here a square of 64 tokens lies
over the packed sequence as it is, whatever texts are in it, and meets only the squares that hold tokens of these same texts.
The texts are sorted by length, so that neighbours are alike. The softmax is added up as FlashAttention-2 has it (Dao 2023,
arXiv 2307.08691).

Nothing here depends on a number that the host must know of a batch, beside its size: a CUDA graph can hold it.

Legend: T tokens of all texts, H heads, W width of a head, P partial sums.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gist_train.model.draws import kept, stirred, zeroed

BLOCK = 64
"""Tokens on a side of a square."""


def attention(qkv: Tensor, bias: Tensor, begin: Tensor, end: Tensor, seed: Tensor, heads: int, dropout: float) -> Tensor:
    """(T, H W) softmax(q k^T W ** -0.5) v within each text, with dropout on the weights.

    Args:
        qkv: (T, 3 H W) queries, keys and values before their bias, contiguous.
        bias: (3 H W,) float32.
        begin, end: (T,) int32, the first token of each token's text and the one after its last.
        seed: (1,) int64 of the dropout.
        heads: H, of a width that is a power of 2 and at least 16.
        dropout: rate on the attention weights.
    """
    out: Tensor = _attention(qkv, bias, begin, end, seed, heads, dropout)[0]
    return out


@torch.library.custom_op("gist_train::attention", mutates_args=())
def _attention(
    qkv: Tensor, bias: Tensor, begin: Tensor, end: Tensor, seed: Tensor, heads: int, dropout: float
) -> tuple[Tensor, Tensor]:
    """`attention`, and (H, T) float32 the base-2 logarithm of each query's sum of exponentials."""
    tokens, width = len(qkv), qkv.shape[1] // 3 // heads
    out = qkv.new_empty(tokens, heads * width)
    sums = qkv.new_empty(heads, tokens, dtype=torch.float32)
    _attention_forward[(triton.cdiv(tokens, BLOCK), heads)](
        qkv, bias, begin, end, seed, out, sums, tokens, width**-0.5, zeroed(dropout), 1 / (1 - dropout),
        HEADS=heads, WIDTH=width, DROPS=dropout > 0, BLOCK=BLOCK, num_warps=4, num_stages=2,
    )  # fmt: skip
    return out, sums


@torch.library.custom_op("gist_train::attention_backward", mutates_args=())
def _attention_gradients(
    gradient: Tensor,
    qkv: Tensor,
    bias: Tensor,
    begin: Tensor,
    end: Tensor,
    seed: Tensor,
    out: Tensor,
    sums: Tensor,
    heads: int,
    dropout: float,
) -> tuple[Tensor, Tensor]:
    """Gradients of `qkv` (T, 3 H W) and, in parts (P, 3 H W) float32, of the bias."""
    tokens, width = len(qkv), qkv.shape[1] // 3 // heads
    of_qkv, parts = torch.empty_like(qkv), qkv.new_empty(triton.cdiv(tokens, BLOCK), qkv.shape[1], dtype=torch.float32)
    _attention_backward[(len(parts), heads)](
        qkv, bias, begin, end, seed, out, sums, gradient, of_qkv, parts, tokens, width**-0.5, zeroed(dropout), 1 / (1 - dropout),
        HEADS=heads, WIDTH=width, DROPS=dropout > 0, BLOCK=BLOCK, num_warps=4, num_stages=2,
    )  # fmt: skip
    return of_qkv, parts


@_attention.register_fake
def _like_attention(
    qkv: Tensor,
    bias: Tensor,  # noqa: ARG001
    begin: Tensor,  # noqa: ARG001
    end: Tensor,  # noqa: ARG001
    seed: Tensor,  # noqa: ARG001
    heads: int,
    dropout: float,  # noqa: ARG001
) -> tuple[Tensor, Tensor]:
    return qkv.new_empty(qkv.shape[0], qkv.shape[1] // 3), qkv.new_empty(heads, qkv.shape[0], dtype=torch.float32)


@_attention_gradients.register_fake
def _like_attention_gradients(gradient: Tensor, qkv: Tensor, *_: Any) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    parts = (qkv.shape[0] + BLOCK - 1) // BLOCK
    return torch.empty_like(qkv), qkv.new_empty(parts, qkv.shape[1], dtype=torch.float32)


def _remember_attention(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.heads, ctx.dropout = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])


def _attention_autograd(ctx: Any, gradient: Tensor, _: None) -> tuple[Tensor | None, ...]:
    of_qkv, parts = _attention_gradients(gradient.contiguous(), *ctx.saved_tensors, ctx.heads, ctx.dropout)
    return of_qkv, parts.sum(dim=0), None, None, None, None, None


_attention.register_autograd(_attention_autograd, setup_context=_remember_attention)


@triton.jit
def _plus(x, at_bias):
    """A block of tokens and its bias, in the type of the block."""
    return (x.to(tl.float32) + tl.load(at_bias)).to(x.dtype)


@triton.jit(do_not_specialize=["tokens", "dropped"])
def _attention_forward(
    qkv, bias, begin, end, seed, out, sums, tokens, scale, dropped, kept_scale,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, DROPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """64 queries of one head against all keys of their texts."""
    first, head = tl.program_id(0) * BLOCK, tl.program_id(1)
    stride = 3 * HEADS * WIDTH
    rows, numbers = first + tl.arange(0, BLOCK), tl.arange(0, WIDTH)
    real = rows < tokens
    starts = tl.load(begin + rows, mask=real, other=0)
    stops = tl.load(end + rows, mask=real, other=0)
    head_qkv = qkv + head * WIDTH + numbers[None, :]
    at_bias = bias + head * WIDTH + numbers[None, :]
    q = _plus(tl.load(head_qkv + rows[:, None].to(tl.int64) * stride, mask=real[:, None], other=0.0), at_bias)
    if DROPS:
        mine = stirred(tl.load(seed), head, rows, HEADS)
    peak = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    sum_of_values = tl.zeros((BLOCK, WIDTH), tl.float32)
    for left in range(tl.load(begin + first), tl.max(stops, axis=0), BLOCK):
        columns = left + tl.arange(0, BLOCK)
        there = (columns < tokens)[:, None]
        at_column = head_qkv + columns[:, None].to(tl.int64) * stride
        k = _plus(tl.load(at_column + HEADS * WIDTH, mask=there, other=0.0), at_bias + HEADS * WIDTH)
        v = _plus(tl.load(at_column + 2 * HEADS * WIDTH, mask=there, other=0.0), at_bias + 2 * HEADS * WIDTH)
        seen = (columns[None, :] >= starts[:, None]) & (columns[None, :] < stops[:, None])
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * 1.4426950408889634)  # log2(e): exp2 is the fast one
        scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(peak, tl.max(scores, axis=1))
        level = tl.where(higher == float("-inf"), 0.0, higher)  # of a query that has met no key yet
        weights = tl.exp2(scores - level[:, None])
        shrunk = tl.exp2(peak - level)
        total = total * shrunk + tl.sum(weights, axis=1)
        if DROPS:
            weights = tl.where(kept(mine[:, None], columns[None, :], dropped), weights, 0.0)
        sum_of_values = sum_of_values * shrunk[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        peak = higher
    total = tl.where(real, total, 1.0)
    values = sum_of_values / total[:, None]
    if DROPS:
        values *= kept_scale
    at_out = out + head * WIDTH + numbers[None, :] + rows[:, None].to(tl.int64) * (HEADS * WIDTH)
    tl.store(at_out, values.to(q.dtype), mask=real[:, None])
    tl.store(sums + head.to(tl.int64) * tokens + rows, peak + tl.log2(total), mask=real)


@triton.jit(do_not_specialize=["tokens", "dropped"])
def _attention_backward(
    qkv, bias, begin, end, seed, out, sums, gradient, of_qkv, parts, tokens, scale, dropped, kept_scale,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, DROPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """64 tokens of one head, as queries against all keys of their texts and as keys against all queries."""
    first, head = tl.program_id(0) * BLOCK, tl.program_id(1)
    stride, out_stride = 3 * HEADS * WIDTH, HEADS * WIDTH
    rows, numbers = first + tl.arange(0, BLOCK), tl.arange(0, WIDTH)
    real = rows < tokens
    starts = tl.load(begin + rows, mask=real, other=0)
    stops = tl.load(end + rows, mask=real, other=0)
    of_head = head * WIDTH + numbers[None, :]  # among the dimensions of a token
    at_row = of_head + rows[:, None].to(tl.int64) * stride
    out_at_row = of_head + rows[:, None].to(tl.int64) * out_stride
    at_bias = bias + of_head
    q = _plus(tl.load(qkv + at_row, mask=real[:, None], other=0.0), at_bias)
    k = _plus(tl.load(qkv + at_row + out_stride, mask=real[:, None], other=0.0), at_bias + out_stride)
    v = _plus(tl.load(qkv + at_row + 2 * out_stride, mask=real[:, None], other=0.0), at_bias + 2 * out_stride)
    g = tl.load(gradient + out_at_row, mask=real[:, None], other=0.0)
    o = tl.load(out + out_at_row, mask=real[:, None], other=0.0)
    own_sum = tl.load(sums + head.to(tl.int64) * tokens + rows, mask=real, other=0.0)
    own_dot = tl.sum(g.to(tl.float32) * o.to(tl.float32), axis=1)
    if DROPS:
        mine = stirred(tl.load(seed), head, rows, HEADS)
    of_q = tl.zeros((BLOCK, WIDTH), tl.float32)
    of_k = tl.zeros((BLOCK, WIDTH), tl.float32)
    of_v = tl.zeros((BLOCK, WIDTH), tl.float32)
    log2_scale = scale * 1.4426950408889634
    for left in range(tl.load(begin + first), tl.max(stops, axis=0), BLOCK):
        others = left + tl.arange(0, BLOCK)
        there = others < tokens
        at_other = of_head + others[:, None].to(tl.int64) * stride
        out_at_other = of_head + others[:, None].to(tl.int64) * out_stride
        other_k = _plus(tl.load(qkv + at_other + out_stride, mask=there[:, None], other=0.0), at_bias + out_stride)
        other_v = _plus(tl.load(qkv + at_other + 2 * out_stride, mask=there[:, None], other=0.0), at_bias + 2 * out_stride)
        # One text holds both or neither of a pair: who sees whom is the same both ways.
        seen = (others[None, :] >= starts[:, None]) & (others[None, :] < stops[:, None])

        # These tokens as queries, the others as keys.
        scores = tl.dot(q, tl.trans(other_k), input_precision="ieee") * log2_scale
        weights = tl.where(seen, tl.exp2(scores - own_sum[:, None]), 0.0)
        slopes = tl.dot(g, tl.trans(other_v), input_precision="ieee")
        if DROPS:
            slopes = tl.where(kept(mine[:, None], others[None, :], dropped), slopes * kept_scale, 0.0)
        slopes = weights * (slopes - own_dot[:, None])
        of_q += tl.dot(slopes.to(k.dtype), other_k, input_precision="ieee")

        # These tokens as keys, the others as queries: a row for each key.
        other_q = _plus(tl.load(qkv + at_other, mask=there[:, None], other=0.0), at_bias)
        other_g = tl.load(gradient + out_at_other, mask=there[:, None], other=0.0)
        other_o = tl.load(out + out_at_other, mask=there[:, None], other=0.0)
        other_sum = tl.load(sums + head.to(tl.int64) * tokens + others, mask=there, other=0.0)
        other_dot = tl.sum(other_g.to(tl.float32) * other_o.to(tl.float32), axis=1)
        scores = tl.dot(k, tl.trans(other_q), input_precision="ieee") * log2_scale
        weights = tl.where(seen, tl.exp2(scores - other_sum[None, :]), 0.0)
        slopes = tl.dot(v, tl.trans(other_g), input_precision="ieee")
        staying = weights
        if DROPS:
            stays = kept(stirred(tl.load(seed), head, others, HEADS)[None, :], rows[:, None], dropped)
            slopes = tl.where(stays, slopes * kept_scale, 0.0)
            staying = tl.where(stays, weights * kept_scale, 0.0)
        of_v += tl.dot(staying.to(v.dtype), other_g, input_precision="ieee")
        slopes = weights * (slopes - other_dot[None, :])
        of_k += tl.dot(slopes.to(k.dtype), other_q, input_precision="ieee")
    tl.store(of_qkv + at_row, (of_q * scale).to(q.dtype), mask=real[:, None])
    tl.store(of_qkv + at_row + out_stride, (of_k * scale).to(q.dtype), mask=real[:, None])
    tl.store(of_qkv + at_row + 2 * out_stride, of_v.to(q.dtype), mask=real[:, None])
    # Tokens behind the last are keys that no query sees and queries whose gradient is 0: they add nothing.
    at_part = parts + tl.program_id(0).to(tl.int64) * stride + head * WIDTH + numbers
    tl.store(at_part, tl.sum(of_q, axis=0) * scale)
    tl.store(at_part + out_stride, tl.sum(of_k, axis=0) * scale)
    tl.store(at_part + 2 * out_stride, tl.sum(of_v, axis=0))
