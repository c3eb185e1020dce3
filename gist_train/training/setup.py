"""A config and what was prepared for it -> all that the loop reads; what of it a model or device can't do."""

import hashlib
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from gist_train.config.errors import Fault, UserError, shown
from gist_train.config.loading import resolved_yaml
from gist_train.config.losses import LossConfig
from gist_train.config.schema import Config, OptimizerConfig, mathematics
from gist_train.config.training import TrainingConfig
from gist_train.data.batches import BatchPlan
from gist_train.data.corpus import Corpus, TokenTable
from gist_train.model.adapters import adapted, base_fingerprint
from gist_train.model.attention import WIDEST_HEAD, flash_runs
from gist_train.model.compiled import BorderedEncoder, CompiledEncoder
from gist_train.model.distillation import map_to_width
from gist_train.model.pretrained import Pretrained
from gist_train.training.checkpoint import Facts
from gist_train.training.distributed import DTYPES, precision_on
from gist_train.training.guides import Guide, SelfGuide, StoredGuide
from gist_train.training.schedule import Schedule, make_schedule
from gist_train.training.step_context import SourceRules, Training
from gist_train.training.update import LossScale, Spikes, UpdateState, for_graphs

MAPPED_TEXTS = 20_000
"""That the map of the guide's embeddings into fewer dimensions is made of."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """What a run reads, prepared once and found by every later command."""

    student: Pretrained
    corpus: Corpus
    plan: BatchPlan
    tokens: TokenTable
    """The student's, of every view of the corpus."""
    guide: Guide

    def folders(self) -> list[Path]:
        """Of the cache, that a run reads from."""
        return [self.corpus.folder, *(self.guide.folders() if isinstance(self.guide, StoredGuide) else ())]


@dataclass(frozen=True, slots=True)
class Job:
    """A run, ready to take its first step."""

    student: Pretrained
    training: Training
    stop: int
    """Step after which the run ends."""
    facts: Facts
    """What a resume compares."""


def open_training(config: Config, accelerator: Accelerator, prepared: Prepared) -> Job:
    """The student on the accelerator's device, with optimizer and schedule, at step 0."""
    student, precision = prepared.student, precision_on(config.training.precision, accelerator.device)
    if precision == "float64":
        student.encoder.double()
    schedule = schedule_of(config, prepared.plan.steps_per_epoch)
    adamw = _optimizer(student, config.optimizer)
    if config.training.cuda_graph:
        for_graphs(adamw, accelerator.device)
    encoder: nn.Module = student.encoder
    if config.training.compile:
        encoder = CompiledEncoder(student.encoder, student.max_length)
    elif config.training.cuda_graph:
        encoder = BorderedEncoder(student.encoder, student.max_length)
    # Wrapped once more, so that accelerate's patches (autocast) stay off the encoder that is evaluated and saved.
    model = accelerator.prepare(nn.Sequential(encoder))
    skipping = config.training.skip_spikes
    training = Training(
        accelerator=accelerator,
        model=model,
        optimizer=adamw,
        schedule=schedule,
        plan=prepared.plan,
        corpus=prepared.corpus,
        tokens=prepared.tokens,
        guide=prepared.guide,
        loss=config.loss,
        distillation=config.distillation,
        guide_map=_guide_map(config, prepared),
        sources=SourceRules.of(config.data.train),
        grad_clip=config.training.grad_clip,
        seed=config.training.seed,
        max_tokens_per_forward=config.training.max_tokens_per_forward,
        state=UpdateState(
            loss_scale=LossScale.first(accelerator.device) if precision == "fp16" else None,
            spikes=None if skipping is None else Spikes.first(skipping, accelerator.device),
        ),
        longest_in_graphs=student.max_length if config.training.cuda_graph else None,
    )
    facts = facts_of(config, prepared, precision, accelerator.num_processes)
    return Job(student, training, last_step(config, schedule), facts)


def _guide_map(config: Config, prepared: Prepared) -> Tensor | None:
    """What regression maps the guide's embeddings with, from those of up to `MAPPED_TEXTS` positives."""
    if not config.distillation.regression or not isinstance(prepared.guide, StoredGuide):
        return None
    texts = np.unique(prepared.corpus.positive)
    chosen = texts[np.linspace(0, len(texts) - 1, min(MAPPED_TEXTS, len(texts))).astype(np.int64)]
    return map_to_width(prepared.guide.positive.embeddings(chosen).numpy(), prepared.student.width)


