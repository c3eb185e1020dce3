"""Rows as other tools write them: what is read, what is left out and said, and what is refused."""

import csv
import json
import sys
from unittest import mock

import datasets
import numpy as np
import openpyxl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.running import gist

from gist_train.config.errors import Fault, UserError
from gist_train.config.schema import DataConfig
from gist_train.data import formats
from gist_train.data.formats import json_records
from gist_train.data.sources import read_rows
from gist_train.data.tables import TableFile

PAIRS = [{"anchor": f"question {n}", "positive": f"answer {n}"} for n in range(4)]


def written(path, rows):
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
            writer.writeheader()
            writer.writerows(rows)
    return path


def read(path, *, source=None, unread=None, **settings):
    kind = source or path.suffix.removeprefix(".")
    (one,) = DataConfig.model_validate({"train": [{"source": kind, "path": str(path), **settings}]}).train
    return list(read_rows(one, "data.train[0]", unread=unread))


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_numbered_negatives_are_a_list(tmp_path, ending):
    """mine_hard_negatives writes them so; read as pairs, a training loses what it was made for and says nothing."""
    rows = [
        {**PAIRS[0], "negative_1": "a", "negative_2": "b", "negative_10": "c"},
        {**PAIRS[1], "negative_1": "d", "negative_2": None, "negative_10": "e"},
        {**PAIRS[2], "negative_1": None, "negative_2": None, "negative_10": None},
    ]
    unread = {}
    found = read(written(tmp_path / f"f.{ending}", rows), unread=unread)
    assert [row.negatives for row in found] == [("a", "b", "c"), ("d", "e"), ()]
    assert unread == {}


@pytest.mark.parametrize("name", ["neg", "negatives", "hard_negative", "hard_negatives", "hard_neg", "negative_passages"])
def test_negatives_by_any_usual_name(tmp_path, name):
    """`init` knows these names: a YAML written by hand must not lose what `init` takes."""
    assert [row.negatives for row in read(written(tmp_path / "f.jsonl", [{**PAIRS[0], name: ["a", "b"]}]))] == [("a", "b")]


def test_a_negative_and_numbered_ones_go_together(tmp_path):
    """Neither is dropped for the other; a column that the YAML names stands alone, and the others are said."""
    path = written(tmp_path / "f.jsonl", [{**PAIRS[0], "negative": "a", "neg_1": "b", "hard_neg_2": ["c", "d"]}])
    assert [row.negatives for row in read(path)] == [("a", "b", "c", "d")]
    unread = {}
    assert [row.negatives for row in read(path, unread=unread, columns={"negative": "neg_1"})] == [("b",)]
    assert list(unread) == ["negative", "hard_neg_2"]


def test_numbered_negatives_give_the_losses_of_a_list(tmp_path, write_config):
    """The same rows in two shapes are the same training."""
    rows = [{**row, "negative_1": f"no {n}", "negative_2": f"nor {n}"} for n, row in enumerate(PAIRS * 4)]
    for n, row in enumerate(rows):
        row["anchor"] += f" of {n}"
    listed = [{"anchor": r["anchor"], "positive": r["positive"], "negative": [r["negative_1"], r["negative_2"]]} for r in rows]
    losses = []
    for name, shape in (("a", rows), ("b", listed)):
        source = {"source": "jsonl", "path": str(written(tmp_path / f"{name}.jsonl", shape)), "task": "t"}
        ended = gist("train", write_config(name, data={"train": [source]}, training={"batch_size": 8, "max_steps": 2}))
        assert ended.code == 0, ended.err
        assert "16 rows: 16 with 2 negatives" in ended.err
        lines = (tmp_path / "runs" / name / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines])
    assert losses[0] == losses[1]


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_columns_that_are_not_read_are_said(tmp_path, ending):
    """What a user gave and nobody reads may be the very thing they wanted trained on."""
    unread = {}
    read(written(tmp_path / f"f.{ending}", [{"id": 1, **PAIRS[0], "source": "web"}]), unread=unread)
    assert list(unread) == ["id", "source"]


