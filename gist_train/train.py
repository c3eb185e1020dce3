"""Joins loop, checkpoints, run log and evaluation: what happens when the loop yields."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console

from gist_train import __version__
from gist_train.checks import check, check_device, check_student
from gist_train.config.errors import Fault, UserError
from gist_train.config.models import GuideConfig
from gist_train.config.schema import Config, run_folder
from gist_train.data.files import held, write_json
from gist_train.model.pretrained import load_student
from gist_train.prepare import Processes, batch_plan, check_folders, prepare_corpus, prepare_guide, prepare_tokens
from gist_train.results.early_stopping import best_saved, forget_later_end, no_rise, out_of_patience, remember_end, stays_ended
from gist_train.results.figures import cut_figures
from gist_train.results.leakage import count_leaks, leakage_line
from gist_train.results.measuring import Measuring, figures_line
from gist_train.results.selected import selected_steps
from gist_train.results.watching import ENDED
from gist_train.training import checkpoint as checkpoints
from gist_train.training.background import CheckpointWriter
from gist_train.training.checkpoint import Progress
from gist_train.training.description import describe
from gist_train.training.display import Display
from gist_train.training.distributed import (
    DTYPES,
    HOST_TIMEOUT,
    largest_over_ranks,
    make_accelerator,
    precision_of,
    raise_on_all_ranks,
    same_on_all_ranks,
)
from gist_train.training.loop import steps
from gist_train.training.opening import Job, last_step, open_training
from gist_train.training.resume import checkpoint_to_start_from, refuse_other_content, verified_for
from gist_train.training.runlog import RunLog
from gist_train.training.signals import StopSignal
from gist_train.training.throughput import TrainingCost, matmul_rate

NOT_WRITTEN = 1000
"""What ranks tell each other at a step's end where a checkpoint could not be written: more than any signal's number."""


def train(config: Config, *, resume: str, timeout: float | None, console: Console) -> int:
    """Trains from where the run folder stands to the end, and returns the exit code: 0, or 128 + the signal that stopped it.

    Args:
        resume: "auto" (go on where the run folder stands), "never" (refuse a folder with a run in it) or a step.
        timeout: seconds that a rank waits for the others; None for the backend's own.

    Raises:
        UserError: the data, the models or the run folder are not what the config says.
        NonFiniteError: loss or gradient is not finite.
    """
    signals = StopSignal()  # before the guide's pass: a launcher may go while it runs
    if timeout is None and config.evaluation.every and config.evaluation.tasks:
        timeout = HOST_TIMEOUT.total_seconds()
    accelerator, note = make_accelerator(config.training.precision, timeout)
    console.quiet = console.quiet or not accelerator.is_main_process
    console.print(_first_line(accelerator))
    if note:
        console.print(note)
    run = run_folder(config)
    check_folders(config)
    with _only_writer(run) if accelerator.is_main_process else nullcontext():
        signal_number = _train_alone(config, accelerator, run, resume, signals, console)
    accelerator.end_training()
    return 128 + signal_number if signal_number else 0


def _train_alone(config: Config, accelerator: Accelerator, run: Path, resume: str, signals: StopSignal, console: Console) -> int:
    """`train`, in a run folder that nobody else writes to. Returns the signal that stopped it, or 0."""
    measuring = check(config)
    origin = checkpoint_to_start_from(run, resume)
    selected_steps(run)  # refuses a selected.json that can't be read, before retention goes by it
    if accelerator.is_main_process:
        (run / ENDED).unlink(missing_ok=True)
    else:
        measuring = replace(measuring, tasks=[])  # read for their faults; the first process measures
    manifest = verified_for(origin, config) if origin is not None else None  # before the guide is put to work
    job = open_job(config, accelerator, console)
    progress = Progress(0, 0.0, 0, 0, 0)
    if origin is not None and manifest is not None:
        refuse_other_content(origin, manifest, job.facts, excluding=config.data.exclude_evaluation_texts)
        checkpoints.load_checkpoint(origin, job.student, job.training.optimizer, job.training.loss_scale)
        progress = checkpoints.progress_of(manifest)
    _refuse_unlike_ranks(progress.step, job.facts)
    stays = stays_ended(config, run, progress.step)
    if stays:
        job = replace(job, stop=progress.step)
    console.print(_plan_lines(config, job, progress.step), soft_wrap=True)
    if accelerator.is_main_process:
        checkpoints.sweep(run)
        if aside := checkpoints.set_aside_later(run, progress.step):
            console.print(f"going back to step {progress.step:,}: the checkpoints after it are now in {aside}", soft_wrap=True)
            if max(selected_steps(run), default=0) > progress.step:
                console.print(f"what was selected is among them: gist-train select {run}, once there is another", soft_wrap=True)
        cut_figures(run, progress.step, aside)
        forget_later_end(run, progress.step)
        leaks = count_leaks(job.training.corpus, measuring.tasks)
        if line := leakage_line(leaks):
            console.print(line, soft_wrap=True, markup=False, highlight=False)
        describe(run, config, accelerator, job, [leak.told() for leak in leaks])
    signal_number, step = _drive(config, job, run, progress, measuring, signals, console)
    if signal_number:
        console.print("Stopped; checkpoint saved. Run the same command to resume.")
        return signal_number
    early = step < last_step(config, job.training.schedule)
    if accelerator.is_main_process:
        if early and not stays:
            remember_end(config, run, step)
        write_json(run / ENDED, {"step": step})
    if early and accelerator.is_main_process:
        told = f"ended early: {no_rise(config, run, measuring)}"
        console.print(f"{told}. Raise evaluation.stop_after or training.stop_at_step to go on", soft_wrap=True, highlight=False)
    console.print(f"done: step {step:,} of {job.training.schedule.total_steps:,}: {run}", soft_wrap=True)
    following = [f"gist-train evaluate {run}", f"gist-train select {run}"] * bool(measuring.tasks) + [f"gist-train export {run}"]
    console.print(f"next: {', '.join(following)}", soft_wrap=True, highlight=False)
    return 0


def open_job(config: Config, accelerator: Accelerator, console: Console) -> Job:
    """Models, corpus, guide store, plan and optimizer, prepared where no run has prepared them yet.

    Raises:
        UserError: data or models are not what the config says.
    """
    student = load_student(config.model)
    check_student(config, student)
    check_device(config, student, accelerator.device, accelerator.num_processes)
    processes = Processes(accelerator.num_processes, accelerator.is_local_main_process)
    corpus = prepare_corpus(config, accelerator.device, console, processes)
    plan = batch_plan(config, corpus)  # refuses too few rows, before the guide is put to work
    tokens = prepare_tokens(corpus, student, console)
    guide = prepare_guide(config, corpus, accelerator.device, console, processes)
    return open_training(config, accelerator, student, corpus, plan, tokens, guide)


def _drive(
    config: Config,
    job: Job,
    run: Path,
    progress: Progress,
    measuring: Measuring,
    signals: StopSignal,
    console: Console,
) -> tuple[int, int]:
    """Takes the steps that are left; logs, saves and evaluates when they are due.

    Returns the signal that stopped it, or 0, and the step at which it ended.
    """
    accelerator, student = job.training.accelerator, job.student
    main, processes = accelerator.is_main_process, accelerator.num_processes
    cost = TrainingCost.of(student.encoder)
    rate = matmul_rate(student.encoder, 2048, DTYPES[precision_of(accelerator)])

    def settle() -> None:
        """Waits for the checkpoint under way. Where it could not be written, all ranks end."""
        with log.standing_still():
            raise_on_all_ranks(writer.wait(), "a checkpoint failed on the first process, which says why")

    def save() -> None:
        """Copies what a checkpoint holds. It is whole after the next `settle`, and so are the metrics up to it."""
        settle()
        with log.standing_still():
            writer.save(log.progress(), before=log.sync, after=partial(_retire, run, config, measuring))

    def measure(step: int) -> bool:
        """Whether the run ends here, for want of a rise: the first process measures, the others hear of it."""
        ends, failure = False, None
        if main and measuring.tasks:
            try:
                figures = measuring.of_step(run, step, student)
                log.add_scores(step, figures)
                console.print(figures_line(f"step {step:,}" if step else "base", figures), soft_wrap=True, highlight=False)
                ends = out_of_patience(config, run, measuring, step)
            except Exception as error:  # whatever it is, the others must not wait for it
                failure = error
        raise_on_all_ranks(failure, "the evaluation failed on the first process, which says why")
        return bool(largest_over_ranks(ends))

    with (
        RunLog(
            run if main else None,
            config.name,
            config.tracking,
            config.model_dump(mode="json"),
            progress,
            job.training.corpus,
            job.training.schedule.total_steps,
        ) as log,
        signals,
        CheckpointWriter(run if main else None, student, job.training.optimizer, job.facts, job.training.loss_scale) as writer,
        Display(console, progress.step, job.stop) as display,
    ):
        step, signal_number, every = progress.step, 0, config.evaluation.every
        # The base model; after an interruption, what it left out.
        if every and (step % every == 0 or step >= job.stop) and measure(step):
            return 0, step
        for record in steps(job.training, step, job.stop):
            step, last = record.step, record.step == job.stop
            flops = cost.flops(record.groups) * processes
            display.show(record, log.add(record, flops, rate * processes))
            signal_number = largest_over_ranks(NOT_WRITTEN if writer.failed else signals.received())
            if signal_number == NOT_WRITTEN:
                settle()  # raises
            judged = every and (step % every == 0 or last)
            if step % config.checkpoint.every == 0 or last or judged or signal_number:
                save()
            # Before it is judged: a figure is of use only where there is a checkpoint, and nothing is lost if measuring fails.
            if last or judged or signal_number:
                settle()
            if signal_number or (judged and measure(step)):
                break
        if writer.count:
            console.print(f"checkpoints: {writer.count:,}, {log.checkpoint_share:.1%} of the time", highlight=False)
    return signal_number, step


@contextmanager
def _only_writer(run: Path) -> Iterator[None]:
    """Raises UserError where another process trains in the run folder: two writers would tear each other's checkpoints."""
    with held(run.parent / f".{run.name}.lock") as alone:
        if not alone:
            fix = "wait for it, stop it, or give this training a name of its own"
            raise UserError(Fault(f"run folder {run}", "another process that trains in it", "one at a time", fix))
        yield


