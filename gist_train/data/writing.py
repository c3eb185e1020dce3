"""Rows of a corpus -> a file that sentence-transformers, FlagEmbedding and gist-train read."""

import base64
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import date, time
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from gist_train.config.errors import Fault, UserError, listed, shown
from gist_train.config.evaluation import FileTask
from gist_train.config.models import GuideVectorsConfig, stored_guides
from gist_train.config.schema import Config, DataConfig
from gist_train.config.sources import MediSource, TableSource
from gist_train.data.corpus import Corpus
from gist_train.data.files import check_target, sync
from gist_train.data.fingerprints import DOCUMENTS
from gist_train.data.further import FurtherColumns
from gist_train.data.opening import reads
from gist_train.data.scores import COLUMNS
from gist_train.data.tables import encodable

if TYPE_CHECKING:
    import pyarrow as pa  # type: ignore[import-untyped]  # slow to import, so only where it is needed

T = TypeVar("T")

ROWS_AT_A_TIME = 4096
ENDINGS = (".jsonl", ".parquet")
LARGEST_IN_FLOAT = 1 << 53
"""Up to which every whole number is a float64 too."""


def check_targets(targets: Mapping[str, Path], config: Config) -> None:
    """What is refused before rows are worked on that are to be written.

    Args:
        targets: by option or argument, where to.

    Raises:
        UserError: no file of rows ends so, it can't be written, it is one of the files that the YAML reads, or would be one next
            time, or two are the same.
    """
    data = config.data
    sources = {f"data.train[{index}]": source for index, source in enumerate(data.train)}
    if data.hard_negatives is not None and (documents := data.hard_negatives.documents) is not None:
        sources[DOCUMENTS] = documents.source
    written: dict[Path, str] = {}
    for where, path in targets.items():
        check_target(where, path)
        if path.suffix not in ENDINGS:
            expected = "a file that ends in .jsonl (FlagEmbedding's) or .parquet (sentence-transformers')"
            raise UserError(Fault(where, shown(path), expected, "name one"))
        reading = (key for key, source in sources.items() if reads(source, path, key))
        others = (key for key, file in _other_files(config).items() if path.exists() and _is_part(path, file))
        if key := next(chain(reading, others), None):
            raise UserError(Fault(where, f"{shown(path)}, which {key} reads", "a file that nothing is read from", "name another"))
        if other := written.get(path.resolve()):
            raise UserError(Fault(where, f"{shown(path)}, as in {other}", "a file of its own", "name another"))
        written[path.resolve()] = where


def _other_files(config: Config) -> dict[str, Path]:
    """By key of the YAML, the files and folders that are read beside those of rows."""
    read: dict[str, Path] = {}
    for index, task in enumerate(config.evaluation.tasks):
        if isinstance(task, FileTask):
            files = task.model_dump(include={"path", "train", "test"})
            read |= {f"evaluation.tasks[{index}].{key}": Path(file) for key, file in files.items()}
    for where, guide in stored_guides(config.guide).items():
        if isinstance(guide, GuideVectorsConfig):
            file = Path(guide.vectors)
            read |= {f"{where}.vectors": file, f"{where}.vectors, texts": file.with_suffix(".jsonl")}
    return read


def _is_part(path: Path, of_file: Path) -> bool:
    """Whether the file is that one, or in that folder."""
    if of_file.is_dir():
        return path.resolve().is_relative_to(of_file.resolve())
    return of_file.exists() and path.samefile(of_file)


def write_rows(corpus: Corpus, data: DataConfig, path: Path, rows: Sequence[int] | None = None) -> None:
    """Writes all rows, or those of `rows`, which ascend, or nothing.

    `.jsonl`: query, the lists pos and neg, and task, which FlagEmbedding and `source: jsonl` read. `.parquet`: anchor, positive,
    negative_1, negative_2, ... and task, a row for each positive, which sentence-transformers and `source: parquet` read; a row
    that has fewer negatives than others has null in their place. Behind them, in both, the further columns of the sources.

    Args:
        data: what the corpus was made of.

    Raises:
        UserError: a file has other rows than when the corpus was made of it.
    """
    if rows is None:
        rows = range(corpus.row_count)
    further, texts = FurtherColumns(corpus, data), _texts_of(corpus, rows)
    with whole_file(path) as beside:
        if path.suffix == ".jsonl":
            named = ({"query": a, "pos": p, "neg": n, "task": task} for a, p, n, task in texts)
            write_jsonl(({**row, **cells} for row, cells in zip(named, further.of_rows(rows), strict=True)), beside)
            return
        most = int((corpus.negative_offsets[1:] - corpus.negative_offsets[:-1]).max(initial=0))
        names = ["anchor", "positive", *(f"negative_{number + 1}" for number in range(most)), "task"]
        lines = (
            {**dict(zip(names, [anchor, positive, *negatives, *[None] * (most - len(negatives)), task], strict=True)), **cells}
            for (anchor, positives, negatives, task), cells in zip(texts, further.of_rows(rows), strict=True)
            for positive in positives
        )
        write_parquet(lines, names, column_types(further.of_rows(rows), further.names), beside)


