"""Tokens of many texts -> embeddings, for student and guide alike.

Legend: N texts, T their tokens in all, D the width of an embedding. The families named below run on one packed sequence of real
tokens; others are padded, which one line in the log says.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import normalize, pad

from gist_train.model.adapters import adapted
from gist_train.model.attention import Borders, PackedLengths, Spans, at_least_float32, kernel_runs, run_packed, spans_of
from gist_train.model.bert import bert_hidden
from gist_train.model.families import Family, family_of
from gist_train.model.mpnet import mpnet_hidden

logger = logging.getLogger(__name__)

Tokens = NDArray[np.integer[Any]]
"""(L,) token ids of one text, special tokens included."""


@dataclass(frozen=True, slots=True)
class Pack:
    """Texts laid end to end, sorted by length."""

    input_ids: Tensor
    """(1, T) int64."""
    positions: Tensor
    """(1, T) int64, counted from 0 within each text."""
    lengths: PackedLengths
    restore: Tensor
    """(N,) int64: `sorted[restore]` is in the order in which the texts were given."""

    @property
    def filled(self) -> bool:
        """Whether `filled_to` put a text behind the others."""
        return len(self.lengths.cumulative) > len(self.restore) + 1

    def filled_to(self, tokens: int) -> "Pack":
        """The same with one more text, which fills the sequence up to `tokens`: nothing is pooled from it, and no loss sees it.

        Only the borders say so. `lengths.groups` are those of the real texts.
        """
        more = tokens - self.input_ids.shape[1]
        lengths = PackedLengths(self.lengths.groups, pad(self.lengths.cumulative, (0, 1), value=tokens))
        return Pack(pad(self.input_ids, (0, more)), pad(self.positions, (0, more)), lengths, self.restore)

    def each(self, change: Callable[[Tensor], Tensor]) -> "Pack":
        """The same with every tensor changed."""
        lengths = PackedLengths(self.lengths.groups, change(self.lengths.cumulative))
        return Pack(change(self.input_ids), change(self.positions), lengths, change(self.restore))

    def to(self, device: torch.device) -> "Pack":
        """The same, on `device`."""
        return self.each(lambda x: x.to(device, non_blocking=True))


def pack(texts: Sequence[Tokens]) -> Pack:
    """Lays the token ids of N texts, each of at least one token, end to end."""
    lengths = np.fromiter((len(text) for text in texts), np.int64, len(texts))
    return pack_from(np.concatenate(texts), np.cumsum(lengths) - lengths, lengths)


def pack_from(ids: Tokens, starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> Pack:
    """`pack` of the texts ids[starts[i] : starts[i] + lengths[i]], with no step of Python's for each.

    Args:
        ids: flat token ids.
        starts, lengths: (N,), each length at least 1.
    """
    order = np.argsort(lengths, kind="stable")
    lengths = lengths[order]
    cumulative = np.concatenate([[0], np.cumsum(lengths)])
    values, counts = np.unique(lengths, return_counts=True)
    restore = np.empty(len(order), np.int64)
    restore[order] = np.arange(len(order))
    positions = np.arange(cumulative[-1]) - np.repeat(cumulative[:-1], lengths)
    return Pack(
        input_ids=torch.from_numpy(ids[np.repeat(starts[order], lengths) + positions].astype(np.int64))[None],
        positions=torch.from_numpy(positions)[None],
        lengths=PackedLengths(
            tuple(zip(counts.tolist(), values.tolist(), strict=True)), torch.from_numpy(cumulative.astype(np.int32))
        ),
        restore=torch.from_numpy(restore),
    )


class Encoder(nn.Module):
    """A transformer with pooling, and normalisation where the model has it.

    Args:
        transformer: a transformers model without a head, such as BertModel. Its attention implementation is set here.
        pooling: "cls", "mean" or "last": the first token's state, the mean of all, or the last one's.
        normalized: whether embeddings have length 1.
    """

    def __init__(self, transformer: Any, *, pooling: str, normalized: bool):
        super().__init__()
        self.transformer = transformer
        self.pooling, self.normalized = pooling, normalized
        self._family = packed_family(transformer)
        self.packed = self._family is not None
        self._padding_id = transformer.config.pad_token_id or 0
        if self._family is None:
            logger.warning(
                "%s models do not run packed yet: texts are padded to the longest of a forward", transformer.config.model_type
            )
        elif not self._family.own_forward:
            run_packed(transformer)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.transformer.parameters()).device  # type: ignore[no-any-return]

    @property
    def head_width(self) -> int:
        """Dimensions of the query of one head of attention."""
        config = self.transformer.config
        return int(config.to_dict().get("head_dim") or config.hidden_size // config.num_attention_heads)

    @property
    def attention_width(self) -> int:
        """Dimensions of a token's queries, all heads of a layer together: in some decoders other than in its hidden state."""
        return int(self.transformer.config.num_attention_heads * self.head_width)

    @property
    def compiles(self) -> bool:
        """Whether `states` is the whole of it, in which attention can do with borders alone."""
        return self._family is not None and not self._family.own_forward

    def forward(self, texts: Pack) -> Tensor:
        """(N, D) float32, or float64, embeddings in the order in which the texts were given to `pack`."""
        return self.pooled(self.packed_hidden(texts) if self.packed else self._padded_hidden(texts), texts)

    def pooled(self, hidden: Tensor, texts: Pack) -> Tensor:
        """What `forward` returns, from the (T, D) last hidden states of the texts."""
        embeddings = at_least_float32(self._pool(hidden, texts.lengths))[texts.restore]
        return normalize(embeddings, dim=1) if self.normalized else embeddings

    def packed_hidden(self, texts: Pack) -> Tensor:
        """(T, D) last hidden states of a model that runs packed, in the order of the pack."""
        position_ids = self.position_ids(texts)
        if self._family is not None and self._family.own_forward:
            return mpnet_hidden(self.transformer, texts.input_ids, position_ids, texts.lengths)
        spans = self.spans(texts.lengths.cumulative, texts.input_ids.shape[1])
        return self.states(texts.input_ids, position_ids, texts.lengths, spans)

    @property
    def _own_layers(self) -> bool:
        """Whether this is a BERT in training, for which we have layers that cost less."""
        own = self._family is not None and self._family.own_layers and bool(self.transformer.training)
        return own and not adapted(self.transformer)  # they read matrices, and would pass adapters by

    def spans(self, cumulative: Tensor, tokens: int) -> Spans | None:
        """What our own kernels read, where they run: a BERT in training, in half precision, on a GPU, with the usual GELU.

        Args:
            cumulative: (N + 1,) int32, where texts begin and end.
        """
        device, config = cumulative.device, self.transformer.config
        if not (self._own_layers and device.type == "cuda" and torch.is_autocast_enabled("cuda") and config.hidden_act == "gelu"):
            return None
        if not kernel_runs(device, torch.get_autocast_dtype("cuda"), self.head_width):
            return None
        return spans_of(cumulative, tokens, config.num_hidden_layers)

    def states(
        self, input_ids: Tensor, position_ids: Tensor, lengths: PackedLengths | Borders, spans: Spans | None = None
    ) -> Tensor:
        """(T, D) last hidden states from (1, T) token ids and positions, as `position_ids` counts them; not of MPNet."""
        # On a CPU our own layers go through the groups of lengths, which borders alone don't say.
        known = input_ids.device.type != "cpu" or isinstance(lengths, PackedLengths)
        if known and self._own_layers:
            return bert_hidden(self.transformer, input_ids, position_ids, lengths, spans)
        # Decoders keep keys and values for a next token unless set otherwise.
        uncached = {"use_cache": False} if self._family is not None and self._family.causal else {}
        out = self.transformer(input_ids=input_ids, position_ids=position_ids, packed=lengths, **uncached)
        return out.last_hidden_state[0]  # type: ignore[no-any-return]

    def position_ids(self, texts: Pack) -> Tensor:
        """(1, T) positions within each text, as the model counts them."""
        if self._family is None or not self._family.positions_after_padding:
            return texts.positions
        # From the padding id on. A text may hold that id itself: such a token has it for its position and is not counted.
        padding: int = self.transformer.embeddings.padding_idx
        real = texts.input_ids.ne(padding).long()
        counted = real.cumsum(dim=1)
        starts = torch.arange(real.shape[1], device=real.device) - texts.positions
        before = (counted - real).gather(1, starts)  # of the texts before
        return (counted - before) * real + padding

    def _padded_hidden(self, texts: Pack) -> Tensor:
        """(T, D) last hidden states, computed on (N, longest) tokens."""
        starts = texts.lengths.cumulative
        lengths = starts.diff()[:, None]
        real = torch.arange(texts.lengths.longest, device=starts.device)[None, :] < lengths
        input_ids = torch.full(real.shape, self._padding_id, device=starts.device).masked_scatter(real, texts.input_ids)
        out = self.transformer(input_ids=input_ids, attention_mask=real.long())
        # Not `[real]`, which asks the device how many there are.
        numbers = torch.arange(texts.input_ids.shape[1], device=starts.device)
        rows = torch.searchsorted(starts[1:], numbers, right=True) * texts.lengths.longest + texts.positions[0]
        return out.last_hidden_state.flatten(0, 1)[rows]  # type: ignore[no-any-return]

    def _pool(self, hidden: Tensor, lengths: PackedLengths) -> Tensor:
        """(N, D) from (T, D), in the order of the pack."""
        if self.pooling == "cls":
            return hidden[lengths.cumulative[:-1].long()]
        if self.pooling == "last":
            return hidden[lengths.cumulative[1:].long() - 1]
        if hidden.is_cuda or sum(lengths.sizes) < len(hidden):  # the second where the pack is filled, elsewhere
            return means_of_texts(hidden, lengths.cumulative)
        parts = zip(torch.split(hidden, lengths.sizes), lengths.groups, strict=True)
        # The mean is taken in float32: over 512 tokens bf16 would round most of them away.
        return torch.cat([at_least_float32(part.view(count, length, -1)).mean(dim=1) for part, (count, length) in parts])


