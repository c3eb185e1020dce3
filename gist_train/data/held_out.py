"""Rows that are held out of training, so that a model can be judged on texts that it was never trained on.

Rows that share a text stay together: all of them train, or none does. Texts are the same where they are so normalised.

Legend: R rows of all sources, S sources, N different texts, P places of texts in rows.
"""

import json
import math
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gist_train.config.errors import Fault, UserError
from gist_train.config.schema import DataConfig
from gist_train.config.sources import ClassificationSource, Source, is_graded
from gist_train.data.building import none_usable
from gist_train.data.corpus import Int64
from gist_train.data.files import json_lines, whole_folder
from gist_train.data.overlap import normalized_hash
from gist_train.data.rows import Labelled, Row
from gist_train.data.sources import read_labelled, read_rows

ROWS, LABELS, FIT = "rows.jsonl", "labels.jsonl", "labels_fit.jsonl"
"""Of pairs and triplets; of labelled texts; and the labelled texts that train, too, which a classifier is fitted on."""
FIT_PER_CLASS = 32
"""Rows of a class that the classifier is fitted on."""
SHUFFLE = np.uint64(0x9E3779B97F4A7C15)
"""An odd number: the order of the products, modulo 2**64, has nothing to do with that of the numbers."""


def write_held_out(folder: Path, data: DataConfig, amount: float | int) -> Iterator[int]:
    """Draws the rows and writes them to a new `folder`; yields how many rows were read, now and then.

    Rows of a source with `max_rows` count as so many. A row's negatives are held out where no other row has them. What is drawn
    depends on the texts alone, and not on their order.

    Args:
        amount: share of each source's rows, or number of rows over all sources.

    Raises:
        UserError: a source can't be read, no row is usable, or none can be held out.
    """
    read = _Texts()
    for index, source in enumerate(data.train):
        for row in _rows(source, index, data):
            read.add(index, row)
            if len(read.source) % 4096 == 0:
                yield len(read.source)
    if not read.source:
        unusable = [row for index, source in enumerate(data.train) for row in _all_rows(source, index, data)]
        raise none_usable([row for row in unusable if isinstance(row, Fault)], len(unusable))
    rows = np.bincount(np.asarray(read.source, np.int64), minlength=len(data.train))
    places, bounds, keys, candidates = read.arrays()
    sources, budgets = np.asarray(read.source, np.int64), _budgets(rows, data.train, amount)
    held = drawn(places[candidates], _of_places(bounds, candidates), keys, sources, budgets)
    if not held.any() and all(map(is_graded, data.train)):
        fix = "leave it out, and name a file of graded pairs of its own in evaluation.tasks, with type: sts"
        raise UserError(Fault("evaluation.held_out", f"{amount}, and graded pairs alone", "rows with a positive to find", fix))
    if not held.any():
        found = f"{amount}, and no rows of {int(rows.sum()):,} that share no text with the others"
        fix = "hold out more, or name a task of its own in evaluation.tasks"
        raise UserError(Fault("evaluation.held_out", found, "rows that can be held out", fix))
    trained = np.zeros(len(keys), bool)
    trained[places[np.repeat(~held, np.diff(bounds))]] = True
    number = {key: text for text, key in enumerate(keys.tolist())}

    def free(text: str) -> bool:
        return not trained[number[_key(normalized_hash(text))]]

    with whole_folder(folder) as beside:
        _write(beside, data, held, free)
    yield len(held)


def held_out_texts(folder: Path) -> frozenset[bytes]:
    """`normalized_hash` of each text that no row may train on."""
    texts: list[str] = []
    for _, row in json_lines(folder / ROWS):
        texts += [row["anchor"], *row["positive"], *row["negative"]]
    texts += [row["text"] for _, row in json_lines(folder / LABELS)]
    return frozenset(map(normalized_hash, texts))


def drawn(places: Int64, bounds: Int64, keys: NDArray[np.uint64], source: Int64, budgets: Sequence[int]) -> NDArray[np.bool_]:
    """(R,) which rows are held out: whole groups of rows that share texts, in an order given by the texts, while they fit.

    Args:
        places: (P,) the text at each place.
        bounds: (R + 1,) where a row's places begin; those of the last end at P.
        keys: (N,) a number for each text that says nothing about it, such as its hash.
        source: (R,) a row's source.
        budgets: (S,) rows of each source that may be held out.
    """
    count = len(source)
    row_of_place = np.repeat(np.arange(count), np.diff(bounds))
    nodes = count + len(keys)
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    graph = coo_array((np.ones(len(places), bool), (row_of_place, count + places)), shape=(nodes, nodes))
    group = connected_components(graph, directed=False)[1]
    least = np.full(group.max(initial=-1) + 1, np.iinfo(np.uint64).max)
    np.minimum.at(least, group[count:], keys)
    order = np.argsort(least[group[:count]] * SHUFFLE, kind="stable")
    starts = np.flatnonzero(np.diff(group[order], prepend=-1))
    left, held = np.array(budgets), np.zeros(count, bool)
    for start, end in zip(starts.tolist(), [*starts[1:].tolist(), count], strict=True):
        rows = order[start:end]
        needed = np.bincount(source[rows], minlength=len(left))
        if (needed <= left).all():
            held[rows] = True
            left -= needed
            if not left.any():
                break
    return held


