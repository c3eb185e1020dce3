"""Scores -> which model of a run and why. Pure: numbers in, choice out.

Legend: a candidate is a checkpoint, or a mean of several; its score is the weighted mean of the metrics it is judged by.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import fsum

import numpy as np
from numpy.typing import NDArray

from gist_train.evaluation.metrics import Items, metric_of, score_of, task_of

RESAMPLES = 500
"""Of a bootstrap: some metrics of scikit-learn take milliseconds each."""
CONFIDENCE = 0.95
"""Of an interval."""
SEED = 42
"""Of the resamples. No setting: the same scores have the same interval."""


@dataclass(frozen=True, slots=True, eq=False)  # told apart by identity
class Candidate:
    """A model that may be chosen."""

    steps: tuple[int, ...]
    """The checkpoint's step, or those of a mean of several, ascending."""
    base_weight: float
    """Share of the base model in its weights, from 0."""
    scores: Mapping[str, float]
    """<task>/<metric> -> fraction; of the metrics it is judged by at least."""

    @property
    def averaged(self) -> bool:
        """Whether it is no checkpoint, but made of some."""
        return len(self.steps) > 1 or self.base_weight > 0

    @property
    def name(self) -> str:
        """As tables call it."""
        steps = ", ".join(f"{step:,}" for step in self.steps)
        name = f"step {steps}" if len(self.steps) == 1 else f"mean of steps {steps}"
        return name if not self.base_weight else f"{name}, {self.base_weight:g} of base"


@dataclass(frozen=True, slots=True)
class Distance:
    """How far a candidate is behind the chosen one."""

    behind: float
    """Score of the chosen one minus its own, a fraction."""
    low: float | None
    """Where `behind` begins in 95 % of resamples of the tasks' items; None where the items are not known."""
    high: float | None
    """Where it ends."""

    @property
    def within_noise(self) -> bool | None:
        """Whether the interval holds 0: on other items of the same kind the order might be the other one."""
        return None if self.low is None or self.high is None else self.low <= 0 <= self.high


def weighted_score(scores: Mapping[str, float], metric: Mapping[str, float]) -> float:
    """The mean of `scores`, each with its weight in `metric` ("<task>/<metric>" -> weight)."""
    return fsum(scores[key] * weight for key, weight in metric.items()) / fsum(metric.values())


def ranked(candidates: Sequence[Candidate], metric: Mapping[str, float]) -> list[Candidate]:
    """The best score first. Of two with one score, the simpler: fewer checkpoints, less of the base, then the earlier step."""

    def place(candidate: Candidate) -> tuple[float, int, float, tuple[int, ...]]:
        return -weighted_score(candidate.scores, metric), len(candidate.steps), candidate.base_weight, candidate.steps

    return sorted(candidates, key=place)


def by_loss(losses: Mapping[int, float], percentile: float) -> list[int]:
    """Steps in order of their training loss, the chosen one first: the one at index int(n * percentile), then the others.

    The rule of GISTEmbed's authors (avsolatorio/GISTEmbed), with a percentile of 0.025. It looks at no benchmark.
    """
    ascending = sorted(losses, key=lambda step: (losses[step], step))
    chosen = ascending[min(int(len(ascending) * percentile), len(ascending) - 1)]
    return [chosen, *(step for step in ascending if step != chosen)]


def resampled_scores(items: Mapping[str, Items | None], metric: Mapping[str, float]) -> NDArray[np.float64] | None:
    """(RESAMPLES,) scores over resampled items of each task, drawn with replacement (the bootstrap, Efron 1979).

    The draws depend on the task's name and its number of items alone: two candidates are judged on the same resampled items, so
    that what makes an item hard for both cancels out in the difference of their scores.

    Args:
        items: by metric, what the score is made of.

    Returns:
        None where a metric has no items.
    """
    scores = np.zeros(RESAMPLES)
    for task in dict.fromkeys(task_of(key) for key in metric):
        generator = np.random.default_rng([SEED, *task.encode()])
        of_task = [(metric_of(key), weight, items[key]) for key, weight in metric.items() if task_of(key) == task]
        for resample in range(RESAMPLES):
            draw: NDArray[np.int64] | None = None  # all metrics of a task see the same items
            for name, weight, of_metric in of_task:
                if of_metric is None:
                    return None
                if draw is None:
                    draw = generator.integers(len(of_metric), size=len(of_metric))
                scores[resample] += weight * score_of(name, of_metric[draw])
    return scores / fsum(metric.values())


def distance(behind: float, chosen: NDArray[np.float64] | None, other: NDArray[np.float64] | None) -> Distance:
    """How far a candidate is behind the chosen one.

    Args:
        behind: the chosen one's score minus its own.
        chosen, other: `resampled_scores` of both; None where there are none.
    """
    if chosen is None or other is None:
        return Distance(behind, None, None)
    low, high = np.quantile(chosen - other, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Distance(behind, float(low), float(high))


def evaluations_since_rise(scores: Mapping[int, float], after: int) -> int:
    """Evaluations since the best score so far was first reached, of those after step `after` alone.

    Args:
        scores: step -> score, of the evaluations so far.
        after: a step from which patience counts anew: 0, or where the run was resumed after it had been ended.
    """
    best = min(scores, key=lambda step: (-scores[step], step), default=0)
    return sum(step > max(best, after) for step in scores)
