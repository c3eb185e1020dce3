"""Readers of evaluation tasks: the user's files -> checked texts, scores, labels and judgements.

Rows count from 1 in messages, a header excluded; in JSONL the row is the line. Texts, labels and ids are stripped.
"""

import csv
import gzip
import json
import math
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from gist_train.config.errors import Fault, shown
from gist_train.config.evaluation import ClassificationTask, RetrievalTask, StsTask
from gist_train.data.tables import CSV_FIELD_CHARACTERS, BadRow, text

FAULTS_PER_FILE = 10
"""Bad rows told of one file; of the others the number."""
A_NUMBER = "a finite number"
AN_ID = "a non-empty string or a whole number"
Record: TypeAlias = dict[str, object]
Made = TypeVar("Made")


@dataclass(frozen=True, slots=True)
class LoadedSts:
    """N pairs of texts with a human score each."""

    name: str
    texts1: tuple[str, ...]
    texts2: tuple[str, ...]
    scores: NDArray[np.float64]
    """(N,), in the file's own unit, not all the same."""


@dataclass(frozen=True, slots=True)
class LoadedRetrieval:
    """Queries that have a relevant document, and all documents."""

    name: str
    queries: tuple[str, ...]
    documents: tuple[str, ...]
    """Title, space, text; at least two."""
    judgements: tuple[dict[int, float], ...]
    """Per query: index of a document -> its judgement, above 0. What is not here counts 0."""


@dataclass(frozen=True, slots=True)
class LoadedClassification:
    """The rows a classifier may be fitted on and those it is judged on."""

    name: str
    train_texts: tuple[str, ...]
    train_labels: NDArray[np.int64]
    """(rows of train,), labels numbered from 0 as they first appear; two different ones at least."""
    test_texts: tuple[str, ...]
    test_labels: NDArray[np.int64]
    """(rows of test,), the same numbers; a label that train has not has a number of its own."""
    per_class: int | None
    """Rows of train that are drawn of each class; None = all."""


LoadedTask: TypeAlias = LoadedSts | LoadedRetrieval | LoadedClassification


class _File:
    """One file of a task, and how its faults are said."""

    def __init__(self, path: Path, label: str, faults: list[Fault]):
        self.path = path
        self.label = label
        self.faults = faults
        self.bad_rows = 0
        self.to_the_end = False
        """Whether all rows were read, good and bad: only then can other files be held against it."""

    @property
    def clean(self) -> bool:
        return self.to_the_end and self.bad_rows == 0

    def fault(self, found: str, allowed: str, mend: str, *, what: str = "") -> None:
        self.faults.append(Fault(self.label + what, found, allowed, mend))

    def read(self, columns: Sequence[str], make: Callable[[Record], Made], *, rename: str = "") -> list[Made]:
        """What `make` makes of each good row. A row it raises BadRow on, and all that is wrong with the file, becomes a fault.

        `rename` is what to do about a missing column, besides adding it."""
        made, row = list[Made](), 0
        kind = Path(self.path.name.lower().removesuffix(".gz")).suffix
        if kind not in _READERS:
            self.fault(shown(self.path.name), "a name that ends in .jsonl, .csv or .tsv, or in one of these and .gz", "rename it")
            return made
        try:
            for row, record in _READERS[kind](self._lines()):
                if isinstance(record, BadRow):
                    self._bad(row, record)
                    continue
                missing = [column for column in columns if column not in record]
                if missing and not made and not self.bad_rows:  # the first row: the whole file is of another form
                    mend = f"{rename}, or add it to the file" if rename else "add it to the file"
                    for column in missing:
                        self.fault(f"the columns {_names(record)}", f'a column "{column}"', mend, what=f': no column "{column}"')
                    return made
                try:
                    if missing:
                        raise BadRow(f'"{missing[0]}" is missing', f"the keys {_names(record)}", _names(columns))
                    made.append(make(record))
                except BadRow as bad:
                    self._bad(row, bad)
        except FileNotFoundError:
            self.fault(f"{shown(str(self.path))}, which is no file in {Path.cwd()}", "a file that exists", "correct the path")
        except IsADirectoryError:
            self.fault(f"{shown(str(self.path))}, a folder", "a file", "name the file")
        except (OSError, EOFError, zlib.error, UnicodeDecodeError, csv.Error) as error:
            found, what = f"it cannot be read to its end: {shown(str(error))}", f", after row {row:,}" if row else ""
            self.fault(found, "a whole file in UTF-8", "make it readable, or fetch or write it again", what=what)
        else:
            self.to_the_end = row > 0
            if row == 0:
                self.fault("no rows", "one row or more", "fill the file")
        if self.bad_rows > FAULTS_PER_FILE:
            self.fault(f"{self.bad_rows - FAULTS_PER_FILE:,} more bad rows", "rows as above", "mend or drop these too")
        return made

    def _lines(self) -> IO[str]:
        # newline="": csv wants line ends as they are, and in JSONL only \n, \r and \r\n end a line, never U+2028.
        if self.path.name.lower().endswith(".gz"):
            return gzip.open(self.path, "rt", encoding="utf-8-sig", newline="")
        return self.path.open(encoding="utf-8-sig", newline="")

    def _bad(self, row: int, bad: BadRow) -> None:
        self.bad_rows += 1
        if self.bad_rows <= FAULTS_PER_FILE:
            self.fault(bad.found, bad.allowed, "mend the row or drop it", what=f", row {row:,}: {bad.what}")


