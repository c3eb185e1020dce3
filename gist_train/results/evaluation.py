"""Evaluation: an encoder and tasks -> named figures, each with the items that it is made of.

Figures are fractions, never times 100. Metrics are in `metrics.py`, the readers of tasks in `tasks.py`; mteb judges its own.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
from sklearn.cluster import KMeans  # type: ignore[import-untyped]
from sklearn.linear_model import LogisticRegression  # type: ignore[import-untyped]
from sklearn.metrics import ndcg_score  # type: ignore[import-untyped]
from sklearn.neighbors import KNeighborsClassifier  # type: ignore[import-untyped]

from gist_train.results.loaded_tasks import (
    LoadedClassification,
    LoadedClustering,
    LoadedPairs,
    LoadedRetrieval,
    LoadedSts,
    LoadedTriplets,
    LocalTask,
)
from gist_train.results.metrics import Items, figure_of

DRAW_SEED = 42
"""Of the draw of `per_class` rows and of k-means' first centres. No setting: figures of two models are comparable alike only."""
RANKED = 1 << 22
"""Similarities ranked at a time: 4 bytes each, and some 40 in scikit-learn while it sorts."""
NEIGHBOURS = 5
"""Of the k-nearest-neighbours classifier."""
RECALL_AT, MRR_AT = 100, 10


class TextEncoder(Protocol):
    """Anything that turns texts into vectors."""

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """(N, D), a vector of any length for each of N texts, in their order."""
        ...


@dataclass(frozen=True, slots=True)
class Figure:
    """What one metric of a task says of a model."""

    value: float
    """A fraction."""
    items: Items | None
    """What `metrics.figure_of` made it of, in the task's own order; None where that is not known."""


def evaluate(encoder: TextEncoder, tasks: Sequence[LocalTask]) -> dict[str, Figure]:
    """`<task>/<metric>` -> figure, tasks in the order given. Each unique text of a task is encoded once.

    Raises:
        FloatingPointError: an embedding holds a value that is not finite.
        ValueError: the encoder gave another number of vectors than texts.
    """
    figures: dict[str, Figure] = {}
    for task in tasks:
        match task:
            case LoadedSts():
                found = _sts(encoder, task)
            case LoadedRetrieval():
                found = _retrieval(encoder, task)
            case LoadedClassification():
                found = _classification(encoder, task)
            case LoadedClustering():
                found = _clustering(encoder, task)
            case LoadedPairs():
                found = _pairs(encoder, task)
            case LoadedTriplets():
                found = _triplets(encoder, task)
        figures |= {f"{task.name}/{metric}": Figure(figure_of(metric, items), items) for metric, items in found.items()}
    return figures


def _sts(encoder: TextEncoder, task: LoadedSts) -> dict[str, Items]:
    """Correlation of cosine similarities with human scores, -1 to 1."""
    first, second = _encode(encoder, task.name, task.texts1, task.texts2)
    items = np.stack([_cosines(first, second), task.scores], axis=1)
    return {"spearman": items, "pearson": items}


