"""Readers: JSONL, CSV, Parquet and MEDI files -> checked rows.

A bad row comes out as a Fault, for the caller to fail or skip; a file that is not what it is said to be raises UserError.
Every reader streams: a file is never whole in memory. Rows count from 1, a CSV header excluded; in JSONL the row is the line.
"""

import csv
import glob
import gzip
import hashlib
import io
import json
import os
import zlib
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import ijson  # type: ignore[import-untyped]

from gist_train.config.errors import Fault, UserError, shown
from gist_train.config.sources import CsvSource, JsonlSource, MediSource, ParquetSource, Source

Wanted = list[tuple[str, ...]]  # by field, the names its column may have: the one that the config names, or the aliases
Columns = tuple[str | None, ...]  # by field, the column that holds it; None where the file has none
ALIASES = (("anchor", "query"), ("positive", "pos", "positives"), ("negative", "neg", "negatives"), ("task", "task_name"))
A_TEXT = "a non-empty string"
TEXTS = "a non-empty string, or a list of them"
MEDI_TEXT = "[instruction, text], or a non-empty string"
MEDI_FILE = 'an array of objects: [{"query": [instruction, text], "pos": ..., "neg": ..., "task_name": ...}, ...]'
READ_BYTES = 1 << 18
CSV_FIELD_CHARACTERS = 1 << 27
"""The module's own limit, 131,072, is less than a long document; without one an unclosed quote would fill the memory."""


@dataclass(frozen=True, slots=True)
class Row:
    """A checked row: texts are stripped, not empty and can be written as UTF-8."""

    anchor: str
    positives: tuple[str, ...]
    """At least one."""
    negatives: tuple[str, ...]
    """May be empty."""
    task: str
    prompts: tuple[str, str, str]
    """Of anchor, positive and negative; "" for none."""


def files_of(source: Source, where: str) -> list[Path]:
    """The source's files, a glob expanded and sorted; `where` is the source's key, e.g. `data.train[2]`."""
    path = Path(os.path.expanduser(source.path))
    if os.path.isdir(path):  # os.path, for a folder that may not be entered: Path's own raise there
        mend = f"name its files, e.g. {path / '*.jsonl'}"
        raise UserError(Fault(f"{where}.path", f"{shown(str(path))}, a folder", "a file, or a glob of files", mend))
    # A file may have brackets in its name, so the name as it stands comes before the glob.
    files = [path] if os.path.exists(path) else sorted(Path(p) for p in glob.glob(str(path), recursive=True) if os.path.isfile(p))
    if not files:
        found = f"{shown(str(path))}, which matches no file in {Path.cwd()}"
        raise UserError(Fault(f"{where}.path", found, "a file that exists, or a glob that matches one", "correct the path"))
    for path in files:
        if not os.access(path, os.R_OK):
            raise UserError(Fault(f"{where}.path", shown(str(path)), "a file that you may read", "make the file readable"))
    return files


def content_hash(path: Path) -> str:
    """BLAKE2b-128 of the file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def read_rows(source: Source, where: str, *, keep_instructions: bool = False) -> Iterator[Row | Fault]:
    """Rows of all the source's files in order, a bad row as a Fault; UserError where a file is broken."""
    files = files_of(source, where)
    same_name = Counter(path.name for path in files)
    for path in files:
        name = path.name if same_name[path.name] == 1 else str(path)
        file = _File(path, f"{where}: {name}", None if isinstance(source, MediSource) else source.task)
        with _read_errors(file):
            for row in _medi(file, keep_instructions) if isinstance(source, MediSource) else _table(file, source):
                yield row if isinstance(row, Row) else file.fault(row)
        if file.row == 0:
            raise UserError(Fault(file.label, "no rows", "one row or more", "fill the file, or take it out of the path"))


class _BadRow(Exception):  # noqa: N818 - it never leaves this file
    """Raised by the checks of a row, caught where the row is made."""

    def __init__(self, what: str, found: str, allowed: str):
        self.what, self.found, self.allowed = what, found, allowed


