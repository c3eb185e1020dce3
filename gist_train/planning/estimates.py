"""What a training will cost before it runs: tokens, memory and disk. Arithmetic on counts; nothing is run.

Legend: S steps of an epoch, B rows of a batch, T tokens of a batch, H hidden size, I intermediate size, L tokens of a text.
"""

from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from gist_train.config.schema import CheckpointConfig, SelectionConfig
from gist_train.data.batches import BatchPlan
from gist_train.data.corpus import Corpus, TokenTable
from gist_train.model.adapters import adapted
from gist_train.model.encoder import Encoder
from gist_train.model.families import kin_of, product_shapes
from gist_train.training.checkpoint import in_window, steps_to_keep

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class EpochTokens:
    """Tokens that the student reads in one epoch, and what trainers that pad would compute for the same batches."""

    lengths: Ints
    """(texts of the epoch,) tokens of each text, in the order of the batches' anchors, then positives, then negatives."""
    by_step: Ints
    """(S,) real tokens of each batch."""
    pairs_by_step: Ints
    """(S,) pairs of tokens that attend to each other: the sum of the squared lengths."""
    texts_by_step: Ints
    """(S,) texts of each batch."""
    longest_by_step: Ints
    """(S,) tokens of the longest text of each batch."""
    padded_to_longest: int
    """Each column (anchors, positives, negatives) of a batch padded to its longest text."""
    padded_to_max: int
    """Every text padded to the student's maximum length."""

    @property
    def real(self) -> int:
        """Real tokens of the epoch."""
        return int(self.by_step.sum())


def epoch_tokens(corpus: Corpus, tokens: TokenTable, plan: BatchPlan, epoch: int, max_length: int) -> EpochTokens:
    """Counts an epoch's tokens from the stored lengths of its views; no text is read."""
    batches = plan.epoch(epoch)
    rows = batches.ravel()
    batch = corpus.batch(rows, plan.positives(rows, epoch))
    anchors, positives, negatives = (
        tokens.lengths(views) for views in (batch.anchor_views, batch.positive_views, batch.negative_views)
    )
    # Negatives are a flat pool: those of a batch are between the offsets of its first row and of the next batch's.
    bounds = batch.negative_offsets[:: batches.shape[1]]
    of_step = np.repeat(np.arange(len(batches)), np.diff(bounds))
    longest_negative = np.zeros(len(batches), np.int64)
    np.maximum.at(longest_negative, of_step, negatives)
    by_column = [lengths.reshape(batches.shape) for lengths in (anchors, positives)]
    padded = sum(int(column.max(axis=1).sum()) * batches.shape[1] for column in by_column)

    def by_step(power: int) -> Ints:
        summed: Ints = np.bincount(of_step, negatives**power, len(batches)).astype(np.int64)
        for column in by_column:
            summed += (column**power).sum(axis=1)
        return summed

    lengths = np.concatenate([anchors, positives, negatives])
    return EpochTokens(
        lengths,
        by_step(1),
        by_step(2),
        2 * batches.shape[1] + np.diff(bounds),
        np.maximum(longest_negative, np.max([column.max(axis=1) for column in by_column], axis=0)),
        padded + int((longest_negative * np.diff(bounds)).sum()),
        len(lengths) * max_length,
    )


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on one device that does the whole batch."""

    weights: int
    """Master weights in float32, and their copies in the precision of the forward pass."""
    gradients: int
    moments: int
    """AdamW's two."""
    activations: int
    """Kept from forward to backward for the largest batch."""

    @property
    def total(self) -> int:
        """Of all that, without what the framework takes for itself."""
        return self.weights + self.gradients + self.moments + self.activations


