"""Attention over a packed sequence: texts lie end to end, and a token sees the tokens of its own text only.

Legend: T tokens of all texts, L of one, H heads, K heads of keys and values (H, or a divisor of it), W width of a head. The texts
are sorted by length, so that those of one length lie together and are one batched call; nothing is padded. `PackedLengths`
travels through transformers' models as a keyword argument.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from gist_train.model.dropout import dropout as cheap_dropout

PACKED = "gist_packed"
"""Name under which transformers' AttentionInterface knows `packed_attention`."""


@dataclass(frozen=True, slots=True)
class PackedLengths:
    """Where the texts of a packed sequence begin and end."""

    groups: tuple[tuple[int, int], ...]
    """(number of texts, tokens in each) of every length that occurs, in the order of the sequence."""
    cumulative: Tensor
    """(N + 1,) int32, on the device: first token of each text, then T. Read by variable-length flash attention."""

    @property
    def sizes(self) -> list[int]:
        """Tokens of each group."""
        return [count * length for count, length in self.groups]

    @property
    def longest(self) -> int:
        """Tokens of the longest text."""
        return max(length for _, length in self.groups)


@dataclass(frozen=True, slots=True)
class Borders:
    """The same for flash attention alone. It holds no number of Python's that differs from batch to batch: a compiled graph would
    be compiled anew for each."""

    cumulative: Tensor
    """As in `PackedLengths`."""
    longest: int
    """No text has more tokens."""


@dataclass(frozen=True, slots=True)
class Spans:
    """What our own kernels (`attention_kernel`, `layer_kernels`) read of a packed sequence, counted once for all layers."""

    begin: Tensor
    """(T,) int32, the first token of each token's text."""
    end: Tensor
    """(T,) int32, the token after its last one."""
    seeds: Tensor
    """(layers, 3) int64 of each layer's dropout: in attention, behind it and behind the inner product."""


def at_least_float32(x: Tensor) -> Tensor:
    """`x` in float32 where it has fewer bits."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def spans_of(cumulative: Tensor, tokens: int, layers: int) -> Spans:
    """The spans of the texts whose borders are `cumulative`, with seeds from torch's generator of that device."""
    texts = torch.searchsorted(cumulative[1:], torch.arange(tokens, dtype=torch.int32, device=cumulative.device), right=True)
    seeds = torch.randint(-(2**63), 2**63 - 1, (layers, 3), device=cumulative.device)
    return Spans(cumulative[texts], cumulative[texts + 1], seeds)


def run_packed(transformer: Any) -> None:
    """Has the layers of a model of transformers attend through `packed_attention`."""
    make_known()
    transformer.set_attn_implementation(PACKED)


def make_known() -> None:
    """Has transformers know `packed_attention` by its name, in this process."""
    from transformers import AttentionInterface

    AttentionInterface.register(PACKED, packed_attention)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packed: PackedLengths | Borders,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **unused: Any,  # noqa: ARG001  (what other attentions read: position ids, cache flags)
) -> tuple[Tensor, None]:
    """`attend` as transformers calls it.

    Args:
        module: the attention layer, whose `is_causal` says whether a token sees those before it and itself only.
        query: (1, H, T, W).
        key, value: (1, K, T, W).
        attention_mask: must be None: the lengths say it all.
        packed: the lengths, whose sizes sum to T.
        dropout: rate on the attention weights; 0 outside training.
        scaling: factor on q k^T; None for W ** -0.5.
        sliding_window: a token sees those less than so many tokens away; None for all.

    Returns:
        (1, T, H, W) and None, as transformers expects it.
    """
    if attention_mask is not None:
        raise ValueError("packed attention takes no attention mask: the lengths of the texts are its mask")
    # Rotary positions turn queries and keys into float32 under autocast: they go back to the type of the forward pass.
    q, k, v = (x.to(value.dtype).transpose(1, 2)[0] for x in (query, key, value))
    out = attend(q, k, v, packed, dropout=dropout, scaling=scaling, causal=bool(module.is_causal), window=sliding_window)
    return out[None], None


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    packed: PackedLengths | Borders,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    causal: bool = False,
    window: int | None = None,
    biases: Sequence[Tensor] | None = None,
) -> Tensor:
    """(T, H, W) softmax(q k^T scaling + bias) v within each text.

    Args:
        q: (T, H, W).
        k, v: (T, K, W); head h of q reads head h // (H // K).
        causal: whether a token sees those before it and itself only.
        window: a token sees those less than so many tokens away; None for all.
        biases: (1, H, L, L) for each group of `packed`, added to the scores; neither with `causal` nor with `window`.

    With `Borders` it is flash attention, which must take such numbers: see `flash_runs`.
    """
    if window is not None and window >= packed.longest:
        window = None
    if isinstance(packed, Borders) or (biases is None and flash_runs(q.device, q.dtype, q.shape[-1])):
        return _flash(q, k, v, packed, dropout, scaling, causal, window)
    sizes = packed.sizes
    parts = []
    # `split` has one backward for all parts. A slice each would fill a whole (T, H, W) tensor of zeros per part.
    groups = zip(packed.groups, *(torch.split(x, sizes) for x in (q, k, v)), strict=True)
    for index, ((count, length), *qkv) in enumerate(groups):
        q_g, k_g, v_g = (x.view(count, length, *x.shape[1:]).transpose(1, 2) for x in qkv)  # (count, H or K, length, W)
        mask = _windowed(length, causal, window, q.device) if biases is None else biases[index].to(q.dtype)
        out = _dense(q_g, k_g, v_g, dropout, scaling, causal, mask)
        parts.append(out.transpose(1, 2).reshape(count * length, *q.shape[1:]))
    return torch.cat(parts)


