"""What all tables of rows have in common: fields that are asked for, columns that hold them, texts, and how faults are said.

A bad row is a BadRow; a file that is not what it is said to be raises UserError.
"""

import ast
import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import cast

from gist_train.config.errors import Fault, UserError, listed, shown
from gist_train.config.secrets import hidden

A_TEXT = "a non-empty string"
TEXTS = "a non-empty string, or a list of them"
READ_BYTES = 1 << 18
BEFORE_JSON = b"\xef\xbb\xbf \t\r\n"
"""A byte-order mark, which ijson refuses, and white space."""


@dataclass(frozen=True, slots=True)
class Field:
    """One thing that a reader asks of every row."""

    key: str | None
    """Its name under `columns:` in the YAML; None where no YAML can name its column."""
    names: tuple[str, ...]
    """Columns that may hold it: the first that is there does."""
    in_every_row: bool
    named: bool
    """Whether the YAML names its column: then the table must have it."""
    numbered: re.Pattern[str] | None = None
    """Further columns of such a name belong to it, as negative_1, negative_2: its cell is then the list of what they hold."""
    watched: bool = False
    """Whether it is only looked at, and no part of a row."""


Columns = tuple[str | tuple[str, ...] | None, ...]
"""By field, the column that holds it, or the numbered columns; None where there is none."""


class BadRow(Exception):  # noqa: N818 - raised by the checks of a row, caught where the row is made
    """Why a row can't be used."""

    def __init__(self, what: str, found: str, expected: str):
        self.what, self.found, self.expected = what, found, expected


class Table:
    """What the rows of one file or data set have in common, and how its faults are said."""

    def __init__(self, label: str, name: str):
        self.label = label
        self.name = hidden(name)
        """Task of rows that name none."""
        self.place = 0
        """Which of its source's files it is, counted from 0 in their order."""
        self.row = 0
        """The last row that was read, bad ones included."""
        self.unread: dict[str, None] = {}
        """Columns that no field takes."""

    def note_unread(self, fields: Sequence[Field], columns: Columns, present: Iterable[str]) -> None:
        """Adds to `unread` what of the columns `present` no field takes."""
        taken = {*flat([column for field, column in zip(fields, columns, strict=True) if not field.watched])}
        self.unread.update(dict.fromkeys(name for name in present if name not in taken and encodable(name)))

    def fault(self, bad: BadRow) -> Fault:
        """A bad row in the user's words."""
        return Fault(
            f"{self.label}, row {self.row:,}: {bad.what}", bad.found, bad.expected, "drop the row, or set data.on_bad_row: skip"
        )

    def broken(self, found: str, expected: str, fix: str) -> UserError:
        """The whole table can't be used, or not from here on."""
        return UserError(Fault(f"{self.label}, after row {self.row:,}" if self.row else self.label, found, expected, fix))

    def refuse_missing(
        self, fields: Sequence[Field], columns: Columns, present: Iterable[str], *, named_too: bool = True
    ) -> None:
        """UserError with the columns found, where a field that must have one has none.

        What the YAML names must be there: a slip of the pen would otherwise lose all negatives and say nothing.
        """
        present = list(present)
        found = f"the columns {listed(map(shown, present))}"
        faults = []
        for field, column in zip(fields, columns, strict=True):
            if column is None and (field.in_every_row or (field.named and named_too)):
                missing, fix = f"no column {either(field.names)}", "add it to the file"
                if field.key is not None:
                    missing, fix = f"no column for {field.key}", f"name the right column in columns.{field.key}, or {fix}"
                if close := get_close_matches(field.names[0], present, 1):
                    fix = f"did you mean {shown(close[0])}? Else {fix}"
                faults.append(Fault(f"{self.label}: {missing}", found, f"a column {either(field.names)}", fix))
        if faults:
            raise UserError(*faults)


class TableFile(Table):
    """A table that is a file, plain or .gz."""

    def __init__(self, path: Path, label: str):
        plain = path.name[:-3] if path.name.lower().endswith(".gz") else path.name
        super().__init__(label, Path(plain).stem)
        self.path = path
        self.delimiter: str | None = None
        """Between the columns of a CSV file; None for a comma, or a tab in a .tsv file."""
        self.header = True
        """Whether the first row of a CSV file or sheet names its columns. Without one they are called 1, 2, ..."""
        self.sheet: str | None = None
        """Of an Excel workbook; None for its first one."""
        self.suffix = Path(plain).suffix.lower()
        self._gzip = plain != path.name

    def open(self) -> io.BufferedReader:
        """The file's bytes, decompressed."""
        # GzipFile's own readline is Python code; behind a BufferedReader lines are cut in C.
        raw = cast(io.RawIOBase, gzip.GzipFile(self.path)) if self._gzip else io.FileIO(self.path)
        return io.BufferedReader(raw, READ_BYTES)


