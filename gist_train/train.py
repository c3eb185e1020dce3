"""Joins loop, checkpoints, run log and evaluation: what happens when the loop yields."""

import hashlib
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console
from torch import nn

from gist_train import __version__
from gist_train.config.errors import Fault, UserError, shown
from gist_train.config.loading import resolved_yaml
from gist_train.config.schema import Config, GuideConfig, OptimizerConfig, mathematics
from gist_train.data.files import read_json, write_json, write_text
from gist_train.model.pretrained import Pretrained, load_student
from gist_train.prepare import batch_plan, prepare_corpus, prepare_guide, prepare_tokens
from gist_train.results.evaluation import LoadedTask, evaluate, load_tasks
from gist_train.results.figures import append_figures
from gist_train.training import checkpoint as checkpoints
from gist_train.training.checkpoint import Progress
from gist_train.training.display import Display
from gist_train.training.distributed import largest_over_ranks, make_accelerator
from gist_train.training.loop import GuideLookup, Training, steps
from gist_train.training.runlog import RunLog
from gist_train.training.schedule import make_schedule
from gist_train.training.signals import StopSignal
from gist_train.training.throughput import matmul_rate, training_flops

PACKAGES = ("torch", "transformers", "sentence-transformers", "accelerate", "tokenizers", "safetensors", "numpy")

MEND_CHANGE = "set it back, or give this training a name of its own"


def run_folder(config: Config) -> Path:
    """Where the run's files are."""
    return Path(config.output_dir) / config.name


def train(config: Config, *, resume: str, timeout: float | None, console: Console) -> int:
    """Trains from where the run folder stands to the end, and returns the exit code: 0, or 128 + the signal that stopped it.

    Args:
        resume: "auto" (go on where the run folder stands), "never" (refuse a folder with a run in it) or a step.
        timeout: seconds that a rank waits for the others; None for the backend's own.

    Raises:
        UserError: the data, the models or the run folder are not what the config says.
        NonFiniteError: loss or gradient is not finite.
    """
    accelerator, note = make_accelerator(config.training.precision, timeout)
    console.quiet = console.quiet or not accelerator.is_main_process
    console.print(_first_line(accelerator))
    if note:
        console.print(note)
    run = run_folder(config)
    _refuse_missing_tracker(config)
    origin = _checkpoint_to_start_from(run, resume)
    tasks = load_tasks(config.evaluation.tasks)
    manifest = _verified(origin, config) if origin is not None else None  # before the guide is put to work
    job = _open(config, accelerator, console)
    progress = Progress(0, 0.0, 0, 0, 0)
    if origin is not None and manifest is not None:
        _verify_content(origin, manifest, job.facts)
        checkpoints.load_checkpoint(origin, job.student, job.adamw)
        progress = checkpoints.progress_of(manifest)
    console.print(_plan_lines(config, job, progress.step), soft_wrap=True)
    if accelerator.is_main_process:
        if aside := checkpoints.set_aside_later(run, progress.step):
            console.print(f"going back to step {progress.step:,}: the checkpoints after it are now in {aside}", soft_wrap=True)
        _describe(run, config, accelerator, job.facts)
    signal_number = _drive(config, job, run, progress, tasks, console)
    accelerator.end_training()
    if signal_number:
        console.print("stopped with a checkpoint written; the same command goes on from there")
        return 128 + signal_number
    console.print(f"done: step {job.stop:,} of {job.training.schedule.total_steps:,}: {run}", soft_wrap=True)
    return 0


@dataclass(frozen=True, slots=True)
class _Job:
    """A config, opened."""

    student: Pretrained
    adamw: torch.optim.AdamW
    """The optimizer inside `training.optimizer`, whose moments a checkpoint holds."""
    training: Training
    stop: int
    """Step after which the run ends."""
    facts: dict[str, Any]
    """What a resume compares."""


