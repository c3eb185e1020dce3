"""Rows of a corpus -> a file that sentence-transformers, FlagEmbedding and gist-train read."""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gist_train.config.conditions import Condition
from gist_train.config.errors import Fault, UserError, listed, shown
from gist_train.config.schema import DataConfig
from gist_train.config.sources import MediSource, TableSource
from gist_train.data.corpus import Corpus
from gist_train.data.files import sync
from gist_train.data.fingerprints import DOCUMENTS
from gist_train.data.opening import reads

ROWS_AT_A_TIME = 4096
ENDINGS = (".jsonl", ".parquet")


def check_targets(targets: Mapping[str, Path], data: DataConfig) -> None:
    """What is refused before rows are worked on that are to be written.

    Args:
        targets: by option or argument, where to.
        data: what rows are read from.

    Raises:
        UserError: no file of rows ends so, its folder is not there, it is one of the files that rows are read from, or would be
            one next time, or two are the same.
    """
    sources = {f"data.train[{index}]": source for index, source in enumerate(data.train)}
    if data.hard_negatives is not None and (documents := data.hard_negatives.documents) is not None:
        sources[DOCUMENTS] = documents.source
    written: dict[Path, str] = {}
    for where, path in targets.items():
        if path.suffix not in ENDINGS or not path.parent.is_dir():
            expected = (
                "a file in a folder that is there, which ends in .jsonl (FlagEmbedding's) or .parquet (sentence-transformers')"
            )
            raise UserError(Fault(where, f'"{path}"', expected, "name one"))
        if key := next((key for key, source in sources.items() if reads(source, path, key)), None):
            raise UserError(Fault(where, f"{shown(path)}, which {key} reads", "a file that no row is read from", "name another"))
        if other := written.get(path.resolve()):
            raise UserError(Fault(where, f"{shown(path)}, as in {other}", "a file of its own", "name another"))
        written[path.resolve()] = where


def write_rows(corpus: Corpus, path: Path, rows: Iterable[int] | None = None) -> None:
    """Writes all rows, or those of `rows`, or nothing.

    `.jsonl`: query, the lists pos and neg, and task, which FlagEmbedding and `source: jsonl` read. `.parquet`: anchor, positive,
    negative_1, negative_2, ... and task, a row for each positive, which sentence-transformers and `source: parquet` read; a row
    that has fewer negatives than others has null in their place.
    """
    with whole_file(path) as beside:
        written = _rows(corpus, range(corpus.row_count) if rows is None else rows)
        _write_jsonl(written, beside) if path.suffix == ".jsonl" else _write_parquet(corpus, written, beside)


def left_behind(corpus: Corpus, data: DataConfig) -> str | None:
    """What of the sources no file of rows has, in words: columns by name, instructions, prompts and scores; None for nothing."""
    columns: dict[str, None] = {}
    for source, counts in zip(data.train, corpus.meta["sources"], strict=True):
        columns.update(dict.fromkeys(counts["unread"]))
        if isinstance(source, TableSource) and source.where is not None:
            columns.update(dict.fromkeys(Condition(source.where).columns))
    parts = [f"the columns {listed(columns)}"] if columns else []
    if any(isinstance(source, MediSource) for source in data.train) and not data.keep_instructions:
        parts.append("MEDI's instructions")
    parts += [name for name, there in (("prompts", len(corpus.prompts) > 1), ("scores", corpus.scored)) if there]
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


Written = Iterator[tuple[str, list[str], list[str], str]]
"""Anchor, positives, negatives and task."""


def _rows(corpus: Corpus, rows: Iterable[int]) -> Written:
    for row in rows:
        positives = corpus.positive[corpus.positive_offsets[row] : corpus.positive_offsets[row + 1]].tolist()
        negatives = corpus.negative[corpus.negative_offsets[row] : corpus.negative_offsets[row + 1]].tolist()
        task = corpus.tasks[int(corpus.task[row])]
        yield corpus.text(int(corpus.anchor[row])), [*map(corpus.text, positives)], [*map(corpus.text, negatives)], task


def _write_jsonl(written: Written, path: Path) -> None:
    with path.open("w", encoding="utf-8") as file:
        for anchor, positives, negatives, task in written:
            line = {"query": anchor, "pos": positives, "neg": negatives, "task": task}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _write_parquet(corpus: Corpus, written: Written, path: Path) -> None:
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    most = int((corpus.negative_offsets[1:] - corpus.negative_offsets[:-1]).max(initial=0))
    names = ["anchor", "positive", *(f"negative_{number + 1}" for number in range(most)), "task"]
    schema = pa.schema([(name, pa.string()) for name in names])
    with pq.ParquetWriter(path, schema) as writer:
        rows: list[list[Any]] = []
        for anchor, positives, negatives, task in written:
            rows += [[anchor, positive, *negatives, *[None] * (most - len(negatives)), task] for positive in positives]
            if len(rows) >= ROWS_AT_A_TIME:
                writer.write_table(pa.table(list(zip(*rows, strict=True)), schema=schema))
                rows = []
        if rows:
            writer.write_table(pa.table(list(zip(*rows, strict=True)), schema=schema))
