"""Readers of evaluation tasks: the user's files -> checked texts, scores and labels. Faults are added to a list."""

import os
from functools import partial
from pathlib import Path

import numpy as np

from gist_train.config.errors import Fault, shown
from gist_train.config.evaluation import (
    ClassificationTask,
    ClusteringTask,
    LabelColumns,
    PairTask,
    StsTask,
    TripletTask,
)
from gist_train.data.tables import text
from gist_train.results.loaded_tasks import (
    LoadedClassification,
    LoadedClustering,
    LoadedPairs,
    LoadedSts,
    LoadedTriplets,
)
from gist_train.results.task_files import Record, TaskFile, identifier, number, zero_or_one


def _labelled(columns: LabelColumns, numbers: dict[str, int], row: Record) -> tuple[str, int]:
    """A text and the number of its label; a label that is new gets the next one."""
    label = identifier(row[columns.label], columns.label)
    return text(row[columns.text], columns.text), numbers.setdefault(label, len(numbers))


def read_sts(task: StsTask, where: str, faults: list[Fault]) -> LoadedSts | None:
    path, columns = Path(os.path.expanduser(task.path)), task.columns
    file = TaskFile(path, f"{where}: {path.name}", faults)

    def pair(row: Record) -> tuple[str, str, float]:
        text1, text2 = text(row[columns.text1], columns.text1), text(row[columns.text2], columns.text2)
        return text1, text2, number(row[columns.score], columns.score)

    wanted = (columns.text1, columns.text2, columns.score)
    pairs = file.read(wanted, pair, rename="name the right columns under columns: text1, text2, score")
    if not file.clean:
        return None
    texts1, texts2, scores = zip(*pairs, strict=True)
    if min(scores) == max(scores):
        found, fix = f"{scores[0]:g} in each of {len(scores):,} rows", "check the column: a correlation needs scores that differ"
        file.fault(found, "two different scores or more", fix, what=f": {columns.score}")
    return LoadedSts(task.name, texts1, texts2, np.array(scores))


def read_classification(task: ClassificationTask, where: str, faults: list[Fault]) -> LoadedClassification | None:
    paths, columns = [Path(os.path.expanduser(path)) for path in (task.train, task.test)], task.columns
    same_name = paths[0].name == paths[1].name
    train, test = [TaskFile(path, f"{where}: {path if same_name else path.name}", faults) for path in paths]
    numbers: dict[str, int] = {}
    labelled = partial(_labelled, columns, numbers)
    wanted, rename = (columns.text, columns.label), "name the right columns under columns: text, label"
    train_rows = train.read(wanted, labelled, rename=rename)
    if train.clean and len(numbers) < 2:  # before test is read, which may bring labels of its own
        found, what = f"only {shown(next(iter(numbers)))}", f": {columns.label}"
        train.fault(found, "two different labels or more", "add rows of another class", what=what)
    test_rows = test.read(wanted, labelled, rename=rename)
    if not (train.clean and test.clean):
        return None
    texts, labels = zip(*train_rows, strict=True)
    test_texts, test_labels = zip(*test_rows, strict=True)
    return LoadedClassification(task.name, texts, np.array(labels), test_texts, np.array(test_labels), task.per_class)


def read_clustering(task: ClusteringTask, where: str, faults: list[Fault]) -> LoadedClustering | None:
    path, columns = Path(os.path.expanduser(task.path)), task.columns
    file = TaskFile(path, f"{where}: {path.name}", faults)
    numbers: dict[str, int] = {}
    labelled = partial(_labelled, columns, numbers)
    rows = file.read((columns.text, columns.label), labelled, rename="name the right columns under columns: text, label")
    if not file.clean:
        return None
    if not 2 <= len(numbers) < len(rows):
        found, expected = f"{len(numbers):,} different in {len(rows):,} rows", "two different labels or more, and fewer than rows"
        file.fault(found, expected, "check the column", what=f": {columns.label}")
    texts, labels = zip(*rows, strict=True)
    return LoadedClustering(task.name, texts, np.array(labels))


def read_pairs(task: PairTask, where: str, faults: list[Fault]) -> LoadedPairs | None:
    path, columns = Path(os.path.expanduser(task.path)), task.columns
    file = TaskFile(path, f"{where}: {path.name}", faults)

    def pair(row: Record) -> tuple[str, str, bool]:
        text1, text2 = text(row[columns.text1], columns.text1), text(row[columns.text2], columns.text2)
        return text1, text2, zero_or_one(row[columns.label], columns.label)

    wanted = (columns.text1, columns.text2, columns.label)
    pairs = file.read(wanted, pair, rename="name the right columns under columns: text1, text2, label")
    if not file.clean:
        return None
    texts1, texts2, together = zip(*pairs, strict=True)
    if len(set(together)) < 2:
        found = f"{int(together[0])} in each of {len(together):,} rows"
        file.fault(found, "0 and 1, both of them", "add pairs of the other kind", what=f": {columns.label}")
    return LoadedPairs(task.name, texts1, texts2, np.array(together))


def read_triplets(task: TripletTask, where: str, faults: list[Fault]) -> LoadedTriplets | None:
    path = Path(os.path.expanduser(task.path))
    file = TaskFile(path, f"{where}: {path.name}", faults)
    wanted = (task.columns.anchor, task.columns.positive, task.columns.negative)

    def triplet(row: Record) -> tuple[str, ...]:
        return tuple(text(row[column], column) for column in wanted)

    triplets = file.read(wanted, triplet, rename="name the right columns under columns: anchor, positive, negative")
    return LoadedTriplets(task.name, *zip(*triplets, strict=True)) if file.clean else None