def _open(config: Config, accelerator: Accelerator, console: Console) -> _Job:
    """Models, corpus, guide store, plan and optimizer, prepared where no run has prepared them yet."""
    student = load_student(config.model)
    corpus = prepare_corpus(config, console)
    tokens = prepare_tokens(corpus, student, console)
    guide = prepare_guide(config, corpus, accelerator.device, console)
    plan = batch_plan(config, corpus)
    schedule = make_schedule(
        config.schedule.type,
        config.optimizer.lr,
        config.schedule.warmup_ratio,
        steps_per_epoch=plan.steps_per_epoch,
        epochs=config.training.epochs,
        max_steps=config.training.max_steps,
    )
    adamw = _optimizer(student, config.optimizer)
    # Wrapped once more, so that accelerate's patches (autocast) stay off the encoder that is evaluated and saved.
    model, optimizer = accelerator.prepare(nn.Sequential(student.encoder), adamw)
    training = Training(
        accelerator=accelerator,
        model=model,
        optimizer=optimizer,
        schedule=schedule,
        plan=plan,
        corpus=corpus,
        tokens=tokens,
        guide=guide,
        loss=config.loss,
        grad_clip=config.training.grad_clip,
        seed=config.training.seed,
    )
    stop = min(schedule.total_steps, config.training.stop_at_step or schedule.total_steps)
    return _Job(student, adamw, training, stop, _facts(config, corpus.fingerprint, guide, accelerator.num_processes))


def _drive(config: Config, job: _Job, run: Path, progress: Progress, tasks: Sequence[LoadedTask], console: Console) -> int:
    """Takes the steps that are left; logs, saves and evaluates when they are due. Returns the signal that stopped it, or 0."""
    accelerator, student = job.training.accelerator, job.student
    main, processes = accelerator.is_main_process, accelerator.num_processes
    rate = matmul_rate(student.encoder, 2048, torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32)

    def save() -> None:
        if main:
            checkpoints.save_checkpoint(run, student, job.adamw, log.progress, job.facts)
            _retire(run, config)
        accelerator.wait_for_everyone()

    def measure(step: int) -> None:
        if main and tasks:
            append_figures(run, step, evaluate(student.with_max_length(config.evaluation.max_length), tasks))
        accelerator.wait_for_everyone()

    with (
        RunLog(run if main else None, config.name, config.tracking, config.model_dump(mode="json"), progress) as log,
        StopSignal() as signals,
        Display(console, progress.step, job.stop) as display,
    ):
        if config.evaluation.every and progress.step == 0:
            measure(0)
        for record in steps(job.training, progress.step, job.stop):
            flops = training_flops(student.encoder, record.groups) * processes
            display.show(record, log.add(record, flops, rate * processes))
            signal_number = largest_over_ranks(signals.received(), accelerator.device)
            if record.step % config.checkpoint.every == 0 or record.step == job.stop or signal_number:
                save()
            if config.evaluation.every and record.step % config.evaluation.every == 0:
                measure(record.step)
            if signal_number:
                return signal_number
    return 0


def _first_line(accelerator: Accelerator) -> str:
    count = accelerator.num_processes
    precision = "bf16" if accelerator.mixed_precision == "bf16" else "float32"
    processes = f"{count} process{'es' if count > 1 else ''}"
    return (
        f"gist-train {__version__}: {processes} on {accelerator.device.type}, {torch.get_num_threads()} threads each, {precision}"
    )


def _plan_lines(config: Config, job: _Job, done: int) -> str:
    counts = job.training.plan.counts(job.training.plan.epoch_of(done + 1))
    total = job.training.schedule.total_steps
    guide = config.guide.name if isinstance(config.guide, GuideConfig) else config.guide or "none"
    shared = f", {counts.shared_text:,} beside a row with the same text" if counts.shared_text else ""
    going = f", going on from step {done:,}" if done else ""
    ends = f", stopping at {job.stop:,}" if job.stop < total else ""
    return (
        f"{counts.rows:,} rows, {counts.left_out:,} of them in no batch of this epoch{shared}; guide: {guide}\n"
        f"{total:,} steps of {config.training.batch_size} triplets{going}{ends}"
    )


