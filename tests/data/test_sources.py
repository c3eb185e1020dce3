"""The readers: what a good file yields, what a bad row says, what a broken file says."""

import csv
import gzip
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gist_train.config.errors import Fault, UserError
from gist_train.config.sources import Columns, CsvSource, JsonlSource, MediSource, ParquetSource, Prompts
from gist_train.data.fingerprints import content_hash
from gist_train.data.opening import files_of
from gist_train.data.rows import Row
from gist_train.data.sources import read_rows

WHERE = "data.train[2]"
MEND = "drop the row, or set data.on_bad_row: skip"
GOOD = {"anchor": "a", "positive": "p", "negative": "n"}


def jsonl(path: Path, *rows: Any) -> JsonlSource:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return JsonlSource(path=str(path))


def text(path: Path, content: str | bytes) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def read(source: Any, **options: Any) -> list[Row | Fault]:
    return list(read_rows(source, WHERE, **options))


def refused(source: Any) -> str:
    with pytest.raises(UserError) as caught:
        read(source)
    return str(caught.value)


def one_fault(source: Any) -> Fault:
    (fault,) = [row for row in read(source) if isinstance(row, Fault)]
    assert fault.fix == MEND
    return fault


def plain(anchor: str, positive: str, *negatives: str, task: str) -> Row:
    return Row(anchor, (positive,), negatives, task, ("", "", ""))


def write_parquet(path: Path, **columns: Any) -> str:
    pq.write_table(pa.table(columns), path)
    return str(path)


# Good files


def test_jsonl_reads_texts_lists_and_rows_without_negative(tmp_path):
    """Lists must not become one text, and null, [] and an absent key must all mean "no negative", not a bad row."""
    rows = [
        {"anchor": " a\n", "positive": ["p1", " p2 "], "negative": ["n1", "n2"], "task": "t"},
        {"anchor": "a", "positive": "p", "negative": "n"},
        {"anchor": "a", "positive": "p", "negative": None, "task": None},
        {"anchor": "a", "positive": "p", "negative": [], "task": " "},
        {"anchor": "a", "positive": "p"},
    ]
    found = read(jsonl(tmp_path / "faq.v2.jsonl", *rows))
    assert found[0] == Row("a", ("p1", "p2"), ("n1", "n2"), "t", ("", "", ""))
    assert found[1] == plain("a", "p", "n", task="faq.v2")
    assert found[2:] == [plain("a", "p", task="faq.v2")] * 3


def test_aliases_explicit_columns_task_and_prompts(tmp_path):
    """A named column must win over the usual one beside it, and the source's task over the row's."""
    row = {"query": "q", "pos": "p", "neg": "n", "task_name": "row", "title": "x"}
    source = jsonl(tmp_path / "f.jsonl", row)
    assert read(source) == [plain("q", "p", "n", task="row")]
    prompts = Prompts(anchor="query: ", positive="passage: ")
    source = JsonlSource(path=source.path, columns=Columns(anchor="title"), task="fixed", prompts=prompts)
    assert read(source) == [Row("x", ("p",), ("n",), "fixed", ("query: ", "passage: ", ""))]


def test_first_alias_wins(tmp_path):
    """`anchor` goes before `query`: the other order would train on whichever column came first in the file."""
    source = jsonl(tmp_path / "f.jsonl", {"query": "q", "positives": ["ps"], "pos": "po", **GOOD, "negatives": ["x"]})
    assert read(source) == [plain("a", "p", "n", task="f")]


def test_rows_of_one_file_may_have_other_keys(tmp_path):
    """Columns are found for each row: those of the first would make every row after it a bad one."""
    source = jsonl(tmp_path / "f.jsonl", GOOD, {"query": "q", "pos": "p"}, GOOD)
    assert read(source) == [plain("a", "p", "n", task="f"), plain("q", "p", task="f"), plain("a", "p", "n", task="f")]


def test_csv_with_bom_quotes_newlines_and_empty_negative(tmp_path):
    """A byte-order mark would hide the first column; an empty cell must be no negative, not an empty text."""
    path = text(tmp_path / "f.csv", '\ufeffanchor, positive,negative\r\n"a, ""x""\nb",p,n\r\nä,p, \r\n')
    assert read(CsvSource(path=path)) == [plain('a, "x"\nb', "p", "n", task="f"), plain("ä", "p", task="f")]


