"""What a guide finds of rows: positives that are none, negatives that are none, rows that say the same or contradict each other.

Every row is compared with texts of its own task alone. numpy and torch, in blocks of bounded size.

Legend: R rows of a corpus, n of them at a time, m texts that they are compared with, G width of the guide.
"""

from collections.abc import Iterator
from itertools import chain, pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gist_train.config.suspects import NEAR
from gist_train.data.corpus import Corpus
from gist_train.data.drawing import of_rows
from gist_train.model.masks import similarity_tolerance
from gist_train.model.negatives import Vectors

Scores = NDArray[np.float32]
AT_A_TIME = 2048
"""Rows whose similarities are in memory at a time."""
POOL = 4096
"""Positives of a task that a row's own is ranked among: drawn, where there are more."""
WINDOW = 4096
"""Rows that a row of a task is looked for duplicates among: all, or those next to it along a random direction."""
NUMBERS_AT_A_TIME = 1 << 25
"""Of the vectors of pairs of rows with nearly the same anchor."""
USUAL = 0.5
"""Deviations below its task's median down to which a pair's similarity is usual."""
TO_DEVIATION = 1.4826
"""Times the median distance from the median, of normally distributed values, is their standard deviation."""


class PairScores:
    """What is found of each row, filled by `look`.

    Args:
        anchors, positives, negatives: the guide's vectors of texts in that column.
    """

    KINDS = ("unrelated", "outranked", "negative_nearer", "disagreeing", "labels", "duplicate")

    BY_PAIR = ("unrelated", "outranked", "negative_nearer", "disagreeing")
    """Kinds that blame a row for its pair: a positive or negative that was drawn for it is nobody's slip, and
    a graded pair may be unrelated."""

    def __init__(self, corpus: Corpus, anchors: Vectors, positives: Vectors, negatives: Vectors):
        self._corpus = corpus
        self._anchors, self._positives, self._negatives = anchors, positives, negatives
        self._place = places_in_files(corpus)
        self.cosine: Scores = np.zeros(corpus.row_count, np.float32)
        """(R,) of the anchor and that of the row's positives that is least similar."""
        self.unusual = np.zeros(corpus.row_count, bool)
        """(R,) whose pair is less similar than is usual for its task."""
        self.scores: dict[str, Scores] = {kind: np.zeros(corpus.row_count, np.float32) for kind in self.KINDS}
        """(R,) by kind."""

    def look(self) -> Iterator[int]:
        """Looks at all rows; yields how many are done."""
        task = np.asarray(self._corpus.task)
        order, done = np.argsort(task, kind="stable"), 0
        bounds = np.searchsorted(task[order], np.arange(int(task.max()) + 2))
        for first, last in pairwise(bounds.tolist()):
            rows = order[first:last]
            for more in chain(self._rank(rows), self._against_each_other(rows)):
                done += more
                yield done // 2
            self._compare_with_usual(rows)
        blameless = self._corpus.drawn | self._corpus.graded
        self.unusual &= ~blameless
        for kind in self.BY_PAIR:
            self.scores[kind][blameless] = 0

    def _own(self, rows: NDArray[np.int64], column: str) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        """(k,) places in `rows` and (k,) text ids of all that these rows have in a column."""
        flat, bounds = self._corpus.array(column), self._corpus.array(f"{column}_offsets")
        return np.repeat(np.arange(len(rows)), np.diff(bounds)[rows]), of_rows(flat, bounds, rows)

    def _rank(self, rows: NDArray[np.int64]) -> Iterator[int]:
        """Ranks the positives of a task's rows among others of the task; yields how many rows more are done."""
        pool = np.unique(self._own(rows, "positive")[1])
        if len(pool) > POOL:
            pool = np.sort(np.random.default_rng(0).choice(pool, POOL, replace=False))
        others = self._positives(pool)
        for begin in range(0, len(rows), AT_A_TIME):
            some = rows[begin : begin + AT_A_TIME]
            anchors = self._anchors(self._corpus.anchor[some])
            similarities = anchors @ others.T
            place, ids = self._own(some, "positive")
            own = _cosines(anchors, place, self._positives(ids))
            limit, shares = (own + similarity_tolerance(own))[:, None], []
            for first in range(0, len(place), AT_A_TIME):  # more than rows, where these have several positives
                part = slice(first, first + AT_A_TIME)
                of_part = similarities if len(place) == len(some) else similarities[torch.from_numpy(place[part])]
                shares.append((of_part > limit[part]).sum(dim=1) / max(1, len(pool)))
            share = torch.cat(shares).float().numpy()
            np.maximum.at(self.scores["outranked"], some[place], share)
            least = np.full(len(some), np.inf, np.float32)
            np.minimum.at(least, place, own.numpy())
            self.cosine[some] = least
            place, ids = self._own(some, "negative")
            nearest = np.full(len(some), -np.inf, np.float32)
            for first in range(0, len(ids), AT_A_TIME):
                part = slice(first, first + AT_A_TIME)
                np.maximum.at(nearest, place[part], _cosines(anchors, place[part], self._negatives(ids[part])).numpy())
            self.scores["negative_nearer"][some] = np.maximum(nearest - least, 0)
            yield len(some)

    def _against_each_other(self, rows: NDArray[np.int64]) -> Iterator[int]:
        """Compares a task's rows with one another; yields how many rows more are done."""
        corpus = self._corpus
        rows = self._in_order(rows)
        first_positive = corpus.positive[corpus.positive_offsets[rows]]
        for begin in range(0, len(rows), AT_A_TIME):
            near = np.arange(max(0, begin - WINDOW), min(len(rows), begin + AT_A_TIME + WINDOW))
            here = slice(begin - near[0], min(begin + AT_A_TIME, len(rows)) - near[0])
            anchors, positives = self._anchors(corpus.anchor[rows[near]]), self._positives(first_positive[near])
            ours, theirs = torch.nonzero(anchors[here] @ anchors.T >= NEAR, as_tuple=True)
            at_a_time = max(1, NUMBERS_AT_A_TIME // anchors.shape[1])
            for first in range(0, len(ours), at_a_time):
                a, b = (x[first : first + at_a_time] for x in (ours + here.start, theirs))
                self._compare(rows[near[a.numpy()]], rows[near[b.numpy()]], anchors, positives, a, b)
            yield here.stop - here.start

    def _compare(
        self, row: NDArray[np.int64], other: NDArray[np.int64], anchors: Tensor, positives: Tensor, a: Tensor, b: Tensor
    ) -> None:
        """Takes in pairs of rows with nearly the same anchor; `a` and `b` are their places in the vectors."""
        corpus = self._corpus
        by_anchor = _similarities(corpus.anchor[row], corpus.anchor[other], anchors, a, b)
        first, of_other = (corpus.positive[corpus.positive_offsets[rows]] for rows in (row, other))
        by_positive = _similarities(first, of_other, positives, a, b)
        labels = np.asarray(corpus.label)
        labelled = labels[row] >= 0
        # A positive that was mined says nothing: of labelled texts the label counts.
        by_positive = np.where(labelled, np.where(labels[row] == labels[other], 1.0, -1.0), by_positive)
        alike, apart = np.minimum(by_anchor, by_positive), by_anchor - by_positive
        is_other, earlier = row != other, self._place[other] < self._place[row]
        same = earlier & (alike >= NEAR)
        np.maximum.at(self.scores["duplicate"], row[same], alike[same])
        apart_rows = is_other & ~labelled & (apart > 0)
        np.maximum.at(self.scores["disagreeing"], row[apart_rows], apart[apart_rows])
        unlike = is_other & labelled & (labels[row] != labels[other])
        np.maximum.at(self.scores["labels"], row[unlike], by_anchor[unlike])

    def _in_order(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """The rows of a task; many of them so that those with like anchors are near each other."""
        if len(rows) <= WINDOW:
            return rows
        direction, places = None, []
        for begin in range(0, len(rows), AT_A_TIME):
            vectors = self._anchors(self._corpus.anchor[rows[begin : begin + AT_A_TIME]])
            if direction is None:
                direction = torch.randn(vectors.shape[1], generator=torch.Generator().manual_seed(0))
            places.append((vectors @ direction).numpy())
        return rows[np.argsort(np.concatenate(places), kind="stable")]

    def _compare_with_usual(self, rows: NDArray[np.int64]) -> None:
        """What goes by how similar the pairs of a whole task are."""
        cosine = self.cosine[rows]
        median = np.median(cosine)
        deviation = TO_DEVIATION * np.median(np.abs(cosine - median))
        self.unusual[rows] = cosine < median - USUAL * deviation
        self.scores["unrelated"][rows] = np.where(self.unusual[rows], self.scores["outranked"][rows], 0)


def _cosines(anchors: Tensor, place: NDArray[np.int64], others: Tensor) -> Tensor:
    """(k,) similarity of each of `others` (k, G) and the anchor at its place."""
    return (anchors[torch.from_numpy(place)] * others).sum(dim=1)


def _similarities(text: NDArray[np.int32], other: NDArray[np.int32], vectors: Tensor, a: Tensor, b: Tensor) -> Scores:
    """(k,) cosines of texts, of one text with itself exactly 1: kept in half precision, vectors have not quite the length 1.

    Args:
        text, other: (k,) ids; `a` and `b` are the places of their vectors.
    """
    cosines = (vectors[a] * vectors[b]).sum(dim=1).clamp(max=1).numpy()
    return np.where(text == other, np.float32(1), cosines)


def places_in_files(corpus: Corpus) -> NDArray[np.int64]:
    """(R,) a row's place in the order of sources, files and rows in them; rows of labelled texts are mined in another one."""
    places = np.empty(corpus.row_count, np.int64)
    places[np.lexsort((corpus.number, corpus.file, corpus.source))] = np.arange(corpus.row_count)
    return places