class _Texts:
    """The texts of rows, as their hashes."""

    def __init__(self) -> None:
        self.source = array("i")
        self._hashes = bytearray()
        self._binding = bytearray()
        self._bounds = array("q", [0])

    def add(self, source: int, row: Row | Labelled) -> None:
        together, others = _texts(row)
        for text in (*together, *others):
            self._hashes += normalized_hash(text)[:8]
        self._binding += b"\1" * len(together) + b"\0" * len(others)
        self._bounds.append(len(self._binding))
        self.source.append(source)

    def arrays(self) -> tuple[Int64, Int64, NDArray[np.uint64], NDArray[np.bool_]]:
        """(P,) the text at each place, (R + 1,) the rows' bounds, (N,) the texts' keys, (P,) whether it holds rows together."""
        keys, places = np.unique(np.frombuffer(bytes(self._hashes), "<u8"), return_inverse=True)
        return places, np.asarray(self._bounds, np.int64), keys, np.frombuffer(bytes(self._binding), bool)


def _texts(row: Row | Labelled) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What rows must not share, and what they may: a negative is a negative of many."""
    return ((row.text,), ()) if isinstance(row, Labelled) else ((row.anchor, *row.positives), row.negatives)


def _key(text_hash: bytes) -> int:
    return int.from_bytes(text_hash[:8], "little")


def _of_places(bounds: Int64, candidates: NDArray[np.bool_]) -> Int64:
    """The rows' bounds among the places that are candidates."""
    before = np.concatenate([[0], np.cumsum(candidates)])
    return before[bounds]


def _rows(source: Source, index: int, data: DataConfig) -> Iterator[Row | Labelled]:
    """The good rows of a source; the others are told, or skipped, where the corpus is made."""
    return (row for row in _all_rows(source, index, data) if isinstance(row, Row | Labelled))


def _all_rows(source: Source, index: int, data: DataConfig) -> Iterable[Row | Labelled | Fault | None]:
    where = f"data.train[{index}]"
    if isinstance(source, ClassificationSource):
        return read_labelled(source, where)
    return read_rows(source, where, keep_instructions=data.keep_instructions)


def _budgets(rows: Int64, sources: Sequence[Source], amount: float | int) -> list[int]:
    """By source, the rows to hold out: at most half of them, and none of graded pairs, which may be unrelated."""
    usable = [0 if is_graded(source) else count for count, source in zip(rows.tolist(), sources, strict=True)]
    of_source = [min(count, source.max_rows or count) for count, source in zip(usable, sources, strict=True)]
    share = amount if isinstance(amount, float) else amount / max(1, sum(of_source))
    return [min(math.ceil(share * count), count // 2) for count in of_source]


def _write(folder: Path, data: DataConfig, held: NDArray[np.bool_], free: Callable[[str], bool]) -> None:
    """The files of the rows that are held out, by a second look at the sources."""
    out = iter(held.tolist())
    labelled: list[Labelled] = []
    trained: dict[tuple[str, str], list[str]] = {}
    with (folder / ROWS).open("w", encoding="utf-8") as file:
        for index, source in enumerate(data.train):
            for row in _rows(source, index, data):
                if isinstance(row, Row):
                    if next(out):
                        negatives = [text for text in row.negatives if free(text)]
                        line = {"anchor": row.anchor, "positive": row.positives, "negative": negatives, "task": row.task}
                        file.write(json.dumps(line, ensure_ascii=False) + "\n")
                elif next(out):
                    labelled.append(row)
                else:
                    trained.setdefault((row.task, row.label), []).append(row.text)
    several = len({task for task, _ in trained}) > 1
    fit = [
        Labelled(text, label, task)
        for (task, label), texts in trained.items()
        for text in sorted(texts, key=normalized_hash)[:FIT_PER_CLASS]
    ]
    known = [row for row in labelled if (row.task, row.label) in trained]  # a class of which no row trains has no classifier
    for name, rows in ((LABELS, known), (FIT, fit)):
        lines = [{"text": row.text, "label": f"{row.task}: {row.label}" if several else row.label} for row in rows]
        (folder / name).write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