def test_csv_field_longer_than_the_modules_limit(tmp_path):
    """csv's own limit of 131,072 characters would refuse a long document."""
    (row,) = read(CsvSource(path=text(tmp_path / "f.csv", f"anchor,positive\na,{'p' * 200_000}\n")))
    assert isinstance(row, Row)
    assert len(row.positives[0]) == 200_000


def test_tsv_has_tabs_and_no_quoting(tmp_path):
    """With CSV's quoting a text that begins with a quote would swallow the rows after it."""
    content = 'query\tpos\ttask\n"a, b\tp\tt\nc\t"p" q\t\n'
    expected = [plain('"a, b', "p", task="t"), plain("c", '"p" q', task="f")]
    assert read(CsvSource(path=text(tmp_path / "f.tsv", content))) == expected
    assert read(CsvSource(path=text(tmp_path / "f.tsv.gz", gzip.compress(content.encode())))) == expected


def test_parquet_strings_lists_and_nulls(tmp_path):
    """List columns and nulls come out of Arrow as they come out of JSON; other columns are not read."""
    path = write_parquet(
        tmp_path / "f.parquet", anchor=["a", "b"], positive=[["p", "q"], ["r"]], negative=[None, ["n"]], x=[1, 2]
    )
    assert read(ParquetSource(path=path)) == [Row("a", ("p", "q"), (), "f", ("", "", "")), plain("b", "r", "n", task="f")]


def test_parquet_row_numbers_go_on_over_batches(tmp_path):
    """A number that starts anew with every batch would send the user to the wrong row."""
    anchors = ["a"] * 10_000
    anchors[9_000] = ""
    path = write_parquet(tmp_path / "f.parquet", anchor=anchors, positive=["p"] * 10_000)
    assert one_fault(ParquetSource(path=path)).where == f'{WHERE}: f.parquet, row 9,001: "anchor" is empty'


MEDI = [
    {"query": ["Find: ", " q "], "pos": ["Doc: ", "p"], "neg": ["Neg: ", "n"], "task_name": "t"},
    {"query": ["Find: ", "q", 0], "pos": ["Doc: ", "p", 0], "neg": ["Neg: ", "n", 0], "task_name": "t"},
    {"query": "q", "pos": ["", "p"]},
    {"query": "q", "pos": ["", "p"], "neg": []},
]


def test_medi_pairs_three_element_form_and_plain_strings(tmp_path):
    """Instruction and text must not change places, nor the older form's 0 or an absent negative be a bad row."""
    path = text(tmp_path / "medi.json", "\ufeff \n" + json.dumps(MEDI))
    assert read(MediSource(path=path)) == [plain("q", "p", "n", task="t")] * 2 + [plain("q", "p", task="medi")] * 2


def test_keep_instructions_makes_them_prompts_as_written(tmp_path):
    """The blank at an instruction's end is part of what the model read: stripped, every token sequence would change."""
    rows = read(MediSource(path=text(tmp_path / "medi.json", json.dumps(MEDI))), keep_instructions=True)
    assert [row.prompts for row in rows if isinstance(row, Row)] == [("Find: ", "Doc: ", "Neg: ")] * 2 + [("", "", "")] * 2


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("f.csv", "question;answer\na;b\n", "commas between the columns"),
        ("f.csv", "question\tanswer\na\tb\n", "commas between the columns"),
        ("f.jsonl", '["a", "b"]', "an array of objects"),
        ("f.jsonl", '[\n  {"anchor": "a", "positive": "p"},\n', "broken JSON"),
        ("f.json", '{"queries": {"a": "b"}}', "relevant_docs"),
        ("f.json", '{\n "mode": "text", "queries": [], "corpus": {}, "relevant_docs": {}}', "relevant_docs"),
        ("f.csv", "ancor,positive\na,p\n", 'did you mean "ancor"?'),
    ],
)
def test_what_people_save_by_mistake_is_told(tmp_path, name, content, said):
    """Spreadsheets save semicolons and scripts save arrays: "drop the row" would send the user the wrong way."""
    kind = CsvSource if name.endswith("csv") else JsonlSource
    with pytest.raises(UserError) as caught:
        read(kind(path=text(tmp_path / name, content)))
    assert said in str(caught.value)


