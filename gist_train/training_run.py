"""Joins loop, checkpoints, run log and evaluation: what happens when the loop yields."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial

import torch
from accelerate import Accelerator
from rich.console import Console

from gist_train.checks import check, check_folders
from gist_train.config.errors import Fault, UserError, listed
from gist_train.config.schema import Config, cache_folder
from gist_train.data.caches import in_use
from gist_train.data.files import write_json
from gist_train.data.leases import held
from gist_train.evaluation.leakage import count_leaks, leakage_line
from gist_train.evaluation.measuring import Measuring
from gist_train.evaluation.score_file import cut_scores
from gist_train.memory import MemoryShortageError, naming_work
from gist_train.milestones import Milestones
from gist_train.planning.estimates import checkpoint_bytes, checkpoints_kept
from gist_train.preparation import prepare
from gist_train.progress import say, terminal
from gist_train.results.early_stopping import forget_later_end, no_rise, remember_end, stays_ended
from gist_train.results.selected import selected_steps
from gist_train.run_folder import Run
from gist_train.training import checkpoint as checkpoints
from gist_train.training.alike import refuse_unlike_configs, refuse_unlike_content
from gist_train.training.checkpoint import LogSums
from gist_train.training.checkpoint_writer import CheckpointWriter
from gist_train.training.display import Display
from gist_train.training.distributed import (
    DTYPES,
    end_group_at_exit,
    largest_over_ranks,
    make_accelerator,
    precision_on,
)
from gist_train.training.embedding import Processes
from gist_train.training.guides import named_guide
from gist_train.training.loop import StepRecord, steps
from gist_train.training.ranks import TIMEOUT, Ranks
from gist_train.training.resume import (
    checkpoint_of_all,
    load_on_all,
    refuse_other_content,
    refuse_other_corpus,
    refuse_other_mathematics,
)
from gist_train.training.run_description import describe
from gist_train.training.runlog import RunLog
from gist_train.training.setup import Job, Prepared, last_step, open_training
from gist_train.training.shortage import training_work
from gist_train.training.signals import Stopped, StopSignal
from gist_train.training.throughput import TrainingCost, matmul_rate
from gist_train.training.trackers import missing_login
from gist_train.training.traffic import Traffic

LONGEST_WAIT = 30 * 24 * 3600
"""Seconds that a rank may wait for the others: a month, which is no end and fits into what counts milliseconds."""
NOT_WRITTEN = 1000
"""What ranks tell each other at a step's end where a checkpoint could not be written: more than any signal's number."""


def train(config: Config, *, resume: str = "auto", timeout: float | None = None, console: Console | None = None) -> int:
    """Trains from where the run folder is to the end, and returns the exit code: 0, or 128 + the signal that stopped it.

    For programs, in whose process it leaves flags of torch and the like otherwise than they were: `api.calls.train` does not.

    Args:
        resume: "auto" (from the newest checkpoint, if any), "never" (refuse a folder with a run in it) or a step.
        timeout: seconds without progress after which a rank counts as hung; None for `ranks.TIMEOUT`.
        console: where a person reads what is going on; None for stderr.

    Raises:
        UserError: the data, the models or the run folder are not what the config says, or `timeout` is no time to wait for.
        NonFiniteError: loss or gradient is not finite.
        RankFailedError: another rank failed, died or hangs.
    """
    with launched(timeout) as ranks:
        return train_on(ranks, config, resume=resume, console=console, by_command=False)


def launched(timeout: float | None) -> Ranks:
    """The processes of this launch.

    Raises:
        UserError: `timeout` is no time to wait for.
    """
    if timeout is not None and not 1 <= timeout <= LONGEST_WAIT:
        fix = "name a number of seconds in this range, or leave it out"
        raise UserError(Fault("--timeout", f"{timeout:g}", f"1 to {LONGEST_WAIT:,}", fix))
    return Ranks(timeout or TIMEOUT)


def train_on(
    ranks: Ranks, config: Config, *, resume: str = "auto", console: Console | None = None, by_command: bool = True
) -> int:
    """`train`, within `ranks`.

    Args:
        by_command: whether the process is the command line's own, and not that of a program which calls this.
    """
    refuse_unlike_configs(ranks, config)
    accelerator, note = make_accelerator(config.training.precision)
    if accelerator.num_processes != ranks.size:
        found = f"{accelerator.num_processes} processes, and no WORLD_SIZE that says so"
        fix = "launch with accelerate or torchrun, or set RANK, LOCAL_RANK, WORLD_SIZE and LOCAL_WORLD_SIZE in each process"
        raise UserError(Fault("the launcher", found, "RANK and WORLD_SIZE in the environment of each process", fix))
    console = console or terminal()
    console.quiet = console.quiet or not accelerator.is_main_process
    console.print(_first_line(config, accelerator))
    for line in (note, missing_login(config)):
        if line:
            say(console, line)
    run = Run.of(config)
    ranks.stacks, ranks.safe = run.stacks, partial(_safe, run)
    check_folders(config)
    # Before the guide's pass: a launcher may go while it runs.
    again = "run the same command" if by_command else "make the same call again"
    with StopSignal(ends_process=by_command) as signals, _only_writer(run) if accelerator.is_main_process else nullcontext():
        try:
            signal_number, step = _train_alone(config, accelerator, ranks, run, resume, signals, console)
        except (Stopped, KeyboardInterrupt):
            say(console, f"Stopped at once. What was read and embedded is kept, as checkpoints are: {again} to go on.")
            raise
        except MemoryShortageError as shortage:
            shortage.safe = _safe(run)
            raise
    if signal_number:
        done = f"Stopped at step {step:,}; checkpoint saved." if step else "Stopped before the first step."
        say(console, f"{done} {again.capitalize()} to resume.")
    end_group_at_exit()
    return 128 + signal_number if signal_number else 0


def _safe(run: Run) -> str:
    """What is not lost where a run ends of itself."""
    newest = max(run.saved_steps(), default=0)
    kept = f"the checkpoint of step {newest:,}" if newest else "what was read and embedded"
    return f"{kept}: the same command goes on from there"


def _train_alone(
    config: Config, accelerator: Accelerator, ranks: Ranks, run: Run, resume: str, signals: StopSignal, console: Console
) -> tuple[int, int]:
    """`train`, in a run folder that nobody else writes to. Returns the signal that stopped it, or 0, and the step it ended at."""
    measuring = check(config, console)
    origin = checkpoint_of_all(ranks, run, resume, console)
    selected_steps(run)  # refuses a selected.json that can't be read, before retention goes by it
    if origin is not None:
        refuse_other_mathematics(origin, config)  # before the guide is put to work
    prepared = _prepared(config, accelerator, console, origin)
    # Before accelerate is given the model: it would send the first rank's weights to all.
    refuse_unlike_content(ranks, config, prepared, precision_on(config.training.precision, accelerator.device))
    job = open_training(config, accelerator, prepared)
    sums = LogSums(step=0)
    if origin is not None:
        refuse_other_content(origin, job.facts)
        load_on_all(origin, job)
        sums = checkpoints.sums_of(origin.manifest)
    if accelerator.is_main_process and (warning := _short_of_room(config, job, run)):
        say(console, warning)
    stays = ranks.first_says("stays" if accelerator.is_main_process and stays_ended(config, run, sums.step) else "") == "stays"
    if stays:
        job = replace(job, stop=sums.step)
    console.print(_plan_lines(config, job, sums.step), soft_wrap=True)
    if accelerator.is_main_process:
        run.ended.unlink(missing_ok=True)  # from here on nothing is refused
        _go_back_to(run, sums.step, console)
        leaks = count_leaks(job.training.corpus, measuring.tasks)
        if line := leakage_line(leaks):
            say(console, line)
        describe(run, config, accelerator, job, leaks)
    with in_use(cache_folder(config), prepared.folders()) if accelerator.is_local_main_process else nullcontext():
        signal_number, step = _drive(config, job, ranks, run, sums, measuring, signals, console)
    if not signal_number and accelerator.is_main_process:
        early = step < last_step(config, job.training.schedule)
        if early and not stays:
            remember_end(config, run, step)
        write_json(run.ended, {"step": step})
        _tell_end(config, job, run, step, measuring, console, early=early)
    return signal_number, step


def open_job(config: Config, accelerator: Accelerator, console: Console) -> Job:
    """The config's run at step 0, prepared where no run has prepared it yet.

    Raises:
        UserError: data or models are not what the config says.
    """
    return open_training(config, accelerator, _prepared(config, accelerator, console))


def _prepared(
    config: Config, accelerator: Accelerator, console: Console, origin: checkpoints.Checkpoint | None = None
) -> Prepared:
    processes = Processes(accelerator.num_processes, accelerator.is_local_main_process)
    judged = config.data.exclude_evaluation_texts or "evaluation" in (config.data.drop_suspects or {})
    refuse = None if origin is None else partial(refuse_other_corpus, origin, excluding=judged)
    return prepare(config, accelerator.device, console, processes, trains_here=True, refuse=refuse)


def _go_back_to(run: Run, step: int, console: Console) -> None:
    """Cleans the run folder of what is left half done, and sets aside what is after `step`."""
    checkpoints.sweep(run)
    if aside := checkpoints.set_aside_later(run, step):
        console.print(f"going back to step {step:,}: the checkpoints after it are now in {aside}", soft_wrap=True)
        if max(selected_steps(run), default=0) > step:
            console.print(f"what was selected is among them: gist-train select {run}, once there is another", soft_wrap=True)
    cut_scores(run, step, aside)
    forget_later_end(run, step)


def _drive(
    config: Config, job: Job, ranks: Ranks, run: Run, sums: LogSums, measuring: Measuring, signals: StopSignal, console: Console
) -> tuple[int, int]:
    """Takes the steps that are left; logs, saves and evaluates when they are due.

    Returns the signal that stopped it, or 0, and the step at which it ended.
    """
    training, student = job.training, job.student
    accelerator, total = training.accelerator, training.schedule.total_steps
    own, processes = run if accelerator.is_main_process else None, accelerator.num_processes
    cost = TrainingCost.of(student.encoder)
    rate = matmul_rate(student.encoder, 2048, DTYPES[job.facts.precision])
    with (
        RunLog(own, config, sums, training.corpus, total, Traffic(training.model, student.width)) as log,
        signals.noted(),
        CheckpointWriter(own, student, training.optimizer, job.facts, training.state) as writer,
        Display(console, sums.step, job.stop) as display,
    ):
        milestones = Milestones(config, ranks, run, job, measuring, log, writer, signals, console, display)
        step, signal_number, every = sums.step, 0, config.evaluation.every
        # The base model; after an interruption, what it left out.
        if every and step == 0 and measuring.tasks:
            say(console, f"measuring the base model on {listed([task.name for task in measuring.tasks])}")
        if every and (step % every == 0 or step >= job.stop):
            if milestones.measure(step):
                return 0, step
            signal_number = largest_over_ranks(signals.received())  # after a further step this one would not be measured again
        for record in () if signal_number else _named_steps(config, job, step):
            step, last = record.step, record.step == job.stop
            flops = cost.flops(record.groups) * processes
            display.show(record, log.add(record, flops, rate * processes))
            for note in (*log.teaching.notes(), *log.notes):
                say(console, note)
            log.notes.clear()
            signal_number = largest_over_ranks(NOT_WRITTEN if writer.failed else signals.received())
            if signal_number == NOT_WRITTEN:
                milestones.settle()  # raises
            evaluated = every and (step % every == 0 or last)
            if step % config.checkpoint.every == 0 or last or evaluated or signal_number:
                milestones.save()
            # Before it is evaluated: a score is of use only where there is a checkpoint, and nothing is lost if measuring fails.
            if last or evaluated or signal_number:
                milestones.settle()
            if signal_number or (evaluated and milestones.measure(step)):
                break
            if evaluated and (signal_number := largest_over_ranks(signals.received())):
                break
        if writer.count:
            console.print(f"checkpoints: {writer.count:,}, {log.checkpoint_share:.1%} of the time", highlight=False)
        if log.skipped_spikes:
            say(console, f"updates left out for the size of their gradient: {log.skipped_spikes:,} (training.skip_spikes)")
        if summary := log.teaching.summary():
            say(console, summary)
    for note in log.notes:  # of its end
        say(console, note)
    return signal_number, step


def _named_steps(config: Config, job: Job, start: int) -> Iterator[StepRecord]:
    """The steps that are left; one that runs out of memory says what lowers what it takes."""
    training, step, fitted = job.training, start, 0
    with naming_work(lambda: training_work(config, training, job.student.max_length, step + 1, fitted)):
        for record in steps(training, start, job.stop):
            step = record.step
            fitted = max(fitted, record.computed_tokens // training.accelerator.num_processes)
            yield record


@contextmanager
def _only_writer(run: Run) -> Iterator[None]:
    """Raises UserError where another process trains in the run folder: two writers would tear each other's checkpoints."""
    with held(run.writer_lock) as other:
        if other is not None:
            fix = "wait for it, stop it, or give this training a name of its own"
            raise UserError(Fault(f"run folder {run}", f"another training in it: {other}", "one at a time", fix))
        yield


