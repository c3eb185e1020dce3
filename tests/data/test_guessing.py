"""What is guessed of a file's first rows, what is refused, and that the reader finds what was guessed."""

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import TypeAdapter

from gist_train.config.errors import Fault, UserError
from gist_train.config.sources import ClassificationSource, Source
from gist_train.data.rows import Row
from gist_train.data.sources import read_labelled, read_rows
from gist_train.starter.guessing import SAMPLED, GuessedFile, judged

PAIRS = [{"anchor": f"how do I open door {i}", "positive": f"turn the key of door {i}"} for i in range(40)]
ASKED = [{"question": row["anchor"], "answer": row["positive"]} for row in PAIRS]
LABELLED = [{"text": f"a sentence number {i}", "label": f"class_{i % 4}"} for i in range(40)]
SCORED = [{"sentence1": f"this is {i}", "sentence2": f"that was {i}", "score": i / 8} for i in range(40)]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """The rows in the format that the path's ending names."""
    plain = Path(path.name.lower().removesuffix(".gz"))
    lines: list[str] = []
    if plain.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
        return path
    if plain.suffix == ".jsonl":
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    elif plain.suffix == ".json":
        lines = [json.dumps(rows, indent=1)]
    elif plain.suffix == ".tsv":
        lines = ["\t".join(map(str, cells)) + "\n" for cells in (rows[0], *(row.values() for row in rows))]
    else:
        with open(path, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([list(rows[0]), *(list(row.values()) for row in rows)])
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    content = "".join(lines).encode()
    path.write_bytes(gzip.compress(content) if path.name.endswith(".gz") else content)
    return path


def tried(path: Path) -> tuple[GuessedFile, list[Any]]:
    """What the file is taken for, and all its rows by a source that says so; none may be bad."""
    found = judged(path)
    given: dict[str, Any] = {"source": found.sample.source, "path": str(path)}
    if found.use == "labelled":
        given["source"] = "classification"
    if found.columns:
        given["columns"] = found.columns
    source: Source = TypeAdapter(Source).validate_python(given)
    read = read_labelled(source, "it") if isinstance(source, ClassificationSource) else read_rows(source, "it")
    rows: list[Any] = list(read)
    assert [row for row in rows if isinstance(row, Fault)] == []
    return found, rows


def refused(path: Path) -> Fault:
    with pytest.raises(UserError) as caught:
        judged(path)
    (fault,) = caught.value.faults
    return fault


# Formats


@pytest.mark.parametrize(
    ("name", "source"),
    [
        *[("f.jsonl", "jsonl"), ("f.csv", "csv"), ("f.tsv", "csv"), ("f.parquet", "parquet")],
        *[("f.jsonl.gz", "jsonl"), ("f.csv.gz", "csv"), ("f.tsv.gz", "csv"), ("F.JSONL", "jsonl")],
    ],
)
def test_every_format_with_the_usual_and_with_other_names(tmp_path, name, source):
    """A format that is looked at by other means than it is read by would give columns that the reader does not find."""
    path = write(tmp_path / name, PAIRS)
    found, rows = tried(path)
    assert (found.use, found.columns, found.guessed) == ("pairs", {}, False)
    assert (found.sample.source, found.sample.path) == (source, str(path))
    assert [(row.anchor, row.positives) for row in rows] == [(row["anchor"], (row["positive"],)) for row in PAIRS]
    found, others = tried(write(path, ASKED))
    assert found.columns == {"anchor": "question", "positive": "answer"}
    assert others == rows


@pytest.mark.parametrize("name", ["medi.json", "medi.json.gz"])
def test_medi(tmp_path, name):
    """MEDI's pairs are [instruction, text]: as lists of two texts they would train on the instructions."""
    medi = [{"query": ["Find: ", f"q {i}"], "pos": ["Doc: ", f"p {i}"], "neg": ["Doc: ", f"n {i}"]} for i in range(3)]
    medi.append({"query": ["Find: ", "q 3"], "pos": ["Doc: ", "p 3"], "task_name": "t"})
    found, rows = tried(write(tmp_path / name, medi))
    assert (found.use, found.columns, found.usable, found.negatives) == ("medi", {}, 4, [0, 1])
    assert rows[0] == Row("q 0", ("p 0",), ("n 0",), "medi", ("", "", ""))
    assert found.sample.rows[0] == {"query": "q 0", "pos": "p 0", "neg": "n 0"}


def test_a_json_file_that_is_no_medi(tmp_path):
    """An array of other objects, or lines, is the likeliest JSON file; read as MEDI, lists of texts would be instructions."""
    found, rows = tried(write(tmp_path / "f.json", ASKED))
    assert (found.sample.source, len(rows)) == ("jsonl", len(ASKED))
    texts = [{"query": f"q {i}", "pos": ["a", "b"], "neg": [f"n {i}", "m"]} for i in range(3)]
    found, rows = tried(write(tmp_path / "f.json", texts))
    assert (found.sample.source, rows[0].positives, found.negatives) == ("jsonl", ("a", "b"), [2])
    lines = tmp_path / "lines.json"
    lines.write_text("".join(json.dumps(row) + "\n" for row in ASKED))
    assert len(tried(lines)[1]) == len(ASKED)


def test_only_the_first_rows_are_looked_at(tmp_path):
    """A file of many gigabytes would be read twice before a line is written: what follows the first rows must not matter."""
    path = write(tmp_path / "f.jsonl", PAIRS * 6)
    with path.open("a") as file:
        file.write('"not an object"\n' * 10)
    sample = judged(path).sample
    assert (len(sample.rows), sample.bad, sample.whole) == (SAMPLED, 0, False)
    sample = judged(write(path, (PAIRS * 5)[:SAMPLED])).sample
    assert (len(sample.rows), sample.whole) == (SAMPLED, True)


def test_rows_that_can_not_be_read_are_counted(tmp_path):
    """The file would look whole, and plan refuse the rows."""
    path = write(tmp_path / "f.jsonl", PAIRS)
    path.write_text("{not JSON\n" + path.read_text())
    sample = judged(path).sample
    assert (len(sample.rows), sample.bad) == (40, 1)


# Columns


@pytest.mark.parametrize(
    ("names", "columns"),
    [
        (("query", "pos", "neg"), {}),
        (("anchor", "positives", "negatives"), {}),
        (("query", "passage"), {"positive": "passage"}),
        (("query", "text"), {"positive": "text"}),
        (("Query", "Document"), {"anchor": "Query", "positive": "Document"}),
        (("title", "abstract"), {"anchor": "title", "positive": "abstract"}),
        (("body", "title"), {"anchor": "title", "positive": "body"}),
        (("sentence1", "sentence2", "sentence3"), {"anchor": "sentence1", "positive": "sentence2", "negative": "sentence3"}),
        (
            ("premise", "entailment", "contradiction"),
            {"anchor": "premise", "positive": "entailment", "negative": "contradiction"},
        ),
        (("query", "positive_passage", "Hard Negative"), {"positive": "positive_passage", "negative": "Hard Negative"}),
        (("question", "context", "answer"), {"anchor": "question", "positive": "answer"}),
        (("summary", "article"), {"anchor": "article", "positive": "summary"}),
        (("headline", "story"), {"anchor": "headline", "positive": "story"}),
        (("text", "story"), {"anchor": "text", "positive": "story"}),
        (("sent0", "sent1", "hard_neg"), {"anchor": "sent0", "positive": "sent1"}),
    ],
)
def test_columns_by_name_and_by_their_texts(tmp_path, names, columns):
    """The names that public data sets use must be found whatever their order and case, or the user writes the YAML anyway."""
    rows = [{name: f"{name} says {i}" for name in names} for i in range(5)]
    found, read = tried(write(tmp_path / "f.jsonl", rows))
    assert found.columns == columns
    assert read[0].anchor == f"{found.roles['anchor']} says 0"
    assert read[0].positives == (f"{found.roles['positive']} says 0",)
    assert len(read[0].negatives) == ("negative" in found.roles)


def test_a_column_with_gaps_is_called_one(tmp_path):
    """A user whose columns have the right names already must not be told to rename them, and nothing else."""
    rows = [*({"anchor": f"a man {i}", "positive": f"he walks {i}"} for i in range(3)), {"anchor": "a dog", "positive": ""}]
    fault = refused(write(tmp_path / "f.jsonl", rows))
    assert '"anchor", "positive" (filled in 3 of 4 rows looked at), and no telling' in fault.found
    assert fault.fix.startswith("fill them")


def test_a_guess_is_called_one(tmp_path):
    """Two unknown columns may be the wrong way round, or no pair: nobody would be told to sample."""
    assert judged(write(tmp_path / "f.jsonl", [{"headline": f"a man {i}", "story": f"he walks {i}"} for i in range(4)])).guessed
    assert judged(write(tmp_path / "f.jsonl", [{"question": f"a man {i}", "story": f"he walks {i}"} for i in range(4)])).guessed
    assert not judged(write(tmp_path / "f.jsonl", ASKED)).guessed


def test_ids_numbers_addresses_and_marks_are_no_texts(tmp_path):
    """In CSV all is text: an id beside two texts would make three, and a mark such as source: wikipedia an anchor."""
    marks = {"id": "q-17", "url": "https://x.org/a", "date": "2024-01-02", "votes": "12", "source": "wikipedia"}
    rows = [{**marks, "headline": f"a man {i}", "story": f"he walks {i}"} for i in range(40)]
    assert judged(write(tmp_path / "f.csv", rows)).columns == {"anchor": "headline", "positive": "story"}
    rows = [{"source": "wikipedia", "text": f"a man {i}", "summary": f"he walks {i}"} for i in range(40)]
    assert judged(write(tmp_path / "f.csv", rows)).columns == {"anchor": "text", "positive": "summary"}


def test_keys_that_the_first_row_lacks_are_found(tmp_path):
    """JSON Lines may leave a negative out: those of all other rows would be lost in silence."""
    rows = [{"question": "q", "answers": ["a", "b"]}, {"question": "r", "answers": "c", "hard_negatives": ["d", "e"]}]
    found, read = tried(write(tmp_path / "f.jsonl", rows))
    assert found.columns == {"anchor": "question", "positive": "answers"}
    assert found.roles["negative"] == "hard_negatives"  # which the reader knows by itself
    assert found.negatives == [0, 2]
    assert [row.negatives for row in read] == [(), ("d", "e")]


@pytest.mark.parametrize(("name", "columns"), [("task_name", {}), ("dataset", {"task": "dataset"}), ("Task", {"task": "Task"})])
def test_task_column(tmp_path, name, columns):
    """Without it rows of all tasks would be one task, and their batches mixed."""
    found, rows = tried(write(tmp_path / "f.jsonl", [{**row, name: f"t{i % 2}"} for i, row in enumerate(PAIRS)]))
    assert (found.columns, found.roles["task"]) == (columns, name)
    assert {row.task for row in rows} == {"t0", "t1"}


def test_a_usual_name_over_something_else_is_refused(tmp_path):
    """The reader takes "negative" by its name: every row would be a bad one, and the YAML would not say why."""
    assert refused(write(tmp_path / "f.jsonl", [{**row, "negative": 0} for row in PAIRS])).found == '"negative" with 0'


# Labelled texts and scored pairs


@pytest.mark.parametrize("name", ["f.jsonl", "f.csv", "f.tsv.gz", "f.parquet"])
def test_labelled_texts(tmp_path, name):
    """Trained on as pairs, the class's name would be the positive of every text."""
    found, rows = tried(write(tmp_path / name, LABELLED))
    assert (found.use, found.columns, found.usable) == ("labelled", {}, 40)
    assert [row.label for row in rows[:2]] == ["class_0", "class_1"]
    renamed = [{"id": str(i), "utterance": row["text"], "intent": row["label"]} for i, row in enumerate(LABELLED)]
    found, rows = tried(write(tmp_path / name, renamed))
    assert (found.use, found.columns) == ("labelled", {"text": "utterance", "label": "intent"})
    assert len(rows) == 40


def test_rows_that_are_mined_for_nothing_are_not_counted(tmp_path):
    """The batch would be larger than what is mined: a text that stands there twice, or alone in its class, gives no triplet."""
    rows = [*LABELLED[:8], LABELLED[0], {"text": "only once", "label": "alone"}]
    assert judged(write(tmp_path / "f.jsonl", rows)).usable == 6


def test_labels_beside_a_pair_or_that_never_repeat(tmp_path):
    """A category beside question and answer is no reason to drop the answers; a label of its own for each text is no class."""
    found = judged(write(tmp_path / "f.jsonl", [{**row, "category": "a"} for row in ASKED]))
    assert (found.use, found.columns) == ("pairs", {"anchor": "question", "positive": "answer"})
    refused(write(tmp_path / "f.jsonl", [{"text": f"sentence {i}", "label": f"l{i}"} for i in range(9)]))


def test_scored_pairs(tmp_path):
    """Pairs of score 0 would be trained together as anchor and positive."""
    found = judged(write(tmp_path / "f.tsv", SCORED))
    assert (found.use, found.columns) == ("scored", {})
    other = [{"left": row["sentence1"], "right": row["sentence2"], "Score": "1"} for row in SCORED]
    found = judged(write(tmp_path / "f.csv", other))
    assert (found.use, found.columns) == ("scored", {"text1": "left", "text2": "right", "score": "Score"})
    found = judged(write(tmp_path / "f.parquet", SCORED))
    assert (found.use, found.columns) == ("scored", {})


@pytest.mark.parametrize(
    ("names", "values", "where"),
    [
        (("sentence1", "sentence2", "label"), (0, 1), "label == 1"),
        (("premise", "hypothesis", "label"), (0, 1, 2), "label == 0"),
        (("premise", "hypothesis", "label"), (0, 1, 2, -1), "label == 0"),
        (("sentence1", "sentence2", "gold_label"), ("entailment", "neutral", "-"), 'gold_label == "entailment"'),
        (("question1", "question2", "is_duplicate"), (0, 1), "is_duplicate == 1"),
        (("query", "title", "clicked"), (False, True), "clicked == 1"),
        (("query", "title", "clicks"), (0, 3, 11), "clicks > 0"),
        (("query", "passage", "score"), (0.0, 0.5, 1.0), "score >= 0.8"),
    ],
)
@pytest.mark.parametrize("name", ["f.jsonl", "f.csv"])
def test_judged_pairs_are_chosen_from(tmp_path, name, names, values, where):
    """Contradictions, pairs that are no paraphrases and titles that nobody clicked would be trained as positives."""
    rows = [dict(zip(names, (f"one {i}", f"two {i}", values[i % len(values)]), strict=True)) for i in range(24)]
    path = write(tmp_path / name, rows)
    found = judged(path)
    assert (found.use, found.where) == ("pairs", where)
    given = {"source": found.sample.source, "path": str(path), "columns": found.columns or None}
    chosen = [row for row in read_rows(TypeAdapter(Source).validate_python({**given, "where": where}), "it") if row is not None]
    assert 0 < len(chosen) == found.usable < len(rows)
    with pytest.raises(UserError, match="belong together"):  # without the condition
        list(read_rows(TypeAdapter(Source).validate_python(given), "it"))


def test_a_file_without_header(tmp_path):
    """The first pair would become the names of the columns, and the YAML hold texts where names should be."""
    rows = [[f"what is the number of case {i}", f"the number of case {i} is {i}", f"no case has {i} of them"] for i in range(9)]
    for width, roles in ((2, {"anchor": "1", "positive": "2"}), (3, {"anchor": "1", "positive": "2", "negative": "3"})):
        for name, delimiter in (("f.tsv", "\t"), ("f.csv", ",")):
            (tmp_path / name).write_text("".join(delimiter.join(row[:width]) + "\n" for row in rows))
            found = judged(tmp_path / name)
            assert (found.sample.header, found.columns, found.usable) == (False, roles, 9)
    (tmp_path / "f.csv").write_text("Question of the customer,Answer of the company\na b,c d\ne f,g h\n")
    assert judged(tmp_path / "f.csv").sample.header
