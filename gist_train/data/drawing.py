"""Draws of rows, and what they leave out of a corpus: rows, texts and tasks that no drawn row has."""

from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from gist_train.data.corpus import Int64

COPIED_BYTES = 1 << 24
Number = TypeVar("Number", np.int32, np.float32)


def drawn_rows(task: NDArray[np.int32], max_rows: int | None, max_rows_per_task: int | None, seed: list[int]) -> Int64:
    """Ascending indices of a draw without replacement from rows of these tasks (n,): first of each task, then of what is left."""
    order = np.random.default_rng(seed).permutation(len(task))
    if max_rows_per_task is not None:
        by_task = order[np.argsort(task[order], kind="stable")]
        sizes = np.unique(task, return_counts=True)[1]
        rank = np.arange(len(task)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        within = np.zeros(len(task), bool)
        within[by_task[rank < max_rows_per_task]] = True
        order = order[within[order]]
    drawn: Int64 = np.sort(order[:max_rows])
    return drawn


def offsets(counts: Int64) -> Int64:
    """(n + 1,) where each of n parts of these lengths begins in a flat array, and where the last one ends."""
    return np.concatenate([[0], np.cumsum(counts)])


def of_rows(flat: NDArray[Number], bounds: Int64, rows: Int64) -> NDArray[Number]:
    """Elements of `rows`, in their order, row r's being flat[bounds[r] : bounds[r + 1]]."""
    if len(rows) == len(bounds) - 1 and (rows[:-1] < rows[1:]).all():  # all of them
        return flat
    counts = np.diff(bounds)[rows]
    gathered: NDArray[Number] = flat[np.arange(counts.sum()) + np.repeat(bounds[rows] - np.cumsum(counts) + counts, counts)]
    return gathered


def copy_texts(path: Path, bounds: Int64, chosen: NDArray[np.bool_], to: IO[bytes]) -> None:
    """Appends the chosen texts (n,) of a file, text i being the bytes bounds[i] to bounds[i + 1], to another one."""
    # Runs of texts that are next to each other, copied whole.
    edges = np.flatnonzero(np.diff(np.concatenate([[False], chosen, [False]]).astype(np.int8)))
    with path.open("rb") as texts:
        for first, last in zip(bounds[edges[::2]].tolist(), bounds[edges[1::2]].tolist(), strict=True):
            texts.seek(first)
            for begin in range(first, last, COPIED_BYTES):
                to.write(texts.read(min(COPIED_BYTES, last - begin)))


def leave_out_unused_texts(path: Path, arrays: dict[str, NDArray[Any]]) -> None:
    """Numbers anew the texts that a row has, or that are documents, in their order, and rewrites the file without the others."""
    columns = [name for name in ("anchor", "positive", "negative", "documents") if name in arrays]
    bounds = arrays["text_offsets"]
    used = np.zeros(len(bounds) - 1, bool)
    for name in columns:
        used[arrays[name]] = True
    number = (np.cumsum(used) - 1).astype(np.int32)
    for name in columns:
        arrays[name] = number[arrays[name]]
    beside = path.with_suffix(".kept")
    with beside.open("wb") as new:
        copy_texts(path, bounds, used, new)
    beside.replace(path)
    arrays["text_offsets"] = offsets(np.diff(bounds)[used])
    arrays["text_hashes"] = arrays["text_hashes"][used]


def leave_out_unused_tasks(tasks: list[str], arrays: dict[str, NDArray[Any]]) -> list[str]:
    """Numbers anew the tasks that a row has, and returns their names."""
    used, arrays["task"] = np.unique(arrays["task"], return_inverse=True)
    arrays["task"] = arrays["task"].astype(np.int32)
    return [tasks[task] for task in used]
