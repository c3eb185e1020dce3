"""Rows that the guide finds alike, in cells: the leaves of a tree of random splits, one for each task and epoch.

Each split halves a cell by the projection of its anchors' vectors on a direction between two random anchors of the task. Batches
of one cell have hard in-batch negatives, and the guide's mask makes these safe: batches of neighbours, as in TAS-Balanced
(Hofstätter et al. 2021, arXiv 2104.06967) and with clusters (Merrick 2024, arXiv 2407.18887).

Legend: R rows of the corpus, E of them in an epoch, G width of the guide.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
SCALE = 2048
"""Vectors are taken times this, in whole numbers. A row's has length 1 and a direction at most 2: their product is below 2^24,
and float32 holds all of these. So a cell is the same on any machine, in whatever order the product is summed."""
READ_ROWS = 65_536


@dataclass(frozen=True, slots=True)
class Likeness:
    """What tells how alike rows are, and how much of it counts."""

    depth: int
    """Splits between the root and a leaf: a task of n rows has cells of n / 2^depth."""
    vectors: Callable[[Ints], NDArray[np.float32]]
    """(n,) rows -> (n, G) the guide's vectors of their anchors, of length 1."""


def cells_of(likeness: Likeness, task: NDArray[np.int32], rows: Ints, random: np.random.Generator) -> Ints:
    """(E,) the cell, counted from 0 within the task, of each of `rows`.

    Cells of a task are in the tree's order: two with neighbouring numbers share all but their last splits.

    Args:
        task: (R,) of each row of the corpus.
        rows: (E,) in random order; a row may come more than once.
    """
    tasks, of_task = np.unique(task[rows], return_inverse=True)
    projected = _projections(likeness, rows, of_task, len(tasks), random)
    cell = np.zeros(len(rows), np.int64)
    for level in range(likeness.depth):
        node = (of_task << likeness.depth) + cell
        order = np.lexsort((projected[:, level], node))  # stable: what projects alike stays in its random order
        first = np.flatnonzero(np.diff(node[order], prepend=-1))
        sizes = np.diff(first, append=len(rows))
        rank = np.arange(len(rows)) - np.repeat(first, sizes)
        cell[order] = 2 * cell[order] + (rank >= np.repeat(sizes - sizes // 2, sizes))
    return cell


def _projections(likeness: Likeness, rows: Ints, of_task: Ints, tasks: int, random: np.random.Generator) -> NDArray[np.int32]:
    """(E, depth) whole numbers: each row's vector times each of its task's directions."""
    by_task = np.argsort(of_task, kind="stable")
    bounds = np.searchsorted(of_task[by_task], np.arange(tasks + 1))
    ends = random.integers(0, np.diff(bounds)[:, None], (tasks, 2 * likeness.depth)) + bounds[:-1, None]
    pairs = likeness.vectors(rows[by_task[ends.ravel()]]).reshape(tasks, 2, likeness.depth, -1)
    directions = _whole(pairs[:, 0] - pairs[:, 1])
    projected = np.empty((len(rows), likeness.depth), np.int32)
    # In the order of the corpus, which is that of the disk, or nearly.
    in_order = np.argsort(rows, kind="stable")
    for start in range(0, len(rows), READ_ROWS):
        places = in_order[start : start + READ_ROWS]
        vectors = _whole(likeness.vectors(rows[places]))
        for one in np.unique(of_task[places]):
            of_one = of_task[places] == one
            projected[places[of_one]] = vectors[of_one] @ directions[one].T
    return projected


def _whole(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    whole: NDArray[np.float32] = np.rint(vectors * np.float32(SCALE))
    return whole