@contextmanager
def read_errors(table: Table) -> Iterator[None]:
    """Turns what a broken file raises into UserError."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise table.broken(f"the byte {error.object[error.start]:#x}, which is not UTF-8", "UTF-8", "save it as UTF-8") from error
    except (OSError, EOFError, zlib.error, csv.Error) as error:
        if isinstance(error, csv.Error) and "new-line character" in str(error):
            found, fix = "lines that end in a carriage return alone", "save it with the line ends of Unix or Windows"
            raise table.broken(found, r"lines that end in \n or \r\n", fix) from error
        raise table.broken(f"it cannot be read to its end: {error}", "a whole file", "fetch or write it again") from error


def either(names: tuple[str, ...]) -> str:
    """Names as they may follow "expected"."""
    return " or ".join(f'"{name}"' for name in names)


def column_of(fields: Sequence[Field], present: Collection[str]) -> Columns:
    """By field, the column of `present` that holds it, or the numbered columns."""
    columns: list[str | tuple[str, ...] | None] = []
    known = frozenset(present)  # tables of 100,000 columns are about
    for field in fields:
        own = next((name for name in field.names if name in known), None)
        numbered = [name for name in present if field.numbered.fullmatch(name)] if field.numbered is not None else []
        if numbered:
            numbered.sort(key=lambda name: [int(digits) for digits in re.findall(r"\d+", name)])
            columns.append((*([] if own is None else [own]), *numbered))
        else:
            columns.append(own)
    return tuple(columns)


def flat(columns: Iterable[str | tuple[str, ...] | None]) -> list[str]:
    """The names of all of these columns."""
    return [name for column in columns if column is not None for name in ((column,) if isinstance(column, str) else column)]


def several(values: Iterable[object]) -> list[object]:
    """What numbered columns hold in one row, empty ones left out; the elements of those that are lists."""
    found: list[object] = []
    for value in values:
        if isinstance(value, list):
            found += value
        elif value is not None and not (isinstance(value, str) and not value.strip()):
            found.append(value)
    return found


def text(value: object, column: str, expected: str = A_TEXT) -> str:
    """`value` stripped; BadRow where it is no text, empty, or can't be written as UTF-8."""
    if not isinstance(value, str):
        raise BadRow(f'"{column}" is not a string', shown(value), expected)
    stripped = value.strip()
    if not stripped:
        raise BadRow(f'"{column}" is empty', shown(value), expected)
    if not encodable(stripped):
        found = shown(stripped.encode("utf-8", "backslashreplace").decode())
        raise BadRow(f'"{column}" holds half of a surrogate pair', found, f"{expected}, of whole Unicode characters")
    return stripped


def encodable(value: str) -> bool:
    """No half of a surrogate pair in it; isascii looks at one bit, so that other scripts alone pay for the test."""
    return value.isascii() or value.encode("utf-8", "ignore").decode() == value


def texts(value: object, column: str) -> tuple[str, ...]:
    """One text or a list of them, as `content_of` sees it, as a tuple of at least one."""
    value = content_of(value)
    if not isinstance(value, list):
        return (text(value, column, TEXTS),)
    if not value:
        raise BadRow(f'"{column}" is empty', "[]", TEXTS)
    return tuple([text(item, f"{column}[{index}]", TEXTS) for index, item in enumerate(value)])


def content_of(value: object) -> object:
    """A list that JSON or Python wrote as text, as tables without lists have it, as a list; documents as their texts.

    A document is `{"title": ..., "text": ...}`, as Tevatron has it.
    """
    if isinstance(value, str):
        written = _written_list(value) if value.lstrip().startswith("[") else None
        return value if written is None else written
    return [document_text(item) for item in value] if isinstance(value, list) else document_text(value)


def document_text(value: object) -> object:
    """The text of a document, after its title where it has one; anything else as it is."""
    if not isinstance(value, dict) or not isinstance(value.get("text"), str):
        return value
    title = value.get("title")
    return f"{title} {value['text']}" if isinstance(title, str) and title.strip() else value["text"]


def _written_list(value: str) -> list[object] | None:
    """The list of texts that JSON or Python wrote as `value`; None where it is a text that begins with a bracket."""
    for read in (json.loads, ast.literal_eval):
        try:
            written = read(value.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if isinstance(written, list) and written and all(isinstance(item, str) for item in written):
            return written
    return None