def means_of_texts(hidden: Tensor, cumulative: Tensor) -> Tensor:
    """(N, D) float32 means of the (T, D) states of each text, in one kernel: one for each length that occurs takes a GPU longer
    to launch than to compute. Each mean is added up in the order of the text, so that its bits are the same every time."""
    # Unsafe is unchecked: a check of the borders would wait for the device.
    return torch.segment_reduce(at_least_float32(hidden), "mean", offsets=cumulative, axis=0, unsafe=True)


def packed_family(transformer: Any) -> Family | None:
    """The model's family, where the model runs packed."""
    family, config = family_of(transformer), transformer.config.to_dict()
    if family is None:
        return None
    # A config may make decoders see both ways, in transformers' masks, which packed attention does not ask for. BERT's kin can be
    # made decoders, whose caches and cross-attention nobody has tried here.
    runs = config.get("is_causal", True) if family.causal else not config.get("is_decoder", False)
    return family if runs else None


# On a CPU more tokens at a time only fall out of its caches: 16,384 took 1.3 times as long as 4,096 (6 layers of width 384).
CPU_BATCH_TOKENS = 4096


def tokens_at_a_time(batch_tokens: int, device: torch.device) -> int:
    """Tokens that `embed` takes at a time on `device`."""
    return min(batch_tokens, CPU_BATCH_TOKENS) if device.type == "cpu" else batch_tokens


