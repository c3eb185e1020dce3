"""Tables of rows: JSONL, CSV, TSV and Parquet files -> the cells of the fields that a reader asks for.

A bad row comes out as a BadRow; a file that is not what it is said to be raises UserError. Every reader streams: a file is never
whole in memory, but for one that LlamaIndex saved. Rows count from 1, a CSV header excluded; in JSONL the row is the line.
"""

import ast
import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import ijson  # type: ignore[import-untyped]

from gist_train.config.errors import Fault, UserError, shown

if TYPE_CHECKING:
    import pyarrow as pa  # type: ignore[import-untyped]  # slow to import, so only where it is needed
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

A_TEXT = "a non-empty string"
TEXTS = "a non-empty string, or a list of them"
READ_BYTES = 1 << 18
LINKS = re.compile(rb'\{\s*"(?:queries|corpus|relevant_docs|mode)"\s*:')
"""How the one object begins in which LlamaIndex saves pairs."""
ROWS_AT_A_TIME = 4096
"""Rows of a Parquet file or data set that become Python objects at a time."""
CSV_FIELD_CHARACTERS = 1 << 27
"""The module's own limit, 131,072, is less than a long document; without one an unclosed quote would fill the memory."""


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
        self.name = name
        """Task of rows that name none."""
        self.row = 0
        """The last row that was read, bad ones included."""
        self.unread: dict[str, None] = {}
        """Columns that no field takes."""

    def note_unread(self, fields: Sequence[Field], columns: Columns, present: Iterable[str]) -> None:
        """Adds to `unread` what of the columns `present` no field takes."""
        taken = flat([column for field, column in zip(fields, columns, strict=True) if not field.watched])
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
        found = f"the columns {', '.join(map(shown, present)) or '(none)'}"
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
        """Whether the first row of a CSV file names its columns. Without one they are called 1, 2, ..."""
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
        raise table.broken(f"it cannot be read to its end: {error}", "a whole file", "fetch or write it again") from error


def either(names: tuple[str, ...]) -> str:
    """Names as they may follow "expected"."""
    return " or ".join(f'"{name}"' for name in names)


def column_of(fields: Sequence[Field], present: Collection[str]) -> Columns:
    """By field, the column of `present` that holds it, or the numbered columns."""
    columns: list[str | tuple[str, ...] | None] = []
    for field in fields:
        own = next((name for name in field.names if name in present), None)
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
    """One text or a list of them, as `opened` sees it, as a tuple of at least one."""
    value = opened(value)
    if not isinstance(value, list):
        return (text(value, column, TEXTS),)
    if not value:
        raise BadRow(f'"{column}" is empty', "[]", TEXTS)
    return tuple([text(item, f"{column}[{index}]", TEXTS) for index, item in enumerate(value)])


def opened(value: object) -> object:
    """A list that JSON or Python wrote as text, as tables without lists have it, as a list; documents as their texts.

    A document is `{"title": ..., "text": ...}`, as Tevatron has it.
    """
    if isinstance(value, str):
        written = _written_list(value) if value.lstrip().startswith("[") else None
        return value if written is None else written
    return [_document(item) for item in value] if isinstance(value, list) else _document(value)


def _document(value: object) -> object:
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


Cells = tuple[Columns, Sequence[Any]]
"""By field, the column it was found in and its content, a list where there are numbered ones; None where the row has none."""
Reader = Callable[[TableFile, Sequence[Field]], Iterator[Cells | BadRow]]


def jsonl_cells(file: TableFile, fields: Sequence[Field]) -> Iterator[Cells | BadRow]:
    """Cells of a file of JSON: one object a row, rows of unlike keys allowed."""
    nothing: Columns = (None,) * len(fields)
    keys: tuple[str, ...] | None = None
    columns = ever = asked = nothing
    numbered, absent = False, list[None]()
    needed = [index for index, field in enumerate(fields) if field.in_every_row]
    for record in json_records(file):
        if isinstance(record, BadRow):
            yield record
            continue
        if (present := tuple(record)) != keys:
            columns = column_of(fields, present)
            if keys is None:
                file.refuse_missing(fields, columns, present, named_too=False)
            file.note_unread(fields, columns, present)
            numbered = any(isinstance(column, tuple) for column in columns)
            # What is asked for last is mostly not there, and need not be looked up in every row.
            asked = columns[: max((index + 1 for index, column in enumerate(columns) if column is not None), default=0)]
            absent = [None] * (len(columns) - len(asked))
            keys = present
            ever = tuple([old or new for old, new in zip(ever, columns, strict=True)])
        missing = [index for index in needed if columns[index] is None]
        if missing:
            names = fields[missing[0]].names
            yield BadRow(f'"{names[0]}" is missing', f"the keys {shown(list(record))}", either(names))
        elif numbered:
            yield columns, [several(map(record.get, c)) if isinstance(c, tuple) else record.get(c) for c in columns]
        else:
            yield columns, [*map(record.get, asked), *absent]
    if keys is not None:  # a row may lack its negative and task, but no file a column that the config names
        file.refuse_missing(fields, ever, keys)


