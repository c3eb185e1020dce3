"""Suspect rows as a file, and the others as files that can be trained on."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path

from gist_train.auditing.audit import Audit
from gist_train.auditing.record import Suspect
from gist_train.config.errors import Fault, UserError
from gist_train.config.schema import DataConfig
from gist_train.config.sources import ClassificationSource, TextsSource
from gist_train.data.opening import names_of_tables
from gist_train.data.sources import Labelled, read_labelled
from gist_train.data.writing import ROWS_AT_A_TIME, whole_file, write_rows
from gist_train.suspects import kept_rows


def write_suspects(found: Audit, path: Path) -> int:
    """Writes a line for every row and kind in which it is suspect, the worst of each kind first; returns how many."""
    lines = found.lines()
    with whole_file(path) as beside:
        return _write_jsonl(lines, beside) if path.suffix == ".jsonl" else _write_parquet(lines, beside)


def _write_jsonl(lines: Iterator[Suspect], path: Path) -> int:
    count = 0
    with path.open("w", encoding="utf-8") as file:
        for one in lines:
            file.write(json.dumps(asdict(one), ensure_ascii=False) + "\n")
            count += 1
    return count


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


def write_clean(found: Audit, path: Path) -> int:
    """Writes the rows that are suspect in no way, and returns how many: as `gist-train mine` writes rows, or labelled texts as
    texts with labels, in columns of the source's names."""
    source, corpus = found.config.data.train[0], found.corpus
    if isinstance(source, ClassificationSource):
        suspect = {(int(corpus.file[row]), int(corpus.number[row])) for row in found.all_suspects()}
        # From the file: a text of which no triplet was mined is in no corpus, and is not lost.
        rows = [
            row
            for row in read_labelled(source, "data.train[0]")
            if isinstance(row, Labelled) and (row.file, row.number) not in suspect
        ]
        with whole_file(path) as beside:
            _write_labelled(rows, source, beside, as_parquet=path.suffix == ".parquet")
        return len(rows)
    kept = kept_rows(corpus.row_count, [found.scores[kind] >= found.thresholds[kind] for kind in found.scores])
    write_rows(corpus, path, kept)
    return len(kept)


def _write_labelled(rows: list[Labelled], source: ClassificationSource, path: Path, *, as_parquet: bool) -> None:
    names = (source.columns.text, source.columns.label)
    if as_parquet:
        import pyarrow as pa
        import pyarrow.parquet as pq

        schema = pa.schema([(name, pa.string()) for name in names])
        pq.write_table(pa.table([[row.text for row in rows], [row.label for row in rows]], schema=schema), path)
        return
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(dict(zip(names, (row.text, row.label), strict=True)), ensure_ascii=False) + "\n")
