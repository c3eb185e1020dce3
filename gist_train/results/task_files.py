"""Files of evaluation tasks, JSONL, CSV or TSV, plain or .gz, read row by row with their faults told by row.

Rows count from 1 in messages, a header excluded; in JSONL the row is the line. Texts, labels and ids are stripped.
"""

import csv
import gzip
import json
import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any, TypeAlias, TypeVar

from gist_train.config.errors import Fault, shown
from gist_train.data.tables import CSV_FIELD_CHARACTERS, BadRow, text

FAULTS_PER_FILE = 10
"""Bad rows told of one file; of the others the number."""
A_NUMBER = "a finite number"
AN_ID = "a non-empty string or a whole number"
Record: TypeAlias = dict[str, object]
Made = TypeVar("Made")


class TaskFile:
    """One file of a task, and how its faults are said.

    Args:
        label: how messages call it.
        faults: where its faults are added.
    """

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

    def fault(self, found: str, expected: str, fix: str, *, what: str = "") -> None:
        self.faults.append(Fault(self.label + what, found, expected, fix))

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
                    fix = f"{rename}, or add it to the file" if rename else "add it to the file"
                    for column in missing:
                        self.fault(f"the columns {quoted(record)}", f'a column "{column}"', fix, what=f': no column "{column}"')
                    return made
                try:
                    if missing:
                        raise BadRow(f'"{missing[0]}" is missing', f"the keys {quoted(record)}", quoted(columns))
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
            self.fault(f"{self.bad_rows - FAULTS_PER_FILE:,} more bad rows", "rows as above", "fix or drop these too")
        return made

    def _lines(self) -> IO[str]:
        # newline="": csv wants line ends as they are, and in JSONL only \n, \r and \r\n end a line, never U+2028.
        if self.path.name.lower().endswith(".gz"):
            return gzip.open(self.path, "rt", encoding="utf-8-sig", newline="")
        return self.path.open(encoding="utf-8-sig", newline="")

    def _bad(self, row: int, bad: BadRow) -> None:
        self.bad_rows += 1
        if self.bad_rows <= FAULTS_PER_FILE:
            self.fault(bad.found, bad.expected, "fix the row or drop it", what=f", row {row:,}: {bad.what}")


def quoted(names: Iterable[str]) -> str:
    return ", ".join(map(shown, names)) or "(none)"


def _jsonl_rows(lines: IO[str]) -> Iterator[tuple[int, Record | BadRow]]:
    with lines:
        for at, line in enumerate(lines, 1):
            if line.isspace():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:  # ValueError: also a number of more digits than Python reads
                yield at, BadRow("not JSON", f"{shown(line)} ({error})", "one JSON object a line")
                continue
            if isinstance(record, dict):
                yield at, record
            else:
                yield at, BadRow("not an object", shown(record), "one JSON object a line")


def _table_rows(lines: IO[str], **dialect: Any) -> Iterator[tuple[int, Record | BadRow]]:
    csv.field_size_limit(max(csv.field_size_limit(), CSV_FIELD_CHARACTERS))
    with lines:
        rows = (cells for cells in csv.reader(lines, **dialect) if cells)
        header = [name.strip() for name in next(rows, [])]
        for at, cells in enumerate(rows, 1):
            if len(cells) == len(header):
                # Reversed: of two columns of one name, the first counts.
                yield at, dict(zip(header[::-1], cells[::-1], strict=True))
            else:
                yield (
                    at,
                    BadRow("not as many fields as the header", f"{len(cells)}: {shown(cells)}", f"{len(header)} fields"),
                )


_READERS: dict[str, Callable[[IO[str]], Iterator[tuple[int, Record | BadRow]]]] = {
    ".jsonl": _jsonl_rows,
    ".csv": partial(_table_rows, strict=True),
    # A quote in a TSV file is a quote: STS-B has lines that open one and never close it.
    ".tsv": partial(_table_rows, delimiter="\t", quoting=csv.QUOTE_NONE),
}


def identifier(value: object, column: str) -> str:
    """A label or an id. A whole number is its digits, so that JSONL's 7 is CSV's 7. BadRow on anything else."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else text(value, column, AN_ID)


def number(value: object, column: str) -> float:
    """A finite number, written as one or as text. BadRow on anything else."""
    try:
        found = float(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        found = math.nan
    if not math.isfinite(found):
        raise BadRow(f'"{column}" is not a number', shown(value), A_NUMBER)
    return found


def zero_or_one(value: object, column: str) -> bool:
    """Whether a pair belongs together."""
    match str(value).strip().lower():
        case "1" | "1.0" | "true":
            return True
        case "0" | "0.0" | "false":
            return False
    raise BadRow(f'"{column}" is neither 1 nor 0', shown(value), "1 where the texts belong together, else 0")
