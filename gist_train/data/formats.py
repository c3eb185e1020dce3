"""Formats of tables: JSON, CSV, TSV, Parquet and Excel files -> the cells of the fields that a reader asks for.

Every reader streams: a file is never whole in memory, but for one that LlamaIndex saved. Rows count from 1, a CSV header
excluded; in JSONL the row is the line.
"""

import csv
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from itertools import chain
from typing import TYPE_CHECKING, Any
from xml.etree.ElementTree import ParseError
from zipfile import BadZipFile

import ijson  # type: ignore[import-untyped]

from gist_train.config.errors import Fault, UserError, shown
from gist_train.data.tables import (
    BEFORE_JSON,
    READ_BYTES,
    BadRow,
    Columns,
    Field,
    Table,
    TableFile,
    column_of,
    either,
    flat,
    several,
)

if TYPE_CHECKING:
    import pyarrow as pa  # type: ignore[import-untyped]  # slow to import, so only where it is needed
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

ROWS_AT_A_TIME = 4096
"""Rows of a Parquet file or data set that become Python objects at a time."""
CSV_FIELD_CHARACTERS = 1 << 27
"""The module's own limit, 131,072, is less than a long document; without one an unclosed quote would fill the memory."""

LINKS = re.compile(rb'\{\s*"(?:queries|corpus|relevant_docs|mode)"\s*:')
"""How the one object begins in which LlamaIndex saves pairs."""

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
    """The objects of a file of JSON: one a line, the elements of one array, or the pairs of LlamaIndex's one object.

    What Label Studio exports is flattened: the fields of a task, and what its annotator chose.
    """
    with file.open() as lines:
        head = lines.peek().lstrip(BEFORE_JSON)
        if head.startswith(b"["):
            for record in array_elements(file, "an array of objects"):
                yield _annotated(record) if "annotations" in record else record
            return
        if file.suffix == ".json" and LINKS.match(head):
            yield from _linked_pairs(file, lines.read())
            return
        for number, line in enumerate(lines, 1):
            if not line.isspace():
                file.row = number
                yield _json_object(line)


def _annotated(task: dict[Any, Any]) -> dict[Any, Any]:
    """A task of Label Studio's JSON export as one row: its data, and by the control's name what the first annotation says."""
    data, annotations = task.get("data"), task["annotations"]
    if not isinstance(data, dict) or not isinstance(annotations, list):
        return task
    done = (one for one in annotations if isinstance(one, dict) and one.get("result") and not one.get("was_cancelled"))
    chosen: dict[str, object] = {}
    results = next((one["result"] for one in done), None)
    for result in results if isinstance(results, list) else []:
        if not isinstance(result, dict):
            continue
        name, kind, said = result.get("from_name"), result.get("type"), result.get("value")
        if not isinstance(name, str) or not isinstance(kind, str) or not isinstance(said, dict):
            continue
        value = said.get("text" if kind == "textarea" else kind)
        if value is not None:
            chosen[name] = value[0] if isinstance(value, list) and len(value) == 1 else value
    return {**data, **chosen}


def array_elements(file: TableFile, expected: str) -> Iterator[dict[Any, Any]]:
    """The objects of the array that the file is, read as a stream; anything else in it raises UserError."""
    with file.open() as stream:
        head = stream.peek()
        stream.read(len(head) - len(head.lstrip(BEFORE_JSON)))
        try:
            for record in ijson.items(_JsonStream(stream, file, expected), "item", buf_size=READ_BYTES, use_float=True):
                if not isinstance(record, dict):
                    raise file.broken(f"{shown(record)} in the array", expected, "write it as an array of objects")
                file.row += 1
                yield record
        except ijson.JSONError as error:
            fix = "fetch or write it again, in UTF-8; as JSON Lines (.jsonl) it may hold nan and numbers of any size"
            raise file.broken(f"broken JSON: {shown(str(error))}", expected, fix) from error


HALVES = re.compile(rb"\\\\|\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|(\\u[dD][89a-fA-F])")
"""Escapes of JSON: of a backslash, of both halves of a surrogate pair, and, as a group, of a half."""
LONGEST_PAIR = 12
"""Bytes of two escapes."""