def _names(names: Iterable[str]) -> str:
    return ", ".join(map(shown, names)) or "(none)"


def _jsonl_rows(lines: IO[str]) -> Iterator[tuple[int, Record | BadRow]]:
    with lines:
        for number, line in enumerate(lines, 1):
            if line.isspace():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:  # ValueError: also a number of more digits than Python reads
                yield number, BadRow("not JSON", f"{shown(line)} ({error})", "one JSON object a line")
                continue
            if isinstance(record, dict):
                yield number, record
            else:
                yield number, BadRow("not an object", shown(record), "one JSON object a line")


def _table_rows(lines: IO[str], **dialect: Any) -> Iterator[tuple[int, Record | BadRow]]:
    csv.field_size_limit(max(csv.field_size_limit(), CSV_FIELD_CHARACTERS))
    with lines:
        rows = (cells for cells in csv.reader(lines, **dialect) if cells)
        header = [name.strip() for name in next(rows, [])]
        for number, cells in enumerate(rows, 1):
            if len(cells) == len(header):
                # Reversed: of two columns of one name, the first counts.
                yield number, dict(zip(header[::-1], cells[::-1], strict=True))
            else:
                yield (
                    number,
                    BadRow("not as many fields as the header", f"{len(cells)}: {shown(cells)}", f"{len(header)} fields"),
                )


_READERS: dict[str, Callable[[IO[str]], Iterator[tuple[int, Record | BadRow]]]] = {
    ".jsonl": _jsonl_rows,
    ".csv": partial(_table_rows, strict=True),
    # A quote in a TSV file is a quote: STS-B has lines that open one and never close it.
    ".tsv": partial(_table_rows, delimiter="\t", quoting=csv.QUOTE_NONE),
}