class _File:
    """What the rows of one file have in common, and how its faults are said."""

    def __init__(self, path: Path, label: str, task: str | None):
        self.path = path
        self.label = label
        self.task = task
        self.row = 0  # the last that was read, bad ones included
        self.name = path.name[:-3] if path.name.lower().endswith(".gz") else path.name

    def open(self) -> io.BufferedReader:
        # GzipFile's own readline is Python code; behind a BufferedReader lines are cut in C.
        raw = io.FileIO(self.path) if self.name == self.path.name else cast(io.RawIOBase, gzip.GzipFile(self.path))
        return io.BufferedReader(raw, READ_BYTES)

    def task_of(self, value: object, column: str | None) -> str:
        if self.task is not None:
            return self.task
        if value is None or (isinstance(value, str) and not value.strip()):
            return Path(self.name).stem
        return _text(value, column or "task", "a string")

    def fault(self, bad: _BadRow) -> Fault:
        return Fault(
            f"{self.label}, row {self.row:,}: {bad.what}", bad.found, bad.allowed, "drop the row, or set data.on_bad_row: skip"
        )

    def broken(self, found: str, allowed: str, mend: str) -> UserError:
        return UserError(Fault(f"{self.label}, after row {self.row:,}" if self.row else self.label, found, allowed, mend))


@contextmanager
def _read_errors(file: _File) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        raise file.broken(f"the byte {error.object[error.start]:#x}, which is not UTF-8", "UTF-8", "save it as UTF-8") from error
    except (OSError, EOFError, zlib.error, csv.Error) as error:
        raise file.broken(f"it cannot be read to its end: {error}", "a whole file", "fetch or write it again") from error


def _columns(wanted: Wanted, present: Collection[str]) -> Columns:
    return tuple([next((name for name in names if name in present), None) for names in wanted])


def _refuse_missing(file: _File, fields: Iterable[int], columns: Columns, wanted: Wanted, present: Iterable[str]) -> None:
    """UserError with the columns found, where one of the `fields` (their indices) has no column."""
    found = f"the columns {', '.join(map(shown, present)) or '(none)'}"
    faults = []
    for field in fields:
        if columns[field] is None:
            name, allowed = ALIASES[field][0], f"a column {_either(wanted[field])}"
            mend = f"name the right column in columns.{name}, or add it to the file"
            faults.append(Fault(f"{file.label}: no column for {name}", found, allowed, mend))
    if faults:
        raise UserError(*faults)


def _either(names: tuple[str, ...]) -> str:
    return " or ".join(f'"{name}"' for name in names)


def _text(value: object, column: str, allowed: str = A_TEXT) -> str:
    if not isinstance(value, str):
        raise _BadRow(f'"{column}" is not a string', shown(value), allowed)
    text = value.strip()
    if not text:
        raise _BadRow(f'"{column}" is empty', shown(value), allowed)
    if not _encodable(text):
        found = shown(text.encode("utf-8", "backslashreplace").decode())
        raise _BadRow(f'"{column}" holds half of a surrogate pair', found, f"{allowed}, of whole Unicode characters")
    return text


def _encodable(text: str) -> bool:
    """No half of a surrogate pair in it; isascii looks at one bit, so that other scripts alone pay for the test."""
    return text.isascii() or text.encode("utf-8", "ignore").decode() == text


def _texts(value: object, column: str) -> tuple[str, ...]:
    if not isinstance(value, list):
        return (_text(value, column, TEXTS),)
    if not value:
        raise _BadRow(f'"{column}" is empty', "[]", TEXTS)
    return tuple([_text(item, f"{column}[{at}]", TEXTS) for at, item in enumerate(value)])


def _row(file: _File, columns: Columns, prompts: tuple[str, str, str], cells: Iterable[Any]) -> Row | _BadRow:
    """The row of anchor, positive, negative and task as they stand in the file; no negative is None or []."""
    anchor, positive, negative, task = cells
    try:
        return Row(
            _text(anchor, columns[0] or "anchor"),
            _texts(positive, columns[1] or "positive"),
            () if negative is None or negative == [] else _texts(negative, columns[2] or "negative"),
            file.task_of(task, columns[3]),
            prompts,
        )
    except _BadRow as bad:
        return bad