def facts_of(config: Config, prepared: Prepared, precision: str, processes: int) -> Facts:
    """What a checkpoint must say so that a resume can tell whether it is the same mathematics."""
    match prepared.guide:
        case StoredGuide(fingerprint=fingerprint):
            guide: str | None = fingerprint
        case SelfGuide():
            guide = "self"
        case None:
            guide = None
    encoder = prepared.student.encoder
    return Facts(
        config_sha256=hashlib.sha256(resolved_yaml(config).encode()).hexdigest(),
        mathematics=mathematics(config),
        corpus=prepared.corpus.content,
        guide=guide,
        precision=precision,
        student=(prepared.student.tokenizer_fingerprint(), encoder.pooling, encoder.normalized),
        processes=processes,
        base=base_fingerprint(encoder.transformer) if adapted(encoder.transformer) else None,
    )


def check_dimensions(loss: LossConfig, student: Pretrained) -> None:
    """Raises UserError where the loss is taken over more dimensions than the student's embeddings have."""
    if loss.dimensions is not None and max(loss.dimensions) > student.width:
        expected = f"at most {student.width} each, the dimensions of an embedding of {student.encoder.transformer.name_or_path}"
        raise UserError(Fault("loss.dimensions", shown(loss.dimensions), expected, "leave the larger ones out"))


def checkpoint_gradients(config: TrainingConfig, student: Pretrained) -> None:
    """Has the student's layers computed again in the backward pass, if that is asked for.

    Raises:
        UserError: this family of models can't.
    """
    if not config.gradient_checkpointing:
        return
    transformer = student.encoder.transformer
    with warnings.catch_warnings():
        # transformers 5.23 calls it otherwise, and 5.17 not yet.
        warnings.simplefilter("ignore", FutureWarning)
        try:
            transformer.gradient_checkpointing_enable({"use_reentrant": False})
        except ValueError:
            found = f"true, and a model of the family {transformer.config.model_type}"
            expected = "false: transformers has no gradient checkpointing for this family"
            fix = "set it to false; training.max_tokens_per_forward saves memory too"
            raise UserError(Fault("training.gradient_checkpointing", found, expected, fix)) from None


def check_family(config: TrainingConfig, student: Pretrained) -> None:
    """Raises UserError where the encoder is to be compiled, or steps are to be replayed from CUDA graphs, and no device can do so
    for this family of models."""
    if student.encoder.compiles:
        return
    found = f"true, and a model of the family {student.encoder.transformer.config.model_type}"
    expected = "false: attention of this family is not flash attention on a packed sequence"
    if faults := [Fault(key, found, expected, "set it to false") for key in _graph_switches(config)]:
        raise UserError(*faults)


def check_graphs(config: TrainingConfig, student: Pretrained, device: torch.device, precision: str, processes: int) -> None:
    """Raises UserError where the encoder is to be compiled, or steps are to be replayed from CUDA graphs, and can't be here.

    Args:
        precision: float32, bf16 or fp16.
    """
    faults, width = [], student.encoder.head_width
    if not flash_runs(device, DTYPES[precision], width):
        setting = f"true, on {device.type} in {precision}, with attention heads of {width} dimensions"
        expected = f"true on CUDA from Ampere on, in bf16 or fp16, with heads of a multiple of 8 dimensions up to {WIDEST_HEAD}"
        faults = [Fault(key, setting, expected, "set it to false") for key in _graph_switches(config)]
    elif config.cuda_graph and processes > 1:
        expected = "true in one process: what processes send each other is no part of a graph"
        faults = [Fault("training.cuda_graph", f"true, and {processes} processes", expected, "set it to false")]
    if faults:
        raise UserError(*faults)


def _graph_switches(config: TrainingConfig) -> list[str]:
    """Keys of those that are on."""
    return [key for key, on in (("training.compile", config.compile), ("training.cuda_graph", config.cuda_graph)) if on]


def schedule_of(config: Config, steps_per_epoch: int) -> Schedule:
    """The schedule of a run whose epochs have so many steps."""
    return make_schedule(
        config.schedule.type,
        config.optimizer.lr,
        config.schedule.warmup_ratio,
        steps_per_epoch=steps_per_epoch,
        epochs=config.training.epochs,
        max_steps=config.training.max_steps,
    )


def last_step(config: Config, schedule: Schedule) -> int:
    """The step after which the run ends."""
    return min(schedule.total_steps, config.training.stop_at_step or schedule.total_steps)


def _optimizer(student: Pretrained, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over the weights that are trained; biases and norms are not decayed, as transformers' Trainer has it."""
    trained = [p for p in student.encoder.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.betas[0], config.betas[1]), eps=config.eps, fused=True)
