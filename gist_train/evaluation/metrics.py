"""Metrics as functions of a task's items, so that a score and its spread over resampled items come from one formula.

The items of a metric are an array of N rows: pairs of texts, queries, labelled texts. Formulas are scipy's and scikit-learn's,
which are imported where they are used: they take seconds, and commands that measure nothing need not wait.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Items = NDArray[np.float64]
"""(N,): a value of each item, of which the score is the mean; or (N, 2): what two columns say of each item."""


@dataclass(frozen=True, slots=True)
class Score:
    """What one metric of a task says of a model."""

    value: float
    """A fraction, never times 100."""
    items: Items | None
    """What `score_of` made it of, in the task's own order; None where that is not known."""


def _spearman(items: Items) -> float:
    from scipy.stats import spearmanr

    return float(spearmanr(items[:, 0], items[:, 1]).statistic) if _both_differ(items) else 0.0


def _pearson(items: Items) -> float:
    from scipy.stats import pearsonr

    return float(pearsonr(items[:, 0], items[:, 1]).statistic) if _both_differ(items) else 0.0


def _both_differ(items: Items) -> bool:
    # scipy says nan, which is no JSON. A model that tells no pair from another has found nothing of the order.
    return bool((items.min(axis=0) < items.max(axis=0)).all())


def _average_precision(items: Items) -> float:
    from sklearn.metrics import average_precision_score  # type: ignore[import-untyped]

    return float(average_precision_score(items[:, 1], items[:, 0])) if items[:, 1].any() else 0.0


def _macro_f1(items: Items) -> float:
    # As f1_score with average="macro", which takes milliseconds: a page and a choice ask for thousands.
    classes, labels = np.unique(items, return_inverse=True)
    said, true = labels.reshape(items.shape).T
    both, all_said, all_true = [np.bincount(some, minlength=len(classes)) for some in (true[said == true], said, true)]
    return float((2 * both / (all_said + all_true)).mean())


def _v_measure(items: Items) -> float:
    from sklearn.metrics import v_measure_score

    return float(v_measure_score(items[:, 1], items[:, 0]))


_OF_TWO_COLUMNS: dict[str, Callable[[Items], float]] = {
    "spearman": _spearman,  # similarity, human score
    "pearson": _pearson,
    "ap": _average_precision,  # similarity, whether the pair belongs together
    "f1": _macro_f1,  # what a classifier says, label
    "v_measure": _v_measure,  # cluster, label
}


def score_of(metric: str, items: Items) -> float:
    """The score, a fraction, that `metric` ("spearman", "ndcg@10", ...) makes of `items`: of a value an item, their mean.

    Spearman and Pearson are 0 where all similarities (or, of a resample, all scores) are the same, average precision where no
    pair belongs together.
    """
    return float(items.mean()) if items.ndim == 1 else _OF_TWO_COLUMNS[metric](items)


def task_of(key: str) -> str:
    """The task of "<task>/<metric>"."""
    return key.split("/", 1)[0]


def metric_of(key: str) -> str:
    """The metric of "<task>/<metric>"; mteb's may have a slash in it."""
    return key.split("/", 1)[1]