def left_behind(corpus: Corpus, data: DataConfig) -> str | None:
    """What of the sources no file of rows has, in words: columns beside single texts, instructions, prompts, scores; None for
    nothing."""
    columns = [
        name
        for source, counts in zip(data.train, corpus.meta["sources"], strict=True)
        if not isinstance(source, TableSource)
        for name in counts["unread"]
    ]
    parts = [f"the columns {listed(dict.fromkeys(columns))}"] if columns else []
    if any(isinstance(source, MediSource) for source in data.train) and not data.keep_instructions:
        parts.append("MEDI's instructions")
    if len(corpus.prompts) > 1:
        parts.append("prompts")
    tables = [
        (source.scores, counts["unread"])
        for source, counts in zip(data.train, corpus.meta["sources"], strict=True)
        if isinstance(source, TableSource)
    ]
    if any(scores == "texts" or {*COLUMNS["texts"]} & {*unread} for scores, unread in tables):
        parts.append("scores of texts")
    return ", ".join(parts) or None


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Where to write what is to be at `path` once it is whole; what is half written is deleted."""
    beside = path.with_name(f".{path.name}.partial")
    try:
        yield beside
        sync(beside)
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def _texts_of(corpus: Corpus, rows: Iterable[int]) -> Iterator[tuple[str, list[str], list[str], str]]:
    """Anchor, positives, negatives and task of each."""
    for row in rows:
        positives = corpus.positive[corpus.positive_offsets[row] : corpus.positive_offsets[row + 1]].tolist()
        negatives = corpus.negative[corpus.negative_offsets[row] : corpus.negative_offsets[row + 1]].tolist()
        task = corpus.tasks[int(corpus.task[row])]
        yield corpus.text(int(corpus.anchor[row])), [*map(corpus.text, positives)], [*map(corpus.text, negatives)], task


def write_jsonl(lines: Iterable[Mapping[str, object]], path: Path) -> int:
    """A line for each, and returns how many; what JSON has no word for (dates, bytes, nan) as `_plain` has it."""
    count = 0
    with path.open("w", encoding="utf-8") as file:
        for line in lines:
            file.write(json.dumps(_plain(line), ensure_ascii=False) + "\n")
            count += 1
    return count


def write_parquet(
    lines: Iterable[Mapping[str, object]], texts: Sequence[str], further: Mapping[str, "pa.DataType | None"], path: Path
) -> None:
    """A row for each.

    Args:
        texts: names of columns of texts; the first ones.
        further: the other columns, as `column_types` gives them.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    of_further = [(name, pa.string() if kind is None else kind) for name, kind in further.items()]
    schema = pa.schema([*((name, pa.string()) for name in texts), *of_further])
    written = {name for name, kind in further.items() if kind is None}
    with pq.ParquetWriter(path, schema) as writer:
        for some in _parts(iter(lines)):
            columns = [[_as_text(line[name]) if name in written else line[name] for line in some] for name in schema.names]
            writer.write_table(pa.table(columns, schema=schema))


def column_types(rows: Iterable[Mapping[str, object]], names: Sequence[str]) -> dict[str, "pa.DataType | None"]:
    """By column, the one type that all its cells can be of; None where Parquet has none, so that they are written as texts."""
    import pyarrow as pa
    import pyarrow.compute as pc  # type: ignore[import-untyped]

    kinds: dict[str, pa.DataType | None] = dict.fromkeys(names, pa.null())
    exact = set[str]()
    for some in _parts(iter(rows)):
        for name, kind in kinds.items():
            if kind is not None:
                try:
                    cells = pa.array([row[name] for row in some])
                    if pa.types.is_integer(cells.type):
                        least, most = pc.min_max(cells).as_py().values()
                        if max(most, -least) > LARGEST_IN_FLOAT:
                            exact.add(name)
                    own = pa.schema([("", cells.type)])
                    kinds[name] = pa.unify_schemas([pa.schema([("", kind)]), own], promote_options="permissive").field(0).type
                except (pa.ArrowException, OverflowError, UnicodeEncodeError):
                    kinds[name] = None
    for name, kind in kinds.items():
        if kind is not None and (kind == pa.null() or (pa.types.is_floating(kind) and name in exact) or not _is_written(kind)):
            kinds[name] = None
    return kinds


def _is_written(kind: "pa.DataType") -> bool:
    """Whether Parquet has the type: an object without keys it has not."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        pq.write_table(pa.schema([("", kind)]).empty_table(), pa.BufferOutputStream())
    except pa.ArrowException:
        return False
    return True


def _parts(lines: Iterator[T]) -> Iterator[list[T]]:
    while some := [*islice(lines, ROWS_AT_A_TIME)]:
        yield some


def _as_text(cell: object) -> str | None:
    """A text as it is, anything else as JSON."""
    plain = _plain(cell)
    return plain if plain is None or isinstance(plain, str) else json.dumps(plain, ensure_ascii=False)


def _plain(cell: object) -> Any:
    """`cell` of what JSON has: dates in ISO 8601, bytes in base64, no number for nan and infinity."""
    match cell:
        case str():
            return cell if encodable(cell) else cell.encode("utf-8", "replace").decode()
        case float():
            return cell if math.isfinite(cell) else None
        case None | bool() | int():
            return cell
        case Mapping():
            return {_plain(str(key)): _plain(value) for key, value in cell.items()}
        case list() | tuple():
            return [_plain(one) for one in cell]
        case bytes():
            return base64.b64encode(cell).decode()
        case date() | time():
            return cell.isoformat()
    return str(cell)