def embed(encoder: Encoder, texts: Sequence[Tokens], batch_tokens: int) -> Iterator[tuple[Tokens, NDArray[np.float32]]]:
    """Embeddings of `texts` in the batches that `batches_of` makes.

    Yields (indices into texts (n,), embeddings (n, D)) in the encoder's present mode: call `encoder.eval()` first.
    """
    yield from embed_batches(encoder, texts, batches_of(texts, tokens_at_a_time(batch_tokens, encoder.device)))


def batches_of(texts: Sequence[Tokens], batch_tokens: int) -> list[NDArray[np.int64]]:
    """Indices into `texts` of each batch of at most `batch_tokens` tokens (one text at least), texts of one length together."""
    lengths = np.array([len(text) for text in texts], np.int64)
    order = np.argsort(lengths, kind="stable")[::-1]
    batches, first, tokens = [], 0, 0
    for place, length in enumerate(lengths[order].tolist()):
        if place > first and tokens + length > batch_tokens:
            batches.append(order[first:place])
            first, tokens = place, 0
        tokens += length
    return [*batches, order[first:]] if len(order) else []


@torch.no_grad()
def embed_batches(
    encoder: Encoder, texts: Sequence[Tokens], batches: Sequence[NDArray[np.int64]]
) -> Iterator[tuple[Tokens, NDArray[np.float32]]]:
    """Embeddings of some batches of `texts`, as `embed` yields them."""
    before: _Underway | None = None
    for batch in batches:
        # A GPU has the next batch to compute while this one is fetched, and its next one laid out.
        packed = pack([texts[i] for i in batch.tolist()])
        if encoder.device.type == "cuda":
            packed = packed.each(Tensor.pin_memory)  # a copy from other memory waits for what the GPU is at
        underway = _Underway(batch, encoder(packed.to(encoder.device)))
        if before is not None:
            yield before.fetched()
        before = underway
    if before is not None:
        yield before.fetched()


class _Underway:
    """Embeddings (n, D) of the texts at `indices` (n,), on their way to the CPU."""

    def __init__(self, indices: Tokens, embeddings: Tensor):
        self._indices = indices
        self._embeddings = embeddings.to("cpu", non_blocking=True)  # into page-locked memory, in the order of the kernels
        self._arrived = torch.cuda.Event() if embeddings.is_cuda else None  # type: ignore[no-untyped-call]
        if self._arrived is not None:
            self._arrived.record(torch.cuda.current_stream(embeddings.device))

    def fetched(self) -> tuple[Tokens, NDArray[np.float32]]:
        """Both, once they are there."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._indices, self._embeddings.numpy()