def _table(file: _File, source: JsonlSource | CsvSource | ParquetSource) -> Iterator[Row | _BadRow]:
    given = source.columns
    named = (given.anchor, given.positive, given.negative, given.task) if given else (None,) * 4
    wanted = [aliases if name is None else (name,) for name, aliases in zip(named, ALIASES, strict=True)]
    # What the config names must be there: a slip of the pen would otherwise lose all negatives and say nothing.
    required = [field for field in range(4) if field < 2 or named[field] is not None]
    prompts = (source.prompts.anchor, source.prompts.positive, source.prompts.negative) if source.prompts else ("", "", "")
    read = _jsonl if isinstance(source, JsonlSource) else _csv if isinstance(source, CsvSource) else _parquet
    return read(file, wanted, required, prompts)


def _jsonl(file: _File, wanted: Wanted, required: list[int], prompts: tuple[str, str, str]) -> Iterator[Row | _BadRow]:
    keys: tuple[str, ...] | None = None
    columns = ever = cast(Columns, (None,) * 4)
    with file.open() as lines:
        for number, line in enumerate(lines, 1):
            if line.isspace():
                continue
            file.row = number
            record = _json_object(line)
            if isinstance(record, _BadRow):
                yield record
                continue
            if (present := tuple(record)) != keys:
                columns = _columns(wanted, present)
                if keys is None:
                    _refuse_missing(file, (0, 1), columns, wanted, present)
                keys = present
                ever = tuple([old or new for old, new in zip(ever, columns, strict=True)])
            if None in columns[:2]:
                names = wanted[columns.index(None)]
                yield _BadRow(f'"{names[0]}" is missing', f"the keys {shown(list(record))}", _either(names))
            else:
                yield _row(file, columns, prompts, map(record.get, columns))
    if keys is not None:  # a row may lack its negative and task, but no file a column that the config names
        _refuse_missing(file, required, ever, wanted, keys)


def _json_object(line: bytes) -> dict[Any, Any] | _BadRow:
    try:
        record = json.loads(line.decode().removeprefix("\ufeff"))
    except UnicodeDecodeError:
        return _BadRow("not UTF-8", shown(line[:200]), "a JSON object in UTF-8")
    except (ValueError, RecursionError) as error:  # ValueError: also a number of more digits than Python reads
        found = f"{shown(line[:200].decode(errors='replace'))} ({shown(str(error))})"
        return _BadRow("not JSON", found, "one JSON object a line")
    return record if isinstance(record, dict) else _BadRow("not an object", shown(record), "one JSON object a line")


def _csv(file: _File, wanted: Wanted, required: list[int], prompts: tuple[str, str, str]) -> Iterator[Row | _BadRow]:
    csv.field_size_limit(max(csv.field_size_limit(), CSV_FIELD_CHARACTERS))
    with file.open() as lines:
        decoded = (line.decode("utf-8" if number else "utf-8-sig") for number, line in enumerate(lines))
        # A TSV file has no quoting, as everywhere in gist-train.
        tabs = file.name.lower().endswith(".tsv")
        reader = csv.reader(decoded, delimiter="\t", quoting=csv.QUOTE_NONE) if tabs else csv.reader(decoded, strict=True)
        header = [name.strip() for name in next((cells for cells in reader if cells), [])]
        columns = _columns(wanted, header)
        if header:
            _refuse_missing(file, required, columns, wanted, header)
        at = [None if name is None else header.index(name) for name in columns]
        while header:
            start = reader.line_num
            try:
                cells = next(reader, None)
            except csv.Error as error:
                # Within one line, the next line is the next row. Over several, a quote has swallowed who knows how many.
                allowed = 'quotes that close, and "" for a quote within them'
                if reader.line_num - start > 1:
                    found = f"broken quoting from line {start + 1:,} to {reader.line_num:,}: {error}"
                    raise file.broken(found, allowed, f"mend the quotes of line {start + 1:,}") from error
                file.row += 1
                yield _BadRow("broken quoting", str(error), allowed)
                continue
            if cells is None:
                return
            file.row += 1
            if len(cells) == len(header):
                anchor, positive, negative, task = [None if index is None else cells[index] for index in at]
                negative = negative if negative and not negative.isspace() else None
                yield _row(file, columns, prompts, (anchor, positive, negative, task))
            elif cells:
                yield _BadRow("not as many fields as the header", f"{len(cells)}: {shown(cells)}", f"{len(header)} fields")


