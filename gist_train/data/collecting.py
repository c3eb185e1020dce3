"""Rows -> ids, in memory: what a corpus is saved from, and parts of one that were collected by other processes.

Legend: R rows, N unique texts.
"""

import hashlib
import json
import shutil
from array import array
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from gist_train.config.sources import AnySource
from gist_train.data.corpus import Corpus, Int64, text_hash, view_key
from gist_train.data.drawing import copy_texts, drawn_rows, leave_out_unused_tasks, leave_out_unused_texts, of_rows, offsets
from gist_train.data.files import read_json, write_json, write_text
from gist_train.data.rows import Row

ORDER = (
    *("anchor", "task", "source", "label", "row_prompts", "positive", "positive_offsets"),
    *("negative", "negative_label", "negative_offsets", "text_offsets", "text_hashes"),
)
"""Of a corpus' arrays, in which its content is hashed."""
WHENCE = ("row_file", "row_number")
"""Arrays of where a row stands: the same rows elsewhere are the same content, of which these are no part."""
DRAW_SEED = 42
"""Of the draws of max_rows, with the source's place in the list. No setting, so that trainings of all seeds share a corpus."""
HASH_BYTES = 16
NAN = float("nan")
"""The score of a text that has none."""
TEXTS, ARRAYS, NAMES = "texts.utf8", "ids.npz", "names.json"
"""Files of a part."""


