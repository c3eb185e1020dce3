"""Readers: hub data sets, MEDI JSON, JSONL, CSV, Parquet and labelled texts -> checked rows.

A bad row comes out as a Fault, for the caller to fail or skip; a file that is not what it is said to be raises UserError.
Every reader streams: a file is never whole in memory.
"""

import glob
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard, TypeVar

from gist_train.config.errors import Fault, UserError, shown
from gist_train.config.sources import (
    ClassificationSource,
    CsvSource,
    HubSource,
    JsonlSource,
    MediSource,
    ParquetSource,
    Prompts,
    Source,
    TableSource,
)
from gist_train.data.hub import commit_of, hub_cells, hub_table
from gist_train.data.medi import Pairs, medi_pairs, pair
from gist_train.data.tables import (
    READERS,
    BadRow,
    Cells,
    Field,
    Reader,
    Table,
    TableFile,
    csv_cells,
    encodable,
    jsonl_cells,
    parquet_cells,
    read_errors,
    reader_of,
    text,
    texts,
)

ALIASES = {
    "anchor": ("anchor", "query"),
    "positive": ("positive", "pos", "positives"),
    "negative": ("negative", "neg", "negatives"),
    "task": ("task", "task_name"),
}
INSTRUCTIONS = {
    "anchor_instruction": ("query_instruct", "anchor_instruct"),
    "positive_instruction": ("pos_instruct", "positive_instruct"),
    "negative_instruction": ("neg_instruct", "negative_instruct"),
}
"""Columns of the published triplets that hold MEDI's instructions."""
NO_PROMPTS = ("", "", "")
T = TypeVar("T")


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
    label: str | None = None
    """What anchor and positives are labelled with; None where they are not."""
    negative_labels: tuple[str, ...] = ()
    """Of each negative; empty where they have none."""


@dataclass(frozen=True, slots=True)
class Labelled:
    """A checked row of a source of labelled texts."""

    text: str
    label: str
    task: str


def files_of(source: Source, where: str) -> list[Path]:
    """The source's files, a glob expanded and sorted; `where` is the source's key, e.g. `data.train[2]`."""
    path = Path(os.path.expanduser(source.path))
    if os.path.isdir(path):  # os.path, for a folder that may not be entered: Path's own raise there
        fix = f"name its files, e.g. {path / '*.jsonl'}"
        raise UserError(Fault(f"{where}.path", f"{shown(str(path))}, a folder", "a file, or a glob of files", fix))
    # A file may have brackets in its name, so the name as it is comes before the glob.
    files = [path] if os.path.exists(path) else sorted(Path(p) for p in glob.glob(str(path), recursive=True) if os.path.isfile(p))
    if not files:
        found = f"{shown(str(path))}, which matches no file in {Path.cwd()}"
        fix = "correct the path, or run the command in the folder that it starts from"
        raise UserError(Fault(f"{where}.path", found, "a file that exists, or a glob that matches one", fix))
    for path in files:
        if not encodable(str(path)):
            name = shown(str(path).encode("utf-8", "backslashreplace").decode())
            raise UserError(Fault(f"{where}.path", name, "a file whose name is UTF-8", "rename it"))
        if not os.path.isfile(path):
            raise UserError(Fault(f"{where}.path", f"{shown(str(path))}, a pipe or device", "a file", "write it to a file first"))
        if not os.access(path, os.R_OK):
            raise UserError(Fault(f"{where}.path", shown(str(path)), "a file that you may read", "make the file readable"))
    return files


def is_data_set(source: Source) -> TypeGuard[HubSource | ClassificationSource]:
    """Whether the source is read through `datasets`: from the hub, or from a local folder of the same shape."""
    if not isinstance(source, ClassificationSource):
        return isinstance(source, HubSource)
    path = Path(os.path.expanduser(source.path))
    named_as_file = TableFile(path, "").suffix in (*READERS, ".json", ".txt")
    return path.is_dir() or not (path.exists() or glob.has_magic(source.path) or named_as_file)


def origin_of(source: Source, where: str) -> dict[str, str | None]:
    """`name` and `commit` of what a reader may know: a data set of the hub, or a file or folder without the way to it."""
    path = os.path.expanduser(source.path)
    if is_data_set(source) and not os.path.isdir(path):
        subset = f" ({source.subset})" if source.subset else ""
        return {"name": source.path + subset, "commit": commit_of(source.path, source.revision, where)}
    return {"name": Path(path).name, "commit": None}


def read_rows(source: Source, where: str, *, keep_instructions: bool = False) -> Iterator[Row | Fault]:
    """Rows of all of the source's files in order, a bad row as a Fault; UserError where a file is broken.

    Raises:
        TypeError: the source is of labelled texts, of which rows are mined (`read_labelled`).
    """
    match source:
        case MediSource():
            for file in _files(source, where):
                yield from _checked(file, (_medi_row(file, pairs, keep_instructions) for pairs in medi_pairs(file)))
        case HubSource() | JsonlSource() | CsvSource() | ParquetSource():
            fields = _row_fields(source, keep_instructions)
            prompts = prompts_of(source.prompts)
            for table, rows in _tables(source, where, fields):
                yield from _checked(table, (_row(table, fields, source.task, prompts, cells) for cells in rows))
        case ClassificationSource():
            raise TypeError("rows of labelled texts are mined")


def read_labelled(source: ClassificationSource, where: str) -> Iterator[Labelled | Fault]:
    """Labelled texts in order, a bad row as a Fault; UserError where a file is broken."""
    columns = source.columns
    fields = [Field("text", (columns.text,), True, True), Field("label", (columns.label,), True, True)]
    for table, rows in _tables(source, where, fields):
        task = source.task or table.name
        yield from _checked(table, (_labelled(fields, task, cells) for cells in rows))