def test_medi_pairs_in_a_table(tmp_path):
    """MEDI as lines, or in Parquet: taken for lists of texts, the instruction would be trained on as a positive."""
    lines = text(tmp_path / "f.jsonl", "".join(json.dumps(row) + "\n" for row in MEDI[:2]))
    pq.write_table(pa.Table.from_pylist([MEDI[0], MEDI[0]]), tmp_path / "f.parquet")
    for source in (JsonlSource(path=lines), ParquetSource(path=str(tmp_path / "f.parquet"))):
        assert read(source) == [plain("q", "p", "n", task="t")] * 2
        assert [row.prompts for row in read(source, keep_instructions=True)] == [("Find: ", "Doc: ", "Neg: ")] * 2


def test_a_file_whose_name_is_not_utf8_is_refused(tmp_path):
    """Its name would be the task of its rows, which no file of ours could hold."""
    (tmp_path / os.fsdecode(b"caf\xe9.jsonl")).write_text("{}")
    with pytest.raises(UserError, match="a file whose name is UTF-8"):
        files_of(JsonlSource(path=str(tmp_path / "*.jsonl")), WHERE)


def test_gzip_of_every_text_format_equals_the_plain_file(tmp_path):
    """The ending .gz must be peeled off for reading and for the task's name alike."""
    table = "anchor,positive\na,p\n"
    for kind, name, content in [
        (JsonlSource, "f.jsonl", json.dumps(GOOD)),
        (CsvSource, "f.csv", table),
        (MediSource, "f.json", json.dumps(MEDI)),
    ]:
        path = text(tmp_path / name, content)
        packed = text(tmp_path / f"{name}.gz", gzip.compress(content.encode()))
        assert read(kind(path=path)) == read(kind(path=packed))


# Which files


def test_glob_is_sorted_and_leaves_folders_out(tmp_path):
    """Rows in the order of the file system would give another corpus, and other batches, on another machine."""
    for name in ("b", "c", "a"):
        jsonl(tmp_path / f"{name}.jsonl", {**GOOD, "anchor": name})
    (tmp_path / "d.jsonl").mkdir()
    source = JsonlSource(path=str(tmp_path / "*.jsonl"))
    assert [path.name for path in files_of(source, WHERE)] == ["a.jsonl", "b.jsonl", "c.jsonl"]
    assert [row.anchor for row in read(source) if isinstance(row, Row)] == ["a", "b", "c"]


def test_glob_over_folders_names_the_folder_in_faults(tmp_path):
    """Two files called train.jsonl: the name alone does not say where the bad row is."""
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
    jsonl(tmp_path / "x" / "train.jsonl", GOOD)
    jsonl(tmp_path / "y" / "train.jsonl", GOOD, {**GOOD, "anchor": ""})
    fault = one_fault(JsonlSource(path=str(tmp_path / "**" / "train.jsonl")))
    assert fault.where.startswith(f"{WHERE}: {tmp_path / 'y' / 'train.jsonl'}, row 2")


def test_name_with_brackets_is_no_pattern(tmp_path):
    """`data[1].jsonl` as a pattern would look for data1.jsonl."""
    assert len(read(jsonl(tmp_path / "data[1].jsonl", GOOD))) == 1


def test_no_file_and_a_folder_are_refused_with_their_key(tmp_path):
    """A glob that matches nothing must not be an empty training set."""
    for path, words in ((tmp_path / "none*.jsonl", "matches no file"), (tmp_path, "a folder")):
        with pytest.raises(UserError) as caught:
            files_of(JsonlSource(path=str(path)), WHERE)
        assert caught.value.faults[0].where == f"{WHERE}.path"
        assert words in str(caught.value)


def test_a_file_that_may_not_be_read_is_refused(tmp_path, monkeypatch):
    """Found out at the start, not after an hour of reading the files before it."""
    source = jsonl(tmp_path / "f.jsonl", GOOD)
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(UserError, match="may read"):
        files_of(source, WHERE)


def test_content_hash_is_blake2b_128_of_the_bytes(tmp_path):
    """Another hash would rebuild every corpus in every cache."""
    path = Path(text(tmp_path / "f", b"x" * 300_000))
    assert content_hash(path) == hashlib.blake2b(b"x" * 300_000, digest_size=16).hexdigest()


