"""Files of evaluation tasks: JSONL, CSV, TSV or Parquet, read as training files are, with all faults of all of them at once.

Rows count from 1 in messages, a header excluded; in JSONL the row is the line. Texts, labels and ids are stripped.
"""

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias, TypeVar

from gist_train.config.errors import Fault, UserError, listed, shown
from gist_train.config.evaluation import FileTask, LabelColumns, ReadTask
from gist_train.data.formats import reader_of
from gist_train.data.rows import ALIASES
from gist_train.data.tables import BadRow, Field, TableFile, read_errors, text

logger = logging.getLogger(__name__)

FAULTS_PER_FILE = 10
"""Bad rows named of one file; of the others the number."""
SYNONYMS = {
    **{(key, key): names[1:] for key, names in ALIASES.items()},
    ("text1", "sentence1"): ("text1", "question1"),
    ("text2", "sentence2"): ("text2", "question2"),
    ("score", "score"): ("similarity", "similarity_score"),
    ("label", "label"): ("is_duplicate", "intent", "category"),
}
"""Columns that are taken too where the config names none and the usual one is not there; by key and usual column."""
A_NUMBER = "a finite number"
AN_ID = "a non-empty string or a whole number"
Record: TypeAlias = dict[str, object]
Made = TypeVar("Made")


class TaskFile:
    """One file of a task, and how its faults are said.

    Args:
        label: how messages call it.
        faults: where its faults are added.
        task: says how its rows are written, and whether bad ones are left out.
    """

    def __init__(self, path: Path, label: str, faults: list[Fault], task: ReadTask):
        self.path = path
        self.label = label
        self.faults = faults
        self.task = task
        self.bad_rows = 0
        self.to_the_end = False
        """Whether all rows were read, good and bad: only then can other files be compared with it."""
        self.clean = False
        """Whether all rows were read, and each is good or left out."""

    def fault(self, found: str, expected: str, fix: str, *, what: str = "") -> None:
        """Adds a fault of this file."""
        self.faults.append(Fault(self.label + what, found, expected, fix))

    def read(
        self, columns: Mapping[str, str] | Sequence[str], make: Callable[[Record], Made], *, optional: Sequence[str] = ()
    ) -> list[Made]:
        """What `make` makes of each good row. All that is wrong with the file becomes a fault.

        A row that `make` raises BadRow on is one too, or is left out: then a line says how many are.

        Args:
            columns: key under `columns` in the YAML -> the column that every row must have; or the columns alone, where the YAML
                can't name them.
            optional: columns that rows may lack; their value is None there.
        """
        made = list[Made]()
        if not self.path.exists():
            self.fault(f"{shown(self.path)}, which is no file in {Path.cwd()}", "a file that exists", "correct the path")
            return made
        if self.path.is_dir():
            self.fault(f"{shown(self.path)}, a folder", "a file", "name the file")
            return made
        keyed = columns.items() if isinstance(columns, Mapping) else [(None, column) for column in columns]
        fields = [Field(key, (column, *SYNONYMS.get((key or "", column), ())), True, True) for key, column in keyed]
        fields += [Field(None, (column,), False, False) for column in optional]
        names = [field.names[0] for field in fields]
        file = TableFile(self.path, self.label)
        if isinstance(self.task, FileTask):
            file.delimiter, file.header = self.task.delimiter, self.task.header
        bad_rows = list[Fault]()
        try:
            with read_errors(file):
                for row in reader_of(file)(file, fields):
                    try:
                        if isinstance(row, BadRow):
                            raise row
                        made.append(make(dict(zip(names, row[1], strict=True))))
                    except BadRow as bad:
                        self.bad_rows += 1
                        if len(bad_rows) < FAULTS_PER_FILE:
                            bad_rows.append(self._fault_of(file.row, bad))
        except UserError as error:
            self.faults += error.faults
        else:
            self.to_the_end = file.row > 0
            if file.row == 0:
                self.fault("no rows", "one row or more", "fill the file")
        skipped = self.task.on_bad_row == "skip" and self.bad_rows < file.row
        self.clean = self.to_the_end and (skipped or not self.bad_rows)
        if skipped and bad_rows:
            first, counts = bad_rows[0], f"{self.bad_rows:,} of {file.row:,} rows left out"
            logger.warning("%s: %s, as %s (%s)", self.label, counts, first.where.removeprefix(f"{self.label}, "), first.found)
            return made
        self.faults += bad_rows
        if self.bad_rows > FAULTS_PER_FILE:
            self.fault(f"{self.bad_rows - FAULTS_PER_FILE:,} more bad rows", "rows as above", "fix or drop these too")
        return made

    def _fault_of(self, row: int, bad: BadRow) -> Fault:
        return Fault(f"{self.label}, row {row:,}: {bad.what}", bad.found, bad.expected, fix_of_row(self.task))


def fix_of_row(task: ReadTask) -> str:
    """What to do about a bad row of a task's file."""
    return f"fix the row, drop it, or set on_bad_row: skip for {task.name}"


def quoted(names: Iterable[str]) -> str:
    """Names as a message lists them."""
    return listed(map(shown, names))


def labelled(columns: LabelColumns, numbers: dict[str, int], row: Record) -> tuple[str, int]:
    """A text and the number of its label; a label that is new in `numbers` gets the next one. BadRow on anything else."""
    label = identifier(row[columns.label], columns.label)
    return text(row[columns.text], columns.text), numbers.setdefault(label, len(numbers))


def identifier(value: object, column: str) -> str:
    """A label or an id. A whole number is its digits, so that JSONL's 7 is CSV's 7. BadRow on anything else."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else text(value, column, AN_ID)


def number(value: object, column: str) -> float:
    """A finite number, written as one or as text. BadRow on anything else."""
    # float() takes digits of all scripts, and underscores between them: a name of a row more likely than a number.
    written = isinstance(value, int | float) and not isinstance(value, bool)
    written |= isinstance(value, str) and value.isascii() and "_" not in value
    try:
        read = float(value) if written else math.nan  # type: ignore[arg-type]
    except (ValueError, OverflowError):
        read = math.nan
    if not math.isfinite(read):
        raise BadRow(f'"{column}" is not a number', shown(value), A_NUMBER)
    return read


def zero_or_one(value: object, column: str) -> bool:
    """Whether a pair belongs together."""
    match str(value).strip().lower():
        case "1" | "1.0" | "true":
            return True
        case "0" | "0.0" | "false":
            return False
    raise BadRow(f'"{column}" is neither 1 nor 0', shown(value), "1 where the texts belong together, else 0")