def prompts_of(prompts: Prompts | None) -> tuple[str, str, str]:
    """Of anchor, positive and negative."""
    return NO_PROMPTS if prompts is None else (prompts.anchor, prompts.positive, prompts.negative)


def _files(source: Source, where: str) -> Iterator[TableFile]:
    files = files_of(source, where)
    same_name = Counter(path.name for path in files)
    for path in files:
        yield TableFile(path, f"{where}: {path.name if same_name[path.name] == 1 else path}")


def _tables(source: Source, where: str, fields: Sequence[Field]) -> Iterator[tuple[Table, Iterator[Cells | BadRow]]]:
    """Each file or data set of the source, with what is read from it."""
    if is_data_set(source):
        table = hub_table(source, where)
        yield table, hub_cells(table, source, where, fields)
        return
    for file in _files(source, where):
        yield file, _reader(source, file)(file, fields)


def _reader(source: Source, file: TableFile) -> Reader:
    match source:
        case JsonlSource():
            return jsonl_cells
        case CsvSource():
            return csv_cells
        case ParquetSource():
            return parquet_cells
    return reader_of(file)


def _checked(table: Table, rows: Iterable[T | BadRow]) -> Iterator[T | Fault]:
    """`rows`, a bad one as a Fault; what a broken file raises, and a table without rows, as UserError."""
    # What `datasets` raises is handled where it is called.
    with read_errors(table) if isinstance(table, TableFile) else nullcontext():
        for row in rows:
            yield table.fault(row) if isinstance(row, BadRow) else row
    if table.row == 0:
        raise UserError(Fault(table.label, "no rows", "one row or more", "fill the file, or take it out of the path"))


def _row_fields(source: TableSource, keep_instructions: bool) -> list[Field]:
    """Anchor, positive, negative and task; then, where instructions are kept, the three columns that may hold them."""
    given = {} if source.columns is None else source.columns.model_dump(exclude_none=True)
    fields = [
        Field(key, (given[key],) if key in given else names, key in ("anchor", "positive"), key in given)
        for key, names in ALIASES.items()
    ]
    return fields + [Field(key, names, False, False) for key, names in INSTRUCTIONS.items() if keep_instructions]


def _row(
    table: Table, fields: Sequence[Field], task: str | None, prompts: tuple[str, str, str], cells: Cells | BadRow
) -> Row | BadRow:
    """The row of anchor, positive, negative and task as they are in the table; no negative is None or []."""
    if isinstance(cells, BadRow):
        return cells
    columns, (anchor, positive, negative, named_task, *instructions) = cells
    names = [column or field.names[0] for column, field in zip(columns, fields, strict=True)]
    try:
        named = task or _task(named_task, names[3], table.name)
        if isinstance(anchor, list):  # MEDI's [instruction, text], in a table
            pairs = [pair(anchor, names[0]), pair(positive, names[1])]
            if negative is not None and negative != []:
                pairs.append(pair(negative, names[2]))
            return _row_of_pairs(pairs, named, None if len(fields) > len(ALIASES) else prompts)
        return Row(
            text(anchor, names[0]),
            texts(positive, names[1]),
            () if negative is None or negative == [] else texts(negative, names[2]),
            named,
            _instructions(instructions, names[4:]) if any(columns[4:]) else prompts,
        )
    except BadRow as bad:
        return bad


def _task(value: object, column: str, default: str) -> str:
    if value is None or (isinstance(value, str) and not value.strip()):
        return default
    return text(value, column, "a string")


def _instructions(values: Sequence[object], columns: Sequence[str]) -> tuple[str, str, str]:
    """Instructions as written, "" where a row has none."""
    for value, column in zip(values, columns, strict=True):
        if value is not None and not (isinstance(value, str) and encodable(value)):
            raise BadRow(f'"{column}" is not a string', shown(value), "a string")
    anchor, positive, negative = [str(value or "") for value in values]
    return anchor, positive, negative


def _labelled(fields: Sequence[Field], task: str, cells: Cells | BadRow) -> Labelled | BadRow:
    if isinstance(cells, BadRow):
        return cells
    columns, (value, label) = cells
    names = [column or field.names[0] for column, field in zip(columns, fields, strict=True)]
    try:
        # A whole number is its digits, so that Parquet's 7 is CSV's 7.
        number = isinstance(label, int) and not isinstance(label, bool)
        name = str(label) if number else text(label, names[1], "a string or a whole number")
        return Labelled(text(value, names[0]), name, task)
    except BadRow as bad:
        return bad


def _medi_row(file: TableFile, read: Pairs | BadRow, keep_instructions: bool) -> Row | BadRow:
    if isinstance(read, BadRow):
        return read
    pairs, named_task = read
    try:
        return _row_of_pairs(pairs, _task(named_task, "task_name", file.name), None if keep_instructions else NO_PROMPTS)
    except BadRow as bad:
        return bad


def _row_of_pairs(pairs: Sequence[tuple[str, str]], task: str, prompts: tuple[str, str, str] | None) -> Row:
    """The row of (instruction, text) of anchor, positive and, if there is one, negative; without prompts its instructions are."""
    (anchor_prompt, anchor), (positive_prompt, positive), *negative = pairs
    prompts = prompts or (anchor_prompt, positive_prompt, negative[0][0] if negative else "")
    return Row(anchor, (positive,), tuple([text for _, text in negative]), task, prompts)