# Bad rows


def test_fault_names_file_row_and_field_and_mends(tmp_path):
    """The message is what the user goes by: source, file, row with thousands parted, field, and what stands there."""
    source = jsonl(tmp_path / "tickets.jsonl", *[GOOD] * 1203, {**GOOD, "positive": " "}, GOOD)
    rows = read(source)
    assert len(rows) == 1205
    assert rows[1203] == Fault(
        f'{WHERE}: tickets.jsonl, row 1,204: "positive" is empty', '" "', "a non-empty string, or a list of them", MEND
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"anchor": ""}, '"anchor" is empty'),
        ({"anchor": 3}, '"anchor" is not a string'),
        ({"anchor": None}, '"anchor" is not a string'),
        ({"anchor": ["a"]}, '"anchor" is no pair'),
        ({"anchor": ["Find: ", ""]}, '"anchor" is empty'),
        ({"anchor": ["Find: ", "a"], "positive": ["p", "q", "r"]}, '"positive" is no pair'),
        ({"positive": []}, '"positive" is empty'),
        ({"positive": ["p", ""]}, '"positive[1]" is empty'),
        ({"positive": {"body": "p"}}, '"positive" is not a string'),
        ({"negative": ""}, '"negative" is empty'),
        ({"negative": ["n", None]}, '"negative[1]" is not a string'),
        ({"task": 7}, '"task" is not a string'),
        ({"anchor": "x\ud800"}, '"anchor" holds half of a surrogate pair'),
    ],
)
def test_jsonl_bad_values(tmp_path, change, said):
    """Each of these would otherwise reach the tokenizer or the disk, hours later and without a row number."""
    fault = one_fault(jsonl(tmp_path / "f.jsonl", GOOD, {**GOOD, **change}, GOOD))
    assert fault.where == f"{WHERE}: f.jsonl, row 2: {said}"
    str(fault).encode()  # the message itself must be printable


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"{not json}", "not JSON"),
        (b'{"anchor": ' + b"9" * 5000 + b"}", "not JSON"),
        (b"[" * 200_000, "not JSON"),
        (b'["a", "p"]', "not an object"),
        (b'{"anchor": "\xff"}', "not UTF-8"),
        (b'{"anchor": "a", "text": "p"}', '"positive" is missing'),
    ],
)
def test_jsonl_bad_lines_do_not_end_the_file(tmp_path, line, said):
    """A bad line is one bad row: the rows after it must still come. A blank line is no row, but counts as a line."""
    good = json.dumps(GOOD).encode()
    rows = read(JsonlSource(path=text(tmp_path / "f.jsonl", b"\n".join([good, b" ", line, good]))))
    assert [type(row) for row in rows] == [Row, Fault, Row]
    assert rows[1].where == f"{WHERE}: f.jsonl, row 3: {said}"


def test_csv_ragged_rows_and_loose_quotes_are_bad_rows(tmp_path):
    """A comma too many would shift texts into other columns. Rows after a bad one keep their number."""
    content = 'anchor,positive,negative\na,p,n\na,p\n\na,p,n,x\n"a" b,p,n\na,,n\na,p,n\n'
    rows = read(CsvSource(path=text(tmp_path / "f.csv", content)))
    said = [row.where.removeprefix(f"{WHERE}: f.csv, row ") for row in rows if isinstance(row, Fault)]
    ragged = "not as many fields as the header"
    assert said == [f"2: {ragged}", f"4: {ragged}", "5: broken quoting", '6: "positive" is empty']
    assert isinstance(rows[-1], Row)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"pos": ["i", "p"]}, '"query" is missing'),
        ({"query": ["i", "q"], "pos": ["p"]}, '"pos" is no pair'),
        ({"query": ["i", "q"], "pos": ["i", "p", "r"]}, '"pos" is no pair'),
        ({"query": ["i", " "], "pos": ["i", "p"]}, '"query" is empty'),
        ({"query": ["i", "q"], "pos": ["i", None]}, '"pos" is not a string'),
        ({"query": [1, "q"], "pos": ["i", "p"]}, 'the instruction of "query" is not a string'),
        ({"query": ["i", "q"], "pos": "p", "neg": ["i", ""]}, '"neg" is empty'),
        ({"query": "q", "pos": ["a", "b"]}, '"pos" is a list of texts'),
        ({"query": "q", "pos": "p", "task_name": 1}, '"task_name" is not a string'),
    ],
)
def test_medi_bad_rows(tmp_path, row, said):
    """A list that is no pair must not be read as one: an instruction would become the text."""
    path = text(tmp_path / "medi.json", json.dumps([MEDI[0], row, MEDI[0]]))
    assert one_fault(MediSource(path=path)).where == f"{WHERE}: medi.json, row 2: {said}"


