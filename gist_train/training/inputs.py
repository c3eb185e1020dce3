"""What a step reads that no weight has a part in: made ahead of the step, by another thread.

Legend: B rows of the whole batch, M negatives, N texts of this rank, G width of the guide.
"""

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gist_train.data.corpus import Batch
from gist_train.training.distributed import share
from gist_train.training.gradient_cache import Texts, computed_tokens, cut, filled_tokens, texts_in
from gist_train.training.guides import StoredGuide
from gist_train.training.step_context import Training, labels_of, own_negatives_of

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class LossInputs:
    """What `guided_contrastive_loss` is given beside the student's embeddings, under the names that it has there; None for what
    is off. Of all rows of the batch."""

    guide_anchor: Tensor | None = None
    """(B, G) float32."""
    guide_positive: Tensor | None = None
    """(B, G) float32."""
    guide_negative: Tensor | None = None
    """(M, G) float32."""
    anchor_ids: Tensor | None = None
    """(B,) text ids."""
    positive_ids: Tensor | None = None
    """(B,) text ids."""
    negative_ids: Tensor | None = None
    """(M,) text ids."""
    labels: Tensor | None = None
    """(B,), -1 for none."""
    negative_labels: Tensor | None = None
    """(M,), -1 for none."""
    own_negatives_only: Tensor | None = None
    """(B,) bool."""
    negative_rows: Tensor | None = None
    """(M,) the row that a negative belongs to."""

    def by_name(self) -> dict[str, Tensor | None]:
        """The same by the names of the loss' arguments."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def each(self, change: Callable[[Tensor], Tensor]) -> "LossInputs":
        """The same with every tensor changed."""
        return LossInputs(**{name: None if x is None else change(x) for name, x in self.by_name().items()})


@dataclass(frozen=True, slots=True)
class Scores:
    """What `score_loss` is given beside the student's embeddings, of all rows of the batch."""

    positive_scores: Tensor
    """(B,) NaN for none."""
    negative_scores: Tensor
    """(M,) NaN for none."""
    negative_rows: Tensor
    """(M,)"""

    def by_name(self) -> dict[str, Tensor]:
        """The same by the names of the loss' arguments."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def each(self, change: Callable[[Tensor], Tensor]) -> "Scores":
        """The same with every tensor changed."""
        return Scores(**{name: change(x) for name, x in self.by_name().items()})


@dataclass(frozen=True, slots=True)
class Inputs:
    """The batch of one step as one rank needs it: which rows, the texts to encode, and what the loss asks of them besides."""

    rows: Ints
    """(B,) of the corpus, in the order in which ranks share them."""
    here: tuple[int, int]
    """(start, stop): those whose loss this rank takes."""
    parts: tuple[list[int], ...]
    """Of each rank: how many anchors, positives and negatives it encodes for the loss."""
    tokens: int
    """Real tokens, over all ranks."""
    computed_tokens: int
    """Tokens that all ranks compute: more where the student can't run packed."""
    texts: Texts
    """Anchors, positives and negatives of this rank's rows, in this order."""
    loss: LossInputs
    scores: Scores | None
    """None where `distillation.scores` is 0."""

    def each(self, change: Callable[[Tensor], Tensor]) -> "Inputs":
        """The same with every tensor changed: on another device, or page-locked."""
        scores = None if self.scores is None else self.scores.each(change)
        return replace(self, texts=self.texts.each(change), loss=self.loss.each(change), scores=scores)

    def tensors(self) -> list[Tensor]:
        """Every tensor, in the order in which `each` comes to it."""
        tensors: list[Tensor] = []

        def note(x: Tensor) -> Tensor:
            tensors.append(x)
            return x

        self.each(note)
        return tensors


