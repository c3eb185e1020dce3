"""The batch plan: which rows a step trains on, as a pure function of (rows, batching, batch size, seed, step).

Legend: R rows in the corpus, B rows per batch, steps count from 1, epochs from 0. Nothing here is state: the epoch that was
opened last is kept, but only to save doing it again.
"""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from gist_train.data.cells import Likeness, cells_of

Ints = NDArray[np.int64]
SWAP_TRIES = 16
"""Partners that are tried for a row that shares a text with another row of its batch. Measured: 16 parts what can be parted."""

SWAP_BUDGET = 100_000
"""Tries in one epoch, about a second's worth: opening an epoch must not hold the training up."""


@dataclass(frozen=True, slots=True)
class EpochCounts:
    """What became of the rows in one epoch."""

    rows: int
    """Rows in the corpus."""
    left_out: int
    """Rows that are in no batch of this epoch."""
    shared_text: int
    """Rows that share an anchor or positive text with an earlier row of their batch and could not be parted from it."""


class BatchPlan:
    """Rows of any step of any epoch. `batch(step)` costs the same at step 1 and at step 102,000,
    once the epoch is open.

    Args:
        task: (R,) task id of each row.
        anchor: (R,) text id of each row's anchor.
        positive: (P,) flat text ids of positives, those of row r at positive_offsets[r] : positive_offsets[r + 1].
        positive_offsets: (R + 1,).
        batching: "reference" (windows in file order, whole and of one task, shuffled once, the authors' procedure),
            "task" (shuffled within tasks, remainders pooled), "similar" (the same, rows of a task in the order of their cells)
            or "mixed" (shuffled over all tasks).
        batch_size: rows per step over all processes.
        seed: of every draw.
        source: (R,) source of each row, ascending; None for one source.
        likeness: for "similar"; None: cells are left aside, which changes who is with whom, and no count.
        weights: of each source, times that a row of it is in an epoch; what is left of a whole number is a share of the
            rows, others each epoch, until all have had their turn. Not for "reference". None for 1 each.

    Raises:
        ValueError: there is no whole batch.
    """

    def __init__(
        self,
        *,
        task: NDArray[np.int32],
        anchor: NDArray[np.int32],
        positive: NDArray[np.int32],
        positive_offsets: Ints,
        batching: Literal["reference", "task", "mixed", "similar"],
        batch_size: int,
        seed: int,
        source: NDArray[np.int32] | None = None,
        weights: Sequence[float] | None = None,
        likeness: Likeness | None = None,
    ):
        self._task, self._anchor, self._positive, self._offsets = task, anchor, positive, positive_offsets
        self._batching, self._size, self._seed, self._likeness = batching, batch_size, seed, likeness
        rows_of_source = [len(task)] if source is None else np.bincount(source, minlength=len(weights or [])).tolist()
        self._shares = [_share(rows, weight) for rows, weight in zip(rows_of_source, weights or [1.0], strict=True)]
        self._weighted = any(share != (rows, 1, 0) for share, rows in zip(self._shares, rows_of_source, strict=True))
        if self._weighted and batching == "reference":
            raise ValueError("reference batching takes each row once: weights must be 1")
        self._windows = _reference_windows(task, batch_size, seed) if batching == "reference" else None
        rows = sum(rows * copies + extra for rows, copies, extra in self._shares)
        self.steps_per_epoch = rows // batch_size if self._windows is None else len(self._windows)
        if self.steps_per_epoch == 0:
            rows_give = "1 row gives" if rows == 1 else f"{rows} rows give"
            raise ValueError(f"{rows_give} no whole batch of {batch_size} with batching: {batching}")
        self._opened: tuple[int, Ints, EpochCounts] | None = None

    def epoch_of(self, step: int) -> int:
        """The epoch, counted from 0, that step `step`, counted from 1, belongs to."""
        return (step - 1) // self.steps_per_epoch

    def batch(self, step: int) -> Ints:
        """(B,) rows of step `step`, counted from 1."""
        if step < 1:
            raise ValueError(f"steps count from 1, not {step}")
        rows: Ints = self._open(self.epoch_of(step))[0][(step - 1) % self.steps_per_epoch]
        return rows

    def epoch(self, epoch: int) -> Ints:
        """(S, B) rows of all of an epoch's steps."""
        return self._open(epoch)[0]

    def positives(self, rows: Ints, epoch: int) -> NDArray[np.int32]:
        """(N,) the text id of the one positive that each of `rows` trains on in `epoch`."""
        return self._positive[_drawn(self._offsets, rows, self._seed, epoch)]

    def counts(self, epoch: int) -> EpochCounts:
        """What `epoch` leaves out, and what it could not part."""
        return self._open(epoch)[1]

    def _open(self, epoch: int) -> tuple[Ints, EpochCounts]:
        if self._opened is None or self._opened[0] != epoch:
            batches = self._windows if self._windows is not None else self._shuffled(epoch)
            keys = self._keys(epoch)
            if self._windows is None:  # the reference keeps its windows as they are, whatever they share
                _part(batches, keys, self._task, self._rng(epoch, 1))
            shared = len(np.unique(_conflicts(batches, keys)[:, 1]))
            taken = len(np.unique(batches)) if self._weighted else batches.size
            counts = EpochCounts(len(self._task), len(self._task) - taken, shared)
            self._opened = (epoch, batches, counts)
        return self._opened[1:]

    def _rng(self, epoch: int, purpose: int) -> np.random.Generator:
        return np.random.Generator(np.random.PCG64([self._seed, epoch, purpose]))

    def _keys(self, epoch: int) -> NDArray[np.int32]:
        """(R, 2) the text ids that no two rows of a batch should share: anchor and this epoch's positive."""
        return np.stack([self._anchor, self.positives(np.arange(len(self._anchor)), epoch)], axis=1)

    def _rows_of(self, epoch: int) -> Ints:
        """(E,) the rows of an epoch, one of a source of weight 2 twice."""
        if not self._weighted:
            return np.arange(len(self._task))
        parts: list[Ints] = []
        first = 0
        for source, (rows, copies, extra) in enumerate(self._shares):
            parts += [np.arange(first, first + rows)] * copies
            # One order for all epochs, gone through in turn: all rows come up before one comes up again.
            turns = np.random.Generator(np.random.PCG64([self._seed, source, 2])).permutation(rows)
            parts.append(first + turns[(np.arange(extra) + epoch * extra) % max(rows, 1)])
            first += rows
        return np.concatenate(parts)

    def _shuffled(self, epoch: int) -> Ints:
        """(steps, B) rows of an epoch, before rows that share a text are parted."""
        rng = self._rng(epoch, 0)
        rows = rng.permutation(self._rows_of(epoch))
        if self._batching == "mixed":
            return rows[: self.steps_per_epoch * self._size].reshape(-1, self._size)
        if self._batching == "similar" and self._likeness is not None and self._likeness.depth:
            rows = rows[np.argsort(cells_of(self._likeness, self._task, rows, self._rng(epoch, 3)), kind="stable")]
        by_task = rows[np.argsort(self._task[rows], kind="stable")]
        sizes = np.bincount(self._task[rows])
        starts = np.cumsum(sizes) - sizes
        rank_in_task = np.arange(len(rows)) - np.repeat(starts, sizes)
        in_whole_batch = rank_in_task < np.repeat(sizes // self._size * self._size, sizes)
        pooled = rng.permutation(by_task[~in_whole_batch])
        whole = np.concatenate([by_task[in_whole_batch], pooled[: len(pooled) // self._size * self._size]])
        return rng.permutation(whole.reshape(-1, self._size))


def _share(rows: int, weight: float) -> tuple[int, int, int]:
    """(rows of a source, times that all of them are in an epoch, further rows that are in it once more)."""
    part = weight - int(weight)
    # At least one row, or a small source of little weight would never have its turn.
    return rows, int(weight), max(1, round(part * rows)) if rows and part else 0


def _reference_windows(task: NDArray[np.int32], size: int, seed: int) -> Ints:
    """(windows, size) rows in the order of the authors' train script (avsolatorio/GISTEmbed at 26a9f73)."""
    whole = task[: len(task) // size * size].reshape(-1, size)
    kept = np.flatnonzero((whole == whole[:, :1]).all(axis=1)).tolist()
    random.Random(seed).shuffle(kept)
    return np.asarray(kept, dtype=np.int64)[:, None] * size + np.arange(size)


def _drawn(offsets: Ints, rows: Ints, seed: int, epoch: int) -> Ints:
    """(N,) flat indices: one of each row's positives, drawn by (seed, epoch, row)."""
    first, count = offsets[rows], offsets[rows + 1] - offsets[rows]
    salt = np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)[0]
    return first + (_mixed(rows.astype(np.uint64) ^ salt) % count.astype(np.uint64)).astype(np.int64)


def _mixed(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finaliser (Steele, Lea, Flood 2014): neighbouring rows draw independently."""
    x = (x + np.uint64(0x9E3779B97F4A7C15)) & np.uint64(0xFFFFFFFFFFFFFFFF)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _conflicts(batches: Ints, keys: NDArray[np.int32]) -> Ints:
    """(C, 3) flat positions in `batches` of two rows of one batch that share a text, the earlier first, and that text's id."""
    texts = keys[batches.ravel()].astype(np.int64)
    batch = np.repeat(np.arange(len(batches)), batches.shape[1])
    code = (batch[:, None] * (int(keys.max()) + 1) + texts).ravel()
    order = np.argsort(code, kind="stable")
    same = code[order][1:] == code[order][:-1]
    pairs = np.stack([order[:-1][same] // 2, order[1:][same] // 2, texts.ravel()[order[1:][same]]], axis=1)
    between_rows: Ints = pairs[pairs[:, 0] != pairs[:, 1]]
    return between_rows


def _part(batches: Ints, keys: NDArray[np.int32], task: NDArray[np.int32], rng: np.random.Generator) -> None:
    """Swaps rows that share a text with another row of their batch, in place, for rows of the same task elsewhere.

    A swap leaves both batches with the tasks that they had. What can't be parted costs little time: a text in more than twice as
    many rows as there are batches is left where it is, and `SWAP_BUDGET` tries are made at most.
    """
    flat, size = batches.reshape(-1), batches.shape[1]
    texts = keys[flat]
    rows_with = np.bincount(texts.ravel(), minlength=int(keys.max()) + 1)
    rows_with -= np.bincount(texts[texts[:, 0] == texts[:, 1], 0], minlength=len(rows_with))
    conflicts = _conflicts(batches, keys)
    conflicts = conflicts[rows_with[conflicts[:, 2]] <= 2 * len(batches)]
    if not len(conflicts):
        return
    of_task = task[flat]
    by_task = np.argsort(of_task, kind="stable")
    bounds = np.searchsorted(of_task[by_task], np.arange(int(task.max()) + 2))
    held: dict[int, Counter[int]] = {}
    tries = 0

    def texts_of(position: int) -> set[int]:
        return set(keys[flat[position]].tolist())

    def texts_in_batch(position: int) -> Counter[int]:
        """How many rows of the batch have each text."""
        batch = position // size
        if batch not in held:
            held[batch] = Counter(text for row in batches[batch] for text in set(keys[row].tolist()))
        return held[batch]

    def fits(texts: set[int], position: int, leaving: set[int]) -> bool:
        """Whether a row with `texts` shares none of them with the batch at `position`, once the row there has left."""
        counts = texts_in_batch(position)
        return all(counts[text] == (text in leaving) for text in texts)

    def moved(position: int) -> bool:
        """Whether the row there shares no text with its batch any more, by a swap of now or of before."""
        nonlocal tries
        mine = texts_of(position)
        if fits(mine, position, mine):
            return True  # an earlier swap took the other row away
        first, last = bounds[of_task[position]], bounds[of_task[position] + 1]
        for other in by_task[rng.integers(first, last, SWAP_TRIES)].tolist():
            tries += 1
            theirs = texts_of(other)
            if other // size != position // size and fits(theirs, position, mine) and fits(mine, other, theirs):
                for place, came, left in ((position, theirs, mine), (other, mine, theirs)):
                    texts_in_batch(place).update(came)
                    texts_in_batch(place).subtract(left)
                flat[position], flat[other] = flat[other], flat[position]
                return True
        return False

    for earlier, later, _ in conflicts.tolist():
        if tries > SWAP_BUDGET:
            return
        if not moved(later):
            moved(earlier)