def _optimizer(student: Pretrained, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over the weights that are trained; biases and norms are not decayed, as transformers' Trainer has it."""
    trained = [p for p in student.encoder.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.betas[0], config.betas[1]), eps=config.eps, fused=True)


def _facts(config: Config, corpus: str, guide: GuideLookup | str | None, processes: int) -> dict[str, Any]:
    """What a checkpoint must say so that a resume can tell whether it is the same mathematics."""
    return {
        "config_sha256": hashlib.sha256(resolved_yaml(config).encode()).hexdigest(),
        "mathematics": mathematics(config),
        "corpus": corpus,
        "guide": guide.store.fingerprint if isinstance(guide, GuideLookup) else guide,
        "processes": processes,
    }


def _checkpoint_to_start_from(run: Path, resume: str) -> Path | None:
    if resume == "never":
        if run.exists() and any(run.iterdir()):
            raise UserError(
                Fault(
                    "--resume never",
                    f"{run}, which has files in it",
                    "an empty run folder, or none",
                    "give the run another name, or leave --resume out to go on with it",
                )
            )
        return None
    if resume != "auto" and not resume.isdecimal():
        raise UserError(Fault("--resume", shown(resume), "auto, never or a step", "name one of these"))
    return checkpoints.checkpoint_to_resume(run, None if resume == "auto" else int(resume))


def _verified(origin: Path, config: Config) -> dict[str, Any]:
    """The manifest of a checkpoint that is whole and was made by the same mathematics.

    Raises:
        UserError: it is damaged, or the config changed since; every field is named.
    """
    manifest = checkpoints.verified_manifest(origin)
    was, now = manifest["mathematics"], mathematics(config)
    faults = [
        Fault(key, shown(now.get(key, "nothing")), f"{shown(was.get(key, 'nothing'))}, as in {origin}", MEND_CHANGE)
        for key in sorted(was.keys() | now.keys())
        if was.get(key) != now.get(key)
    ]
    if faults:
        raise UserError(*faults)
    return manifest


def _verify_content(origin: Path, manifest: dict[str, Any], facts: dict[str, Any]) -> None:
    """Raises UserError where the same config names other data or another guide than the checkpoint was made with."""
    faults = [
        Fault(name, f"other content, of fingerprint {facts[key]}", f"{manifest[key]}, as in {origin}", MEND_CHANGE)
        for key, name in (("corpus", "data.train"), ("guide", "guide.name"))
        if manifest[key] != facts[key]
    ]
    if faults:
        raise UserError(*faults)


def _refuse_missing_tracker(config: Config) -> None:
    if config.tracking.wandb is not None and find_spec("wandb") is None:
        mend = 'pip install "gist-train[wandb]", or take tracking.wandb out'
        raise UserError(Fault("tracking.wandb", "no package wandb", "the package, which is an extra", mend))


def _describe(run: Path, config: Config, accelerator: Accelerator, facts: dict[str, Any]) -> None:
    """Writes config.yaml and run.json."""
    run.mkdir(parents=True, exist_ok=True)
    write_text(run / "config.yaml", resolved_yaml(config))
    described = {
        "gist_train": __version__,
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "machine": platform.machine(),
        "system": platform.platform(),
        "device": torch.cuda.get_device_name() if accelerator.device.type == "cuda" else accelerator.device.type,
        "threads": torch.get_num_threads(),
        "processes": accelerator.num_processes,
        "precision": accelerator.mixed_precision,
        "corpus": facts["corpus"],
        "guide": facts["guide"],
        "started": time.time(),
        "command": sys.argv,
    }
    write_json(run / "run.json", described)


def _retire(run: Path, config: Config) -> None:
    around, window = config.selection.around, config.selection.window
    selected = read_json(run / "selected.json")["step"] if (run / "selected.json").exists() else None
    kept: Callable[[int], bool] = lambda step: step == selected or (around is not None and abs(step - around) <= window)  # noqa: E731
    checkpoints.retire_checkpoints(run, keep_last=config.checkpoint.keep_last, keep_every=config.checkpoint.keep_every, kept=kept)