def inputs_of(training: Training, step: int) -> Inputs:
    """The inputs of `step`, counted from 1, in host memory: a pure function of config, corpus and step."""
    accelerator, tokens = training.accelerator, training.tokens
    rows = training.plan.batch(step)
    positives = training.plan.positives(rows, training.plan.epoch_of(step))
    batch = training.corpus.batch(rows, positives)
    rank, ranks = accelerator.process_index, accelerator.num_processes
    if ranks > 1:
        dealt = deal(_tokens_of_rows(batch, tokens.lengths), ranks)
        rows, positives = rows[dealt], positives[dealt]
        batch = training.corpus.batch(rows, positives)
    shares = [share(len(rows), one, ranks) for one in range(ranks)]
    views = [_views(batch, start, stop) for start, stop in shares]
    lengths = [tokens.lengths(of_rank) for of_rank in views]
    chunks = [cut(of_rank, training.max_tokens_per_forward, packed=training.packed) for of_rank in lengths]
    # Ranks must do the same things in the same order wherever these wait for each other: if one caches, all do.
    texts = texts_in(chunks[rank], tokens.ids, tokens.starts(views[rank]), lengths[rank], cached=max(map(len, chunks)) > 1)
    if training.longest_in_graphs is not None and not texts.cached:
        texts = texts.filled_to(filled_tokens(int(lengths[rank].sum()), training.longest_in_graphs))
    encoded = [of_rank[chunk] for of_rank, cuts in zip(lengths, chunks, strict=True) for chunk in cuts]
    inputs = Inputs(
        rows=rows,
        here=shares[rank],
        parts=tuple([b - a, b - a, int(batch.negative_offsets[b] - batch.negative_offsets[a])] for a, b in shares),
        tokens=sum(int(n.sum()) for n in lengths),
        computed_tokens=sum(computed_tokens(chunk, packed=training.packed) for chunk in encoded) + texts.filling,
        texts=texts,
        loss=_loss_inputs(training, batch),
        scores=_scores(training, batch) if training.distillation.scores else None,
    )
    return inputs.each(Tensor.pin_memory) if accelerator.device.type == "cuda" else inputs


def deal(tokens: Ints, ranks: int) -> Ints:
    """Rows -> an order in which the ranks' shares (`share`) have about as many tokens each.

    The loss is a mean over rows: their order changes it by rounding alone. The longest row goes to the rank that has the fewest
    tokens so far and still has room, and so on (Graham 1969, doi:10.1137/0117039). Rows keep their order within a rank.

    Args:
        tokens: (B,) of each row.

    Returns:
        (B,) a permutation of the rows.
    """
    bounds = [share(len(tokens), rank, ranks) for rank in range(ranks)]
    room = [stop - start for start, stop in bounds]
    loads = [(0, rank) for rank in range(ranks) if room[rank]]
    owner = np.empty(len(tokens), np.int64)
    for row in np.argsort(-tokens, kind="stable").tolist():
        load, rank = heapq.heappop(loads)
        owner[row] = rank
        room[rank] -= 1
        if room[rank]:
            heapq.heappush(loads, (load + int(tokens[row]), rank))
    return np.argsort(owner, kind="stable")


def _tokens_of_rows(batch: Batch, lengths: Any) -> Ints:
    """(B,) tokens of each row's anchor, positive and negatives."""
    sums = np.concatenate([[0], np.cumsum(lengths(batch.negative_views))])[batch.negative_offsets]
    of_rows: Ints = lengths(batch.anchor_views) + lengths(batch.positive_views) + np.diff(sums)
    return of_rows


def _views(batch: Batch, start: int, stop: int) -> Ints:
    """(N,) views that a rank encodes for the rows start to stop."""
    first, last = batch.negative_offsets[start], batch.negative_offsets[stop]
    views = np.concatenate([batch.anchor_views[start:stop], batch.positive_views[start:stop], batch.negative_views[first:last]])
    # A rank without rows takes part in all the same: it encodes one text, of which the loss uses nothing.
    return views if len(views) else batch.anchor_views[:1]


def _loss_inputs(training: Training, batch: Batch) -> LossInputs:
    ids: Sequence[NDArray[np.int32]] = (batch.anchor, batch.positive, batch.negative)
    stored = training.guide if isinstance(training.guide, StoredGuide) else None
    text_ids = [_tensor(of_role) if training.loss.mask_duplicates else None for of_role in ids]
    labels, negative_labels = labels_of(training.sources, batch)
    own_negatives_only, negative_rows = own_negatives_of(training.sources, batch)
    return LossInputs(
        guide_anchor=None if stored is None else stored.anchor.embeddings(batch.anchor),
        guide_positive=None if stored is None else stored.positive.embeddings(batch.positive),
        guide_negative=None if stored is None else stored.negative.embeddings(batch.negative),
        anchor_ids=text_ids[0],
        positive_ids=text_ids[1],
        negative_ids=text_ids[2],
        labels=_tensor(labels),
        negative_labels=_tensor(negative_labels),
        own_negatives_only=_tensor(own_negatives_only),
        negative_rows=_tensor(negative_rows),
    )


def _scores(training: Training, batch: Batch) -> Scores:
    positives, negatives = training.corpus.scores(batch.rows, batch.positive)
    row = np.repeat(np.arange(len(batch.rows)), np.diff(batch.negative_offsets))
    return Scores(torch.from_numpy(positives), torch.from_numpy(negatives), torch.from_numpy(row))


def _tensor(values: NDArray[Any] | None) -> Tensor | None:
    return None if values is None else torch.from_numpy(np.ascontiguousarray(values))
