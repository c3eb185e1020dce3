"""Batches larger than memory: gradient caching (Gao et al. 2021, arXiv 2101.06983).

The loss wants the embeddings of a whole batch, the encoder keeps much for each of its tokens. So the texts are encoded chunk by
chunk and nothing is kept; the loss gives the gradient of each embedding; then each chunk is encoded once more, under the same
dropout, and hands that gradient on to the weights. One chunk's activations are in memory at a time, for one more forward pass.

Legend: N texts of this rank, D width of the student.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor, nn

from gist_train.model.encoder import Pack, Tokens, pack_from

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Texts:
    """The texts that a rank encodes in a step, in the chunks in which it encodes them."""

    chunks: tuple[Pack, ...]
    which: tuple[Tensor, ...]
    """Of each chunk (n,) int64: which of the N texts it holds."""
    cached: bool
    """Whether chunks are encoded twice. If not there is one chunk, with all texts in their order."""

    @property
    def groups(self) -> tuple[tuple[int, int], ...]:
        """(number of texts, tokens in each), of every chunk."""
        return tuple(group for chunk in self.chunks for group in chunk.lengths.groups)

    @property
    def filled(self) -> bool:
        """Whether one more text, which no loss sees, fills the only chunk up."""
        return not self.cached and self.chunks[0].filled

    @property
    def filling(self) -> int:
        """Tokens of that text."""
        real = sum(count * length for count, length in self.groups)
        return self.chunks[0].input_ids.shape[1] - real if self.filled else 0

    def filled_to(self, tokens: int) -> "Texts":
        """The same, with the only chunk filled up to `tokens`."""
        (chunk,) = self.chunks
        return Texts((chunk.filled_to(tokens),), self.which, self.cached)

    def each(self, change: Callable[[Tensor], Tensor]) -> "Texts":
        """The same with every tensor changed."""
        return Texts(tuple(chunk.each(change) for chunk in self.chunks), tuple(change(x) for x in self.which), self.cached)


def computed_tokens(lengths: Ints, *, packed: bool) -> int:
    """Tokens that a forward pass over texts of these lengths (n,) computes: the real ones or, not packed, padding too."""
    return int(lengths.sum() if packed else len(lengths) * lengths.max())


FINEST = 64
"""Tokens between two totals of `filled_tokens`, at the least."""


def filled_tokens(tokens: int, longest: int) -> int:
    """The total to which a batch is filled for a CUDA graph: in steps of an eighth of the power of two below it.

    Args:
        longest: tokens of the longest text that there may be, which the text that fills it up keeps to as well.
    """
    apart = min(max(FINEST, (1 << (tokens.bit_length() - 1)) // 8), longest)
    return (tokens // apart + 1) * apart


def cut(lengths: Ints, limit: int | None, *, packed: bool) -> list[Ints]:
    """Texts -> chunks of whole texts, the longest first: what does not fit in memory shows at once.

    Texts of like length come together, so that attention runs over few groups and little is padded.

    Args:
        lengths: (N,) tokens of each text.
        limit: the most tokens in a chunk, but that one text may have more; None for one chunk.
        packed: whether texts are computed without padding. If not, each counts as much as the longest of its chunk.

    Returns:
        Of each chunk (n,) which texts it holds. Without a limit, or where all texts are within it: one chunk, in their order.
    """
    padded = lengths if packed else np.full_like(lengths, lengths.max())
    if limit is None or len(lengths) == 1 or padded.sum() <= limit:
        return [np.arange(len(lengths))]
    order = np.argsort(-lengths, kind="stable")
    lengths = lengths[order]
    ends = np.cumsum(lengths)
    chunks, first = [], 0
    while first < len(order):
        before = ends[first] - lengths[first]
        fits = np.searchsorted(ends, before + limit, side="right") if packed else first + limit // lengths[first]
        last = max(int(fits), first + 1)
        chunks.append(order[first:last])
        first = last
    return chunks


def texts_in(chunks: Sequence[Ints], ids: Tokens, starts: Ints, lengths: Ints, *, cached: bool) -> Texts:
    """Packs N texts into chunks, as `cut` made them for these texts, in host memory.

    Args:
        ids, starts, lengths: the texts' token ids, as `pack_from` takes them.
    """
    packs = tuple(pack_from(ids, starts[chunk], lengths[chunk]) for chunk in chunks)
    return Texts(packs, tuple(torch.from_numpy(chunk) for chunk in chunks), cached)


def encode(model: nn.Module, texts: Texts, seeds: Sequence[int]) -> Tensor:
    """(N, D) embeddings, with the graph that leads to the weights or, where it is to be cached, as a leaf that wants a gradient.

    Args:
        model: Pack -> (n, D).
        seeds: of each chunk's dropout, on every device.
    """
    if not texts.cached:
        torch.manual_seed(seeds[0])
        return model(texts.chunks[0])  # type: ignore[no-any-return]
    parts = []
    with torch.no_grad():
        for chunk, seed in zip(texts.chunks, seeds, strict=True):
            torch.manual_seed(seed)
            parts.append(model(chunk))
        in_chunks = torch.cat(parts)
        return torch.empty_like(in_chunks).index_copy_(0, torch.cat(texts.which), in_chunks).requires_grad_()


def hand_on(accelerator: Accelerator, model: nn.Module, texts: Texts, seeds: Sequence[int], embeddings: Tensor) -> None:
    """Adds to the weights' gradients what follows from the gradient of the embeddings.

    DistributedDataParallel sums over ranks once, in the last chunk's backward pass: so ranks may have unlike numbers of chunks,
    but all of them or none must be cached.

    Args:
        seeds: the same as for `encode`.
        embeddings: (N, D), what `encode` gave; after backward.
    """
    gradient = embeddings.grad
    assert gradient is not None
    for number, (chunk, which, seed) in enumerate(zip(texts.chunks, texts.which, seeds, strict=True)):
        waits: Any = accelerator.no_sync(model) if number + 1 < len(texts.chunks) else nullcontext()
        with waits:  # around the forward pass too: it is there that DistributedDataParallel asks
            torch.manual_seed(seed)
            # Not accelerator.backward: the loss was scaled already, where it is.
            torch.autograd.backward(model(chunk), gradient[which])