class _JsonStream:
    """A stream of JSON in which no escape is half of a surrogate pair: the parser would make a question mark of it."""

    def __init__(self, stream: Any, file: TableFile, expected: str):
        self._stream, self._file, self._expected = stream, file, expected
        self._rest = b""

    def read(self, size: int = -1) -> bytes:
        """The next bytes, as the stream has them."""
        content: bytes = self._stream.read(size)
        seen = self._rest + content
        end = len(seen) - LONGEST_PAIR if content else len(seen)  # an escape that begins behind it may go on in what is next
        self._rest = seen[max(0, end) :]
        for escape in HALVES.finditer(seen):
            if escape.start() >= end:
                break
            if escape[1]:
                found = f"{escape[1].decode()}.., half of a surrogate pair, some lines after row {self._file.row:,}"
                raise self._file.broken(found, self._expected, "write whole characters, in UTF-8")
            if escape.end() > end:
                self._rest = seen[escape.end() :]
        return content


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
        if not isinstance(documents, list):
            yield BadRow(f"relevant_docs of query {shown(name)}", shown(documents), "a list of ids of corpus")
            continue
        lost = next((one for one in documents if not isinstance(one, str) or one not in known), None)
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
        if len(header) == 1 and file.header and not tabs and (other := re.search(r"[;\t|]", header[0])):
            found = f'the header {shown(header[0])}, with "{other[0]}" between the columns'
            expected = "commas between the columns, or tabs in a .tsv file"
            raise file.broken(found, expected, f"save it so, or set delimiter: {json.dumps(other[0])} on its source")
        columns, places = _columns(file, fields, header)
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


def _columns(file: TableFile, fields: Sequence[Field], header: list[str]) -> tuple[Columns, list[int | list[int] | None]]:
    """By field, the column of a table with this header that holds it, and the place or places of that column."""
    columns = column_of(fields, header)
    if header:
        file.refuse_missing(fields, columns, header)
    file.note_unread(fields, columns, header)
    counts = Counter(header)
    read = flat(column for field, column in zip(fields, columns, strict=True) if not field.watched)
    if twice := next((name for name in read if counts[name] > 1), None):
        raise file.broken(f"two columns {shown(twice)}", "each name once", "rename one of them")
    place = {name: number for number, name in enumerate(header)}
    return columns, [None if c is None else place[c] if isinstance(c, str) else [place[name] for name in c] for c in columns]


def xlsx_cells(file: TableFile, fields: Sequence[Field]) -> Iterator[Cells | BadRow]:
    """Cells of a sheet of an Excel workbook. Rows without any cell count for nothing; a formula is what it last came to."""
    with _sheet_of(file) as rows:
        filled = (cells for cells in rows if any(cell is not None for cell in cells))
        first = next(filled, ())
        names = ["" if cell is None else str(cell).strip() for cell in first]
        header = names if file.header else [str(number + 1) for number in range(len(first))]
        columns, places = _columns(file, fields, header)
        for cells in filled if file.header else chain([first] if first else [], filled):
            file.row += 1
            full = [*cells, *[None] * (len(header) - len(cells))]
            yield (
                columns,
                [
                    None if place is None else full[place] if isinstance(place, int) else several(full[p] for p in place)
                    for place in places
                ],
            )


@contextmanager
def _sheet_of(file: TableFile) -> Iterator[Iterator[tuple[Any, ...]]]:
    """The rows of the file's sheet; what its reader raises within the block comes out as UserError."""
    try:
        import openpyxl  # an extra
    except ImportError:
        fix = 'pip install "gist-train[excel]", or save the sheet as CSV'
        raise UserError(Fault(file.label, "no package openpyxl", "the package, which reads .xlsx", fix)) from None
    try:
        with file.open() as stream, closing(openpyxl.load_workbook(stream, read_only=True, data_only=True)) as workbook:
            sheets = [sheet.title for sheet in workbook.worksheets]
            if file.sheet is not None and file.sheet not in sheets:
                raise file.broken(f"the sheets {shown(sheets)}", f"a sheet {shown(file.sheet)}", "correct the key sheet")
            yield workbook.worksheets[0 if file.sheet is None else sheets.index(file.sheet)].iter_rows(values_only=True)
    except (BadZipFile, KeyError, ValueError, OSError, ParseError) as error:
        found = f"Excel's reader refuses it: {shown(str(error))}"
        raise file.broken(found, "an .xlsx workbook", "save it again, or as CSV") from error


def lines_cells(file: TableFile, fields: Sequence[Field]) -> Iterator[Cells | BadRow]:
    """A text file's lines as the cells of the one column that is asked for; blank lines count for nothing."""
    columns: Columns = (fields[0].names[0],)
    with file.open() as lines:
        for number, line in enumerate(lines):
            if not line.strip():
                continue
            file.row += 1
            try:
                yield columns, [line.decode("utf-8" if number else "utf-8-sig").strip()]
            except UnicodeDecodeError:
                yield BadRow("not UTF-8", shown(line[:200]), "a line in UTF-8")


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
    ".xlsx": xlsx_cells,
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
