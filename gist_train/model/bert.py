"""BERT's layers in training: the same arithmetic as transformers' own, in fewer passes over memory and fewer kernels.

One product makes queries, keys and values. On a GPU in half precision what lies between the products are kernels of our own
(`attention_kernel`, `layer_kernels`). On a CPU what is left beside the products is memory traffic: a text's queries, keys and
values are laid out in one copy, dropout keeps the 16 bits that it drew for an element and not a float32 mask, and adds the
residual in the pass that drops.

Legend: T tokens of all texts, D width, H heads, W width of a head, L tokens of a text, n texts of one length.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout as torch_dropout
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from gist_train.model.attention import Borders, PackedLengths, Spans, at_least_float32, attend
from gist_train.model.dropout import Rate, kept, rate_of, words


def bert_hidden(
    transformer: Any, input_ids: Tensor, position_ids: Tensor, lengths: PackedLengths | Borders, spans: Spans | None = None
) -> Tensor:
    """(T, D) last hidden states of transformers' `BertModel`, or one of its kin, from (1, T) token ids and positions.

    Args:
        lengths: where texts begin and end; with the groups of their lengths on a CPU.
        spans: the same for our own kernels, where they run.
    """
    hidden: Tensor = transformer.embeddings(input_ids=input_ids, position_ids=position_ids)[0]
    if spans is not None:
        kind = hidden.device.type
        half = hidden.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else hidden
        for layer, seeds in zip(transformer.encoder.layer, spans.seeds.unbind(0), strict=True):
            if layer.gradient_checkpointing:
                hidden, half = checkpoint(_layer_of_kernels, layer, hidden, half, spans, seeds, use_reentrant=False)
            else:
                hidden, half = _layer_of_kernels(layer, hidden, half, spans, seeds)
        return hidden
    for layer in transformer.encoder.layer:
        if layer.gradient_checkpointing:
            hidden = checkpoint(_layer, layer, hidden, lengths, use_reentrant=False)
        else:
            hidden = _layer(layer, hidden, lengths)
    return hidden


def _layer(layer: Any, hidden: Tensor, lengths: PackedLengths | Borders) -> Tensor:
    own, after, output = layer.attention.self, layer.attention.output, layer.output
    # One product for all three: their input's gradient is summed inside it.
    context = _attended(linear(hidden, *_three(own)), own, lengths)
    attended = after.LayerNorm(_dropped_plus(after.dense(context), hidden, after.dropout))
    made: Tensor = output.LayerNorm(_dropped_plus(output.dense(layer.intermediate(attended)), attended, output.dropout))
    return made


def _three(own: Any) -> tuple[Tensor, Tensor]:
    """(3 D, D) and (3 D,) weights and biases of queries, keys and values."""
    three = (own.query, own.key, own.value)
    return torch.cat([part.weight for part in three]), torch.cat([part.bias for part in three])


def _attended(qkv: Tensor, own: Any, lengths: PackedLengths | Borders) -> Tensor:
    """(T, D) attention within each text, from (T, 3 D) queries, keys and values."""
    if qkv.device.type == "cpu":
        of_texts: Tensor = _Attention.apply(qkv, lengths, own.num_attention_heads, rate_of(own.dropout))  # type: ignore[no-untyped-call]
        return of_texts
    q, k, v = qkv.view(len(qkv), 3, own.num_attention_heads, -1).unbind(1)
    return attend(q, k, v, lengths, dropout=_probability(own.dropout)).flatten(1)


def _layer_of_kernels(layer: Any, hidden: Tensor, half: Tensor, spans: Spans, seeds: Tensor) -> tuple[Tensor, Tensor]:
    """(T, D) what a layer makes of `hidden`, in float32 and in half precision.

    Args:
        hidden, half: (T, D) the same twice.
        seeds: (3,) of dropout.
    """
    from gist_train.model.attention_kernel import attention  # Triton is there where a GPU is
    from gist_train.model.layer_kernels import bias_gelu

    own, after, output, inner = layer.attention.self, layer.attention.output, layer.output, layer.intermediate.dense
    weight, bias = _three(own)
    dropout = _probability(own.dropout)
    context = attention(linear(half, weight), bias, spans.begin, spans.end, seeds[:1], own.num_attention_heads, dropout)
    attended, attended_half = _normed(after, context, hidden, seeds[1:2])
    made = bias_gelu(linear(attended_half, inner.weight), inner.bias)
    return _normed(output, made, attended, seeds[2:])


def _normed(block: Any, x: Tensor, residual: Tensor, seed: Tensor) -> tuple[Tensor, Tensor]:
    """What transformers' `BertSelfOutput` and `BertOutput` do."""
    from gist_train.model.layer_kernels import add_norm

    dense, norm, dropout = block.dense, block.LayerNorm, _probability(block.dropout)
    return add_norm(linear(x, dense.weight), dense.bias, residual, norm.weight, norm.bias, seed, norm.eps, dropout)


def _probability(dropout: nn.Dropout) -> float:
    return dropout.p if dropout.training else 0.0


