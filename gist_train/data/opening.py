"""Which files or data sets a source is, opened: each a table, with its cells row by row."""

import glob
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from fnmatch import fnmatch
from pathlib import Path
from typing import TypeGuard, TypeVar

from gist_train.config.errors import Fault, UserError, shown
from gist_train.config.sources import (
    CsvSource,
    HubSource,
    JsonlSource,
    ParquetSource,
    Source,
    TextFileSource,
    TextsSource,
    XlsxSource,
)
from gist_train.data.formats import (
    READERS,
    Cells,
    Reader,
    csv_cells,
    jsonl_cells,
    lines_cells,
    parquet_cells,
    reader_of,
    xlsx_cells,
)
from gist_train.data.hub import commit_of, hub_cells, hub_table
from gist_train.data.tables import BadRow, Field, Table, TableFile, encodable, read_errors

T = TypeVar("T")


def files_of(source: Source, where: str) -> list[Path]:
    """The source's files, a glob expanded and sorted; `where` is the source's key, e.g. `data.train[2]`."""
    path = Path(source.path)
    if os.path.isdir(path):  # os.path, for a folder that may not be entered: Path's own raise there
        fix = f"name its files, e.g. {path / '*.jsonl'}"
        raise UserError(Fault(f"{where}.path", f"{shown(path)}, a folder", "a file, or a glob of files", fix))
    # A file may have brackets in its name, so the name as it is comes before the glob.
    files = [path] if os.path.exists(path) else sorted(Path(p) for p in glob.glob(str(path), recursive=True) if os.path.isfile(p))
    if not files:
        found = f"{shown(path)}, which matches no file in {Path.cwd()}"
        fix = "correct the path, or run the command in the folder that it starts from"
        raise UserError(Fault(f"{where}.path", found, "a file that exists, or a glob that matches one", fix))
    for path in files:
        if not encodable(str(path)):
            raise UserError(Fault(f"{where}.path", shown(path), "a file whose name is UTF-8", "rename it"))
        if not os.path.isfile(path):
            raise UserError(Fault(f"{where}.path", f"{shown(path)}, a pipe or device", "a file", "write it to a file first"))
        if not os.access(path, os.R_OK):
            raise UserError(Fault(f"{where}.path", shown(path), "a file that you may read", "make the file readable"))
    return files


def is_data_set(source: Source) -> TypeGuard[HubSource | TextFileSource]:
    """Whether the source is read through `datasets`: from the hub, or from a local folder of the same shape."""
    if not isinstance(source, TextFileSource):
        return isinstance(source, HubSource)
    path = Path(source.path)
    named_as_file = TableFile(path, "").suffix in (*READERS, ".txt")
    return path.is_dir() or not (path.exists() or glob.has_magic(source.path) or named_as_file)


def origin_of(source: Source, where: str) -> dict[str, str | None]:
    """`name` and `commit` of what a reader may know: a data set of the hub, or a file or folder without the way to it."""
    path = source.path
    if is_data_set(source) and not os.path.isdir(path):
        subset = f" ({source.subset})" if source.subset else ""
        return {"name": source.path + subset, "commit": commit_of(source.path, source.revision, where)}
    return {"name": Path(path).name, "commit": None}


def reads(source: Source, path: Path, where: str) -> bool:
    """Whether the source reads the file at `path`, or would read it if it were there."""
    if is_data_set(source):
        return os.path.isdir(source.path) and path.resolve().is_relative_to(Path(source.path).resolve())
    if path.exists() and any(path.samefile(file) for file in files_of(source, where)):
        return True
    asked = Path(source.path)
    return _matches(path.resolve().parts, (asked.parent.resolve() / asked.name).parts)


def _matches(parts: Sequence[str], asked: Sequence[str]) -> bool:
    """Whether a path is one of a pattern's, both in parts; `**` is any number of them."""
    if not asked or not parts:
        return not parts and all(part == "**" for part in asked)
    if asked[0] == "**":
        return _matches(parts, asked[1:]) or _matches(parts[1:], asked)
    return fnmatch(parts[0], asked[0]) and _matches(parts[1:], asked[1:])


def names_of_tables(source: Source, where: str) -> list[str]:
    """Of each of the source's tables, by `Table.place`, the file or data set."""
    return [source.path] if is_data_set(source) else [str(path) for path in files_of(source, where)]


def table_files(source: Source, where: str) -> Iterator[TableFile]:
    files = files_of(source, where)
    same_name = Counter(path.name for path in files)
    for place, path in enumerate(files):
        file = TableFile(path, f"{where}: {path.name if same_name[path.name] == 1 else path}")
        file.place = place
        if isinstance(source, CsvSource | TextFileSource):
            file.delimiter, file.header = source.delimiter, source.header
        elif isinstance(source, XlsxSource):
            file.sheet, file.header = source.sheet, source.header
        yield file


def tables(source: Source, where: str, fields: Sequence[Field]) -> Iterator[tuple[Table, Iterator[Cells | BadRow]]]:
    """Each file or data set of the source, with what is read from it."""
    if is_data_set(source):
        table = hub_table(source, where)
        yield table, hub_cells(table, source, where, fields)
        return
    for file in table_files(source, where):
        yield file, _reader(source, file)(file, fields)


def _reader(source: Source, file: TableFile) -> Reader:
    match source:
        case JsonlSource():
            return jsonl_cells
        case CsvSource():
            return csv_cells
        case ParquetSource():
            return parquet_cells
        case XlsxSource():
            return xlsx_cells
        case TextsSource() if file.suffix == ".txt":
            return lines_cells
    return reader_of(file)


def checked(table: Table, rows: Iterable[T | BadRow]) -> Iterator[T | Fault]:
    """`rows`, a bad one as a Fault; what a broken file raises, and a table without rows, as UserError."""
    # What `datasets` raises is handled where it is called.
    with read_errors(table) if isinstance(table, TableFile) else nullcontext():
        for row in rows:
            yield table.fault(row) if isinstance(row, BadRow) else row
    if table.row == 0:
        raise UserError(Fault(table.label, "no rows", "one row or more", "fill the file, or take it out of the path"))
