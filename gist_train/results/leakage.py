"""Texts that a model is judged on and was trained on: counted by task, and told."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from gist_train.config.errors import Fault, UserError
from gist_train.data.corpus import Corpus
from gist_train.data.files import read_json
from gist_train.data.overlap import count_overlaps
from gist_train.results.loaded_tasks import (
    LoadedClassification,
    LoadedClustering,
    LoadedMteb,
    LoadedPairs,
    LoadedRetrieval,
    LoadedSts,
    LoadedTask,
    LoadedTriplets,
)


@dataclass(frozen=True, slots=True)
class Leak:
    """What one part of a task has in common with the training rows; texts are the same where they are so normalised."""

    task: str
    part: str | None
    """Which texts of the task, e.g. queries; None: they are not read here, and nothing was checked."""
    texts: int
    """Different texts of the part; 0 where nothing was checked."""
    shared: int
    """Of these, how many stand in a training row."""
    rows: int
    """Training rows that hold one of them, as anchor, positive or negative."""

    def told(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)


def evaluation_texts(task: LoadedTask) -> dict[str, Sequence[str]]:
    """Part -> the texts that the task's figures are taken on; no part where they are not read here.

    The rows that a classifier is fitted on are none of them: the published recipe too trains on classification sets' own rows.
    """
    match task:
        case LoadedSts() | LoadedPairs():
            return {"pairs": task.texts1 + task.texts2}
        case LoadedRetrieval():
            # Training data hold passages without the title that stands before them here.
            return {"queries": task.queries, "documents": task.documents, **({"bodies": task.bodies} if task.bodies else {})}
        case LoadedClassification():
            return {"test": task.test_texts}
        case LoadedClustering():
            return {"texts": task.texts}
        case LoadedTriplets():
            return {"triplets": task.anchors + task.positives + task.negatives}
        case LoadedMteb():  # its data are mteb's, and may not be here yet
            return {}


def count_leaks(corpus: Corpus, tasks: Sequence[LoadedTask]) -> list[Leak]:
    """By task and part, in the order of `tasks`. The first count over a corpus reads its texts, later ones their hashes."""
    parts = [(task.name, evaluation_texts(task)) for task in tasks]
    overlaps = iter(count_overlaps(corpus, [texts for _, by_part in parts for texts in by_part.values()]))
    leaks: list[Leak] = []
    for name, by_part in parts:
        leaks += [Leak(name, part, *next(overlaps)) for part in by_part] or [Leak(name, None, 0, 0, 0)]
    return leaks


def leaks_of(run: Path, tasks: Sequence[str]) -> list[Leak]:
    """What run.json of a run folder says of these tasks; those that came after the training were not checked.

    Raises:
        UserError: run.json can't be read.
    """
    path = run / "run.json"
    try:
        told = [Leak(**leak) for leak in (read_json(path).get("leakage", []) if path.exists() else [])]
    except (ValueError, TypeError, AttributeError):
        fix = "train again: it writes it anew, and counts"
        raise UserError(Fault(str(path), "a file that can't be read", "what gist-train train writes", fix)) from None
    by_task = {task: [leak for leak in told if leak.task == task] for task in tasks}
    return [leak for task, leaks in by_task.items() for leak in leaks or [Leak(task, None, 0, 0, 0)]]


def leakage_line(leaks: Sequence[Leak]) -> str | None:
    """A line that names the parts that training rows hold texts of, and what to do about it; None where there is no such part."""
    found = ", ".join(f"{leak.shared:,} of {leak.texts:,} texts of {leak.task} ({leak.part})" for leak in leaks if leak.shared)
    return f"in training rows too: {found}; data.exclude_evaluation_texts: true leaves them out" if found else None


def leakage_table(leaks: Sequence[Leak]) -> Table:
    """A row per part of a task."""
    table = Table(title="evaluation texts that stand in training rows")
    table.add_column("task")
    table.add_column("texts")
    for name in ("different", "in training", "rows with one"):
        table.add_column(name, justify="right")
    for leak in leaks:
        counts = [f"{count:,}" for count in (leak.texts, leak.shared, leak.rows)]
        table.add_row(leak.task, *(("not checked",) if leak.part is None else (leak.part, *counts)))
    return table
