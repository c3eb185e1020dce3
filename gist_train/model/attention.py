"""Attention over a packed sequence: texts lie end to end, and a token sees the tokens of its own text only.

Legend: T tokens of all texts, H heads, W width of a head. The texts are sorted by length, so that those of one length lie
together and are one batched call; nothing is padded. `PackedLengths` travels through transformers' models as a keyword argument.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

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


def packed_attention(
    module: nn.Module,  # noqa: ARG001  (the signature is transformers')
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packed: PackedLengths,
    dropout: float = 0.0,
    scaling: float | None = None,
    **unused: Any,  # noqa: ARG001  (what other attentions read: position ids, cache flags)
) -> tuple[Tensor, None]:
    """Softmax(q k^T scaling) v within each text.

    Args:
        query, key, value: (1, H, T, W).
        attention_mask: must be None: the lengths say it all.
        packed: the lengths, whose sizes sum to T.
        dropout: rate on the attention weights; 0 outside training.
        scaling: factor on q k^T; None for W ** -0.5.

    Returns:
        (1, T, H, W) and None, as transformers expects it.
    """
    if attention_mask is not None:
        raise ValueError("packed attention takes no attention mask: the lengths of the texts are its mask")
    q, k, v = (x.transpose(1, 2)[0] for x in (query, key, value))  # (T, H, W)
    if _flash_runs(q):
        return _flash(q, k, v, packed, dropout, scaling)[None], None
    sizes = packed.sizes
    parts = []
    # `split` has one backward for all parts. A slice each would fill a whole (T, H, W) tensor of zeros per part.
    for (count, length), *qkv in zip(packed.groups, *(torch.split(x, sizes) for x in (q, k, v)), strict=True):
        q_g, k_g, v_g = (x.view(count, length, *x.shape[1:]).transpose(1, 2) for x in qkv)  # (count, H, length, W)
        out = _dense(q_g, k_g, v_g, dropout, scaling)
        parts.append(out.transpose(1, 2).reshape(count * length, *q.shape[1:]))
    return torch.cat(parts)[None], None


def _dense(q: Tensor, k: Tensor, v: Tensor, dropout: float, scaling: float | None) -> Tensor:
    """(N, H, L, W) attention of N texts of one length."""
    if dropout == 0.0 or q.device.type != "cpu":
        return scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scaling)
    # Torch's attention with dropout falls back to these very operations on a CPU, and draws its dropout on one thread.
    scores = (q * (q.shape[-1] ** -0.5 if scaling is None else scaling)) @ k.transpose(-1, -2)
    return cheap_dropout(torch.softmax(scores, dim=-1), dropout) @ v


def _flash_runs(q: Tensor) -> bool:
    """Whether torch's variable-length flash attention takes (T, H, W) like these: the bare operator pads no W."""
    if not q.is_cuda or q.dtype not in (torch.float16, torch.bfloat16):
        return False
    return torch.cuda.get_device_capability(q.device) >= (8, 0) and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256


def _flash(q: Tensor, k: Tensor, v: Tensor, packed: PackedLengths, dropout: float, scaling: float | None) -> Tensor:
    """(T, H, W) through torch's variable-length flash attention.

    The operator and not `torch.nn.attention.varlen.varlen_attn`, which takes no dropout (torch 2.13).
    """
    cumulative, longest = packed.cumulative, packed.longest
    out: Tensor = torch.ops.aten._flash_attention_forward(
        q, k, v, cumulative, cumulative, longest, longest, dropout, False, False, scale=scaling
    )[0]
    return out


AttentionInterface.register(PACKED, packed_attention)