class Collector:
    """Rows of one source after the other. Texts go straight to the disk, ids are kept.

    Args:
        texts: an empty file that is open.
    """

    def __init__(self, texts: IO[bytes]):
        self._texts = texts
        self._ids: dict[bytes, int] = {}
        self._tasks: dict[str, int] = {}
        self._prompts: dict[str, int] = {"": 0}
        self._labels: dict[tuple[int, str], int] = {}
        self._hashes = bytearray()
        self._text_offsets = array("q", [0])
        self.anchor, self._task, self._row_prompts = array("i"), array("i"), array("i")
        self._positive, self._positive_offsets = array("i"), array("q", [0])
        self._negative, self._negative_offsets = array("i"), array("q", [0])
        self._label, self._negative_label = array("i"), array("i")
        self._file, self._number = array("i"), array("q")
        self._positive_score, self._negative_score = array("f"), array("f")
        self._documents = array("i")
        self._ends: list[int] = []
        """Rows in all at the end of each source, before any draw."""
        self._kept: list[Int64] = []
        """By source, the rows that were drawn, numbered from its first."""

    @property
    def rows_of_source(self) -> int:
        """Rows of the present source so far."""
        return len(self.anchor) - (self._ends[-1] if self._ends else 0)

    def add(self, row: Row) -> None:
        self.anchor.append(self._text_id(row.anchor))
        self._positive.extend(self._text_id(text) for text in row.positives)
        self._positive_offsets.append(len(self._positive))
        self._negative.extend(self._text_id(text) for text in row.negatives)
        self._negative_offsets.append(len(self._negative))
        self._task.append(self._tasks.setdefault(row.task, len(self._tasks)))
        self._row_prompts.extend(self._prompts.setdefault(prompt, len(self._prompts)) for prompt in row.prompts)
        self._label.append(-1 if row.label is None else self._label_id(row.label))
        self._negative_label.extend(self._label_id(label) for label in row.negative_labels)
        self._negative_label.extend([-1] * (len(self._negative) - len(self._negative_label)))
        self._file.append(row.file)
        self._number.append(row.number)
        self._positive_score.extend(row.positive_scores or [NAN] * len(row.positives))
        self._negative_score.extend(row.negative_scores or [NAN] * len(row.negatives))

    def add_document(self, text: str) -> None:
        """Takes in a text that is in no row, or may be in some."""
        self._documents.append(self._text_id(text))

    def dump(self, folder: Path) -> None:
        """Writes the rows of the one source that was collected, before any draw: `absorb` takes them in."""
        arrays: dict[str, Any] = {name: np.asarray(values) for name, values in self._flat().items()}
        arrays["text_offsets"] = np.asarray(self._text_offsets)
        arrays["text_hashes"] = np.frombuffer(bytes(self._hashes), np.uint8).reshape(-1, HASH_BYTES)
        np.savez(folder / ARRAYS, **arrays)
        names = {"tasks": list(self._tasks), "prompts": list(self._prompts), "labels": [label for _, label in self._labels]}
        write_text(folder / NAMES, json.dumps(names))

    def absorb(self, folder: Path) -> None:
        """Takes in the rows of a source that were dumped: what is numbered comes out as if they had been added one by one."""
        ids, names = np.load(folder / ARRAYS, allow_pickle=False), read_json(folder / NAMES)
        known, hashes = len(self._ids), ids["text_hashes"].tobytes()
        keys = [hashes[first : first + HASH_BYTES] for first in range(0, len(hashes), HASH_BYTES)]
        texts = np.array([self._ids.setdefault(key, len(self._ids)) for key in keys], np.int32)
        new, lengths = texts >= known, np.diff(ids["text_offsets"])
        copy_texts(folder / TEXTS, ids["text_offsets"], new, self._texts)
        self._text_offsets.frombytes((self._text_offsets[-1] + np.cumsum(lengths[new])).tobytes())
        self._hashes += ids["text_hashes"][new].tobytes()
        tasks, prompts = (
            np.array([numbers.setdefault(name, len(numbers)) for name in names[kind]], np.int32)
            for kind, numbers in (("tasks", self._tasks), ("prompts", self._prompts))
        )
        labels = np.array([self._label_id(name) for name in names["labels"]] + [-1], np.int32)  # -1 is the last, and stays
        numbers = {"anchor": texts, "positive": texts, "negative": texts, "task": tasks, "row_prompts": prompts}
        numbers |= {"label": labels, "negative_label": labels}
        for name, values in self._flat().items():
            if name in numbers:
                values.frombytes(numbers[name][ids[name]].tobytes())
            elif name in ("positive_score", "negative_score", *WHENCE):
                values.frombytes(ids[name].tobytes())
            else:  # offsets
                values.frombytes((values[-1] + ids[name][1:]).tobytes())

    def _flat(self) -> "dict[str, array[Any]]":
        return {
            "anchor": self.anchor,
            "task": self._task,
            "row_prompts": self._row_prompts,
            "positive": self._positive,
            "positive_offsets": self._positive_offsets,
            "negative": self._negative,
            "negative_offsets": self._negative_offsets,
            "label": self._label,
            "negative_label": self._negative_label,
            "positive_score": self._positive_score,
            "negative_score": self._negative_score,
            "row_file": self._file,
            "row_number": self._number,
        }

    def end_source(self, source: AnySource) -> int:
        """Draws what max_rows and max_rows_per_task say, and returns how many rows were left out."""
        rows = self.rows_of_source
        task = np.asarray(self._task[len(self._task) - rows :], np.int32)
        drawn = source.max_rows is not None or source.max_rows_per_task is not None
        seed = [DRAW_SEED, len(self._ends)]
        kept = drawn_rows(task, source.max_rows, source.max_rows_per_task, seed) if drawn else np.arange(rows)
        self._ends.append(len(self.anchor))
        self._kept.append(kept)
        return rows - len(kept)

    def _label_id(self, label: str) -> int:
        """A number that no label of another source has."""
        return self._labels.setdefault((len(self._ends), label), len(self._labels))

    def _text_id(self, text: str) -> int:
        key = text_hash(text)
        known = self._ids.get(key)
        if known is not None:
            return known
        self._ids[key] = new = len(self._ids)
        encoded = text.encode()
        self._texts.write(encoded)
        self._text_offsets.append(self._text_offsets[-1] + len(encoded))
        self._hashes += key
        return new

    def save(self, folder: Path, meta: dict[str, Any]) -> None:
        """Writes the arrays of the rows that were drawn, and leaves the texts of the others out of texts.utf8."""
        self._ids.clear()  # the largest thing in memory, and done with
        rows = np.concatenate([kept + start for kept, start in zip(self._kept, [0, *self._ends], strict=False)])
        positive_offsets, negative_offsets = (np.asarray(x, np.int64) for x in (self._positive_offsets, self._negative_offsets))
        arrays: dict[str, NDArray[Any]] = {
            "anchor": np.asarray(self.anchor, np.int32)[rows],
            "task": np.asarray(self._task, np.int32)[rows],
            "source": np.repeat(np.arange(len(self._kept), dtype=np.int32), [len(kept) for kept in self._kept]),
            "label": np.asarray(self._label, np.int32)[rows],
            "row_prompts": np.asarray(self._row_prompts, np.int32).reshape(-1, 3)[rows],
            "positive": of_rows(np.asarray(self._positive, np.int32), positive_offsets, rows),
            "positive_offsets": offsets(np.diff(positive_offsets)[rows]),
            "negative": of_rows(np.asarray(self._negative, np.int32), negative_offsets, rows),
            "negative_label": of_rows(np.asarray(self._negative_label, np.int32), negative_offsets, rows),
            "negative_offsets": offsets(np.diff(negative_offsets)[rows]),
            "text_offsets": np.asarray(self._text_offsets, np.int64),
            "text_hashes": np.frombuffer(bytes(self._hashes), np.uint8).reshape(-1, 16),
        }
        arrays |= {"row_file": np.asarray(self._file, np.int32)[rows], "row_number": np.asarray(self._number, np.int64)[rows]}
        scores = np.asarray(self._positive_score, np.float32)
        if np.isfinite(scores).any():
            arrays["positive_score"] = of_rows(scores, positive_offsets, rows)
            arrays["negative_score"] = of_rows(np.asarray(self._negative_score, np.float32), negative_offsets, rows)
        if len(self._documents):
            arrays["documents"] = np.unique(np.asarray(self._documents, np.int32))
        tasks = list(self._tasks)
        if len(rows) < len(self.anchor):
            leave_out_unused_texts(folder / "texts.utf8", arrays)
            tasks = leave_out_unused_tasks(tasks, arrays)
        write_arrays(folder, arrays, tasks, list(self._prompts), meta)