def json_records(file: TableFile) -> Iterator[dict[Any, Any] | BadRow]:
    """The objects of a file of JSON: one a line, the elements of one array, or the pairs of LlamaIndex's one object."""
    with file.open() as lines:
        head = lines.peek().lstrip(b"\xef\xbb\xbf \t\r\n")
        if head.startswith(b"["):
            yield from array_elements(file, "an array of objects")
            return
        if file.suffix == ".json" and LINKS.match(head):
            yield from _linked_pairs(file, lines.read())
            return
        for number, line in enumerate(lines, 1):
            if not line.isspace():
                file.row = number
                yield _json_object(line)


def array_elements(file: TableFile, expected: str) -> Iterator[dict[Any, Any]]:
    """The objects of the array that the file is, read as a stream; anything else in it raises UserError."""
    with file.open() as stream:
        head = stream.peek()
        stream.read(len(head) - len(head.lstrip(b"\xef\xbb\xbf \t\r\n")))  # ijson refuses a byte-order mark
        try:
            for record in ijson.items(stream, "item", buf_size=READ_BYTES, use_float=True):
                if not isinstance(record, dict):
                    raise file.broken(f"{shown(record)} in the array", expected, "write it as an array of objects")
                file.row += 1
                yield record
        except ijson.JSONError as error:
            raise file.broken(f"broken JSON: {shown(str(error))}", expected, "fetch or write it again, in UTF-8") from error


def _linked_pairs(file: TableFile, content: bytes) -> Iterator[dict[str, object] | BadRow]:
    """Each query of LlamaIndex's file with the documents that belong to it. Such a file is small enough to be read as a whole."""
    try:
        parts = json.loads(content.decode("utf-8-sig"))
        queries, corpus, relevant = parts["queries"], parts["corpus"], parts["relevant_docs"]
        pairs = [(name, query, relevant.get(name, [])) for name, query in queries.items()]
        known = corpus.keys()
    except UnicodeDecodeError:
        raise  # said by read_errors
    except (ValueError, RecursionError, KeyError, AttributeError, TypeError) as error:
        expected = '{"queries": {id: text}, "corpus": {id: text}, "relevant_docs": {id: [ids]}}'
        raise file.broken(
            f"an object that is not so: {shown(str(error))}", expected, "write it again, or as JSON Lines"
        ) from error
    for name, query, documents in pairs:
        file.row += 1
        lost = next((document for document in documents if document not in known), None)
        if lost is not None:
            yield BadRow(f"query {shown(name)} has a document that is not there", shown(lost), "an id of corpus")
        else:
            yield {"query": query, "positive": [corpus[document] for document in documents]}


def _json_object(line: bytes) -> dict[Any, Any] | BadRow:
    try:
        record = json.loads(line.decode().removeprefix("\ufeff"))
    except UnicodeDecodeError:
        return BadRow("not UTF-8", shown(line[:200]), "a JSON object in UTF-8")
    except (ValueError, RecursionError) as error:  # ValueError: also a number of more digits than Python reads
        found = f"{shown(line[:200].decode(errors='replace'))} ({shown(str(error))})"
        return BadRow("not JSON", found, "one JSON object a line")
    return record if isinstance(record, dict) else BadRow("not an object", shown(record), "one JSON object a line")


