"""The training loop, read from top to bottom. `steps` is a generator: it yields one record a step and knows no files.

Each step is a pure function of (config, corpus, step) and of the weights and moments that the step before left: rows, learning
rate and dropout seeds are computed from the step number, so that a resumed run needs no other state.

Nothing in here waits for the device: the next batch is made ready by another thread, metrics stay on the device until somebody
reads them, and after a value that is not finite the update freezes there.

Legend: B rows of the whole batch.
"""

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gist_train.config.errors import listed
from gist_train.data.corpus import Corpus
from gist_train.model.distillation import distillation_loss, regression_loss
from gist_train.model.loss import BLOCKS, guided_contrastive_loss
from gist_train.model.scores import score_loss
from gist_train.pulse import PULSE, waiting
from gist_train.training.distributed import gather_with_gradient, sum_over_ranks
from gist_train.training.gradient_cache import encode, hand_on
from gist_train.training.graphs import Graphs
from gist_train.training.guides import SelfGuide, StoredGuide
from gist_train.training.inputs import Inputs, LossInputs, inputs_of
from gist_train.training.step_context import Training
from gist_train.training.throughput import StepClock
from gist_train.training.update import set_learning_rate, update

METRICS = (
    "loss",
    "grad_norm",
    *(f"masked_{block}" for block in BLOCKS),
    *(f"candidates_{block}" for block in BLOCKS),
    "distillation_loss",
    "regression_loss",
    "score_loss",
    "loss_scale",
    "spike",
    "skipped_spikes",
    "frozen",
)
"""What the device computes of a step, in the order of `StepRecord.metrics`; counts over all ranks, and 0 for no loss scale.
`spike`: 1.0 where the update was left out; `skipped_spikes`: how many of the run's updates were."""


@dataclass(frozen=True, slots=True)
class StepRecord:
    """What one step did, over all processes. What the device computed is read when it is asked for, which waits for it."""

    step: int
    """Updates so far, this one included."""
    epoch: float
    """Passes over the data so far."""
    lr: float
    """After this update: `Schedule.learning_rate(step)`."""
    rows: NDArray[np.int64]
    """(B,) of the corpus."""
    tokens: int
    """Real tokens that the student read."""
    computed_tokens: int
    """Tokens that the student computed: more than `tokens` where the model can't run packed."""
    groups: tuple[tuple[int, int], ...]
    """(number of texts, tokens in each) that this process encoded."""
    clock: StepClock
    """Where this process' time went."""
    gathered: tuple[int, ...]
    """Embeddings of each rank, which all ranks gather."""
    seconds: float
    """Wall time of the step on this process; on CUDA the device may be behind."""
    metrics: Tensor
    """float32 on the device, one for each of `METRICS`."""

    def metric(self, name: str) -> float:
        """One of `METRICS`."""
        return self.metrics[METRICS.index(name)].item()

    @property
    def loss(self) -> float:
        """Of this step."""
        return self.metric("loss")

    @property
    def grad_norm(self) -> float:
        """Before clipping."""
        return self.metric("grad_norm")

    @property
    def masked(self) -> dict[str, float]:
        """Share of candidates that left the partition function, by block."""
        metrics = dict(zip(METRICS, self.metrics.tolist(), strict=True))
        return {block: metrics[f"masked_{block}"] / max(metrics[f"candidates_{block}"], 1.0) for block in BLOCKS}

    @property
    def distillation_loss(self) -> float:
        """The divergence from the guide's distribution over the batch; 0 where it is not taken."""
        return self.metric("distillation_loss")

    @property
    def regression_loss(self) -> float:
        """1 - cosine of embeddings and the guide's, the mean over the batch's texts; 0 where it is not taken."""
        return self.metric("regression_loss")

    @property
    def score_loss(self) -> float:
        """The divergence from the distribution of the rows' scores."""
        return self.metric("score_loss")

    @property
    def loss_scale(self) -> float | None:
        """Under fp16, for the step that follows."""
        return self.metric("loss_scale") or None


class NonFiniteError(ArithmeticError):
    """Loss or gradient is not finite. Weights and moments are as the step before left them."""