def write_arrays(
    folder: Path, arrays: dict[str, NDArray[Any]], tasks: list[str], prompts: list[str], meta: dict[str, Any]
) -> None:
    """Writes all of a corpus but its texts. `arrays` gets the views, which follow from the others."""
    prompt_ids, counts = arrays["row_prompts"], (np.diff(arrays["positive_offsets"]), np.diff(arrays["negative_offsets"]))
    arrays["views"] = np.unique(
        np.concatenate(
            [
                view_key(prompt_ids[:, 0], arrays["anchor"]),
                view_key(np.repeat(prompt_ids[:, 1], counts[0]), arrays["positive"]),
                view_key(np.repeat(prompt_ids[:, 2], counts[1]), arrays["negative"]),
            ]
        )
    )
    for name, values in arrays.items():
        np.save(folder / f"{name}.npy", values)
    facts = {
        "content": _content_hash(arrays, [tasks, prompts]),
        "rows": len(arrays["anchor"]),
        "texts": len(arrays["text_hashes"]),
        "views": len(arrays["views"]),
        "tasks": tasks,
        "prompts": prompts,
        "sizes": {name: values.size for name, values in arrays.items()},
    }
    write_json(folder / "meta.json", {**meta, **facts})


def _content_hash(arrays: dict[str, NDArray[Any]], names: list[list[str]]) -> str:
    """32 hex digits over rows and texts as they are; the texts count by their hashes."""
    content = hashlib.blake2b(json.dumps(names).encode(), digest_size=16)
    for name, values in arrays.items():
        if name not in WHENCE:
            content.update(values.tobytes())
    return content.hexdigest()


def with_rows(corpus: Corpus, folder: Path, kept: Int64) -> None:
    """Writes a corpus of the same texts and documents into the empty `folder`, that has the rows `kept` alone, ascending."""
    none, labels = np.empty((corpus.row_count, 0), np.int32), np.full(corpus.text_count, -1, np.int32)
    with_negatives(corpus, folder, none, labels, kept, documents=True)


def with_negatives(
    corpus: Corpus,
    folder: Path,
    chosen: NDArray[np.int32],
    labels: NDArray[np.int32],
    kept: Int64,
    *,
    documents: bool = False,
) -> None:
    """Writes a corpus of the same texts into the empty `folder`, whose rows have further negatives, after their own.

    Args:
        chosen: (R, P) text ids, -1 for none.
        labels: (N,) of texts, -1 for none.
        kept: ascending rows that the new corpus has.
        documents: whether it has the documents too, for negatives that are taken later.
    """
    there = chosen[kept] >= 0
    counts, more = np.diff(corpus.negative_offsets)[kept], there.sum(axis=1)
    arrays = {name: corpus.array(name)[kept] for name in ("anchor", "task", "source", "label", "row_prompts", *WHENCE)}
    for name in ("positive", "negative", "negative_label"):
        bounds = corpus.positive_offsets if name == "positive" else corpus.negative_offsets
        arrays[name] = of_rows(np.asarray(corpus.array(name)), bounds, kept)
    arrays["positive_offsets"] = offsets(np.diff(corpus.positive_offsets)[kept])
    arrays["negative_offsets"] = offsets(counts + more)
    ends, texts = np.repeat(np.cumsum(counts), more), chosen[kept][there]
    arrays["negative"] = np.insert(arrays["negative"], ends, texts).astype(np.int32)
    arrays["negative_label"] = np.insert(arrays["negative_label"], ends, labels[texts]).astype(np.int32)
    arrays |= {name: np.asarray(corpus.array(name)) for name in ("text_offsets", "text_hashes")}
    order = [*ORDER, *WHENCE]
    if corpus.scored:
        arrays["positive_score"] = of_rows(np.asarray(corpus.array("positive_score")), corpus.positive_offsets, kept)
        scores = of_rows(np.asarray(corpus.array("negative_score")), corpus.negative_offsets, kept)
        arrays["negative_score"] = np.insert(scores, ends, np.float32(NAN))
        order += ["positive_score", "negative_score"]
    if documents and len(corpus.documents):
        arrays["documents"] = np.asarray(corpus.documents)
        order.append("documents")
    shutil.copyfile(corpus.folder / TEXTS, folder / TEXTS)
    write_arrays(folder, {name: arrays[name] for name in order}, corpus.tasks, corpus.prompts, corpus.meta)
