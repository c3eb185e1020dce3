"""How much of a score, or of the difference of two, is the luck of its task's items: by resampled items, as `select` has it.

Legend: S resamples.
"""

from collections.abc import Mapping
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from gist_train.evaluation.metrics import task_of
from gist_train.evaluation.score_file import Terms, read_items
from gist_train.results.ranking import CONFIDENCE, resampled_scores
from gist_train.run_folder import Run

Resampled = NDArray[np.float64]
"""(S,) scores over resampled items: two models' are of the same draws, wherever they were measured, if the items are the same."""
KEPT = 1024
"""Scores whose resamples are kept in memory for a page that is made again while a run trains."""


def resampled(run: Run, step: int, keys: Mapping[str, object], terms: Terms, contents: Mapping[str, str]) -> dict[str, Resampled]:
    """Of each score "<task>/<metric>" of a step whose items are on disk, its resamples.

    Args:
        contents: by task, the content that its scores are of.
    """
    items = {key: read_items(run, step, key, terms, contents.get(task_of(key), "")) for key in keys}
    return {
        key: samples
        for key, one in items.items()
        if one is not None and (samples := _of_items(key, one.astype(np.float64).tobytes(), one.shape)) is not None
    }


def interval(samples: Resampled) -> tuple[float, float]:
    """Where 95 % of the resamples lie."""
    low, high = np.quantile(samples, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


@lru_cache(maxsize=KEPT)
def _of_items(key: str, content: bytes, shape: tuple[int, ...]) -> Resampled | None:
    return resampled_scores({key: np.frombuffer(content).reshape(shape)}, {key: 1.0})
