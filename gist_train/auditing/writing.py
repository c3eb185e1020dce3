"""Suspect rows as a file, and the others as files that can be trained on."""

from collections.abc import Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path

from gist_train.auditing.audit import Audit
from gist_train.auditing.record import Suspect
from gist_train.config.errors import Fault, UserError
from gist_train.config.schema import DataConfig
from gist_train.config.sources import ClassificationSource, TextsSource
from gist_train.data.further import cells_at
from gist_train.data.opening import names_of_tables
from gist_train.data.rows import Labelled
from gist_train.data.sources import read_labelled
from gist_train.data.writing import (
    ROWS_AT_A_TIME,
    column_types,
    left_behind,
    whole_file,
    write_jsonl,
    write_parquet,
    write_rows,
)
from gist_train.suspects import kept_rows


def write_suspects(found: Audit, path: Path) -> int:
    """Writes a line for every row and kind in which it is suspect, the worst of each kind first; returns how many."""
    lines = found.lines()
    with whole_file(path) as beside:
        return write_jsonl(map(asdict, lines), beside) if path.suffix == ".jsonl" else _write_parquet(lines, beside)


def _write_parquet(lines: Iterator[Suspect], path: Path) -> int:
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    text, texts, count = pa.string(), pa.list_(pa.string()), 0
    columns = [("kind", text), ("score", pa.float64()), ("task", text), ("source", text), ("row", pa.int64())]
    schema = pa.schema([*columns, ("anchor", text), ("positives", texts), ("negatives", texts)])
    with pq.ParquetWriter(path, schema) as writer:
        while some := [asdict(one) for one in islice(lines, ROWS_AT_A_TIME)]:
            writer.write_table(pa.Table.from_pylist(some, schema))
            count += len(some)
    return count


def check_clean(data: DataConfig, where: str) -> None:
    """Raises UserError where no one file can hold the clean rows: labelled texts of several tasks or beside pairs, bare texts."""
    texts = [f"data.train[{index}]" for index, source in enumerate(data.train) if isinstance(source, TextsSource)]
    labelled = {f"data.train[{i}]": source for i, source in enumerate(data.train) if isinstance(source, ClassificationSource)}
    tasks = sum(1 if source.task is not None else len(names_of_tables(source, key)) for key, source in labelled.items())
    if texts:
        expected = "rows of pairs or triplets, or labelled texts: two bare texts are no row of a file"
        raise UserError(Fault(where, f"bare texts of {', '.join(texts)}", expected, "leave it out"))
    if labelled and (tasks > 1 or len(data.train) > 1):
        what = "labelled texts of several files" if len(data.train) == len(labelled) else "labelled texts beside pairs"
        expected = "labelled texts of one source and task, or rows of pairs and triplets"
        raise UserError(Fault(where, what, expected, "audit each with a YAML of its own"))


def write_clean(found: Audit, path: Path) -> tuple[int, str | None]:
    """Writes the rows that are suspect in no way: as `gist-train mine` writes rows, or labelled texts as texts with labels, in
    columns of the source's names.

    Returns:
        How many, and what of the sources the file does not have, in words; None for nothing.
    """
    config, corpus = found.config, found.corpus
    source = config.data.train[0]
    if isinstance(source, ClassificationSource):
        suspect = {(int(corpus.file[row]), int(corpus.number[row])) for row in found.all_suspects()}
        # From the file: a text of which no triplet was mined is in no corpus, and is not lost.
        rows = [
            row
            for row in read_labelled(source, "data.train[0]")
            if isinstance(row, Labelled) and (row.file, row.number) not in suspect
        ]
        _write_labelled(rows, source, corpus.meta["sources"][0]["unread"], path)
        return len(rows), "prompts" if len(corpus.prompts) > 1 else None
    kept = kept_rows(corpus.row_count, [found.scores[kind] >= found.thresholds[kind] for kind in found.scores])
    write_rows(corpus, config.data, path, kept.tolist())
    return len(kept), left_behind(corpus, config.data)


def _write_labelled(rows: list[Labelled], source: ClassificationSource, further: list[str], path: Path) -> None:
    texts = [source.columns.text, source.columns.label]

    def cells() -> Iterator[dict[str, object]]:
        places = [(row.file, row.number) for row in rows]
        for values in cells_at(places, source, "data.train[0]", further):
            yield dict(zip(further, values, strict=True))

    lines = (dict(zip(texts, (row.text, row.label), strict=True)) | own for row, own in zip(rows, cells(), strict=True))
    with whole_file(path) as beside:
        if path.suffix == ".jsonl":
            write_jsonl(lines, beside)
        else:
            write_parquet(lines, texts, column_types(cells(), further), beside)
