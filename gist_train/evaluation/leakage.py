"""Texts that a model is judged on and was trained on: counted by task, and shown."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table

from gist_train.config.errors import Fault, UserError
from gist_train.config.evaluation import HELD_OUT_METRICS, EvaluationConfig
from gist_train.data.corpus import Corpus
from gist_train.data.files import read_json
from gist_train.data.overlap import count_overlaps
from gist_train.evaluation.tasks import LoadedTask
from gist_train.run_folder import Run


@dataclass(frozen=True, slots=True)
class Leak:
    """What one part of a task has in common with the training rows; texts are the same where they are so normalised."""

    task: str
    part: str | None
    """Which texts of the task, e.g. queries; None: they are not read here, and nothing was checked."""
    texts: int
    """Different texts of the part; 0 where nothing was checked."""
    shared: int
    """Of these, how many are in a training row."""
    rows: int
    """Training rows that hold one of them, as anchor, positive or negative."""


def count_leaks(corpus: Corpus, tasks: Sequence[LoadedTask]) -> list[Leak]:
    """By task and part, in the order of `tasks`. The first count over a corpus reads its texts, later ones their hashes."""
    parts = [(task.name, task.judged_texts()) for task in tasks]
    overlaps = iter(count_overlaps(corpus, [texts for _, by_part in parts for texts in by_part.values()]))
    leaks: list[Leak] = []
    for name, by_part in parts:
        leaks += [Leak(name, part, *next(overlaps)) for part in by_part] or [Leak(name, None, 0, 0, 0)]
    return leaks


def leaks_of(run: Run, evaluation: EvaluationConfig) -> list[Leak]:
    """What run.json of a run folder says of the tasks; those that came after the training were not checked.

    Raises:
        UserError: run.json can't be read.
    """
    path = run.description
    try:
        known = [Leak(**leak) for leak in (read_json(path).get("leakage", []) if path.exists() else [])]
    except (ValueError, TypeError, AttributeError):
        fix = "train again: it writes it anew, and counts"
        raise UserError(Fault(str(path), "a file that can't be read", "what gist-train train writes", fix)) from None
    held_out = [leak.task for leak in known if leak.task in HELD_OUT_METRICS] if evaluation.held_out is not None else []
    tasks = [task.name for task in evaluation.tasks] + held_out
    by_task = {task: [leak for leak in known if leak.task == task] for task in tasks}
    return [leak for task, leaks in by_task.items() for leak in leaks or [Leak(task, None, 0, 0, 0)]]


def leakage_line(leaks: Sequence[Leak]) -> str | None:
    """A line that names the parts that training rows hold texts of, and what to do about it; None where there is no such part."""
    parts = ", ".join(f"{leak.shared:,} of {leak.texts:,} texts of {leak.task} ({leak.part})" for leak in leaks if leak.shared)
    return f"in training rows too: {parts}; data.exclude_evaluation_texts: true leaves them out" if parts else None


def leakage_table(leaks: Sequence[Leak]) -> Table:
    """A row per part of a task."""
    table = Table(title="evaluation texts that are in training rows")
    table.add_column("task")
    table.add_column("texts")
    for name in ("different", "in training", "rows with one"):
        table.add_column(name, justify="right")
    for leak in leaks:
        counts = [f"{count:,}" for count in (leak.texts, leak.shared, leak.rows)]
        table.add_row(leak.task, *(("not checked",) if leak.part is None else (leak.part, *counts)))
    return table
