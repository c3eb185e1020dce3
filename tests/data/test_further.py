"""Columns that training does not read stay with their rows where these are written again."""

import csv
import json
from datetime import date

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.corpora import built, data_of

from gist_train.config.errors import UserError
from gist_train.config.schema import DataConfig
from gist_train.config.sources import Columns, CsvSource, HubSource, JsonlSource, ParquetSource
from gist_train.data import writing
from gist_train.data.further import FurtherColumns

ROWS = [{"anchor": f"anchor {n}", "positive": f"positive {n}", "id": n, "url": f"a/{n}" if n % 3 else None} for n in range(40)]
KEPT = [0, 1, 7, 8, 21, 39]


def as_file(kind, folder):
    """The rows in a file of that kind, and the source that reads it."""
    path = folder / f"rows.{kind}"
    if kind == "jsonl":
        path.write_text("\n\n".join(map(json.dumps, ROWS)))  # blank lines count as lines, and are no rows
        return JsonlSource(path=str(path))
    if kind == "csv":
        pd.DataFrame(ROWS).to_csv(path, index=False, quoting=csv.QUOTE_ALL)
        return CsvSource(path=str(path))
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path)
        return ParquetSource(path=str(path))
    (folder / "set").mkdir()
    pq.write_table(pa.Table.from_pylist(ROWS), folder / "set" / "train-00000-of-00001.parquet")
    return HubSource(path=str(folder / "set"))


def read_again(path):
    """All rows of a file that was written."""
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "hub"])
def test_each_row_keeps_its_own_cells(tmp_path, kind, ending):
    """The twin is a look-up by anchor, which no reader does."""
    data = DataConfig(train=[as_file(kind, tmp_path)])
    corpus, path = built(tmp_path / "corpus", data), tmp_path / f"out.{ending}"
    writing.write_rows(corpus, data, path, KEPT)
    written, of_anchor = read_again(path), {row["anchor"]: row for row in ROWS}
    own = [of_anchor[row["query" if ending == "jsonl" else "anchor"]] for row in written]
    assert [row["id"] for row in own] == KEPT
    number = str if kind == "csv" else int  # a CSV file has nothing but texts
    assert [(row["id"], row["url"]) for row in written] == [(number(row["id"]), row["url"]) for row in own]


def test_several_files_and_sources(tmp_path, write_rows):
    """Each has columns of its own; a row has null in those of others."""
    one = [{"anchor": f"a{n}", "positive": [f"p{n}", f"q{n}"], "one": n} for n in range(5)]
    two = [{"anchor": f"b{n}", "positive": f"p{n}", "two": {"x": [n]}} for n in range(5)]
    for name, rows in (("one-1", one), ("one-2", one[::-1]), ("two", two)):
        write_rows(f"{name}.jsonl", rows)
    data = data_of(tmp_path / "one-*.jsonl", tmp_path / "two.jsonl")
    corpus = built(tmp_path / "corpus", data)
    writing.write_rows(corpus, data, tmp_path / "out.jsonl")
    expected = [(row.get("one"), row.get("two")) for row in [*one, *one[::-1], *two]]
    assert [(row["one"], row["two"]) for row in read_again(tmp_path / "out.jsonl")] == expected
    writing.write_rows(corpus, data, tmp_path / "out.parquet")  # a row for each positive
    twice = [cells for cells in expected for _ in range(1 if cells[0] is None else 2)]
    assert [(row["one"], row["two"]) for row in read_again(tmp_path / "out.parquet")] == twice


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_a_column_that_would_be_read_gets_another_name(tmp_path, write_rows, ending):
    """Read again, a title that is called "query" would be the anchor."""
    rows = [{"a": f"a{n}", "p": f"p{n}", "query": "title", "source_query": "y", "source": "z"} for n in range(9)]
    columns = Columns(anchor="a", positive="p")
    data = DataConfig(train=[JsonlSource(path=str(write_rows("rows.jsonl", rows)), columns=columns)])
    corpus = built(tmp_path / "corpus", data)
    assert FurtherColumns(corpus, data).names == ["source_query", "source_source_query", "source"]
    writing.write_rows(corpus, data, tmp_path / f"out.{ending}")
    row = read_again(tmp_path / f"out.{ending}")[4]
    assert row["query" if ending == "jsonl" else "anchor"] == "a4"
    assert (row["source_query"], row["source_source_query"], row["source"]) == ("title", "y", "z")


