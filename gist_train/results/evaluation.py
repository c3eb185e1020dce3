"""Evaluation: an encoder and tasks -> named figures. All metrics are scipy's and scikit-learn's.

Figures are fractions, never times 100. The readers of tasks are in `tasks.py`.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.stats import pearsonr, spearmanr  # type: ignore[import-untyped]
from sklearn.linear_model import LogisticRegression  # type: ignore[import-untyped]
from sklearn.metrics import accuracy_score, f1_score, ndcg_score  # type: ignore[import-untyped]

from gist_train.config.errors import Fault, UserError
from gist_train.config.evaluation import ClassificationTask, EvaluationTask, RetrievalTask, StsTask
from gist_train.results.tasks import (
    LoadedClassification,
    LoadedRetrieval,
    LoadedSts,
    LoadedTask,
    read_classification,
    read_retrieval,
    read_sts,
)

__all__ = ["LoadedTask", "TextEncoder", "evaluate", "load_tasks"]

DRAW_SEED = 42
"""Of the draw of `per_class` rows. A constant, no setting: figures of two models are comparable on the same rows only."""
RANKED = 1 << 22
"""Similarities ranked at a time: 4 bytes each, and some 40 in scikit-learn while it sorts."""


class TextEncoder(Protocol):
    """Anything that turns texts into vectors."""

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """(N, D), a vector of any length for each of N texts, in their order."""
        ...


def load_tasks(tasks: Sequence[EvaluationTask]) -> list[LoadedTask]:
    """The tasks with their files read and checked, in order.

    Raises:
        UserError: with all faults of all tasks.
    """
    faults: list[Fault] = []
    loaded: list[LoadedTask | None] = []
    for index, task in enumerate(tasks):
        where = f"evaluation.tasks[{index}] ({task.name})"
        match task:
            case StsTask():
                loaded.append(read_sts(task, where, faults))
            case RetrievalTask():
                loaded.append(read_retrieval(task, where, faults))
            case ClassificationTask():
                loaded.append(read_classification(task, where, faults))
    if faults:
        raise UserError(*faults)
    return [task for task in loaded if task is not None]  # none is None where there is no fault


def evaluate(encoder: TextEncoder, tasks: Sequence[LoadedTask]) -> dict[str, float]:
    """`<task>/<metric>` -> figure as a fraction, tasks in the order given. Each unique text of a task is encoded once.

    Raises:
        ValueError: the encoder gave another number of vectors than texts, or a value that is not finite.
    """
    figures: dict[str, float] = {}
    for task in tasks:
        match task:
            case LoadedSts():
                found = _sts(encoder, task)
            case LoadedRetrieval():
                found = _retrieval(encoder, task)
            case LoadedClassification():
                found = _classification(encoder, task)
        figures |= {f"{task.name}/{metric}": value for metric, value in found.items()}
    return figures


def _sts(encoder: TextEncoder, task: LoadedSts) -> dict[str, float]:
    """Correlation of cosine similarities with human scores, -1 to 1; 0 where all similarities are the same."""
    first, second = [_unit(vectors) for vectors in _encode(encoder, task.name, task.texts1, task.texts2)]
    similarities = np.einsum("nd,nd->n", first, second, dtype=np.float64)
    if similarities.min() == similarities.max():
        # scipy says nan, which is no JSON. A model that tells no pair from another has found nothing of the order.
        return {"spearman": 0.0, "pearson": 0.0}
    return {
        "spearman": float(spearmanr(similarities, task.scores).statistic),
        "pearson": float(pearsonr(similarities, task.scores).statistic),
    }


def _retrieval(encoder: TextEncoder, task: LoadedRetrieval) -> dict[str, float]:
    """Mean over queries of nDCG at 10: gains as judged, documents of one similarity share their places."""
    queries, documents = [_unit(vectors) for vectors in _encode(encoder, task.name, task.queries, task.documents)]
    at_a_time = max(1, RANKED // len(documents))
    total = 0.0
    for start in range(0, len(queries), at_a_time):
        similarities = queries[start : start + at_a_time] @ documents.T
        gains = np.zeros_like(similarities)
        for row, judged in enumerate(task.judgements[start : start + at_a_time]):
            gains[row, list(judged)] = list(judged.values())
        total += float(ndcg_score(gains, similarities, k=10)) * len(similarities)
    return {"ndcg@10": total / len(queries)}


def _classification(encoder: TextEncoder, task: LoadedClassification) -> dict[str, float]:
    """Accuracy and macro F1 on test of a logistic regression fitted on train, on the vectors as the encoder gives them."""
    rows = drawn_rows(task.train_labels, task.per_class)
    train, test = _encode(encoder, task.name, [task.train_texts[row] for row in rows], task.test_texts)
    said = LogisticRegression(max_iter=1000).fit(train, task.train_labels[rows]).predict(test)
    return {
        "accuracy": float(accuracy_score(task.test_labels, said)),
        "f1": float(f1_score(task.test_labels, said, average="macro", zero_division=0)),
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


def _encode(encoder: TextEncoder, name: str, *lists: Sequence[str]) -> list[NDArray[np.float32]]:
    """(texts, D) for each of the lists, every unique text among them encoded once."""
    number: dict[str, int] = {}
    rows = [[number.setdefault(text, len(number)) for text in texts] for texts in lists]
    vectors = np.asarray(encoder.encode(list(number)), dtype=np.float32)
    if vectors.ndim != 2 or len(vectors) != len(number):
        raise ValueError(f"{name}: the encoder gave an array of shape {vectors.shape} for {len(number)} texts")
    broken = int((~np.isfinite(vectors)).any(axis=1).sum())
    if broken:
        raise ValueError(f"{name}: {broken:,} of {len(vectors):,} embeddings hold a value that is not finite")
    return [vectors[of] for of in rows]


def _unit(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """(N, D) of length 1; a vector of length 0 stays as it is, and its cosines are 0."""
    lengths: NDArray[np.float32] = np.linalg.norm(vectors, axis=1, keepdims=True)
    lengths[lengths == 0] = 1
    return vectors / lengths
