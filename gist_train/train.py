"""Joins loop, checkpoints, run log and evaluation: what happens when the loop yields."""

import hashlib
import platform
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from torch import nn

from gist_train import __version__
from gist_train.config.errors import Fault, UserError, shown
from gist_train.config.loading import resolved_yaml
from gist_train.config.schema import Config, OptimizerConfig, mathematics
from gist_train.data.files import read_json, write_json, write_text
from gist_train.model.pretrained import Pretrained, load_student
from gist_train.prepare import batch_plan, prepare_corpus, prepare_guide, prepare_tokens
from gist_train.results.evaluation import evaluate, load_tasks
from gist_train.results.figures import append_figures
from gist_train.training import checkpoint as checkpoints
from gist_train.training.distributed import largest_over_ranks, make_accelerator
from gist_train.training.loop import GuideLookup, StepRecord, Training, steps
from gist_train.training.runlog import RunLog
from gist_train.training.schedule import make_schedule
from gist_train.training.signals import StopSignal
from gist_train.training.throughput import matmul_rate, training_flops

PACKAGES = ("torch", "transformers", "sentence-transformers", "accelerate", "tokenizers", "safetensors", "numpy")


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
    main = accelerator.is_main_process
    console.quiet = console.quiet or not main
    console.print(_first_line(accelerator))
    if note:
        console.print(note)
    run = run_folder(config)
    origin = _checkpoint_to_start_from(run, resume)
    tasks = load_tasks(config.evaluation.tasks)

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
    stop = min(schedule.total_steps, config.training.stop_at_step or schedule.total_steps)
    facts = _facts(config, corpus.fingerprint, guide, accelerator.num_processes)
    progress = checkpoints.Progress(0, 0.0, 0)
    if origin is not None:
        progress = _verify(origin, facts)
    console.print(
        _plan_lines(
            config,
            corpus.row_count,
            plan.counts(plan.epoch_of(progress.step + 1)).left_out,
            schedule.total_steps,
            progress.step,
            stop,
        )
    )

    adamw = _optimizer(student, config.optimizer)
    # Wrapped once more, so that accelerate's patches (autocast) stay off the encoder that is evaluated and saved.
    model, optimizer = accelerator.prepare(nn.Sequential(student.encoder), adamw)
    if origin is not None:
        checkpoints.load_checkpoint(origin, student, adamw)
    if main:
        _describe(run, config, accelerator, facts)
    training = Training(
        accelerator,
        model,
        optimizer,
        schedule,
        plan,
        corpus,
        tokens,
        guide,
        config.loss,
        config.training.grad_clip,
        config.training.seed,
    )
    rate = matmul_rate(student.encoder, 2048, torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32)

    def save(step: int) -> None:
        if main:
            checkpoints.save_checkpoint(run, student, adamw, log.progress(step), facts)
            _retire(run, config)
        accelerator.wait_for_everyone()

    def measure(step: int) -> None:
        if main and tasks:
            append_figures(run, step, evaluate(student.with_max_length(config.evaluation.max_length), tasks))
        accelerator.wait_for_everyone()

    saved, signal_number = progress.step, 0
    log_folder = run if main else None
    with (
        RunLog(log_folder, config.name, config.tracking, config.model_dump(mode="json"), progress) as log,
        StopSignal() as signals,
        _Display(console, progress.step, stop) as display,
    ):
        if config.evaluation.every and origin is None:
            measure(0)
        for record in steps(training, progress.step, stop):
            flops = training_flops(student.encoder, record.groups) * accelerator.num_processes
            display.show(record, log.add(record, flops, rate * accelerator.num_processes))
            signal_number = largest_over_ranks(signals.received(), accelerator.device)
            if record.step % config.checkpoint.every == 0 or record.step == stop or signal_number:
                save(saved := record.step)
            if config.evaluation.every and record.step % config.evaluation.every == 0:
                measure(record.step)
            if signal_number:
                break
    accelerator.end_training()
    if signal_number:
        console.print(f"stopped at step {saved:,} with its checkpoint written; the same command goes on from there")
        return 128 + signal_number
    console.print(f"done: step {stop:,} of {schedule.total_steps:,}, {checkpoints.checkpoint_folder(run, stop)}")
    return 0


def _first_line(accelerator: Accelerator) -> str:
    count = accelerator.num_processes
    precision = "bf16" if accelerator.mixed_precision == "bf16" else "float32"
    processes = f"{count} process{'es' if count > 1 else ''}"
    return (
        f"gist-train {__version__}: {processes} on {accelerator.device.type}, {torch.get_num_threads()} threads each, {precision}"
    )


def _plan_lines(config: Config, rows: int, left_out: int, total: int, done: int, stop: int) -> str:
    guide = config.guide if config.guide is None or isinstance(config.guide, str) else config.guide.name
    going = f", going on from step {done:,}" if done else ""
    ends = f", stopping at {stop:,}" if stop < total else ""
    return (
        f"{rows:,} rows, {left_out:,} of them in no batch of this epoch; guide: {guide or 'none'}\n"
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


def _verify(origin: Path, facts: dict[str, Any]) -> checkpoints.Progress:
    """The progress that a checkpoint holds, if it was made by the same mathematics.

    Raises:
        UserError: it is damaged, or config, data or guide changed since; every field is named.
    """
    manifest = checkpoints.verified_manifest(origin)
    was, now = manifest["mathematics"], facts["mathematics"]
    mend = "set it back, or give this training a name of its own"
    faults = [
        Fault(key, shown(now.get(key, "nothing")), f"{shown(was.get(key, 'nothing'))}, as in {origin}", mend)
        for key in sorted(was.keys() | now.keys())
        if was.get(key) != now.get(key)
    ]
    for key, name in (("corpus", "data.train"), ("guide", "guide.name")):
        if not faults and manifest[key] != facts[key]:
            found = f"other content: {key} fingerprint {facts[key]}"
            faults.append(Fault(name, found, f"{manifest[key]}, as in {origin}", mend.replace("set it", "put the files")))
    if faults:
        raise UserError(*faults)
    return checkpoints.Progress(manifest["step"], manifest["loss_sum"], manifest["loss_steps"])


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


class _Display:
    """Step, loss, tokens per second and time left: a bar on a terminal, a line per row of metrics elsewhere."""

    def __init__(self, console: Console, start: int, stop: int):
        self._console, self._stop = console, stop
        columns = (
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("loss {task.fields[loss]}  {task.fields[speed]} tokens/s"),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, console=console, disable=not console.is_terminal)
        self._task: TaskID = self._bar.add_task("training", total=stop, completed=start, loss="-", speed="-")

    def __enter__(self) -> "_Display":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def show(self, record: StepRecord, row: dict[str, Any] | None) -> None:
        """Takes a step in, and the row of metrics that was due after it."""
        speed = record.tokens / record.seconds
        self._bar.update(self._task, completed=record.step, loss=f"{record.loss:.4f}", speed=f"{speed:,.0f}")
        if row is not None and not self._console.is_terminal:
            self._console.print(
                f"step {record.step:,}/{self._stop:,}  loss {row['loss_mean']:.4f}  {row['tokens_per_second']:,.0f} tokens/s",
                highlight=False,
            )
