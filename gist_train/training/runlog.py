"""Metrics of a run: one row every `log_every` steps to metrics.jsonl and to the trackers, which get evaluation scores too."""

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Self

import numpy as np

from gist_train.config.schema import Config
from gist_train.config.training import SpikesConfig
from gist_train.data.corpus import Corpus
from gist_train.data.files import json_lines
from gist_train.run_folder import Run
from gist_train.training.checkpoint import LogSums
from gist_train.training.loop import StepRecord, metrics_of
from gist_train.training.rowfile import RowFile
from gist_train.training.teaching import Teaching
from gist_train.training.throughput import PARTS, peak_memory
from gist_train.training.tracker_thread import SCORE, Past
from gist_train.training.trackers import Tracker, trackers_of
from gist_train.training.traffic import Traffic


class RunLog:
    """Adds up steps and writes their rows. Its sums are part of a checkpoint, so that a resumed run logs the same numbers.

    Args:
        run: None on ranks that write nothing.
        sums: of the checkpoint that is resumed: rows after its step are cut off, and its sums added to.
        corpus: names the rows of a step that was not finite.
        last: the schedule's last step, which has a row whatever `log_every` is.
        traffic: between ranks.
    """

    def __init__(
        self,
        run: Run | None,
        config: Config,
        sums: LogSums,
        corpus: Corpus,
        last: int,
        traffic: Traffic | None = None,
    ):
        self._corpus, self._last, self._traffic = corpus, last, traffic
        self._skipping = config.training.skip_spikes
        self._distillation = config.distillation
        self.skipped_spikes = 0
        """Updates of the run that were left out, as far as steps were read."""
        self.teaching = Teaching(config)
        """Whether the steps taught anything, as far as their losses were read."""
        self._every = config.tracking.log_every
        self._since = sums
        """Sums over the steps since the last row, those before a resume included."""
        self._unread: list[StepRecord] = []
        """Steps after `_since`, whose losses may still be on the device."""
        # What the clock metrics counts from the start of this process.
        self._timed: list[StepRecord] = []
        self._flops, self._reading = 0, 0.0
        self._fastest = 0.0
        """FLOP/s over the steps of the fastest row so far."""
        self._opened = self._row_at = time.perf_counter()
        self._waited = self._waited_at_row = 0.0
        """Seconds that the loop waited for checkpoints, now and when the last row was written."""
        self._trackers: list[Tracker] = []
        self.notes: list[str] = []
        """What is to be said, and was not yet."""
        self._file = RowFile(run.metrics if run else None, sums.step, self.notes)
        self._ids = RowFile(run.rows, sums.step, self.notes) if run and config.tracking.log_rows else None
        """Where each step's rows of the corpus are written."""
        if run is None:
            return
        # What is logged again after a resume are the figures that trackers have: they would take them for further ones.
        last = self._file.last
        scored = any(row.get("step") == last for _, row in json_lines(run.evaluations))
        past = Past(sums.step, metrics=last, scores=last if scored else last - 1)
        self._trackers = trackers_of(config, run, past, self.notes)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for file in self._files():
            file.write()
        for tracker in self._trackers:
            tracker.finish(0 if kind is None else 1)

    def add(self, record: StepRecord, flops: int, peak_flops: float) -> dict[str, float] | None:
        """Takes a step in; returns the row that is due after it, if one is.

        Args:
            flops: floating-point operations of the step, over all processes.
            peak_flops: the most per second that all processes' devices could do, as it was measured; steps that were faster
                correct it.

        Raises:
            NonFiniteError: a row is due, and the loss or gradient of a step since the one before was not finite.
        """
        self._unread.append(record)
        if self._ids is not None:
            self._ids.add(json.dumps({"step": record.step, "rows": sorted(record.rows.tolist())}) + "\n")
        self._timed.append(record)
        self._flops += flops
        if record.step % self._every and record.step != self._last:
            return None
        self._read()
        count, seconds = len(self._timed), sum(step.seconds for step in self._timed) + self._reading
        parts = [step.clock.seconds() for step in self._timed]
        now = time.perf_counter()
        # What else the machine did while its rate was measured is not there now: no share of it is more than all.
        self._fastest = max(self._fastest, self._flops / seconds)
        row: dict[str, float] = {
            "step": record.step,
            "time": time.time(),
            "epoch": record.epoch,
            "loss": record.loss,
            "loss_mean": self._since.loss_sum / self._since.loss_steps,
            "lr": record.lr,
            "grad_norm": record.grad_norm,
            **{f"masked_{block}": share for block, share in record.masked.items()},
            "triplets_per_second": sum(len(step.rows) for step in self._timed) / seconds,
            "tokens_per_second": sum(step.tokens for step in self._timed) / seconds,
            "padding_share": 1 - self._since.tokens / self._since.computed_tokens,
            "mfu": self._flops / seconds / max(peak_flops, self._fastest),
            "checkpoint_share": (self._waited - self._waited_at_row) / (now - self._row_at),
            "step_seconds": seconds / count,
            **{f"{part}_seconds": sum(step[part] for step in parts) / count for part in PARTS},
            "peak_memory_bytes": peak_memory(record.metrics.device),
        }
        if self._traffic is not None:
            row |= self._traffic.row(record.gathered, row["communication_seconds"], row["step_seconds"])
        if self._distillation.weight:
            row["distillation_loss"] = record.distillation_loss
        if self._distillation.scores:
            row["score_loss"] = record.score_loss
        if self._distillation.regression:
            row["regression_loss"] = record.regression_loss
        if record.loss_scale is not None:
            row["loss_scale"] = record.loss_scale
        if self._skipping is not None:
            row["skipped_spikes"] = record.metric("skipped_spikes")
        self._timed, self._flops, self._reading = [], 0, 0.0
        self._since = LogSums(record.step)
        self._row_at, self._waited_at_row = now, self._waited
        self._file.add(json.dumps({**row, "task": self._task_of(record)}) + "\n")
        for file in self._files():
            file.write()
        for tracker in self._trackers:
            tracker.log(row, record.step)
        return row

    def _task_of(self, record: StepRecord) -> str | None:
        """The task of all its rows; None where they are of several."""
        tasks = np.unique(self._corpus.task[record.rows])
        return self._corpus.tasks[int(tasks[0])] if len(tasks) == 1 else None

    def add_scores(self, step: int, scores: Mapping[str, float]) -> None:
        """Hands the scores of an evaluation, by "<task>/<metric>", to the trackers. The run's own file is evaluations.jsonl."""
        for tracker in self._trackers:
            tracker.log({f"{SCORE}{name}": score for name, score in scores.items()}, step)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time of the block as time that the loop waited for a checkpoint."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._waited += time.perf_counter() - began

    @property
    def checkpoint_share(self) -> float:
        """Share of the time since this log was opened that the loop waited for checkpoints."""
        return self._waited / (time.perf_counter() - self._opened)

    def sync(self) -> None:
        """Has the rows so far put on the disk: a checkpoint that vouches for them must not outlive them."""
        for file in self._files():
            file.sync()

    def _files(self) -> list[RowFile]:
        return [self._file] if self._ids is None else [self._file, self._ids]

    def sums(self) -> LogSums:
        """What a checkpoint after the last step taken in must hold.

        Raises:
            NonFiniteError: loss or gradient of a step since the last row was not finite: nothing was trained from it on.
        """
        self._read()
        return self._since

    def _read(self) -> None:
        """Adds up the steps whose losses were not read yet, waiting for the device once."""
        began = time.perf_counter()
        for record, metrics in zip(self._unread, metrics_of(self._unread, self._corpus), strict=True):
            since = self._since
            self.teaching.add(record.step, metrics)
            self.skipped_spikes = int(metrics["skipped_spikes"])
            if self._skipping is not None and metrics["spike"]:
                self._note_spike(self._skipping, record.step, metrics["grad_norm"])
            self._since = LogSums(
                record.step,
                since.loss_sum + metrics["loss"],
                since.loss_steps + 1,
                since.tokens + record.tokens,
                since.computed_tokens + record.computed_tokens,
            )
        self._unread = []
        self._reading += time.perf_counter() - began

    def _note_spike(self, skipping: SpikesConfig, step: int, norm: float) -> None:
        spike = f"a gradient of norm {norm:.3g}, over {skipping.factor:g} times the median of the last steps"
        count = f"the update is left out, {self.skipped_spikes:,} of at most {skipping.at_most:,}"
        rest = "; from here on all are taken" if self.skipped_spikes == skipping.at_most else ""
        self.notes.append(f"step {step:,}: {spike}: {count}{rest}")