CELLS = [
    ("numbers", [1, 2.5, None], [1, 2.5, None], [1.0, 2.5, None]),
    ("a number and a text", [1, "one", None], [1, "one", None], ["1", "one", None]),
    ("no cell", [None, None, None], [None, None, None], [None, None, None]),
    ("a number that no column holds", [1 << 70, 2, None], [1 << 70, 2, None], [str(1 << 70), "2", None]),
    ("nested", [{"x": [1]}, {"x": []}, None], [{"x": [1]}, {"x": []}, None], [{"x": [1]}, {"x": []}, None]),
    ("objects without keys", [{}, {}, None], [{}, {}, None], ["{}", "{}", None]),
    ("lists of them", [[{}], [], None], [[{}], [], None], ["[{}]", "[]", None]),
    ("a large number, then a part", [(1 << 60) + 1, 0.5, None], [(1 << 60) + 1, 0.5, None], [str((1 << 60) + 1), "0.5", None]),
    ("half of a surrogate pair", ["\ud83d", "b", None], ["?", "b", None], ["?", "b", None]),
    ("nan", [float("nan"), 1.0, None], [None, 1.0, None], [float("nan"), 1.0, None]),
]


@pytest.mark.parametrize(("cells", "in_jsonl", "in_parquet"), [row[1:] for row in CELLS], ids=[row[0] for row in CELLS])
def test_whatever_a_cell_holds(tmp_path, cells, in_jsonl, in_parquet, monkeypatch):
    """A column of Parquet is of one type: that of all its cells, over more rows than are written at a time, or text."""
    monkeypatch.setattr(writing, "ROWS_AT_A_TIME", 1)
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"anchor": f"a{n}", "positive": f"p{n}", "x": x}) for n, x in enumerate(cells)))
    data = data_of(path)
    corpus = built(tmp_path / "corpus", data)
    for ending, expected in (("jsonl", in_jsonl), ("parquet", in_parquet)):
        writing.write_rows(corpus, data, tmp_path / f"out.{ending}")
        assert repr([row["x"] for row in read_again(tmp_path / f"out.{ending}")]) == repr(expected)


def test_what_json_has_no_word_for(tmp_path):
    """Dates and bytes of a Parquet file."""
    columns = {"anchor": ["a"], "positive": ["p"], "day": [date(2024, 2, 29)], "raw": [b"\xff"], "when": [pd.Timestamp(0)]}
    pq.write_table(pa.table(columns), tmp_path / "rows.parquet")
    data = DataConfig(train=[ParquetSource(path=str(tmp_path / "rows.parquet"))])
    corpus = built(tmp_path / "corpus", data)
    for ending in ("jsonl", "parquet"):
        writing.write_rows(corpus, data, tmp_path / f"out.{ending}")
    (row,) = read_again(tmp_path / "out.jsonl")
    assert (row["day"], row["raw"], row["when"]) == ("2024-02-29", "/w==", "1970-01-01T00:00:00")
    (row,) = read_again(tmp_path / "out.parquet")
    assert (row["day"], row["raw"]) == (date(2024, 2, 29), b"\xff")


def test_files_that_change_meanwhile_leave_nothing(tmp_path, write_rows):
    """Cells of other rows beside a text would be believed."""
    path = write_rows("rows.jsonl", ROWS)
    data = data_of(path)
    corpus = built(tmp_path / "corpus", data)
    path.write_text(json.dumps(ROWS[0]))
    with pytest.raises(UserError, match="other rows than when they were first read"):
        writing.write_rows(corpus, data, tmp_path / "out.jsonl")
    assert {one.name for one in tmp_path.iterdir()} == {"rows.jsonl", "corpus"}


def test_scores_of_texts_are_left_behind(tmp_path, write_rows):
    """To negatives that are added they say nothing, and a file that has fewer scores than texts is refused."""
    rows = [{"query": f"q{n}", "pos": [f"p{n}"], "neg": [f"n{n}"], "pos_scores": [0.9], "neg_scores": [0.1]} for n in range(3)]
    data = data_of(write_rows("rows.jsonl", rows))
    corpus = built(tmp_path / "corpus", data)
    writing.write_rows(corpus, data, tmp_path / "out.jsonl")
    assert {name for row in read_again(tmp_path / "out.jsonl") for name in row} == {"query", "pos", "neg", "task"}
    assert writing.left_behind(corpus, data) == "scores of texts"
