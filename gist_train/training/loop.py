"""The training loop, read from top to bottom. `steps` is a generator: it yields one record a step and knows no files.

Each step is a pure function of (config, corpus, step) and of the weights and moments that the step before left: rows, learning
rate and dropout seeds are computed from the step number, so that a resumed run needs no other state.

Legend: B rows of the whole batch, M negatives, N texts of this rank, D width of the student.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor, nn

from gist_train.config.schema import LossConfig
from gist_train.data.batches import BatchPlan
from gist_train.data.corpus import Batch, Corpus, TokenTable
from gist_train.model.loss import BLOCKS, LossOutput, guided_contrastive_loss
from gist_train.training.distributed import gather_with_gradient, share, sum_over_ranks
from gist_train.training.gradient_cache import Texts, cut, encode, hand_on, texts_in
from gist_train.training.lookups import GuideLookup, SourceRules, guide_embeddings, labels_of, own_negatives_of, text_ids
from gist_train.training.schedule import Schedule


@dataclass(frozen=True, slots=True)
class Training:
    """All that a step reads. Nothing in here but weights and moments changes from step to step."""

    accelerator: Accelerator
    model: nn.Module
    """The student's encoder as accelerate prepared it: Pack -> (N, D)."""
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    plan: BatchPlan
    corpus: Corpus
    tokens: TokenTable
    guide: GuideLookup | str | None
    """A store's embeddings, "self" for the student's own similarities, or None."""
    loss: LossConfig
    sources: SourceRules
    grad_clip: float | None
    seed: int
    max_tokens_per_forward: int | None = None
    """Where a rank's texts have more tokens, they are encoded in chunks and the gradient is cached."""


@dataclass(frozen=True, slots=True)
class StepRecord:
    """What one step did, over all processes."""

    step: int
    """Updates so far, this one included."""
    epoch: float
    """Passes over the data so far."""
    loss: float
    """Of this step."""
    lr: float
    """After this update: `Schedule.learning_rate(step)`."""
    grad_norm: float
    """Before clipping."""
    masked: dict[str, float]
    """Share of candidates that left the partition function, by block."""
    tokens: int
    """Real tokens that the student read."""
    computed_tokens: int
    """Tokens that the student computed: more than `tokens` where the model can't run packed."""
    groups: tuple[tuple[int, int], ...]
    """(number of texts, tokens in each) that this process encoded."""
    seconds: float
    """Wall time of the step on this process."""


class NonFiniteError(ArithmeticError):
    """Loss or gradient is not finite. The weights are as the step before left them."""


def steps(training: Training, start: int, stop: int) -> Iterator[StepRecord]:
    """Trains steps start + 1 to stop, and yields a record after each update.

    Raises:
        NonFiniteError: before the update, so that weights and moments stay as they were.
    """
    accelerator, optimizer = training.accelerator, training.optimizer
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    training.model.train()
    for step in range(start + 1, stop + 1):
        began = time.perf_counter()
        epoch = training.plan.epoch_of(step)
        rows = training.plan.batch(step)
        batch = training.corpus.batch(rows, training.plan.positives(rows, epoch))

        texts = _texts_of_rank(training, batch)
        # Dropout's draws depend on nothing that came before: the generators are set anew for each chunk.
        rank = accelerator.process_index
        seeds = [dropout_seed(training.seed, step, rank, chunk) for chunk in range(len(texts.chunks))]
        embeddings = encode(training.model, texts, seeds)
        out = _loss(training, batch, embeddings)
        # Summed over ranks this is the batch's loss. DistributedDataParallel averages gradients, hence the factor.
        accelerator.backward(out.loss * accelerator.num_processes)
        if texts.cached:  # backward has reached the embeddings, and from there no graph leads to the weights yet
            hand_on(accelerator, training.model, texts, seeds, embeddings)

        limit = math.inf if training.grad_clip is None else training.grad_clip
        grad_norm = float(accelerator.clip_grad_norm_(parameters, limit))
        totals = sum_over_ranks(_totals(out, texts, training))
        loss = totals[0].item()  # waits for the device, as float() above did
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            optimizer.zero_grad(set_to_none=True)
            raise NonFiniteError(_tell_non_finite(step, loss, grad_norm, training.corpus, batch))

        for group in optimizer.param_groups:
            group["lr"] = training.schedule.learning_rate(step - 1)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield StepRecord(
            step=step,
            epoch=step / training.plan.steps_per_epoch,
            loss=loss,
            lr=training.schedule.learning_rate(step),
            grad_norm=grad_norm,
            masked=dict(zip(BLOCKS, (totals[1:5] / totals[5:9].clamp(min=1)).tolist(), strict=True)),
            tokens=int(totals[9]),
            computed_tokens=int(totals[10]),
            groups=texts.groups,
            seconds=time.perf_counter() - began,
        )