def _windowed(length: int, causal: bool, window: int | None, device: torch.device) -> Tensor | None:
    """`_seen`, or None where the window leaves nothing out."""
    return None if window is None or window >= length else _seen(length, causal, window, device)


def _seen(length: int, causal: bool, window: int, device: torch.device) -> Tensor:
    """(L, L) True where a row's token sees a column's."""
    position = torch.arange(length, device=device)
    distance = position[:, None] - position[None, :]
    return (distance >= 0) & (distance < window) if causal else distance.abs() < window


def _dense(q: Tensor, k: Tensor, v: Tensor, dropout: float, scaling: float | None, causal: bool, mask: Tensor | None) -> Tensor:
    """(N, H, L, W) attention of N texts of one length. A mask says all that is seen, or is added; `causal` counts without one."""
    if k.shape[1] != q.shape[1]:
        # Written out, which costs little: with a mask or in float32 torch's fast kernels share no heads.
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    if dropout == 0.0 or q.device.type != "cpu":
        return scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=causal and mask is None, scale=scaling)
    # Torch's attention with dropout falls back to these very operations on a CPU, and draws its dropout on one thread.
    scores = (q * (q.shape[-1] ** -0.5 if scaling is None else scaling)) @ k.transpose(-1, -2)
    if causal and mask is None:
        mask = _seen(q.shape[2], True, q.shape[2], q.device)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    return cheap_dropout(torch.softmax(scores, dim=-1), dropout) @ v


WIDEST_HEAD = 192
"""That flash attention trains on every GPU that has it."""


def flash_runs(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """Whether torch's variable-length flash attention takes heads of this width: the bare operator pads none."""
    built = _half_on_ampere(device, dtype) and torch.backends.cuda.is_flash_attention_available()
    return built and width % 8 == 0 and width <= WIDEST_HEAD


def kernel_runs(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """Whether our own kernels (`attention_kernel`, `layer_kernels`) run there, on heads of this width."""
    return _half_on_ampere(device, dtype) and _has_triton() and width in (16, 32, 64, 128)


def _half_on_ampere(device: torch.device, dtype: torch.dtype) -> bool:
    half = dtype in (torch.float16, torch.bfloat16)
    return half and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


@cache
def _has_triton() -> bool:
    """Triton comes with torch where there is CUDA on Linux."""
    return find_spec("triton") is not None


def _flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    packed: PackedLengths | Borders,
    dropout: float,
    scaling: float | None,
    causal: bool,
    window: int | None,
) -> Tensor:
    """(T, H, W) through torch's variable-length flash attention, which takes K heads of keys and values as they are.

    The operator and not `torch.nn.attention.varlen.varlen_attn`, which takes no dropout (torch 2.13).
    """
    cumulative, longest = packed.cumulative, packed.longest
    # Its window counts the tokens beside the token itself.
    left = None if window is None else window - 1
    right = 0 if causal and window is not None else left
    out: Tensor = torch.ops.aten._flash_attention_forward(
        q,
        k,
        v,
        cumulative,
        cumulative,
        longest,
        longest,
        dropout,
        causal,
        False,
        scale=scaling,
        window_size_left=left,
        window_size_right=right,
    )[0]
    return out