def _refuse_unlike_ranks(step: int, facts: dict[str, Any]) -> None:
    """Raises UserError on all ranks where they would not start from one checkpoint over one corpus."""
    corpus = int(facts["corpus"][:15], 16)
    # Both are asked on every rank: a question that one rank leaves out would keep the others waiting.
    alike = [same_on_all_ranks(value) for value in (step, corpus)]
    if not all(alike):
        found = "checkpoints of different steps" if not alike[0] else "data of different content"
        raise UserError(
            Fault(
                "the processes of this run",
                found,
                "one run folder and one corpus",
                "put output_dir and data on a shared disk",
            )
        )


def _first_line(accelerator: Accelerator) -> str:
    count = accelerator.num_processes
    processes = f"{count} process{'es' if count > 1 else ''}"
    where = f"{accelerator.device.type}, {torch.get_num_threads()} threads each, {precision_of(accelerator)}"
    return f"gist-train {__version__}: {processes} on {where}"


def _plan_lines(config: Config, job: Job, done: int) -> str:
    counts = job.training.plan.counts(job.training.plan.epoch_of(done + 1))
    total = job.training.schedule.total_steps
    guide = config.guide.name if isinstance(config.guide, GuideConfig) else config.guide or "none"
    shared = f", {counts.shared_text:,} beside a row with the same text" if counts.shared_text else ""
    going = f", resuming from step {done:,}" if done else ""
    ends = f", stopping at {job.stop:,}" if job.stop < total else ""
    return (
        f"{counts.rows:,} rows, {counts.left_out:,} of them in no batch of this epoch{shared}; guide: {guide}\n"
        f"{total:,} steps of {config.training.batch_size} triplets{going}{ends}"
    )


def _retire(run: Path, config: Config, measuring: Measuring) -> None:
    try:
        staying = {*selected_steps(run), best_saved(config, run, measuring)}
    except UserError:  # selected.json was spoilt meanwhile: training goes on, and deletes nothing
        return
    checkpoints.retire_checkpoints(
        run,
        keep_last=config.checkpoint.keep_last,
        keep_every=config.checkpoint.keep_every,
        kept=lambda step: step in staying or checkpoints.in_window(config.selection, step),
    )
