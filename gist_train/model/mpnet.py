"""MPNet on a packed sequence, with the model's own layers.

Its forward adds to every score of attention a bias that depends on how far apart two tokens are, in one matrix for all tokens
at hand: of a packed sequence that would be a (T, T) matrix a head, which counts distances across texts. So what its forward does
is done here, layer by layer, with a matrix for each length that occurs. Nothing in the model is changed.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from gist_train.model.attention import PackedLengths, attend


def mpnet_hidden(transformer: Any, input_ids: Tensor, position_ids: Tensor, lengths: PackedLengths) -> Tensor:
    """(T, D) last hidden states of transformers' `MPNetModel` from (1, T) token ids and positions."""
    hidden: Tensor = transformer.embeddings(input_ids=input_ids, position_ids=position_ids)[0]
    # The layers share the biases: (1, H, L, L) for each group. Of what it is given, the model's method reads the shape alone.
    # transformers 5.17 counts positions on the default device, and a copy from the host would wait for the GPU.
    with input_ids.device:
        biases = [transformer.encoder.compute_position_bias(input_ids[:, :length]) for _, length in lengths.groups]
    for layer in transformer.encoder.layer:
        attended = _attention(layer.attention, hidden, lengths, biases)
        hidden = layer.output(layer.intermediate(attended), attended)
    return hidden


def _attention(block: Any, hidden: Tensor, lengths: PackedLengths, biases: Sequence[Tensor]) -> Tensor:
    """(T, D) what `MPNetAttention` makes of (T, D), within each text."""
    own = block.attn
    q, k, v = (linear(hidden).view(len(hidden), own.num_attention_heads, -1) for linear in (own.q, own.k, own.v))
    rate = own.dropout.p if own.training else 0.0
    attended = attend(q, k, v, lengths, dropout=rate, biases=biases)
    return block.LayerNorm(block.dropout(own.o(attended.flatten(1))) + hidden)  # type: ignore[no-any-return]