def _short_of_room(config: Config, job: Job, run: Run) -> str | None:
    """A warning where the run's checkpoints can't fit on the disk; None where they can."""
    kept = checkpoints_kept(config.checkpoint, config.selection, config.evaluation.every, job.stop)
    there = len(run.saved_steps())
    needed = max(0, len(kept) + 1 - there) * checkpoint_bytes(job.student.encoder)
    free = shutil.disk_usage(config.output_dir).free
    if needed <= free:
        return None
    sizes = f"{needed / 2**30:.1f} GiB for {len(kept):,} checkpoints and the next one, and {free / 2**30:.1f} GiB are free"
    return f"warning: {config.output_dir}: it will take up to {sizes}. Make room, or lower checkpoint.keep_last"


def _first_line(config: Config, accelerator: Accelerator) -> str:
    count = accelerator.num_processes
    processes = f"{count} process{'es' if count > 1 else ''}"
    precision = precision_on(config.training.precision, accelerator.device)
    where = f"{accelerator.device.type}, {torch.get_num_threads()} threads each, {precision}"
    return f"{processes} on {where}"


def _plan_lines(config: Config, job: Job, done: int) -> str:
    counts = job.training.plan.counts(job.training.plan.epoch_of(done + 1))
    total = job.training.schedule.total_steps
    guide = named_guide(config, job.training.guide)
    shared = f"; {counts.shared_text:,} share a batch with a row of the same text" if counts.shared_text else ""
    resuming = f", resuming from step {done:,}" if done else ""
    ends = f", stopping at {job.stop:,}" if job.stop < total else ""
    if job.stop < done:
        ends = f"; training.stop_at_step {job.stop:,} is behind: no step is left to take"
    left_out = f"; this epoch leaves out {counts.left_out:,}" if counts.left_out else ""
    return (
        f"{counts.rows:,} rows{left_out}{shared}; guide: {guide}\n"
        f"{total:,} steps of {config.training.batch_size} rows{resuming}{ends}"
    )


def _tell_end(config: Config, job: Job, run: Run, step: int, measuring: Measuring, console: Console, *, early: bool) -> None:
    """Says where the run ended, and what a person may want to do next."""
    if early:
        why = f"ended early: {no_rise(config, run, measuring)}"
        fix = "Raise evaluation.stop_after or training.stop_at_step to train further"
        console.print(f"{why}. {fix}", soft_wrap=True, highlight=False)
    console.print(f"done: step {step:,} of {job.training.schedule.total_steps:,}: {run}", soft_wrap=True)
    following = [f"gist-train export {run}"]
    if measuring.tasks:
        following = [f"gist-train evaluate {run}", f"gist-train select {run}", *following]
    console.print(f"next: {', '.join(following)}", soft_wrap=True, highlight=False)