def steps(training: Training, start: int, stop: int) -> Iterator[StepRecord]:
    """Trains steps start + 1 to stop, and yields a record after each update.

    From a step on whose loss or gradient is not finite no update changes anything: `metrics_of` the records tells.
    """
    accelerator, device = training.accelerator, training.accelerator.device
    frozen = torch.zeros((), device=device)
    graphs = None
    if training.longest_in_graphs is not None:
        untimed = StepClock(device, running=False)  # in a graph there is no time
        graphs = Graphs(lambda inputs, seed: _compute(training, inputs, [seed], frozen, untimed), device)
    training.model.train()
    # A tensor's device has a number: of one process accelerate says "cuda", which a thread can't be given.
    with ThreadPoolExecutor(1, "next batch", _use, (frozen.device,)) as ahead:
        following = ahead.submit(inputs_of, training, start + 1)
        for step in range(start + 1, stop + 1):
            began, clock = time.perf_counter(), StepClock(device)
            inputs = following.result()
            if step < stop:
                following = ahead.submit(inputs_of, training, step + 1)
            # Dropout's draws depend on nothing that came before: the generators are set anew for each chunk.
            seeds = [dropout_seed(training.seed, step, accelerator.process_index, n) for n in range(len(inputs.texts.chunks))]
            set_learning_rate(training.optimizer, training.schedule.learning_rate(step - 1))
            if graphs is not None and graphs.take(inputs):
                clock.ends("data")
                metrics = graphs.run(inputs, seeds[0])
                clock.ends("graph")
            else:
                inputs = inputs.each(lambda x: x.to(device, non_blocking=True))
                clock.ends("data")
                metrics = _compute(training, inputs, seeds, frozen, clock)
            yield StepRecord(
                step=step,
                epoch=step / training.plan.steps_per_epoch,
                lr=training.schedule.learning_rate(step),
                rows=inputs.rows,
                tokens=inputs.tokens,
                computed_tokens=inputs.computed_tokens,
                groups=inputs.texts.groups,
                clock=clock,
                gathered=tuple(sum(part) for part in inputs.parts),
                seconds=time.perf_counter() - began,
                metrics=metrics,
            )
            PULSE.beat("training", step)


def _compute(training: Training, inputs: Inputs, seeds: Sequence[int], frozen: Tensor, clock: StepClock) -> Tensor:
    """The work of one step on the device, update included, and its `METRICS`."""
    accelerator, optimizer, texts = training.accelerator, training.optimizer, inputs.texts
    embeddings = encode(training.model, texts, seeds)
    clock.ends("forward")
    own = embeddings[: sum(inputs.parts[accelerator.process_index])]
    gathered = gather_with_gradient(own, [sum(part) for part in inputs.parts])
    clock.ends("communication")
    out = _losses(training, inputs, gathered)
    clock.ends("loss")

    # Summed over ranks this is the batch's loss. DistributedDataParallel averages gradients, hence the factor.
    factor = accelerator.num_processes
    scaled = training.state.loss_scale
    with waiting():  # DistributedDataParallel sums gradients over ranks on the way
        (out.total * (factor if scaled is None else factor * scaled.value)).backward()
    if texts.cached:  # backward has reached the embeddings, and from there no graph leads to the weights yet
        with waiting():
            hand_on(accelerator, training.model, texts, seeds, embeddings)
    clock.ends("backward")

    parts = (out.distillation, out.regression, out.scores)
    figures = out.total.detach()[None], out.masked, out.candidates, *(part.detach()[None] for part in parts)
    totals = sum_over_ranks(torch.cat([part.to(out.total.dtype) for part in figures]))
    clock.ends("communication")
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm, spike = update(optimizer, parameters, totals[0], frozen, limit=training.grad_clip, state=training.state)
    clock.ends("optimizer")
    none, spikes = frozen.new_zeros(()), training.state.spikes
    scale = none if scaled is None else scaled.value
    skipped = none if spikes is None else spikes.skipped
    return torch.cat([totals[:1], norm[None], totals[1:], torch.stack([scale, spike, skipped, frozen])])


def metrics_of(records: Sequence[StepRecord], corpus: Corpus) -> list[dict[str, float]]:
    """`METRICS` of some steps by name, read at once.

    Raises:
        NonFiniteError: one of them was not finite, or its gradient was not.
    """
    if not records:
        return []
    with waiting():  # for the device, which may wait for those of other ranks
        read = torch.stack([record.metrics for record in records]).tolist()
    metrics_of_steps = [dict(zip(METRICS, values, strict=True)) for values in read]
    for record, metrics in zip(records, metrics_of_steps, strict=True):
        if metrics["frozen"]:
            raise NonFiniteError(_tell_non_finite(record, metrics["loss"], metrics["grad_norm"], corpus))
    return metrics_of_steps


def dropout_seed(seed: int, step: int, rank: int, chunk: int) -> int:
    """63 bits that no other (seed, step, rank, chunk) shares, but by chance."""
    return int(np.random.SeedSequence([seed, step, rank, chunk]).generate_state(1, np.uint64)[0]) >> 1