def test_plan_and_train_say_what_is_not_read(tmp_path, write_config):
    """Once a command, by source, with how many rows have how many negatives and several positives."""
    rows = [{"id": n, **PAIRS[n % 4], "negative": ["x", "y"][: n % 3]} for n in range(15)]
    rows[0]["positive"] = ["one", "two"]
    path = write_config(data={"train": [{"source": "jsonl", "path": str(written(tmp_path / "f.jsonl", rows))}]})
    for command in ("plan", "train"):
        ended = gist(command, path)
        assert ended.code == 0, ended.err
        assert "data.train[0]: columns that are not read: id" in ended.err
        assert "15 rows: 5 with no negatives, 5 with 1 negative, 5 with 2 negatives, 1 with several positives" in ended.err
    (source,) = json.loads(gist("plan", path, "--json").out)["sources"]
    assert source["rows_by_negatives"] == {"0": 5, "1": 5, "2": 5}
    assert source["unread_columns"] == ["id"]


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize(("column", "values"), [("label", [1, 0, 1, 0]), ("similarity", [0.9, 0.1, 0.8, 0.3])])
def test_judged_pairs_are_not_trained_as_positives(tmp_path, ending, column, values):
    """Half of what was trained as pairs that belong together did not; with a condition, those that do are."""
    path = written(tmp_path / f"f.{ending}", [{**row, column: value} for row, value in zip(PAIRS, values, strict=True)])
    with pytest.raises(UserError, match=f'column "{column}"') as caught:
        read(path)
    (fault,) = caught.value.faults
    condition = json.loads(fault.fix.split("where: ")[1].split(" on the source")[0])
    found = read(path, where=condition)
    assert [row is not None for row in found] == [value > 0.5 for value in values]
    assert len([row for row in read(path, where=f"{column} >= 0") if row is not None]) == 4


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("label", [1, 1, 1, 1]),
        ("label", ["intent a", "intent b", "a", "b"]),
        ("label", [0, 17, 4, 76]),
        ("score", [1.0, 1.0, 1.0, 1.0]),
        ("score", [[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.6, 0.4]]),
    ],
)
def test_what_judges_nothing_is_no_reason_to_refuse(tmp_path, column, values):
    """A class beside triplets, a label that all share, the scores of a row's own candidates."""
    rows = [{**row, column: value} for row, value in zip(PAIRS, values, strict=True)]
    unread = {}
    assert len(read(written(tmp_path / "f.jsonl", rows), unread=unread)) == 4
    assert list(unread) == [column]


def test_rows_that_where_leaves_out_are_counted(tmp_path, write_config):
    """Neither lost without a word nor called bad; one that can't be compared is a bad row."""
    rows = [{**PAIRS[n % 4], "anchor": f"q {n}", "clicks": n % 3} for n in range(24)]
    source = {"source": "jsonl", "path": str(written(tmp_path / "f.jsonl", rows)), "where": "clicks > 0"}
    planned = json.loads(gist("plan", write_config(data={"train": [source]}), "--json").out)
    assert (planned["dropped"]["filtered"], planned["rows"], planned["sources"][0]["rows"]) == (8, 24, 16)
    rows[3]["clicks"] = "many"
    (bad,) = [row for row in read(written(tmp_path / "g.jsonl", rows), where="clicks > 0") if isinstance(row, Fault)]
    assert 'row 4: "clicks" is not a number' in bad.where
    with pytest.raises(UserError, match='no column "klicks"'):
        read(tmp_path / "f.jsonl", where="klicks > 0")


@pytest.mark.parametrize(("delimiter", "ending"), [(";", "csv"), ("\t", "csv"), ("|", "csv"), (";", "tsv")])
def test_any_delimiter(tmp_path, delimiter, ending):
    """Spreadsheets of half of Europe write semicolons."""
    path = tmp_path / f"f.{ending}"
    path.write_text(f'\ufeffanchor{delimiter}positive\n"a{delimiter}b"{delimiter}c, d\n', encoding="utf-8")
    (row,) = read(path, source="csv", delimiter=delimiter)
    assert (row.anchor, row.positives) == (f"a{delimiter}b", ("c, d",))