def test_parquet_values_of_another_type_are_bad_rows(tmp_path):
    """Numbers must not be turned into texts in silence, nor a null positive into "None"."""
    path = write_parquet(tmp_path / "f.parquet", anchor=[1], positive=["p"])
    assert one_fault(ParquetSource(path=path)).where.endswith('"anchor" is not a string')
    path = write_parquet(tmp_path / "f.parquet", anchor=["a", "b"], positive=["p", None])
    assert one_fault(ParquetSource(path=path)).where.endswith('row 2: "positive" is not a string')


# Broken files


def test_truncated_gzip_says_how_far_it_was_read(tmp_path):
    """A download that broke off must not be a smaller training set."""
    lines = "".join(json.dumps({**GOOD, "anchor": f"{n} {hashlib.sha256(b'%d' % n).hexdigest()}"}) + "\n" for n in range(20_000))
    table = "anchor,positive\n" + "a,p\n" * 20_000
    for kind, name, content in [
        (JsonlSource, "f.jsonl", lines),
        (CsvSource, "f.csv", table),
        (MediSource, "f.json", json.dumps(MEDI)),
    ]:
        packed = gzip.compress(content.encode())
        path = text(tmp_path / f"{name}.gz", packed[: len(packed) - 9])
        assert f"{WHERE}: {name}.gz" in refused(kind(path=path))
    assert "f.jsonl.gz, after row 1" in refused(JsonlSource(path=str(tmp_path / "f.jsonl.gz")))


def test_plain_text_behind_gz_is_refused(tmp_path):
    """The ending decides: a file that is no gzip must be said, not traced back."""
    assert "cannot be read" in refused(JsonlSource(path=text(tmp_path / "f.jsonl.gz", json.dumps(GOOD))))


def test_csv_that_is_not_utf8_is_refused_with_its_row(tmp_path):
    """Latin-1 decoded anyhow would train on mojibake."""
    said = refused(CsvSource(path=text(tmp_path / "f.csv", b"anchor,positive\na,p\n\xe4,p\n")))
    assert "f.csv, after row 1" in said
    assert "0xe4" in said


def test_csv_quote_that_never_closes_is_refused(tmp_path):
    """As a bad row, skipped, it would lose the rest of the file and count one."""
    said = refused(CsvSource(path=text(tmp_path / "f.csv", 'anchor,positive\na,p\n"a,p\n' + "a,p\n" * 100)))
    assert "from line 3 to" in said


@pytest.mark.parametrize("negative", [None, "negs"])
def test_missing_column_names_the_columns_found(tmp_path, negative):
    """A slip in a column's name would lose every negative in silence, or call every row bad."""
    columns = Columns(anchor="q", positive="p", negative=negative)
    names = ["q", "p", "n"] if negative else ["q", "pp", "n"]
    with open(tmp_path / "f.csv", "w", newline="") as file:
        csv.writer(file).writerows([names, ["a", "b", "c"]])
    jsonl(tmp_path / "f.jsonl", dict.fromkeys(names, "x"))
    write_parquet(tmp_path / "f.parquet", **{name: ["x"] for name in names})
    for kind, ending in ((CsvSource, "csv"), (JsonlSource, "jsonl"), (ParquetSource, "parquet")):
        said = refused(kind(path=str(tmp_path / f"f.{ending}"), columns=columns))
        assert f"f.{ending}: no column for {'negative' if negative else 'positive'}" in said
        assert ", ".join(f'"{name}"' for name in names) in said