def _use(device: torch.device) -> None:
    """Sets the thread's CUDA device; a new thread defaults to device 0."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


@dataclass(frozen=True, slots=True)
class Losses:
    """Of this rank's rows against the pool of all ranks. Summed over ranks losses are the mean over the batch."""

    total: Tensor
    """Scalar: what is trained, weights included."""
    distillation: Tensor
    """Scalar: the divergence from the guide's distribution, without its weight; 0 where it is not taken."""
    regression: Tensor
    """Scalar: how far embeddings are from the guide's, without its weight; 0 where it is not taken."""
    scores: Tensor
    """Scalar: the divergence from the distribution of the rows' scores, without its weight; 0 where it is not taken."""
    masked: Tensor
    """(4,) as `LossOutput` has them; 0 where the contrastive loss is not taken."""
    candidates: Tensor
    """(4,)"""


def _losses(training: Training, inputs: Inputs, gathered: Sequence[Tensor]) -> Losses:
    pieces = [torch.split(texts, part) for texts, part in zip(gathered, inputs.parts, strict=True)]
    anchor, positive, negative = (torch.cat(column) for column in zip(*pieces, strict=True))
    given = inputs.loss
    if isinstance(training.guide, SelfGuide):
        given = replace(given, guide_anchor=anchor.detach(), guide_positive=positive.detach(), guide_negative=negative.detach())
    texts: dict[str, Any] = {"anchor": anchor, "positive": positive, "negative": negative, "rows": inputs.here, **given.by_name()}
    total = distillation = regression = scores = anchor.new_zeros((), dtype=torch.promote_types(anchor.dtype, torch.float32))
    masked = candidates = torch.zeros(len(BLOCKS), dtype=torch.int64, device=anchor.device)
    if training.loss.weight:
        # The config's section has the options of the loss, under their names. That texts are compared by id the inputs know.
        options = training.loss.model_dump(exclude={"mask_duplicates", "weight"})
        if isinstance(training.guide, StoredGuide):
            options["guide_widths"] = None if training.loss.votes is None else training.guide.anchor.widths
        else:  # a plan's stand-in for several guides is one
            options["votes"] = None
        out = guided_contrastive_loss(**texts, **options)
        total = out.loss if training.loss.weight == 1 else training.loss.weight * out.loss
        masked, candidates = out.masked, out.candidates
    if training.distillation.weight:
        options = training.distillation.model_dump(include={"temperature", "guide_temperature"})
        options |= training.loss.model_dump(include={"block_size", "dimensions", "dimension_weights"})
        unlabelled = {name: value for name, value in texts.items() if name not in ("labels", "negative_labels")}
        distillation = distillation_loss(**unlabelled, **options).loss
        total = total + training.distillation.weight * distillation
    if training.distillation.regression:
        regression = _regression(training, inputs, gathered, given)
        total = total + training.distillation.regression * regression
    if inputs.scores is not None:
        options = training.distillation.model_dump(include={"temperature", "score_temperature"})
        options |= training.loss.model_dump(include={"dimensions", "dimension_weights"}) | inputs.scores.by_name()
        scores = score_loss(anchor, positive, negative, rows=inputs.here, **options)
        total = total + training.distillation.scores * scores
    return Losses(total, distillation, regression, scores, masked, candidates)


def _regression(training: Training, inputs: Inputs, gathered: Sequence[Tensor], given: LossInputs) -> Tensor:
    """Of this rank's texts; summed over ranks it is the mean over all texts of the batch."""
    rank, (start, stop) = training.accelerator.process_index, inputs.here
    first = sum(negatives for _, _, negatives in inputs.parts[:rank])
    assert given.guide_anchor is not None
    assert given.guide_positive is not None
    assert given.guide_negative is not None
    negatives = given.guide_negative[first : first + inputs.parts[rank][2]]
    guides = torch.cat([given.guide_anchor[start:stop], given.guide_positive[start:stop], negatives])
    return regression_loss(gathered[rank], guides, training.guide_map) / sum(map(sum, inputs.parts))


def _tell_non_finite(record: StepRecord, loss: float, grad_norm: float, corpus: Corpus) -> str:
    tasks = sorted({corpus.tasks[task] for task in corpus.task[record.rows].tolist()})
    return (
        f"step {record.step:,}: loss {loss}, gradient norm {grad_norm}. From this step on the weights were not touched.\n"
        f"  rows     {listed(map(str, record.rows.tolist()), 64)} of the corpus {corpus.folder}\n"
        f"  tasks    {listed(tasks)}\n"
        "  fix      look at these rows; lower optimizer.lr; use training.precision: float32"
    )