def dropout_seed(seed: int, step: int, rank: int, chunk: int) -> int:
    """63 bits that no other (seed, step, rank, chunk) shares, but by chance."""
    return int(np.random.SeedSequence([seed, step, rank, chunk]).generate_state(1, np.uint64)[0]) >> 1


def _texts_of_rank(training: Training, batch: Batch) -> Texts:
    """Anchors, positives and negatives of this rank's rows, in this order, on the device, cut where they are too many."""
    accelerator, tokens = training.accelerator, training.tokens
    packed = accelerator.unwrap_model(training.model)[0].packed
    views = [_views_of_rank(batch, rank, accelerator.num_processes) for rank in range(accelerator.num_processes)]
    chunks = [cut(tokens.lengths(of_rank), training.max_tokens_per_forward, packed=packed) for of_rank in views]
    here = accelerator.process_index
    # Ranks must do the same things in the same order wherever these wait for each other: if one caches, all do.
    return texts_in(chunks[here], tokens.of(views[here]), accelerator.device, cached=max(map(len, chunks)) > 1)


def _views_of_rank(batch: Batch, rank: int, processes: int) -> NDArray[np.int64]:
    """(N,) views that a rank encodes."""
    start, stop = share(len(batch.rows), rank, processes)
    first, last = batch.negative_offsets[start], batch.negative_offsets[stop]
    views = np.concatenate([batch.anchor_views[start:stop], batch.positive_views[start:stop], batch.negative_views[first:last]])
    # A rank without rows takes part in all the same: it encodes one text, of which `_loss` uses nothing.
    return views if len(views) else batch.anchor_views[:1]


def _loss(training: Training, batch: Batch, embeddings: Tensor) -> LossOutput:
    """The loss of this rank's rows against the pool of all ranks. Summed over ranks it is the mean over the batch."""
    accelerator, options = training.accelerator, training.loss
    shares = [share(len(batch.rows), rank, accelerator.num_processes) for rank in range(accelerator.num_processes)]
    parts = [[b - a, b - a, int(batch.negative_offsets[b] - batch.negative_offsets[a])] for a, b in shares]
    here = shares[accelerator.process_index]
    gathered = gather_with_gradient(embeddings[: sum(parts[accelerator.process_index])], [sum(part) for part in parts])
    pieces = [torch.split(texts, part) for texts, part in zip(gathered, parts, strict=True)]
    anchor, positive, negative = (torch.cat(column) for column in zip(*pieces, strict=True))

    guides = guide_embeddings(training.guide, batch, (anchor, positive, negative), accelerator.device)
    ids = text_ids(batch, accelerator.device) if options.mask_duplicates else (None, None, None)
    labels = labels_of(training.sources, batch, accelerator.device)
    own_negatives = own_negatives_of(training.sources, batch, accelerator.device)
    return guided_contrastive_loss(
        anchor,
        positive,
        negative,
        guide_anchor=guides[0],
        guide_positive=guides[1],
        guide_negative=guides[2],
        temperature=options.temperature,
        margin=options.margin,
        margin_strategy=options.margin_strategy,
        contrast_anchors=options.contrast_anchors,
        contrast_positives=options.contrast_positives,
        negatives=options.negatives,
        block_size=options.block_size,
        dimensions=options.dimensions,
        dimension_weights=options.dimension_weights,
        anchor_ids=ids[0],
        positive_ids=ids[1],
        negative_ids=ids[2],
        labels=labels[0],
        negative_labels=labels[1],
        own_negatives_only=own_negatives[0],
        negative_rows=own_negatives[1],
        rows=here,
    )


def _totals(out: LossOutput, texts: Texts, training: Training) -> Tensor:
    """(11,) float32, to be summed over ranks: loss, masked (4), candidates (4), tokens, computed tokens."""
    packed = training.accelerator.unwrap_model(training.model)[0].packed
    counts = [texts.computed_tokens(True), texts.computed_tokens(packed)]
    of_texts = torch.tensor(counts, dtype=torch.float32, device=out.loss.device)
    return torch.cat([out.loss.detach().float()[None], out.masked.float(), out.candidates.float(), of_texts])


def _tell_non_finite(step: int, loss: float, grad_norm: float, corpus: Corpus, batch: Batch) -> str:
    tasks = sorted({corpus.tasks[task] for task in corpus.task[batch.rows].tolist()})
    return (
        f"step {step:,}: loss {loss}, gradient norm {grad_norm}. The weights were not touched.\n"
        f"  rows     {', '.join(map(str, batch.rows.tolist()))} of the corpus {corpus.folder}\n"
        f"  tasks    {', '.join(tasks)}\n"
        "  mend     look at these rows; lower optimizer.lr; use training.precision: float32"
    )