def test_first_jsonl_row_without_a_required_key_is_refused(tmp_path):
    """All rows would be bad for one reason: say it once, with the aliases that were looked for."""
    said = refused(jsonl(tmp_path / "f.jsonl", {"title": "t", "body": "b"}))
    assert '"title", "body"' in said
    assert '"anchor" or "query"' in said
    assert "no column for positive" in said


def test_named_negative_may_be_absent_from_some_jsonl_rows(tmp_path):
    """The check for a misspelt column must not refuse a file whose first row merely has no negative."""
    path = jsonl(tmp_path / "f.jsonl", {"anchor": "a", "positive": "p"}, {**GOOD, "hard": "h"}).path
    rows = read(JsonlSource(path=path, columns=Columns(negative="hard")))
    assert rows == [plain("a", "p", task="f"), plain("a", "p", "h", task="f")]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"item": [{"query": "q", "pos": "p"}]}', "begins with"),
        ('"text"', "begins with"),
        ("[1, 2]", "1 in the array"),
        ('[["q", "p"]]', "in the array"),
        ('[{"query": "q", "pos": "p"}', "broken JSON"),
        ('[{"query": "q", "pos": "p"}] x', "broken JSON"),
        (b'[{"query": "\xff", "pos": "p"}]', "UTF8"),
        (b'[{"query": "\xed\xa0\x80", "pos": "p"}]', "UTF-8"),
        ("[]", "no rows"),
        (" \n", "no rows"),
    ],
)
def test_medi_files_that_are_no_array_of_objects(tmp_path, content, said):
    """The streaming parser alone finds no row in most of these and ends as if all were well."""
    assert said in refused(MediSource(path=text(tmp_path / "medi.json", content)))


@pytest.mark.parametrize("content", ["", "\n\n", "anchor,positive\n"])
def test_files_without_rows_are_refused(tmp_path, content):
    """An empty file in a glob is a step before this one that failed."""
    path = text(tmp_path / "f", content)
    assert "no rows" in refused(CsvSource(path=path))
    if not content.strip():
        assert "no rows" in refused(JsonlSource(path=path))


def test_broken_parquet_is_refused(tmp_path):
    """Not Parquet, cut off, without rows, or two columns of one name: each said in words."""
    assert "Parquet's reader refuses" in refused(ParquetSource(path=text(tmp_path / "f.parquet", "anchor,positive\na,p\n")))
    whole = Path(write_parquet(tmp_path / "g.parquet", anchor=["a"], positive=["p"])).read_bytes()
    assert "refuses" in refused(ParquetSource(path=text(tmp_path / "f.parquet", whole[:-20])))
    assert "no rows" in refused(ParquetSource(path=write_parquet(tmp_path / "h.parquet", anchor=[], positive=[])))
    pq.write_table(pa.table([["a"], ["b"], ["p"]], names=["anchor", "anchor", "positive"]), tmp_path / "i.parquet")
    assert "refuses" in refused(ParquetSource(path=str(tmp_path / "i.parquet")))


def test_prompts_stand_before_the_texts_of_pairs_too(tmp_path):
    """Instructions that are dropped must not take the source's own prompts with them."""
    lines = text(tmp_path / "f.jsonl", json.dumps(MEDI[0]))
    (row,) = read(JsonlSource(path=lines, prompts=Prompts(anchor="query: ")))
    assert row.prompts == ("query: ", "", "")


def test_two_csv_columns_of_one_name_are_refused(tmp_path):
    """Half of the positives would be lost without a word."""
    with pytest.raises(UserError, match='two columns "positive"'):
        read(CsvSource(path=text(tmp_path / "f.csv", "anchor,positive,positive\na,p,q\n")))


def test_a_pipe_is_refused(tmp_path):
    """It would be hashed to its end, and then have nothing to read; or be waited for without end."""
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(UserError, match="a pipe or device"):
        files_of(JsonlSource(path=str(tmp_path / "pipe.jsonl")), WHERE)


def test_dates_beyond_the_calendar_name_the_file(tmp_path):
    """Arrow holds years that Python does not."""
    pq.write_table(pa.table({"anchor": pa.array([2**62], pa.timestamp("us")), "positive": ["p"]}), tmp_path / "f.parquet")
    with pytest.raises(UserError, match=r"f\.parquet"):
        read(ParquetSource(path=str(tmp_path / "f.parquet")))
