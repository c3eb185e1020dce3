"""Classification: classifiers fitted on the embeddings of labelled texts, judged on others. Config: `ClassificationTask`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from gist_train.config.errors import Fault, shown
from gist_train.config.evaluation import ClassificationTask
from gist_train.evaluation.encoding import TextEncoder, encode_lists
from gist_train.evaluation.metrics import Items
from gist_train.evaluation.task_files import TaskFile, labelled

DRAW_SEED = 42
"""Of the draw of `per_class` rows. No setting: scores of two models are comparable alike only."""
NEIGHBOURS = 5
"""Of the k-nearest-neighbours classifier."""


@dataclass(frozen=True, slots=True)
class LoadedClassification:
    """The rows a classifier may be fitted on and those it is judged on."""

    METRICS: ClassVar = ClassificationTask.METRICS
    name: str
    train_texts: tuple[str, ...]
    train_labels: NDArray[np.int64]
    """(rows of train,), labels numbered from 0 as they first appear; two different ones at least."""
    test_texts: tuple[str, ...]
    test_labels: NDArray[np.int64]
    """(rows of test,), the same numbers; a label that train has not has a number of its own."""
    per_class: int | None
    """Rows of train that are drawn of each class; None = all."""
    prompt: str | None = field(default=None, kw_only=True)
    """Before every text; None for the model's default."""

    def judged_texts(self) -> Mapping[str, Sequence[str]]:
        """Part -> the texts that scores are taken on.

        Rows that a classifier is fitted on are none of them: the published recipe too trains on classification sets' own rows.
        """
        return {"test": self.test_texts}

    def measure(self, encoder: TextEncoder) -> dict[str, Items]:
        """(predicted, label) of each text of test: by a logistic regression on the vectors as they are, by the nearest."""
        rows = drawn_rows(self.train_labels, self.per_class)
        train, test = encode_lists(
            encoder, self.name, [self.train_texts[row] for row in rows], self.test_texts, prompt=self.prompt
        )
        labels = self.train_labels[rows]
        from sklearn.linear_model import LogisticRegression  # type: ignore[import-untyped]
        from sklearn.neighbors import KNeighborsClassifier  # type: ignore[import-untyped]

        linear = LogisticRegression(max_iter=1000).fit(train, labels).predict(test)
        neighbours = KNeighborsClassifier(min(NEIGHBOURS, len(rows)), metric="cosine", algorithm="brute")
        nearest = neighbours.fit(train, labels).predict(test)
        return {
            "accuracy": (linear == self.test_labels).astype(np.float64),
            "f1": np.stack([linear, self.test_labels], axis=1).astype(np.float64),
            "knn_accuracy": (nearest == self.test_labels).astype(np.float64),
        }


def drawn_rows(labels: NDArray[np.int64], per_class: int | None) -> NDArray[np.int64]:
    """Ascending indices of `per_class` rows a class, drawn without replacement; of all where it is None or a class has fewer.

    `labels`, (N,), are numbered as they first appear in the file: what a label is called changes nothing, and each class has a
    draw of its own, so that another row in one class leaves the rows drawn of the others as they are.
    """
    if per_class is None:
        return np.arange(len(labels))
    drawn: list[NDArray[np.int64]] = []
    for label in range(int(labels.max()) + 1):
        rows = np.flatnonzero(labels == label)
        drawn.append(np.random.default_rng([DRAW_SEED, label]).permutation(rows)[:per_class])
    return np.sort(np.concatenate(drawn))


def read_classification(task: ClassificationTask, where: str, faults: list[Fault]) -> LoadedClassification | None:
    """The task with its files read; None, and faults, where they have some."""
    paths, columns = [Path(path) for path in (task.train, task.test)], task.columns
    same_name = paths[0].name == paths[1].name
    train, test = [TaskFile(path, f"{where}: {path if same_name else path.name}", faults, task) for path in paths]
    numbers: dict[str, int] = {}
    make, names = partial(labelled, columns, numbers), {"text": columns.text, "label": columns.label}
    train_rows = train.read(names, make)
    if train.clean and len(numbers) < 2:  # before test is read, which may bring labels of its own
        only, what = f"only {shown(next(iter(numbers)))}", f": {columns.label}"
        train.fault(only, "two different labels or more", "add rows of another class", what=what)
    test_rows = test.read(names, make)
    if not (train.clean and test.clean):
        return None
    texts, labels = zip(*train_rows, strict=True)
    test_texts, test_labels = zip(*test_rows, strict=True)
    return LoadedClassification(
        task.name, texts, np.array(labels), test_texts, np.array(test_labels), task.per_class, prompt=task.prompt
    )