def memory(
    encoder: Encoder,
    epoch: EpochTokens,
    candidates: int,
    dimensions: int,
    *,
    half: bool,
    dense: bool,
    limit: int | None = None,
    checkpointed: bool = False,
) -> Memory:
    """An estimate for training `encoder` with dropout, at the largest batch of the epoch.

    A layer keeps, of each token, 8 H + 2 I numbers and two dropout masks of H bytes: with I = 4 H and 2 bytes a number that is
    the 34 H bytes of Korthikanti et al. 2022 (arXiv 2205.05198, equation 1, without its term for attention scores, which
    variable-length attention does not keep). 4 H of these are queries, keys, values and their result, which in a decoder may have
    another width; a decoder's gated layers keep 2 I more and its norms a copy each, and it has dropout in attention alone.

    The loss keeps some five numbers a pair of row and candidate, and one more for each further dimension that it is taken over.

    Args:
        candidates: of all rows of a batch together.
        dimensions: how many the loss is taken over.
        half: whether the forward pass runs in bf16.
        dense: whether attention keeps its scores, their dropout and its result, and dropout masks are numbers: on a CPU.
        limit: the most tokens that are encoded at a time; None for the whole batch. Their texts are taken to be as long as the
            longest of the batch, which those that come first nearly are.
        checkpointed: whether a layer keeps its input only, and all else while it is computed again.
    """
    config, parameters = encoder.transformer.config, list(encoder.parameters())
    weights = sum(p.numel() for p in parameters)
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    size, hidden = 2 if half else 4, config.hidden_size
    # The widest layer, and not a field of the config, which each family of models calls otherwise.
    intermediate = max(out for out, _ in product_shapes(encoder.transformer))
    family = kin_of(encoder.transformer)
    if family is not None and family.causal:
        of_token = (6 * hidden + (8 if family.norms_queries else 4) * encoder.attention_width + 4 * intermediate) * size
    else:
        of_token = (4 * hidden + 4 * encoder.attention_width + 2 * intermediate) * size + 2 * hidden * (size if dense else 1)
    of_pair = 3 * config.num_attention_heads * size if dense or not encoder.packed else 0
    tokens, pairs = epoch.by_step, epoch.pairs_by_step
    if not encoder.packed:  # every text padded to the longest of the batch
        tokens = epoch.texts_by_step * epoch.longest_by_step
        pairs = tokens * epoch.longest_by_step
    if limit is not None:
        tokens = np.minimum(tokens, np.maximum(limit, epoch.longest_by_step))
        pairs = np.minimum(pairs, tokens * epoch.longest_by_step)
    of_layer = of_token * tokens + of_pair * pairs
    layers = config.num_hidden_layers
    # What passes from layer to layer is float32, under autocast too.
    of_layers = of_layer + layers * hidden * 4 * tokens if checkpointed else of_layer * layers
    return Memory(
        weights=4 * weights + (2 * weights if half else 0),
        gradients=4 * trained,
        moments=8 * trained,
        activations=int(of_layers.max()) + (4 + dimensions) * 4 * candidates,
    )


def checkpoint_bytes(encoder: Encoder) -> int:
    """Of one checkpoint: weights and the moments of those that are trained, both float32; the tokenizer is left out.

    Of a model with adapters it holds these alone.
    """
    parameters = [p for p in encoder.parameters() if p.requires_grad or not adapted(encoder.transformer)]
    return sum(4 * p.numel() + (8 * p.numel() if p.requires_grad else 0) for p in parameters)


def checkpoints_kept(checkpoint: CheckpointConfig, selection: SelectionConfig, evaluated: int, stop: int) -> list[int]:
    """Steps whose checkpoints are there at the end of a run of `stop` steps, by the rule of retention.

    The best checkpoint by `selection.metric` may be one more; it cannot be known in advance.

    Args:
        evaluated: steps between two evaluations, each of which has a checkpoint; 0 for none.
    """
    saved = sorted({step for every in (checkpoint.every, evaluated) if every for step in range(every, stop + 1, every)} | {stop})
    return steps_to_keep(
        saved, keep_last=checkpoint.keep_last, keep_every=checkpoint.keep_every, kept=partial(in_window, selection)
    )