def csv_cells(file: TableFile, fields: Sequence[Field]) -> Iterator[Cells | BadRow]:
    """Cells of a CSV file with a header, or of a TSV file. Of a field that not every row has, a blank cell is None."""
    csv.field_size_limit(max(csv.field_size_limit(), CSV_FIELD_CHARACTERS))
    with file.open() as lines:
        decoded = (line.decode("utf-8" if number else "utf-8-sig") for number, line in enumerate(lines))
        # A TSV file has no quoting, as everywhere in gist-train.
        tabs = file.suffix == ".tsv" and file.delimiter is None
        if tabs:
            reader = csv.reader(decoded, delimiter="\t", quoting=csv.QUOTE_NONE)
        else:
            reader = csv.reader(decoded, delimiter=file.delimiter or ",", strict=True)
        first = next((cells for cells in reader if cells), [])
        header = [name.strip() for name in first] if file.header else [str(number + 1) for number in range(len(first))]
        ahead = [] if file.header or not first else [first]
        columns = column_of(fields, header)
        if len(header) == 1 and file.header and not tabs and (other := re.search(r"[;\t|]", header[0])):
            found = f'the header {shown(header[0])}, with "{other[0]}" between the columns'
            expected = "commas between the columns, or tabs in a .tsv file"
            raise file.broken(found, expected, f"save it so, or set delimiter: {json.dumps(other[0])} on its source")
        if header:
            file.refuse_missing(fields, columns, header)
        file.note_unread(fields, columns, header)
        if twice := next((name for name in flat(columns) if header.count(name) > 1), None):
            raise file.broken(f"two columns {shown(twice)}", "each name once", "rename one of them")
        places = [
            None if c is None else header.index(c) if isinstance(c, str) else [header.index(name) for name in c] for c in columns
        ]
        optional = [index for index, field in enumerate(fields) if not field.in_every_row]
        while header:
            start = reader.line_num
            try:
                cells = ahead.pop() if ahead else next(reader, None)
            except csv.Error as error:
                # Within one line, the next line is the next row. Over several, a quote has swallowed who knows how many.
                expected = 'quotes that close, and "" for a quote within them'
                if reader.line_num - start > 1:
                    found = f"broken quoting from line {start + 1:,} to {reader.line_num:,}: {error}"
                    raise file.broken(found, expected, f"fix the quotes of line {start + 1:,}") from error
                file.row += 1
                yield BadRow("broken quoting", str(error), expected)
                continue
            if cells is None:
                return
            file.row += 1
            if len(cells) == len(header):
                values: list[Any] = [
                    None if place is None else cells[place] if isinstance(place, int) else several(cells[p] for p in place)
                    for place in places
                ]
                for index in optional:
                    if isinstance(values[index], str) and not values[index].strip():
                        values[index] = None
                yield columns, values
            elif cells:
                yield BadRow("not as many fields as the header", f"{len(cells)}: {shown(cells)}", f"{len(header)} fields")


def parquet_cells(file: TableFile, fields: Sequence[Field]) -> Iterator[Cells | BadRow]:
    """Cells of a Parquet file."""
    with parquet_of(file) as table:
        present = table.schema_arrow.names
        columns = column_of(fields, present)
        file.refuse_missing(fields, columns, present)
        file.note_unread(fields, columns, present)
        yield from arrow_cells(file, table.iter_batches(batch_size=ROWS_AT_A_TIME, columns=flat(columns)), columns)


@contextmanager
def parquet_of(file: TableFile) -> "Iterator[pq.ParquetFile]":
    """The Parquet file, opened; what its reader raises within the block comes out as UserError."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file.path) as table:
            yield table
    # KeyError: two columns of one name; the others: dates and numbers that Python does not have.
    except (pa.ArrowException, OSError, KeyError, ValueError, OverflowError) as error:
        raise file.broken(f"Parquet's reader refuses it: {shown(str(error))}", "Parquet", "write it again") from error


def arrow_cells(table: Table, batches: "Iterable[pa.RecordBatch | pa.Table]", columns: Columns) -> Iterator[Cells]:
    """Cells of Arrow batches, a row at a time."""
    for batch in batches:
        nothing = [None] * batch.num_rows
        lists = [
            nothing
            if column is None
            else batch.column(column).to_pylist()
            if isinstance(column, str)
            else [several(cells) for cells in zip(*(batch.column(name).to_pylist() for name in column), strict=True)]
            for column in columns
        ]
        for cells in zip(*lists, strict=True):
            table.row += 1
            yield columns, cells


READERS: dict[str, Reader] = {
    ".jsonl": jsonl_cells,
    ".json": jsonl_cells,
    ".csv": csv_cells,
    ".tsv": csv_cells,
    ".parquet": parquet_cells,
}
"""By a file's suffix, .gz aside."""


def reader_of(file: TableFile) -> Reader:
    """The reader that the file's name asks for.

    Raises:
        UserError: it ends in none of the endings that are known.
    """
    if file.suffix not in READERS:
        expected = f"a file that ends in {', '.join(READERS)}, or one of these with .gz"
        raise UserError(Fault(file.label, f"the ending {shown(file.suffix)}", expected, "write it in one of these formats"))
    return READERS[file.suffix]
