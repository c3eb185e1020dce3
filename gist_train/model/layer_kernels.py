"""What lies between the products of BERT's layers, as Triton kernels for CUDA in half precision.

A GPU does little there and reads much. Bias, dropout, residual and norm are one pass over memory here, bias and GELU another.
Going back, the gradients of biases and of the norm's weights are added up in the pass that has them at hand.

Legend: T tokens of all texts, D width, I inner width of a layer, P partial sums.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gist_train.model.draws import kept, stirred, zeroed

ROWS = 4
"""Tokens that a norm takes at a time."""
PARTS = 256
"""P, partial sums over tokens."""


def add_norm(
    x: Tensor, bias: Tensor, residual: Tensor, weight: Tensor, shift: Tensor, seed: Tensor, eps: float, dropout: float
) -> tuple[Tensor, Tensor]:
    """LayerNorm(dropout(x + bias) + residual), (T, D) in float32, and once more in the type of `x`.

    Args:
        x: (T, D) in half precision, contiguous.
        bias: (D,) float32.
        residual: (T, D) float32, contiguous.
        weight, shift: (D,) float32 of the norm.
        seed: (1,) int64 of the dropout.
    """
    out, half, *_ = _add_norm(x, bias, residual, weight, shift, seed, eps, dropout)
    return out, half


@torch.library.custom_op("gist_train::add_norm", mutates_args=())
def _add_norm(
    x: Tensor, bias: Tensor, residual: Tensor, weight: Tensor, shift: Tensor, seed: Tensor, eps: float, dropout: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`add_norm`, what went into the norm (T, D), and (2, T) mean and inverse deviation of each token."""
    tokens, width = x.shape
    out, added, half = torch.empty_like(residual), torch.empty_like(residual), torch.empty_like(x)
    moments = residual.new_empty(2, tokens)
    _norm_forward[(triton.cdiv(tokens, ROWS),)](
        x, bias, residual, weight, shift, seed, out, half, added, moments, tokens, eps, zeroed(dropout), 1 / (1 - dropout),
        WIDTH=width, DROPS=dropout > 0, ROWS=ROWS, BLOCK=triton.next_power_of_2(width), num_warps=4,
    )  # fmt: skip
    return out, half, added, moments


