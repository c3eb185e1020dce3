"""Evaluation tasks as they are in memory, read and checked: texts, scores, labels and judgements."""

import hashlib
from dataclasses import dataclass, field, fields
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class LoadedSts:
    """N pairs of texts with a human score each."""

    name: str
    texts1: tuple[str, ...]
    texts2: tuple[str, ...]
    scores: NDArray[np.float64]
    """(N,), in the file's own unit, not all the same."""


@dataclass(frozen=True, slots=True)
class LoadedRetrieval:
    """Queries that have a relevant document, and all documents."""

    name: str
    queries: tuple[str, ...]
    documents: tuple[str, ...]
    """Title, space, text; at least two."""
    bodies: tuple[str, ...] = field(default=(), kw_only=True)
    """The texts of the documents that have a title, without it."""
    judgements: tuple[dict[int, float], ...]
    """Per query: index of a document -> its judgement, above 0. What is not here counts 0."""


@dataclass(frozen=True, slots=True)
class LoadedClassification:
    """The rows a classifier may be fitted on and those it is judged on."""

    name: str
    train_texts: tuple[str, ...]
    train_labels: NDArray[np.int64]
    """(rows of train,), labels numbered from 0 as they first appear; two different ones at least."""
    test_texts: tuple[str, ...]
    test_labels: NDArray[np.int64]
    """(rows of test,), the same numbers; a label that train has not has a number of its own."""
    per_class: int | None
    """Rows of train that are drawn of each class; None = all."""


@dataclass(frozen=True, slots=True)
class LoadedClustering:
    """N labelled texts."""

    name: str
    texts: tuple[str, ...]
    labels: NDArray[np.int64]
    """(N,), numbered from 0 as they first appear; two different ones at least, and fewer than texts."""


@dataclass(frozen=True, slots=True)
class LoadedPairs:
    """N pairs of texts that belong together or not."""

    name: str
    texts1: tuple[str, ...]
    texts2: tuple[str, ...]
    together: NDArray[np.bool_]
    """(N,), both values among them."""


@dataclass(frozen=True, slots=True)
class LoadedTriplets:
    """N anchors with a positive and a negative each."""

    name: str
    anchors: tuple[str, ...]
    positives: tuple[str, ...]
    negatives: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class LoadedMteb:
    """A task of mteb, all tasks of one of its benchmarks, or local files as one of its tasks. No data of the hub is read yet."""

    name: str
    tasks: tuple[Any, ...]
    """mteb's AbsTask objects, as mteb made them: they draw random numbers, so that each measurement has copies of its own."""
    benchmark: bool
    where: str
    """The task's key in the YAML."""

    def metrics(self) -> list[str]:
        """Names of its figures: the main score, or "<mteb task>/<main score>" of each task of a benchmark and their mean."""
        if not self.benchmark:
            return [task.metadata.main_score for task in self.tasks]
        return [*(f"{task.metadata.name}/{task.metadata.main_score}" for task in self.tasks), "mean"]


LocalTask: TypeAlias = LoadedSts | LoadedRetrieval | LoadedClassification | LoadedClustering | LoadedPairs | LoadedTriplets
LoadedTask: TypeAlias = LocalTask | LoadedMteb


def content_hash(task: LoadedTask) -> str:
    """16 hex digits over what a task asks, its name aside: figures of two contents are never compared."""
    content = hashlib.blake2b(type(task).__name__.encode(), digest_size=8)
    if isinstance(task, LoadedMteb):  # its data are mteb's: a revision of a data set is a content
        of_tasks = [(of.metadata.name, of.metadata.main_score, of.metadata.dataset.get("revision")) for of in task.tasks]
        content.update(repr(of_tasks).encode())
        return content.hexdigest()
    for part in fields(task):
        if part.name in ("name", "bodies"):  # the documents hold the bodies
            continue
        value = getattr(task, part.name)
        content.update(f"\0{part.name}\0".encode())
        if isinstance(value, np.ndarray):
            content.update(value.tobytes())
        else:
            for element in value if isinstance(value, tuple) else [value]:
                content.update(repr(element).encode() + b"\0")
    return content.hexdigest()