def test_files_without_a_header(tmp_path):
    """MS MARCO's triples have none: the first row would be lost, and name the columns."""
    path = tmp_path / "triples.tsv"
    path.write_text("q1\tp1\tn1\nq2\tp2\tn2\n")
    rows = read(path, source="csv", header=False, columns={"anchor": "1", "positive": "2", "negative": "3"})
    assert [(row.anchor, *row.positives, *row.negatives) for row in rows] == [("q1", "p1", "n1"), ("q2", "p2", "n2")]


def test_folders_of_save_to_disk(tmp_path):
    """What people have after a day of preparing data with `datasets`, with splits or without."""
    table = datasets.Dataset.from_list(PAIRS)
    table.save_to_disk(tmp_path / "plain")
    datasets.DatasetDict({"train": table, "dev": table.select([0])}).save_to_disk(tmp_path / "splits")
    assert [row.anchor for row in read(tmp_path / "plain", source="hub")] == [row["anchor"] for row in PAIRS]
    assert len(read(tmp_path / "splits", source="hub", split="dev")) == 1
    assert np.all([row.task == "splits" for row in read(tmp_path / "splits", source="hub")])


@pytest.mark.parametrize("written_as", ['["a", "b, c"]', "['a', 'b, c']"])
def test_lists_that_a_table_has_as_text(tmp_path, written_as):
    """pandas writes a list into a CSV file as Python does: as one text it would be a negative that no retriever meets."""
    path = tmp_path / "f.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["anchor", "positive", "negative"], ["q", "[1] as cited", written_as]])
    (row,) = read(path)
    assert (row.positives, row.negatives) == (("[1] as cited",), ("a", "b, c"))


def workbook(path, sheets):
    """An Excel file of these sheets: name -> rows."""
    book = openpyxl.Workbook()
    book.remove(book.active)
    for name, rows in sheets.items():
        sheet = book.create_sheet(name)
        for row in rows:
            sheet.append(row)
    book.save(path)
    return path


def test_a_workbook_is_read_as_the_same_table_in_csv(tmp_path):
    """An empty row between, a short row and a number are what people have in their sheets."""
    table = [["anchor", "positive", "neg_1", "neg_2"], ["q1", " a1 ", "n1", "n2"], [None], ["q2", "a2"], ["q3", 4, None, "n3"]]
    path = workbook(tmp_path / "f.xlsx", {"notes": [["nothing", "here"], ["to", "see"]], "FAQ": table})
    good, second, bad = read(path, sheet="FAQ")
    assert (good.anchor, good.positives, good.negatives) == ("q1", ("a1",), ("n1", "n2"))
    assert (second.positives, second.negatives) == (("a2",), ())
    assert isinstance(bad, Fault)
    assert bad.where == 'data.train[0]: f.xlsx, row 3: "positive" is not a string'
    with pytest.raises(UserError, match=r'the columns "nothing", "here"'):
        read(path)
    plain = workbook(tmp_path / "plain.xlsx", {"one": table[1:2]})
    (row,) = read(plain, header=False, columns={"anchor": "1", "positive": "2", "negative": "4"})
    assert (row.anchor, row.negatives) == ("q1", ("n2",))


def test_faults_of_a_workbook(tmp_path, monkeypatch):
    """A file of another kind under that name, a slip in the sheet's, and a machine without the package."""
    (tmp_path / "text.xlsx").write_text("anchor,positive\na,b\n")
    with pytest.raises(UserError, match=r"save it again, or as CSV"):
        read(tmp_path / "text.xlsx")
    path = workbook(tmp_path / "f.xlsx", {"FAQ": [["anchor", "anchor", "positive"], ["a", "b", "c"]]})
    with pytest.raises(UserError, match=r'a sheet "faq"'):
        read(path, sheet="faq")
    with pytest.raises(UserError, match=r'two columns "anchor"'):
        read(path)
    with pytest.raises(UserError, match="no rows"):
        read(workbook(tmp_path / "empty.xlsx", {"FAQ": []}))
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    with pytest.raises(UserError, match=r"gist-train\[excel\]"):
        read(path)


def annotation(*choices, cancelled=False, kind="choices", name="intent"):
    result = {"from_name": name, "to_name": "text", "type": kind, "value": {kind: list(choices)}}
    return {"was_cancelled": cancelled, "result": [result] if choices else []}