def _parquet(file: _File, wanted: Wanted, required: list[int], prompts: tuple[str, str, str]) -> Iterator[Row | _BadRow]:
    import pyarrow as pa  # type: ignore[import-untyped]  # slow to import, so only where it is needed
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    try:
        with pq.ParquetFile(file.path) as table:
            present = table.schema_arrow.names
            columns = _columns(wanted, present)
            _refuse_missing(file, required, columns, wanted, present)
            needed = [name for name in columns if name is not None]
            for batch in table.iter_batches(batch_size=4096, columns=needed):
                nothing = [None] * batch.num_rows
                lists = [nothing if name is None else batch.column(name).to_pylist() for name in columns]
                for cells in zip(*lists, strict=True):
                    file.row += 1
                    yield _row(file, columns, prompts, cells)
    except (pa.ArrowException, OSError, KeyError) as error:  # KeyError: two columns of one name
        raise file.broken(f"Parquet's reader refuses it: {shown(str(error))}", "Parquet", "write it again") from error


def _medi(file: _File, keep_instructions: bool) -> Iterator[Row | _BadRow]:
    with file.open() as stream:
        head = stream.peek()
        body = head.lstrip(b"\xef\xbb\xbf \t\r\n")  # a byte-order mark, which ijson refuses, and white space
        if not body:
            return
        if not body.startswith(b"["):  # of an object ijson would read what stands under a key "item"
            begin = shown(body[:40].decode(errors="replace"))
            raise file.broken(f"it begins with {begin}", MEDI_FILE, "write it as one array, or as lines under source: jsonl")
        stream.read(len(head) - len(body))
        try:
            for record in ijson.items(stream, "item", buf_size=READ_BYTES):
                if not isinstance(record, dict):
                    raise file.broken(f"{shown(record)} in the array", MEDI_FILE, "write it as an array of objects")
                file.row += 1
                yield _medi_row(file, record, keep_instructions)
        except ijson.JSONError as error:
            raise file.broken(f"broken JSON: {shown(str(error))}", MEDI_FILE, "fetch or write it again, in UTF-8") from error


def _medi_row(file: _File, record: dict[str, Any], keep_instructions: bool) -> Row | _BadRow:
    try:
        pairs = [_pair(record, "query"), _pair(record, "pos")]
        if record.get("neg") not in (None, []):
            pairs.append(_pair(record, "neg"))
        task = file.task_of(record.get("task_name"), "task_name")
    except _BadRow as bad:
        return bad
    (anchor_prompt, anchor), (positive_prompt, positive), *negative = pairs
    prompts = (anchor_prompt, positive_prompt, negative[0][0] if negative else "") if keep_instructions else ("", "", "")
    return Row(anchor, (positive,), tuple([text for _, text in negative]), task, prompts)


def _pair(record: dict[str, Any], key: str) -> tuple[str, str]:
    """Instruction as written and text of `[instruction, text]`, `[instruction, text, 0]` or a text alone."""
    if key not in record:
        raise _BadRow(f'"{key}" is missing', f"the keys {shown(list(record))}", MEDI_TEXT)
    value = record[key]
    if isinstance(value, str):
        return "", _text(value, key, MEDI_TEXT)
    if not isinstance(value, list) or len(value) not in (2, 3) or (len(value) == 3 and isinstance(value[2], str)):
        raise _BadRow(f'"{key}" is no pair', shown(value), MEDI_TEXT)
    instruction = value[0]
    if not isinstance(instruction, str) or not _encodable(instruction):
        raise _BadRow(f'the instruction of "{key}" is not a string', shown(instruction), MEDI_TEXT)
    return instruction, _text(value[1], key, MEDI_TEXT)
