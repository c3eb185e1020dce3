"""A tracker that keeps rows in a store of its own: a thread fills it, so that no step waits for a disk or a server.

The store says up to which step it has each number. It gets what it lacks from the run's own files, and nothing twice: whether the
process was killed before a row was written, or in the middle of it, the store was away, or the tracker was turned on late.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from heapq import merge
from itertools import islice, takewhile
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any, Protocol

from gist_train.config.errors import shown
from gist_train.config.schema import Config
from gist_train.data.files import json_lines
from gist_train.evaluation.score_file import Terms, read_scores
from gist_train.run_folder import Run

SECONDS_TO_END, SECONDS_WITH_MODEL = 60, 3600
"""That a store may take at the end for what it has not got yet: rows, or a model too."""
ROWS_AT_ONCE = 20
"""Rows that a store is given at a time, where so many wait: MLflow takes one in 10 ms, and 20 together in 42."""
SCORE = "evaluation/"
"""Names of scores begin so."""


@dataclass(frozen=True, slots=True)
class Row:
    """What was measured of a step: metrics, or the scores of an evaluation."""

    step: int
    time: float
    """Seconds since 1970."""
    values: Mapping[str, float]

    @classmethod
    def of(cls, row: Mapping[str, float], step: int) -> "Row":
        """That of a row of metrics.jsonl, without what is no measurement, or of scores by name."""
        values = {name: row[name] for name in row if name not in ("step", "time", "task")}
        return cls(step, row.get("time", time.time()), values)


@dataclass(frozen=True, slots=True)
class TrackedModel:
    """A model that was selected, as it is handed on."""

    folder: Path
    step: int
    scores: Mapping[str, float]
    """<task>/<metric> -> fraction."""

    @property
    def aliases(self) -> list[str]:
        """What its version is called where a tracker has versions."""
        return ["selected", f"step-{self.step}"]

    @property
    def metadata(self) -> dict[str, Any]:
        """What is said of it where a tracker has room for that."""
        return {"step": self.step, "scores": dict(self.scores)}


@dataclass(frozen=True, slots=True)
class Past:
    """A run as its trackers find it."""

    step: int
    """Rows of its files up to this step are there to stay; those after it are cut off."""
    metrics: int = -1
    """The last step that had a row of metrics before they were cut."""
    scores: int = -1
    """The last step whose scores trackers got, likewise."""

    def has(self, values: Mapping[str, float], step: int) -> bool:
        """Whether a tracker that can't be asked is taken to have got these before."""
        return step <= (self.scores if next(iter(values), "").startswith(SCORE) else self.metrics)


class Store(Protocol):
    """Where a tracker keeps a run. One thread makes and uses it; whatever it raises ends it, and no training."""

    sent: dict[str, int] | None
    """Name there -> last step that it has; None where it can't be asked."""

    def name_of(self, name: str) -> str:
        """What a number is called there."""

    def log(self, rows: Sequence[Row]) -> None:
        """Keeps rows, in the order of their steps."""

    def log_model(self, model: TrackedModel) -> None:
        """Keeps the files of a model."""

    def end(self, code: int) -> None:
        """Keeps that the run ended, with this exit code."""


class TrackerThread:
    """The `Tracker` of a store.

    Args:
        name: of the tracker, in messages.
        open_store: makes the store; what is slow about it is no matter.
        notes: what is to be said is added to it.
    """

    def __init__(self, name: str, open_store: Callable[[], Store], config: Config, run: Run, past: Past, notes: list[str]):
        self._name, self._open_store, self._notes = name, open_store, notes
        self._config, self._run, self._past = config, run, past
        self._queue: SimpleQueue[Row | None] = SimpleQueue()
        """None after the last row."""
        self._model: TrackedModel | None = None
        self._code, self._patience = 0, SECONDS_TO_END
        self._failure: Exception | None = None
        self._failure_noted = False
        self._thread = Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def log(self, row: Mapping[str, float], step: int) -> None:
        """Takes numbers by name, of a step."""
        if self._failure is None:
            self._queue.put(Row.of(row, step))
        self._note_failure()

    def log_model(self, model: TrackedModel) -> None:
        """Takes a model, whose folder must stay until `finish` is over."""
        self._model, self._patience = model, SECONDS_WITH_MODEL

    def finish(self, code: int) -> None:
        """Ends, with the exit code of the run."""
        self._code = code
        self._queue.put(None)
        self._thread.join(self._patience)
        if self._thread.is_alive():
            self._notes.append(f"warning: {self._name}: not all was taken within {self._patience} s. {self._fix()}")
        self._note_failure()

    def _note_failure(self) -> None:
        if self._failure is not None and not self._failure_noted:
            self._failure_noted = True
            self._notes.append(f"warning: {self._name}: {failure_reason(self._failure)}. {self._fix()}")

    def _fix(self) -> str:
        if self._model is not None:
            return "It may lack the model: the same gist-train select logs it again"
        return "It gets no more rows. metrics.jsonl has all: what it lacks it gets when this training is started again"

    def _work(self) -> None:
        try:
            store = self._open_store()
            past = filter(None, (self._unsent(store, row) for row in rows_so_far(self._run, self._config, self._past.step)))
            while rows := list(islice(past, ROWS_AT_ONCE)):
                store.log(rows)
            ended = False
            while not ended:
                waiting = self._waiting()
                ended = waiting[-1] is None
                if rows := [new for row in waiting if row is not None and (new := self._unsent(store, row))]:
                    store.log(rows)
            if self._model is not None:
                store.log_model(self._model)
            store.end(self._code)
        except Exception as error:  # a store's packages raise whatever they like: a figure on a page ends no training
            self._failure = error

    def _unsent(self, store: Store, row: Row) -> Row | None:
        """What the store lacks of a row, under its own names; from now on it counts as sent. None where it has all."""
        if store.sent is None:
            return None if self._past.has(row.values, row.step) else row
        values = {store.name_of(name): value for name, value in row.values.items()}
        values = {name: value for name, value in values.items() if row.step > store.sent.get(name, -1)}
        store.sent.update(dict.fromkeys(values, row.step))
        return replace(row, values=values) if values else None

    def _waiting(self) -> list[Row | None]:
        """What is in the queue; waits until there is something."""
        rows = [self._queue.get()]
        while rows[-1] is not None and len(rows) < ROWS_AT_ONCE and not self._queue.empty():
            rows.append(self._queue.get())
        return rows


def rows_so_far(run: Run, config: Config, last: int) -> Iterator[Row]:
    """What a run's own files have up to step `last`, by step, metrics before scores."""
    known = read_scores(run, Terms.of(config.evaluation))
    scores = [Row.of({f"{SCORE}{name}": known[step][name] for name in known[step]}, step) for step in sorted(known)]
    rows = merge(_metrics(run), scores, key=lambda row: row.step)
    return takewhile(lambda row: row.step <= last, rows)


def _metrics(run: Run) -> Iterator[Row]:
    for _, row in json_lines(run.metrics):
        if isinstance(row.get("step"), int):
            yield Row.of(row, row["step"])


def failure_reason(error: Exception) -> str:
    """What a tracker's package says of its failure, in a line."""
    return shown(str(error) or type(error).__name__, 300).strip('"').rstrip(".")