@torch.library.custom_op("gist_train::add_norm_backward", mutates_args=())
def _add_norm_gradients(
    gradient: Tensor, half_gradient: Tensor, added: Tensor, moments: Tensor, weight: Tensor, seed: Tensor, dropout: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `x` and of the residual (T, D), and in `PARTS` parts (P, 3, D) those of bias, weight and shift."""
    tokens, width = added.shape
    of_x, of_residual = torch.empty_like(half_gradient), torch.empty_like(added)
    parts = added.new_empty(PARTS, 3, width)
    _norm_backward[(PARTS,)](
        gradient, half_gradient, added, moments, weight, seed, of_x, of_residual, parts, tokens,
        zeroed(dropout), 1 / (1 - dropout),
        WIDTH=width, DROPS=dropout > 0, ROWS=ROWS, BLOCK=triton.next_power_of_2(width), num_warps=4,
    )  # fmt: skip
    return of_x, of_residual, parts


@_add_norm.register_fake
def _like_add_norm(x: Tensor, bias: Tensor, residual: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # noqa: ARG001
    moments = residual.new_empty(2, residual.shape[0])
    return torch.empty_like(residual), torch.empty_like(x), torch.empty_like(residual), moments


@_add_norm_gradients.register_fake
def _like_add_norm_gradients(
    gradient: Tensor,  # noqa: ARG001
    half_gradient: Tensor,
    added: Tensor,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(half_gradient), torch.empty_like(added), added.new_empty(PARTS, 3, added.shape[1])


def _remember_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, _, _, weight, _, seed, _, ctx.dropout = inputs
    ctx.save_for_backward(*output[2:], weight, seed)
    ctx.mark_non_differentiable(*output[2:])


def _norm_autograd(ctx: Any, gradient: Tensor, half_gradient: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    given = gradient.contiguous(), half_gradient.contiguous()
    of_x, of_residual, parts = _add_norm_gradients(*given, *ctx.saved_tensors, ctx.dropout)
    of_bias, of_weight, of_shift = parts.sum(dim=0).unbind(0)
    return of_x, of_bias, of_residual, of_weight, of_shift, None, None, None


_add_norm.register_autograd(_norm_autograd, setup_context=_remember_norm)


@torch.library.custom_op("gist_train::bias_gelu", mutates_args=())
def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """(T, I) gelu(x + bias) with the exact GELU, in the type of `x`, which is contiguous; the bias (I,) is float32."""
    tokens, width = x.shape
    out = torch.empty_like(x)
    _gelu_forward[(triton.cdiv(tokens, 8), triton.cdiv(width, 256))](x, bias, out, tokens, WIDTH=width, ROWS=8, COLUMNS=256)
    return out


@torch.library.custom_op("gist_train::bias_gelu_backward", mutates_args=())
def _bias_gelu_gradients(gradient: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient of `x` (T, I) and, in parts (P, I) float32, of the bias."""
    tokens, width = x.shape
    of_x, parts = torch.empty_like(x), bias.new_empty(PARTS, width)
    _gelu_backward[(PARTS, triton.cdiv(width, 256))](gradient, x, bias, of_x, parts, tokens, WIDTH=width, ROWS=8, COLUMNS=256)
    return of_x, parts


@bias_gelu.register_fake
def _like_gelu(x: Tensor, bias: Tensor) -> Tensor:  # noqa: ARG001
    return torch.empty_like(x)


@_bias_gelu_gradients.register_fake
def _like_gelu_gradients(gradient: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    return torch.empty_like(x), bias.new_empty(PARTS, x.shape[1])


def _remember_gelu(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:  # noqa: ARG001
    ctx.save_for_backward(*inputs)


def _gelu_autograd(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
    of_x, parts = _bias_gelu_gradients(gradient.contiguous(), *ctx.saved_tensors)
    return of_x, parts.sum(dim=0)


bias_gelu.register_autograd(_gelu_autograd, setup_context=_remember_gelu)


@triton.jit(do_not_specialize=["tokens", "dropped"])
def _norm_forward(
    x, bias, residual, weight, shift, seed, out, half, added, moments, tokens, eps, dropped, kept_scale,
    WIDTH: tl.constexpr, DROPS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Some tokens, whole."""
    rows, columns = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    real, there = rows < tokens, columns < WIDTH
    both = real[:, None] & there[None, :]
    places = rows[:, None].to(tl.int64) * WIDTH + columns[None, :]
    value = tl.load(x + places, mask=both, other=0.0).to(tl.float32) + tl.load(bias + columns, mask=there, other=0.0)[None, :]
    if DROPS:
        mine = stirred(tl.load(seed), 0, rows, 1)
        value = tl.where(kept(mine[:, None], columns[None, :], dropped), value * kept_scale, 0.0)
    value += tl.load(residual + places, mask=both, other=0.0)
    mean = tl.sum(value, axis=1) / WIDTH
    centred = tl.where(both, value - mean[:, None], 0.0)
    inverse = 1 / tl.sqrt(tl.sum(centred * centred, axis=1) / WIDTH + eps)
    normed = centred * inverse[:, None] * tl.load(weight + columns, mask=there, other=0.0)[None, :]
    normed += tl.load(shift + columns, mask=there, other=0.0)[None, :]
    tl.store(out + places, normed, mask=both)
    tl.store(half + places, normed.to(half.dtype.element_ty), mask=both)
    tl.store(added + places, value, mask=both)
    tl.store(moments + rows, mean, mask=real)
    tl.store(moments + tokens + rows, inverse, mask=real)


@triton.jit(do_not_specialize=["tokens", "dropped"])
def _norm_backward(
    gradient, half_gradient, added, moments, weight, seed, of_x, of_residual, parts, tokens, dropped, kept_scale,
    WIDTH: tl.constexpr, DROPS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Every so many tokens, whole; what it adds up over them is one part of the sums."""
    columns = tl.arange(0, BLOCK)
    there = columns < WIDTH
    factor = tl.load(weight + columns, mask=there, other=0.0)[None, :]
    of_bias = tl.zeros((BLOCK,), tl.float32)
    of_weight = tl.zeros((BLOCK,), tl.float32)
    of_shift = tl.zeros((BLOCK,), tl.float32)
    for first in range(tl.program_id(0) * ROWS, tokens, tl.num_programs(0) * ROWS):
        rows = first + tl.arange(0, ROWS)
        real = rows < tokens
        both = real[:, None] & there[None, :]
        places = rows[:, None].to(tl.int64) * WIDTH + columns[None, :]
        slope = tl.load(gradient + places, mask=both, other=0.0)
        slope += tl.load(half_gradient + places, mask=both, other=0.0).to(tl.float32)
        mean = tl.load(moments + rows, mask=real, other=0.0)[:, None]
        inverse = tl.load(moments + tokens + rows, mask=real, other=0.0)[:, None]
        normed = tl.where(both, (tl.load(added + places, mask=both, other=0.0) - mean) * inverse, 0.0)
        of_weight += tl.sum(slope * normed, axis=0)
        of_shift += tl.sum(slope, axis=0)
        slope *= factor
        along = tl.sum(slope * normed, axis=1)[:, None] / WIDTH
        slope = (slope - tl.sum(slope, axis=1)[:, None] / WIDTH - normed * along) * inverse
        tl.store(of_residual + places, slope, mask=both)
        if DROPS:
            mine = stirred(tl.load(seed), 0, rows, 1)
            slope = tl.where(kept(mine[:, None], columns[None, :], dropped), slope * kept_scale, 0.0)
        of_bias += tl.sum(tl.where(both, slope, 0.0), axis=0)
        tl.store(of_x + places, slope.to(of_x.dtype.element_ty), mask=both)
    at_part = parts + tl.program_id(0) * 3 * WIDTH + columns
    tl.store(at_part, of_bias, mask=there)
    tl.store(at_part + WIDTH, of_weight, mask=there)
    tl.store(at_part + 2 * WIDTH, of_shift, mask=there)


@triton.jit(do_not_specialize=["tokens"])
def _gelu_forward(x, bias, out, tokens, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Some tokens, some of their dimensions."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    there = columns < WIDTH
    both = (rows < tokens)[:, None] & there[None, :]
    places = rows[:, None].to(tl.int64) * WIDTH + columns[None, :]
    value = tl.load(x + places, mask=both, other=0.0).to(tl.float32) + tl.load(bias + columns, mask=there, other=0.0)[None, :]
    value = 0.5 * value * (1 + tl.erf(value * 0.7071067811865476))
    tl.store(out + places, value.to(out.dtype.element_ty), mask=both)


@triton.jit(do_not_specialize=["tokens"])
def _gelu_backward(
    gradient, x, bias, of_x, parts, tokens, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Every so many tokens, some of their dimensions; what it adds up over them is one part of the bias' gradient."""
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    there = columns < WIDTH
    shift = tl.load(bias + columns, mask=there, other=0.0)[None, :]
    of_bias = tl.zeros((COLUMNS,), tl.float32)
    for first in range(tl.program_id(0) * ROWS, tokens, tl.num_programs(0) * ROWS):
        rows = first + tl.arange(0, ROWS)
        both = (rows < tokens)[:, None] & there[None, :]
        places = rows[:, None].to(tl.int64) * WIDTH + columns[None, :]
        value = tl.load(x + places, mask=both, other=0.0).to(tl.float32) + shift
        slope = 0.5 * (1 + tl.erf(value * 0.7071067811865476)) + value * tl.exp(-0.5 * value * value) * 0.3989422804014327
        slope *= tl.load(gradient + places, mask=both, other=0.0).to(tl.float32)
        of_bias += tl.sum(slope, axis=0)
        tl.store(of_x + places, slope.to(of_x.dtype.element_ty), mask=both)
    tl.store(parts + tl.program_id(0) * WIDTH + columns, of_bias, mask=there)