def test_an_export_of_label_studio_is_a_row_a_task(tmp_path):
    """A task that was skipped has no label; of several annotators the first counts."""
    tasks = [
        {"data": {"text": "a", "lang": "en"}, "annotations": [annotation("x"), annotation("y")]},
        {"data": {"text": "b"}, "annotations": [annotation("x", cancelled=True), annotation("y", "z")]},
        {"data": {"text": "c"}, "annotations": []},
        {"data": {"text": "d"}, "annotations": [annotation(), annotation(5, kind="rating", name="stars")]},
        {"data": "e", "annotations": [annotation("x")]},
    ]
    path = tmp_path / "export.json"
    path.write_text(json.dumps(tasks))
    assert list(json_records(TableFile(path, "it"))) == [
        {"text": "a", "lang": "en", "intent": "x"},
        {"text": "b", "intent": ["y", "z"]},
        {"text": "c"},
        {"text": "d", "stars": 5},
        tasks[4],
    ]


def test_what_label_studio_got_of_pairs_trains(tmp_path):
    """Texts that annotators wrote are in the control's name, too."""
    answer = {"from_name": "positive", "to_name": "q", "type": "textarea", "value": {"text": ["an answer"]}}
    task = {
        "data": {"anchor": "a question"},
        "annotations": [{"result": [answer, {"from_name": "broken"}, 3]}],
    }
    (tmp_path / "export.json").write_text(json.dumps([task]))
    (row,) = read(tmp_path / "export.json", source="jsonl")
    assert (row.anchor, row.positives) == ("a question", ("an answer",))


def test_half_of_a_character_in_an_array_is_refused(tmp_path):
    """The parser makes a question mark of it, and nobody asked for one. Whole pairs, and backslashes before a u, are texts."""
    path = tmp_path / "rows.json"
    whole = [{"anchor": "\U0001f600" * 40 + "\\ud800" + "한" * n, "positive": f"p{n}"} for n in range(60)]
    path.write_text(json.dumps(whole))
    with mock.patch.object(formats, "READ_BYTES", 64):
        assert [row.anchor for row in read(path, source="jsonl")] == [row["anchor"] for row in whole]
        for half in ("\ud800", "\udc00", "\udc00\ud800"):
            path.write_text(json.dumps([*whole, {"anchor": f"x{half}", "positive": "p"}]))
            with pytest.raises(UserError, match="half of a surrogate pair"):
                read(path, source="jsonl")


@pytest.mark.parametrize(
    "change", [{"value": None}, {"value": "a"}, {"type": ["choices"]}, {"from_name": ["a"]}, {"from_name": None}]
)
def test_an_odd_answer_of_label_studio_is_left_out(tmp_path, change):
    """Plug-ins write what they like; a traceback would be for one answer of thousands."""
    odd = annotation("x")
    odd["result"][0] |= change
    path = tmp_path / "export.json"
    path.write_text(json.dumps([{"data": {"text": "a"}, "annotations": [odd]}]))
    assert list(json_records(TableFile(path, "it"))) == [{"text": "a"}]


@pytest.mark.parametrize("documents", [None, 5, [["d"]], "d"])
def test_odd_documents_of_llama_index_are_a_bad_row(tmp_path, documents):
    """One query of a file that was written by hand."""
    path = tmp_path / "pairs.json"
    parts = {"queries": {"q": "a", "r": "b"}, "corpus": {"d": "c"}, "relevant_docs": {"q": documents, "r": ["d"]}}
    path.write_text(json.dumps(parts))
    first, second = read(path, source="jsonl")
    assert isinstance(first, Fault)
    assert (second.anchor, second.positives) == ("b", ("c",))


def test_what_an_array_or_a_table_may_not_hold_is_told(tmp_path):
    """Python's json writes NaN; a Mac of old ends lines by a carriage return."""
    path = tmp_path / "rows.json"
    path.write_text('[{"anchor": "a", "positive": "p", "x": NaN}]')
    with pytest.raises(UserError, match=r"JSON Lines \(\.jsonl\) it may hold nan"):
        read(path, source="jsonl")
    table = tmp_path / "rows.csv"
    table.write_bytes(b"anchor,positive\ra,b\rc,d\r")
    with pytest.raises(UserError, match="end in a carriage return alone"):
        read(table)