def _retrieval(encoder: TextEncoder, task: LoadedRetrieval) -> dict[str, Items]:
    """By query: nDCG at 10 (gains as judged, documents of one similarity share their places), recall at 100, reciprocal rank.

    Recall and reciprocal rank are sentence-transformers' evaluator's, for which all that is judged above 0 is relevant.
    """
    queries, documents = [_unit(vectors) for vectors in _encode(encoder, task.name, task.queries, task.documents)]
    at_a_time = max(1, RANKED // len(documents))
    evaluator = InformationRetrievalEvaluator(
        {"query": ""},
        {},
        {"query": {"document"}},  # set anew for each query below
        mrr_at_k=[MRR_AT],
        precision_recall_at_k=[RECALL_AT],
        ndcg_at_k=[],
        accuracy_at_k=[],
        map_at_k=[],
    )
    items = np.zeros((3, len(queries)))
    for start in range(0, len(queries), at_a_time):
        similarities = queries[start : start + at_a_time] @ documents.T
        for row, judged in enumerate(task.judgements[start : start + at_a_time]):
            near = _near(similarities[row], judged)
            gains = np.array([judged.get(document, 0.0) for document in near.tolist()])
            items[0, start + row] = ndcg_score(gains[None], similarities[row, near][None], k=10)
            # It ranks documents of one similarity by name, hence names that sort as the numbers do.
            evaluator.relevant_docs = {"query": {f"{document:09d}" for document in judged}}
            hits = [{"corpus_id": f"{document:09d}", "score": float(similarities[row, document])} for document in near.tolist()]
            found = evaluator.compute_metrics([hits])
            items[1:, start + row] = found["recall@k"][RECALL_AT], found["mrr@k"][MRR_AT]
    return {"ndcg@10": items[0], "recall@100": items[1], "mrr@10": items[2]}


def _near(similarities: NDArray[np.float32], judged: Collection[int]) -> NDArray[np.int64]:
    """The documents that a query's figures depend on, ascending: the 100 most similar, all that tie with the last, the judged."""
    count = min(RECALL_AT, len(similarities))
    least = np.partition(similarities, -count)[-count]
    return np.union1d(np.flatnonzero(similarities >= least), np.fromiter(judged, np.int64, len(judged)))


def _classification(encoder: TextEncoder, task: LoadedClassification) -> dict[str, Items]:
    """(said, label) of each text of test: by a logistic regression on the vectors as the encoder gives them, by the nearest."""
    rows = drawn_rows(task.train_labels, task.per_class)
    train, test = _encode(encoder, task.name, [task.train_texts[row] for row in rows], task.test_texts)
    labels = task.train_labels[rows]
    linear = LogisticRegression(max_iter=1000).fit(train, labels).predict(test)
    nearest = (
        KNeighborsClassifier(min(NEIGHBOURS, len(rows)), metric="cosine", algorithm="brute").fit(train, labels).predict(test)
    )
    by_linear, by_nearest = (np.stack([said, task.test_labels], axis=1).astype(np.float64) for said in (linear, nearest))
    right = [(of[:, 0] == of[:, 1]).astype(np.float64) for of in (by_linear, by_nearest)]
    return {"accuracy": right[0], "f1": by_linear, "knn_accuracy": right[1]}


def _clustering(encoder: TextEncoder, task: LoadedClustering) -> dict[str, Items]:
    """(cluster, label) of each text, by k-means on the vectors as the encoder gives them."""
    (vectors,) = _encode(encoder, task.name, task.texts)
    clusters = KMeans(int(task.labels.max()) + 1, n_init=4, random_state=DRAW_SEED).fit_predict(vectors)
    return {"v_measure": np.stack([clusters, task.labels], axis=1).astype(np.float64)}


def _pairs(encoder: TextEncoder, task: LoadedPairs) -> dict[str, Items]:
    first, second = _encode(encoder, task.name, task.texts1, task.texts2)
    return {"ap": np.stack([_cosines(first, second), task.together], axis=1)}


def _triplets(encoder: TextEncoder, task: LoadedTriplets) -> dict[str, Items]:
    """1 for each anchor that is more similar to its positive, else 0: a tie decides nothing, and so is no success."""
    anchors, positives, negatives = _encode(encoder, task.name, task.anchors, task.positives, task.negatives)
    return {"accuracy": (_cosines(anchors, positives) > _cosines(anchors, negatives)).astype(np.float64)}


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
        raise FloatingPointError(f"{name}: {broken:,} of {len(vectors):,} embeddings hold a value that is not finite")
    return [vectors[of] for of in rows]


def _unit(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """The same (N, D), each brought to length 1 in place; a vector of length 0 stays as it is, and its cosines are 0."""
    lengths: NDArray[np.float32] = np.linalg.norm(vectors, axis=1, keepdims=True)
    lengths[lengths == 0] = 1
    vectors /= lengths
    return vectors


def _cosines(first: NDArray[np.float32], second: NDArray[np.float32]) -> NDArray[np.float64]:
    """(N,) cosine similarities of row i of both (N, D)."""
    cosines: NDArray[np.float64] = np.einsum("nd,nd->n", _unit(first), _unit(second), dtype=np.float64)
    return cosines