def _id(value: object, column: str) -> str:
    """A label or an id. A whole number is its digits, so that JSONL's 7 is CSV's 7."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else text(value, column, AN_ID)


def _number(value: object, column: str) -> float:
    try:
        number = float(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise BadRow(f'"{column}" is not a number', shown(value), A_NUMBER)
    return number


def read_sts(task: StsTask, where: str, faults: list[Fault]) -> LoadedSts | None:
    path, columns = Path(os.path.expanduser(task.path)), task.columns
    file = _File(path, f"{where}: {path.name}", faults)

    def pair(row: Record) -> tuple[str, str, float]:
        text1, text2 = text(row[columns.text1], columns.text1), text(row[columns.text2], columns.text2)
        return text1, text2, _number(row[columns.score], columns.score)

    wanted = (columns.text1, columns.text2, columns.score)
    pairs = file.read(wanted, pair, rename="name the right columns under columns: text1, text2, score")
    if not file.clean:
        return None
    texts1, texts2, scores = zip(*pairs, strict=True)
    if min(scores) == max(scores):
        found, mend = f"{scores[0]:g} in each of {len(scores):,} rows", "check the column: a correlation needs scores that differ"
        file.fault(found, "two different scores or more", mend, what=f": {columns.score}")
    return LoadedSts(task.name, texts1, texts2, np.array(scores))


def read_classification(task: ClassificationTask, where: str, faults: list[Fault]) -> LoadedClassification | None:
    paths, columns = [Path(os.path.expanduser(path)) for path in (task.train, task.test)], task.columns
    same_name = paths[0].name == paths[1].name
    train, test = [_File(path, f"{where}: {path if same_name else path.name}", faults) for path in paths]
    numbers: dict[str, int] = {}

    def labelled(row: Record) -> tuple[str, int]:
        label = _id(row[columns.label], columns.label)
        return text(row[columns.text], columns.text), numbers.setdefault(label, len(numbers))

    wanted, rename = (columns.text, columns.label), "name the right columns under columns: text, label"
    train_rows = train.read(wanted, labelled, rename=rename)
    if train.clean and len(numbers) < 2:  # before test is read, which may bring labels of its own
        found, what = f"only {shown(next(iter(numbers)))}", f": {columns.label}"
        train.fault(found, "two different labels or more", "add rows of another class", what=what)
    test_rows = test.read(wanted, labelled, rename=rename)
    if not (train.clean and test.clean):
        return None
    texts, labels = zip(*train_rows, strict=True)
    test_texts, test_labels = zip(*test_rows, strict=True)
    return LoadedClassification(task.name, texts, np.array(labels), test_texts, np.array(test_labels), task.per_class)


def read_retrieval(task: RetrievalTask, where: str, faults: list[Fault]) -> LoadedRetrieval | None:
    folder = Path(os.path.expanduser(task.path))
    if not folder.is_dir():
        found = f"{shown(str(folder))}, which is {'a file' if folder.exists() else f'no folder in {Path.cwd()}'}"
        faults.append(Fault(f"{where}: path", found, "a folder that exists", "correct the path"))
        return None
    # The flat names first: they belong to one split.
    corpus = _part(folder, ("corpus.jsonl",), where, faults)
    queries = _part(folder, (f"queries.{task.split}.jsonl", "queries.jsonl"), where, faults)
    qrels = _part(folder, (f"qrels.{task.split}.tsv", f"qrels/{task.split}.tsv"), where, faults)
    documents: dict[str, str] = {}
    asked: dict[str, str] = {}

    def document(row: Record) -> None:
        # The id stands even where the text is bad, so that its judgements are not called unknown as well.
        at = _new_id(row, documents)
        # Title or text may be empty, as in several of BEIR's corpora, but not both.
        filled = [column for column in ("title", "text") if str(row.get(column) or "").strip()]
        documents[at] = " ".join(text(row[column], column) for column in filled or ["text"])

    def query(row: Record) -> None:
        at = _new_id(row, asked)
        asked[at] = text(row["text"], "text")

    if corpus:
        corpus.read(("_id", "text"), document)
        if corpus.clean and len(documents) < 2:
            corpus.fault("one document", "two documents or more", "a ranking needs documents to rank: add some")
    if queries:
        queries.read(("_id", "text"), query)
    whole = corpus is not None and corpus.to_the_end and queries is not None and queries.to_the_end
    if qrels is None:
        return None
    judged = _judgements(qrels, asked if whole else None, documents if whole else None)
    if not (whole and qrels.clean and judged):
        return None
    index = {at: number for number, at in enumerate(documents)}
    judgements = tuple({index[at]: judgement for at, judgement in of.items()} for of in judged.values())
    return LoadedRetrieval(task.name, tuple(asked[at] for at in judged), tuple(documents.values()), judgements)


def _judgements(qrels: _File, queries: dict[str, str] | None, documents: dict[str, str] | None) -> dict[str, dict[str, float]]:
    """Query id -> document id -> judgement, those above 0 only. Ids are held against `queries` and `documents` where given."""
    said: dict[tuple[str, str], float] = {}

    def judgement(row: Record) -> None:
        pair = _id(row["query-id"], "query-id"), _id(row["corpus-id"], "corpus-id")
        for at, column, known in zip(pair, ("query-id", "corpus-id"), (queries, documents), strict=True):
            if known is not None and at not in known:
                kind = "query" if column == "query-id" else "document"
                raise BadRow(f'"{column}" is unknown', shown(at), f"the _id of a {kind}")
        score = _number(row["score"], "score")
        if said.setdefault(pair, score) != score:
            raise BadRow("a pair that was judged before", f"{score:g}, {said[pair]:g} before", "one judgement of a pair")

    qrels.read(("query-id", "corpus-id", "score"), judgement)
    judged: dict[str, dict[str, float]] = {}
    for (query, document), score in said.items():
        if score > 0:
            judged.setdefault(query, {})[document] = score
    if qrels.clean and not judged:
        qrels.fault("no score above 0", "one relevant document or more", "check the column", what=": score")
    return judged


def _part(folder: Path, names: Sequence[str], where: str, faults: list[Fault]) -> _File | None:
    """The first that exists of `names` in the folder, each as it is or with .gz."""
    for name in [name + ending for name in names for ending in ("", ".gz")]:
        if (folder / name).is_file():
            return _File(folder / name, f"{where}: {name}", faults)
    there = sorted(str(path.relative_to(folder)) for path in (*folder.glob("*"), *folder.glob("qrels/*")) if path.is_file())
    found = f"{shown(str(folder))} with {_names(there[:20])}"
    allowed = f"{' or '.join(names)}, or one of these with .gz"
    faults.append(Fault(f"{where}: no {names[0]}", found, allowed, "add the file, or correct the path or the split"))
    return None


def _new_id(row: Record, known: dict[str, str]) -> str:
    at = _id(row["_id"], "_id")
    if at in known:
        raise BadRow('"_id" was there before', shown(at), "each _id once")
    known[at] = ""
    return at
