"""The tasks of a config: read and checked, identified by their content, measured. A kind of task is a file beside this one.

A new kind needs its config class in config/evaluation.py, its file, and a row in `READERS` and `LocalTask`.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any, TypeAlias

import numpy as np

from gist_train.config.errors import Fault, UserError
from gist_train.config.evaluation import (
    ClassificationTask,
    ClusteringTask,
    EvaluationTask,
    MtebTask,
    PairTask,
    RetrievalTask,
    StsTask,
    TripletTask,
)
from gist_train.evaluation.classification import LoadedClassification, read_classification
from gist_train.evaluation.clustering import LoadedClustering, read_clustering
from gist_train.evaluation.encoding import TextEncoder
from gist_train.evaluation.metrics import Score, score_of
from gist_train.evaluation.mteb_tasks import LoadedMteb, read_mteb
from gist_train.evaluation.pairs import LoadedPairs, read_pairs
from gist_train.evaluation.retrieval import LoadedRetrieval, read_retrieval
from gist_train.evaluation.sts import LoadedSts, read_sts
from gist_train.evaluation.triplets import LoadedTriplets, read_triplets

LocalTask: TypeAlias = LoadedSts | LoadedRetrieval | LoadedClassification | LoadedClustering | LoadedPairs | LoadedTriplets
"""A task whose texts we read: it gives `judged_texts` and `measure`."""
LoadedTask: TypeAlias = LocalTask | LoadedMteb
READERS: dict[type[EvaluationTask], Callable[[Any, str, list[Fault]], LoadedTask | None]] = {
    StsTask: read_sts,
    RetrievalTask: read_retrieval,
    ClassificationTask: read_classification,
    ClusteringTask: read_clustering,
    PairTask: read_pairs,
    TripletTask: read_triplets,
    MtebTask: read_mteb,
}
"""Config class -> its reader: (task, its key in the YAML, faults to add to) -> the task, or None where it added one."""


def load_tasks(tasks: Sequence[EvaluationTask]) -> list[LoadedTask]:
    """The tasks with their files read and checked, in order.

    Raises:
        UserError: with all faults of all tasks.
    """
    faults: list[Fault] = []
    loaded = [READERS[type(task)](task, f"evaluation.tasks[{index}] ({task.name})", faults) for index, task in enumerate(tasks)]
    if faults:
        raise UserError(*faults)
    return [task for task in loaded if task is not None]  # none is None where there is no fault


def measure(encoder: TextEncoder, tasks: Sequence[LocalTask]) -> dict[str, Score]:
    """`<task>/<metric>` -> score, tasks in the order given. Each unique text of a task is encoded once.

    Raises:
        FloatingPointError: an embedding holds a value that is not finite.
        ValueError: the encoder gave another number of vectors than texts.
    """
    return {
        f"{task.name}/{metric}": Score(score_of(metric, items), items)
        for task in tasks
        for metric, items in task.measure(encoder).items()
    }


def content_hash(task: LoadedTask) -> str:
    """16 hex digits over what a task asks, its name aside: scores of two contents are never compared."""
    content = hashlib.blake2b(type(task).__name__.encode(), digest_size=8)
    if isinstance(task, LoadedMteb):
        content.update(repr(task.content()).encode())
        return content.hexdigest()
    for part in fields(task):
        if part.name in ("name", "bodies"):  # the documents hold the bodies
            continue
        value = getattr(task, part.name)
        if part.name in ("prompt", "prompts", "itself") and value == part.default:  # as in all scores of before
            continue
        content.update(f"\0{part.name}\0".encode())
        if isinstance(value, np.ndarray):
            content.update(value.tobytes())
        else:
            for element in value if isinstance(value, tuple) else [value]:
                content.update(repr(element).encode() + b"\0")
    return content.hexdigest()