def _dropped_plus(x: Tensor, residual: Tensor, dropout: nn.Dropout) -> Tensor:
    """`dropout(x) + residual`."""
    if x.device.type != "cpu":
        return torch_dropout(x, _probability(dropout)) + residual
    rate = rate_of(dropout)
    if rate.zeroed == 0:
        return x + residual
    added: Tensor = _DroppedPlus.apply(x, residual, rate)  # type: ignore[no-untyped-call]
    return added


class _DroppedPlus(torch.autograd.Function):
    """Dropout and the addition of the residual in one pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor, rate: Rate) -> Tensor:
        drawn = words(x.numel()).view(x.shape)
        ctx.save_for_backward(drawn)
        ctx.rate, ctx.dtype = rate, x.dtype
        return torch.addcmul(residual, x.to(residual.dtype), kept(drawn, rate, residual.dtype), value=rate.scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        (drawn,) = ctx.saved_tensors
        of_x = kept(drawn, ctx.rate, gradient.dtype).mul_(gradient).mul_(ctx.rate.scale)
        return of_x.to(ctx.dtype), gradient, None


class _Attention(torch.autograd.Function):
    """softmax(q k^T W ** -0.5) v within each text, dropout on the weights; (T, 3 D) queries, keys and values -> (T, D).

    In float32 also where the layers run in bf16: what products of so few numbers gain from bf16, casts for the softmax lose.
    """

    @staticmethod
    @torch.autocast("cpu", enabled=False)  # type: ignore[untyped-decorator]
    def forward(ctx: Any, qkv: Tensor, lengths: PackedLengths, heads: int, rate: Rate) -> Tensor:
        width = qkv.shape[1] // 3 // heads
        out = qkv.new_empty(len(qkv), heads * width)
        drawn = words(sum(n * heads * length * length for n, length in lengths.groups) if rate.zeroed else 0)
        saved, first = [], 0
        for rows, n, length in _groups(lengths):
            q, k, v = three = _by_head(qkv[rows], n, length, heads)
            weights = torch.softmax(_product(q, k.transpose(1, 2), width**-0.5), dim=-1)
            last = first + weights.numel()
            o = _product(_dropped(weights, drawn[first:last], rate), v, rate.scale)
            out[rows].view(n, length, heads, width).copy_(o.view(n, heads, length, width).transpose(1, 2))
            saved += [three, weights]
            first = last
        ctx.save_for_backward(drawn, *saved)
        ctx.lengths, ctx.heads, ctx.rate = lengths, heads, rate
        return out

    @staticmethod
    @torch.autocast("cpu", enabled=False)  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        drawn, *saved = ctx.saved_tensors
        heads, rate, width = ctx.heads, ctx.rate, gradient.shape[1] // ctx.heads
        of_qkv = gradient.new_empty(len(gradient), 3 * gradient.shape[1])
        first = 0
        for group, (rows, n, length) in enumerate(_groups(ctx.lengths)):
            three, weights = saved[2 * group : 2 * group + 2]
            q, k, v = three
            g = at_least_float32(gradient[rows].view(n, length, heads, width).transpose(1, 2).reshape(n * heads, length, width))
            last = first + weights.numel()
            of_weights = _product(g, v.transpose(1, 2), rate.scale)
            if rate.zeroed:
                mask = kept(drawn[first:last], rate, weights.dtype).view(weights.shape)
                of_weights.mul_(mask)
                dropped = mask.mul_(weights)
            else:
                dropped = weights
            of_scores = torch.ops.aten._softmax_backward_data(of_weights, weights, -1, weights.dtype)
            of_three = three.new_empty(three.shape)  # not its strides: where n is 1 it is a view of `qkv`
            _product(of_scores, k, width**-0.5, of_three[0])
            _product(of_scores.transpose(1, 2), q, width**-0.5, of_three[1])
            _product(dropped.transpose(1, 2), g, rate.scale, of_three[2])
            of_qkv[rows].view(n, length, 3, heads, width).copy_(of_three.view(3, n, heads, length, width).permute(1, 3, 0, 2, 4))
            first = last
        return of_qkv, None, None, None


def _groups(lengths: PackedLengths) -> Iterator[tuple[slice, int, int]]:
    """(rows of the packed sequence, texts, tokens in each) of every length that occurs."""
    first = 0
    for n, length in lengths.groups:
        yield slice(first, first + n * length), n, length
        first += n * length


def _by_head(qkv: Tensor, n: int, length: int, heads: int) -> Tensor:
    """(3, n H, L, W) float32, or float64, from (n L, 3 D), in one copy, or none."""
    return at_least_float32(qkv.view(n, length, 3, heads, -1).permute(2, 0, 3, 1, 4).reshape(3, n * heads, length, -1))


def _product(a: Tensor, b: Tensor, scale: float, out: Tensor | None = None) -> Tensor:
    """`scale * (a @ b)`, the scale inside the multiplication."""
    if out is None:
        out = a.new_empty(len(a), a.shape[1], b.shape[2])
    return torch.baddbmm(out, a, b, beta=0, alpha=scale, out=out)


def _dropped(weights: Tensor, drawn: Tensor, rate: Rate) -> Tensor:
    """The weights that stay, not yet divided by the share that does."""
    return weights if rate.zeroed == 0 else kept(drawn, rate, weights.dtype).view(weights.shape).mul_(weights)
