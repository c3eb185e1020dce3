"""The starter YAML: which file trains, which judges, what is refused, and that what is written loads and makes a corpus."""

import csv
import gzip
import json
import shlex
from pathlib import Path
from typing import Any

import openpyxl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from support.running import QUIET, gist

from gist_train.config.errors import Fault, UserError
from gist_train.config.loading import load_config
from gist_train.config.schema import Config
from gist_train.data.sources import read_labelled, read_rows
from gist_train.evaluation.tasks import load_tasks
from gist_train.model import device
from gist_train.preparation import prepare_corpus
from gist_train.starter.models import COST_OF_LARGE, LARGE, SMALL, pair_for
from gist_train.starter.names import run_name
from gist_train.starter.page import GUIDE_POOLING, starter_yaml, write_starter
from gist_train.training.batching import batch_plan

ODD = "a \"b\": 'c' # d, {e} [f] \\ %g\n\t- h\u2028i\x85j\x7f\ufeff\N{PARTY POPPER}"
"""Every sign that YAML might take for its own, four that end a line and one that a YAML file may not hold."""
PAIRS = [{"anchor": f"how do I open door {i}", "positive": f"turn the key of door {i}"} for i in range(40)]
ASKED = [{"question": row["anchor"], "answer": row["positive"]} for row in PAIRS]
LABELLED = [{"text": f"a sentence number {i}", "label": f"class_{i % 4}"} for i in range(40)]
SCORED = [{"sentence1": f"this is {i}", "sentence2": f"that was {i}", "score": i / 8} for i in range(40)]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """The rows in the format that the path's ending names; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    else:
        with path.open("w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            table.writeheader()
            table.writerows(rows)
    return path


def starter(*files: Path, model: str = "some/model", guide: str | None = "some/guide", **options: Any) -> str:
    return starter_yaml(files, model=model, guide=guide, **{"to": Path("run.yaml"), **options})


def loaded(tmp_path: Path, text: str) -> Config:
    to = tmp_path / "written.yaml"
    to.unlink(missing_ok=True)
    write_starter(to, text)
    return load_config(to)


def rows_of(config: Config) -> list[Any]:
    """All rows of all sources; none may be bad."""
    rows: list[Any] = []
    for index, source in enumerate(config.data.train):
        where = f"data.train[{index}]"
        rows += list(read_labelled(source, where) if source.source == "classification" else read_rows(source, where))
    assert [row for row in rows if isinstance(row, Fault)] == []
    return rows


def started(tmp_path: Path, *files: Path) -> tuple[dict[str, str | None], dict[str, tuple[str, ...]], str]:
    """Of the YAML written for `files`: training file -> task, evaluation task -> its files, and the text.

    Files are named as they stand in tmp_path. All rows and all tasks must be readable.
    """
    text = starter(*files)
    config = loaded(tmp_path, text)
    rows_of(config)
    load_tasks(config.evaluation.tasks)

    def short(path: str) -> str:
        return str(Path(path).relative_to(tmp_path))

    train = {short(source.path): getattr(source, "task", None) for source in config.data.train}
    tasks = {
        task.name: (short(task.train), short(task.test)) if task.type == "classification" else (short(task.path),)
        for task in config.evaluation.tasks
    }
    return train, tasks, text


def refused(*files: Path, **options: Any) -> UserError:
    with pytest.raises(UserError) as caught:
        starter(*files, **options)
    return caught.value


# Which file trains


def test_medi_like_sample(tmp_path, shared_data):
    """Real data of 18 tasks must load as it stands."""
    config = loaded(tmp_path, starter(shared_data / "medi" / "medi_like_sample.json"))
    assert (len(rows_of(config)), config.training.batch_size) == (1800, 32)


def test_the_yaml_tells_what_was_guessed(tmp_path):
    """Two unknown columns may be the wrong way round, or no pair: the YAML must not look as if it knew."""
    guess = starter(write(tmp_path / "f.jsonl", [{"headline": f"a man {i}", "story": f"he walks {i}"} for i in range(4)]))
    assert 'anchor is "headline", positive is "story": a GUESS' in guess
    asked = starter(write(tmp_path / "f.jsonl", [{**row, "id": 7} for row in ASKED]))
    assert "a GUESS" not in asked
    for told in ("by their names", "# Not read: id.", "#   positive: turn the key of door 0\n", "Negatives of a row: 0;"):
        assert told in asked
    lists = [{"query": "q", "pos": ["a", "b"]}, {"query": "r", "pos": "c", "neg": ["d", "e"]}]
    text = starter(write(tmp_path / "f.jsonl", lists))
    assert "#   positive: a (and 1 more)" in text
    assert "Negatives of a row: 0 to 2;" in text


def test_labelled_texts_need_a_guide_and_two_labels(tmp_path):
    """`load_config` or `plan` would refuse the YAML that was just written."""
    path = write(tmp_path / "f.jsonl", LABELLED)
    for guide in (None, "self"):
        assert "--guide" in refused(path, guide=guide).faults[0].fix
    one = write(tmp_path / "one.jsonl", [{**row, "label": "same"} for row in LABELLED])
    assert "two labels" in refused(one).faults[0].expected
    sorted_rows = [{"text": f"a sentence number {i}", "label": "same"} for i in range(201)]
    loaded(tmp_path, starter(write(tmp_path / "sorted.jsonl", sorted_rows)))


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("banking77/train.jsonl", "banking77"),
        ("banking77/train-00000-of-00001.jsonl", "banking77"),
        ("banking77/default/train/0000.jsonl", "banking77"),
        ("banking77/data/Training.jsonl", "banking77"),
        ("banking77/dataset.jsonl", "banking77"),
        ("banking77/data_train.jsonl", "banking77"),
        ("banking77/intents.jsonl", "intents"),
        ("banking77/intents_train.jsonl", "intents_train"),
        ("banking77/dataset of 2024.jsonl", "dataset of 2024"),
        ("banking77/test.jsonl", "banking77"),
    ],
)
def test_task_of_a_training_file(tmp_path, name, task):
    """All sources would be the one task "train", their rows in one batch: negatives of another kind, that teach nothing."""
    assert started(tmp_path, write(tmp_path / name, LABELLED))[0] == {name: task}
    needed = task if task == "banking77" else None
    assert started(tmp_path, write(tmp_path / name, PAIRS))[0] == {name: needed}
    assert started(tmp_path, write(tmp_path / name, [{**row, "task": "own"} for row in PAIRS]))[0] == {name: None}


def test_task_of_a_file_in_this_folder(tmp_path, monkeypatch):
    """A path without folders has no name to give but that of the folder the command runs in."""
    write(tmp_path / "banking77" / "train.jsonl", LABELLED)
    monkeypatch.chdir(tmp_path / "banking77")
    assert loaded(tmp_path, starter(Path("train.jsonl"))).data.train[0].task == "banking77"
    monkeypatch.setenv("HOME", str(tmp_path / "banking77"))
    assert loaded(tmp_path, starter(Path("~/train.jsonl"))).data.train[0].task == "banking77"
    nameless = write(tmp_path / "banking77" / "caf\udce9" / "train.jsonl", LABELLED).parent
    monkeypatch.chdir(nameless)
    assert loaded(tmp_path, starter(Path("train.jsonl"))).data.train[0].task == "banking77"


# Which file judges


def test_banking77_snips_and_clinc150(tmp_path, shared_data):
    """Trained on its test file, a model's figures say nothing. Banking77 is sorted: few of its labels are looked at."""
    folder = shared_data / "classification"
    text = starter(*[folder / name for name in ("banking77", "clinc150", "snips")])
    config = loaded(tmp_path, text)
    names = ["banking77", "clinc150", "snips"]
    assert [(source.task, source.path) for source in config.data.train] == [(n, str(folder / n / "train.jsonl")) for n in names]
    judges = [(task.name, task.train, task.test) for task in config.evaluation.tasks]
    assert judges == [(n, str(folder / n / "train.jsonl"), str(folder / n / "test.jsonl")) for n in names]
    for name in ("clinc150", "snips"):
        assert f"#   {folder / name / 'dev.jsonl'}: test.jsonl judges in its place." in text
    assert f"#   {folder / 'clinc150' / 'oos_test.jsonl'}: no file above has its columns and labels." in text
    assert "ITS NAME SAYS" not in text
    assert "Its name says test, so it trains nothing" in text


@pytest.mark.parametrize(
    ("train", "test", "name"),
    [
        ("b/train.jsonl", "b/test.jsonl", "b"),
        ("b/intents.jsonl", "b/intents_test.jsonl", "intents"),
        ("b/intents.train.csv", "c/intents.DEV.csv", "intents"),
        ("b/train-00000-of-00001.tsv", "b/validation-00000-of-00001.tsv", "b"),
        ("b/train/0000.jsonl", "b/test/0000.jsonl", "b"),
        ("tickets.jsonl", "far/away/final-test.jsonl", "final"),
        ("b c: d/train.jsonl", "b c: d/val.jsonl", "b-c-d"),
    ],
)
def test_a_labelled_test_file_judges(tmp_path, train, test, name):
    """Named otherwise than the first pair that came to mind, a test file would train."""
    for rows in (LABELLED, [{"utterance": row["text"], "intent": row["label"]} for row in LABELLED]):
        files = [write(tmp_path / file, rows) for file in (test, train)]
        trained, tasks, text = started(tmp_path, *files)
        assert list(trained) == [train]
        assert tasks == {name: (train, test)}
        assert "LEFT OUT" not in text
        columns = load_config(tmp_path / "written.yaml").evaluation.tasks[0].columns
        assert [columns.text, columns.label] == list(rows[0])
        assert ("columns" in text.split("tasks:")[1].split("# More of them")[0]) == (rows is not LABELLED)


def test_one_task_for_a_training_file(tmp_path):
    """Dev and test beside each other would measure the same twice; of these test is the one that others report."""
    for name in ("intents", "intents_dev", "intents_test", "extra_test"):
        write(tmp_path / "b" / f"{name}.jsonl", LABELLED)
    train, tasks, text = started(tmp_path, tmp_path / "b")
    assert list(train) == ["b/intents.jsonl"]
    assert tasks == {"intents": ("b/intents.jsonl", "b/intents_test.jsonl")}
    for name in ("intents_dev", "extra_test"):
        assert f"{tmp_path}/b/{name}.jsonl: intents_test.jsonl judges in its place." in text


@pytest.mark.parametrize("value", [1900, ["a text", None], {"a": 1}])
def test_columns_that_hold_no_text_say_so(tmp_path, value):
    """ "query", "positive", and no telling which are texts: of a file whose columns are called just so, that helps nobody."""
    rows = [{"query": f"when was number {n} built", "positive": value} for n in range(30)]
    (fault,) = refused(write(tmp_path / "years.jsonl", rows)).faults
    assert f'"positive" (30 of 30 rows looked at hold no text, such as {value!r})' in fault.found


def test_labels_by_a_name_of_their_own_are_a_guess(tmp_path):
    """Annotators' tools call the column as the user called the control: sentiment, topic, queue."""
    rows = [{"text": row["text"], "queue": row["label"], "annotator": 1, "id": n} for n, row in enumerate(LABELLED)]
    text = starter(write(tmp_path / "tasks.jsonl", rows))
    (source,) = loaded(tmp_path, text).data.train
    assert (source.source, source.columns.text, source.columns.label) == ("classification", "text", "queue")
    assert 'label is "queue", with 4 different ones in these rows: a GUESS' in text
    two = [{**row, "team": row["queue"]} for row in rows]
    assert "no telling which" in refused(write(tmp_path / "two.jsonl", two)).faults[0].found
    workbook = openpyxl.Workbook()
    for line in [["Question", "Answer"], *[[row["anchor"], row["positive"]] for row in PAIRS]]:
        workbook.active.append(line)
    workbook.save(tmp_path / "faq.xlsx")
    (source,) = loaded(tmp_path, starter(tmp_path / "faq.xlsx")).data.train
    assert (source.source, source.columns.anchor) == ("xlsx", "Question")
    assert next(iter(read_rows(source, "it"))).positives == ("turn the key of door 0",)


def test_each_test_file_goes_with_its_own_training_file(tmp_path):
    """Labels 0 and 1 are in many files: a classifier of sentiments would be judged on spam."""
    numbered = [{**row, "label": i % 2} for i, row in enumerate(LABELLED)]
    for name in ("a/train", "a/test", "b/train", "b/test", "c_train", "c_test", "d"):
        write(tmp_path / f"{name}.jsonl", numbered)
    for name in ("a", "b"):
        write(tmp_path / name / f"{name}_more.jsonl", numbered)
    write(tmp_path / "e" / "first.jsonl", numbered)
    write(tmp_path / "e" / "second_test.jsonl", numbered)
    _, tasks, _ = started(tmp_path, *[tmp_path / name for name in ("d.jsonl", "a", "b", "e", "c_test.jsonl", "c_train.jsonl")])
    assert tasks == {
        "a": ("a/train.jsonl", "a/test.jsonl"),
        "b": ("b/train.jsonl", "b/test.jsonl"),
        "c": ("c_train.jsonl", "c_test.jsonl"),
        "second": ("e/first.jsonl", "e/second_test.jsonl"),
    }


def test_names_of_tasks_are_their_own(tmp_path):
    """`load_config` refuses a name that is used twice; one that overwrites another loses a task and says nothing."""
    for folder in ("x/b", "y/b"):
        write(tmp_path / folder / "train.jsonl", [{**row, "label": folder + row["label"]} for row in LABELLED])
        write(tmp_path / folder / "test.jsonl", [{**row, "label": folder + row["label"]} for row in LABELLED])
    scored = [write(tmp_path / name, SCORED) for name in ("b-2.csv", "z/b.csv", "z/b/test.csv", "Ä.csv")]
    _, tasks, _ = started(tmp_path, *scored, tmp_path / "x" / "b", tmp_path / "y" / "b")
    assert list(tasks) == ["b-2", "b", "b-3", "texts", "b-4", "b-5"]
    assert tasks["b-3"] == ("z/b/test.csv",)
    assert tasks["b-5"] == ("y/b/train.jsonl", "y/b/test.jsonl")


def test_what_can_not_judge_is_left_out_and_listed(tmp_path):
    """Held-out pairs would train, and a task that evaluation can't read would end the training at its first figures."""
    others = [{**row, "label": f"other {row['label']}"} for row in LABELLED]
    renamed = [{"utterance": row["text"], "label": row["label"]} for row in LABELLED]
    files = {
        "others_test.jsonl": others,
        "renamed_test.jsonl": renamed,
        "one_test.jsonl": [{"text": f"out of scope {i}", "label": "oos"} for i in range(9)],
    }
    good = [write(tmp_path / "l.jsonl", LABELLED), write(tmp_path / "p.jsonl", PAIRS)]
    train, tasks, text = started(tmp_path, *good, *[write(tmp_path / name, rows) for name, rows in files.items()])
    assert train == {"l.jsonl": "l", "p.jsonl": None}
    assert tasks == {}
    for name in files:
        (line,) = [line for line in text.splitlines() if f"{tmp_path}/{name}: " in line]
        assert line.lstrip().startswith("# ")
        assert "columns and labels" in line


def test_held_out_pairs_judge_a_search(tmp_path):
    """They were listed as of no use, and the model that they were kept for was measured on nothing."""
    triplets = [{"q": row["anchor"], "answer": row["positive"], "negative": "no"} for row in PAIRS]
    files = [write(tmp_path / name, rows) for name, rows in (("faq_test.jsonl", PAIRS), ("t/dev.csv", triplets))]
    train, tasks, text = started(tmp_path, write(tmp_path / "faq.jsonl", PAIRS), *files)
    assert list(train) == ["faq.jsonl"]
    assert tasks == {"faq_test": ("faq_test.jsonl",), "t": ("t/dev.csv",)}
    config = load_config(tmp_path / "written.yaml")
    assert [task.type for task in config.evaluation.tasks] == ["retrieval"] * 2
    assert config.selection.metric == {"faq_test/ndcg@10": 1}
    assert config.evaluation.held_out is None
    assert "Its name says dev, so it trains nothing" in text


@pytest.mark.parametrize(("qrels", "split"), [("qrels/test.tsv", "test"), ("qrels.dev.tsv", "dev"), ("qrels/faq.tsv.gz", "faq")])
def test_a_folder_of_documents_and_judgements_judges(tmp_path, qrels, split):
    """As data files the three of them are no pairs of texts, and the whole folder was refused."""
    folder = tmp_path / "data" / "search"
    write(folder / "corpus.jsonl", [{"_id": f"d{n}", "text": row["positive"]} for n, row in enumerate(PAIRS)])
    write(folder / "queries.jsonl", [{"_id": f"q{n}", "text": row["anchor"]} for n, row in enumerate(PAIRS)])
    (folder / qrels).parent.mkdir(exist_ok=True)
    judged = ("query-id\tcorpus-id\tscore\n" + "".join(f"q{n}\td{n}\t1\n" for n in range(len(PAIRS)))).encode()
    (folder / qrels).write_bytes(gzip.compress(judged) if qrels.endswith(".gz") else judged)
    assert "name such a file too" in str(refused(tmp_path / "data"))
    write(tmp_path / "data" / "faq.jsonl", PAIRS)
    train, tasks, _ = started(tmp_path, tmp_path / "data")
    assert (list(train), tasks) == (["data/faq.jsonl"], {"search": ("data/search",)})
    assert load_config(tmp_path / "written.yaml").evaluation.tasks[0].split == split


@pytest.mark.parametrize(
    ("rows", "expected", "steps_apart"),
    [
        (PAIRS[:19], None, 1),
        (PAIRS, 0.2, 1),
        (PAIRS * 10, 0.2, 3),
        (PAIRS * 30, 0.1, 13),
        (PAIRS * 60, 0.05, 28),
        (PAIRS * 700, 1000, 200),
    ],
    ids=["19", "40", "400", "1200", "2400", "many"],
)
def test_with_nothing_to_judge_by_rows_are_held_out(tmp_path, rows, expected, steps_apart):
    """Training for hours and no way to tell what it gained was the first evening of many; so was one score at the end."""
    path = write(
        tmp_path / "faq.jsonl",
        [{"anchor": f"{row['anchor']} {n}", "positive": f"{row['positive']} {n}"} for n, row in enumerate(rows)],
    )
    started(tmp_path, path)
    config = load_config(tmp_path / "written.yaml")
    assert config.evaluation.held_out == expected
    assert (config.evaluation.every, config.checkpoint.every) == (steps_apart, steps_apart)
    assert config.selection.metric == (None if expected is None else {"held_out/ndcg@10": 1})
    started(tmp_path, write(tmp_path / "l.jsonl", LABELLED))
    assert load_config(tmp_path / "written.yaml").selection.metric == {"held_out_labels/accuracy": 1}


def test_parquet_trains_and_judges(tmp_path):
    """What trains in one format must be judged in it too: files of two formats go together."""
    write(tmp_path / "l.parquet", LABELLED)
    _, tasks, _ = started(tmp_path, tmp_path / "l.parquet", write(tmp_path / "l_test.jsonl", LABELLED))
    assert tasks == {"l": ("l.parquet", "l_test.jsonl")}


def test_a_test_file_alone_trains_and_is_called_one(tmp_path):
    """There is nothing else that the user could mean, but they must not judge by it."""
    files = [write(tmp_path / name, rows) for name, rows in (("a/Dev.jsonl", LABELLED), ("b_test.csv", PAIRS), ("s.tsv", SCORED))]
    train, tasks, text = started(tmp_path, *files)
    assert train == {"a/Dev.jsonl": "a", "b_test.csv": None}
    assert tasks == {"s": ("s.tsv",)}
    assert text.count("ITS NAME SAYS DEV: take this source out") == 1
    assert text.count("ITS NAME SAYS TEST: take this source out") == 1
    assert "LEFT OUT" not in text
    train, _, text = started(tmp_path, write(tmp_path / "contest.jsonl", PAIRS), write(tmp_path / "latest news.jsonl", PAIRS))
    assert list(train) == ["contest.jsonl", "latest news.jsonl"]
    assert "ITS NAME SAYS" not in text


def test_scored_pairs_evaluate(tmp_path):
    """Pairs of score 0 would be trained together as anchor and positive."""
    scored = [write(tmp_path / folder / "sts dev.tsv", SCORED) for folder in ("a", "b")]
    other = write(
        tmp_path / "c.csv", [{"left": row["sentence1"], "right": row["sentence2"], "Score": row["score"]} for row in SCORED]
    )
    train, tasks, _ = started(tmp_path, *scored, write(tmp_path / "f.jsonl", PAIRS), other)
    assert list(train) == ["f.jsonl"]
    assert tasks == {"sts-dev": ("a/sts dev.tsv",), "sts-dev-2": ("b/sts dev.tsv",), "c": ("c.csv",)}
    columns = load_config(tmp_path / "written.yaml").evaluation.tasks[2].columns
    assert [columns.text1, columns.text2, columns.score] == ["left", "right", "Score"]
    assert "sts dev.tsv" in refused(*scored).faults[0].where


# What is refused


def test_all_faults_of_all_files_at_once(tmp_path):
    """One fault a run sends the user through the command as often as there are files."""
    (tmp_path / "empty folder").mkdir()
    files = {
        "missing.jsonl": "no such file",
        "empty folder": "without data files",
        "notes.docx": '".docx"',
        "empty.jsonl": "no rows",
        "empty.json": "no rows",
        "header.csv": "no rows",
        "broken.jsonl": "not JSON",
        "broken.parquet": "Parquet's reader refuses",
        "packed.jsonl.gz": "cannot be read",
        "numbers.csv": '"a", "b"',
        "one.jsonl": "no telling",
        "three.jsonl": '"x", "y", "z"',
    }
    for name in ("notes.docx", "empty.jsonl", "empty.json", "header.csv"):
        (tmp_path / name).write_text("anchor,positive\n" if name == "header.csv" else "")
    for name in ("broken.jsonl", "broken.parquet", "packed.jsonl.gz"):
        (tmp_path / name).write_text("nothing\nof the kind\n")
    write(tmp_path / "numbers.csv", [{"a": 1, "b": 2}])
    write(tmp_path / "one.jsonl", [{"note": "some words", "n": 2}])
    write(tmp_path / "three.jsonl", [{"x": "some words", "y": "more words", "z": "and more"}])
    good = write(tmp_path / "good.jsonl", PAIRS)
    faults = refused(good, *[tmp_path / name for name in files]).faults
    assert sorted(Path(fault.where).name for fault in faults) == sorted(files)
    for fault in faults:
        assert files[Path(fault.where).name] in fault.found
        assert fault.expected
        assert fault.fix


def test_nothing_is_overwritten_and_nothing_half_written(tmp_path):
    """The config of a week's work would be gone at a second init."""
    to = tmp_path / "my.yaml"
    write_starter(to, "name: one\n")
    with pytest.raises(UserError, match="exists"):
        write_starter(to, "name: two\n")
    with pytest.raises(UserError, match="no folder"):
        write_starter(tmp_path / "nowhere" / "my.yaml", "name: two\n")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"my.yaml": "name: one\n"}


# What is written


def test_odd_paths_columns_and_texts(tmp_path):
    """A quote, colon or line end in a name breaks the YAML or, worse, reads as another name; one in a text ends the comment."""
    folder = tmp_path / ODD
    folder.mkdir()
    asked, told = "Frage: #1, {x}\n\u2028\x85", "yes"
    for name, task in ((f"{ODD}.jsonl", None), ("[a]*?.jsonl", None), ("null.jsonl", None), ("train.jsonl", ODD)):
        path = write(folder / name, [{asked: f"{ODD} {i}", told: f"no: {ODD * 9}", "task": None} for i in range(3)])
        text = starter(path, model=str(folder), guide=f"{ODD}/guide")
        config = loaded(tmp_path, text)
        (source,) = config.data.train
        assert (source.path, source.columns.anchor, source.columns.positive) == (str(path), asked, told)
        assert (source.task, config.model.name, config.guide.name) == (task, str(folder), f"{ODD}/guide")
        assert {row.task for row in rows_of(config)} == {task or name.removesuffix(".jsonl")}
        assert "\N{PARTY POPPER}" in text
    write(tmp_path / "half.jsonl", PAIRS).write_text('{"anchor": "\\ud83d half", "positive": "a\\u0000b"}\n')
    loaded(tmp_path, starter(tmp_path / "half.jsonl"))
    assert "not UTF-8" in refused(Path("caf\udce9.jsonl")).faults[0].found


@pytest.mark.parametrize("guide", [None, "self", "some/guide", *GUIDE_POOLING])
def test_guide_and_defaults(tmp_path, guide):
    """Only the default guide's pooling is known; set for another it would spoil the guide and say nothing."""
    config = loaded(tmp_path, starter(write(tmp_path / "f.jsonl", PAIRS), guide=guide))
    told = config.guide if guide in (None, "self") else (config.guide.name, config.guide.pooling)
    assert told == (guide if guide in (None, "self") else (guide, GUIDE_POOLING.get(guide)))
    assert (config.name, config.model.name, config.data.batching) == ("run", "some/model", "task")
    assert (config.optimizer.lr, config.training.batch_size) == (2e-5, 32)


def test_paths_stay_as_given_and_files_count_once(tmp_path, monkeypatch):
    """An absolute path would tie the YAML to this machine; a file named beside its folder would be trained on twice."""
    (tmp_path / "data").mkdir()
    for name in ("b.jsonl", "a.csv"):
        write(tmp_path / "data" / name, PAIRS)
    (tmp_path / "data" / "README.md").write_text("not data")
    monkeypatch.chdir(tmp_path)
    config = loaded(tmp_path, starter(Path("data/b.jsonl"), Path("data")))
    assert [source.path for source in config.data.train] == ["data/b.jsonl", "data/a.csv"]


def test_bad_rows_and_files_that_go_on_are_told(tmp_path):
    """The YAML would say "all rows", and plan refuse some of them."""
    path = write(tmp_path / "f.jsonl", PAIRS)
    path.write_text("{not JSON\n" + path.read_text())
    assert "all 41 rows looked at, 1 of them not to be used.\n" in starter(path)
    assert "the first 200 rows looked at.\n" in starter(write(path, PAIRS * 6))


@pytest.mark.parametrize("row", [{"question": "q", "answer": ""}, {"question": "q"}])
def test_a_file_with_a_bad_row_is_planned(tmp_path, monkeypatch, make_model, row):
    """A real file has a blank somewhere: `on_bad_row: fail` would have plan refuse what init just wrote."""
    monkeypatch.chdir(tmp_path)
    rows = [{"question": f"question {i}", "answer": f"the answer to {i}"} for i in range(40)]
    write(Path("faq.jsonl"), [*rows[:8], row, *rows[8:]])
    assert gist("init", "faq.jsonl", "--model", make_model(), "--guide", "self").code == 0
    assert "all 41 rows looked at, 1 of them not to be used" in Path("my-model.yaml").read_text()
    ended = gist("plan", "my-model.yaml", "--json")
    assert ended.code == 0, ended.err
    found = json.loads(ended.out)
    assert (found["rows"], found["dropped"]["bad"]) == (41, 1)


@pytest.mark.parametrize("to", ["my-model.yaml", 'its folder/my "own" $data\'s.yaml'])
def test_commands_name_the_file(tmp_path, to):
    """A command that is pasted from the header must find the YAML, whatever its name."""
    text = starter(write(tmp_path / "f.jsonl", PAIRS), to=Path(to))
    commands = [line.removeprefix("# Run").lstrip("# ").split("  ")[0] for line in text.splitlines()[2:6]]
    words = [shlex.split(command)[:3] for command in commands]
    assert words == [["gist-train", word, to] for word in ("plan", "train", "evaluate", "export")]
    assert len({line.index(" (") for line in text.splitlines()[2:6]}) == 1
    assert text.endswith("\n")
    assert "my.yaml" not in text


def test_the_command_line_writes_it(tmp_path, monkeypatch):
    """The default guide would lose the pooling that the GIST models had it with, were it called otherwise there than here."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(device, "on_cpu", lambda: False)
    write(Path("data/f.jsonl"), PAIRS)
    ended = gist("init", "data")
    assert (ended.code, ended.out) == (0, "")
    config = load_config(Path("my-model.yaml"))
    assert (config.name, config.model.name) == ("my-model", LARGE.model)
    assert {config.guide.name: config.guide.pooling} == GUIDE_POOLING
    assert "No GPU" not in Path("my-model.yaml").read_text()
    again = gist("init", "data")
    assert (again.code, "exists" in again.err) == (2, True)
    assert gist("init", "data", "--to", "b.yaml", "--guide", "none", "--model", "a/b").code == 0
    config = load_config(Path("b.yaml"))
    assert (config.name, config.guide, config.model.name) == ("b", None, "a/b")
    monkeypatch.setattr(device, "on_cpu", lambda: True)
    assert gist("init", "data", "--force").code == 0
    config = load_config(Path("my-model.yaml"))
    assert (config.model.name, config.guide.name, config.guide.pooling) == (*SMALL, None)
    assert f"The larger pair, {LARGE.model} under\n  # {LARGE.guide}, costs 2 times" in Path("my-model.yaml").read_text()


@pytest.mark.parametrize(
    ("model", "guide", "on_cpu", "expected"),
    [
        (None, None, False, LARGE),
        (None, None, True, SMALL),
        (LARGE.model, None, True, LARGE),  # the usual guide would be the student itself
        ("a/b", None, True, ("a/b", SMALL.guide)),
        ("a/b", None, False, ("a/b", LARGE.guide)),
        (None, "none", True, (SMALL.model, "none")),
        (None, "c/d", False, (LARGE.model, "c/d")),
    ],
)
def test_the_pair_is_one_that_the_machine_can_train(model, guide, on_cpu, expected):
    """The large guide's pass over ten thousand texts takes a CPU hours, and nobody had said so."""
    assert pair_for(model, guide, on_cpu=on_cpu) == expected


def test_cost_of_the_larger_pair():
    """The figures in the comment are of the models' published shapes: layers and dimensions."""
    shapes = {LARGE.model: (12, 384), LARGE.guide: (24, 1024), SMALL.model: (6, 384), SMALL.guide: (12, 384)}
    products = [[layers * dimensions**2 for layers, dimensions in map(shapes.get, pair)] for pair in (LARGE, SMALL)]
    assert [f"{large / small:.0f}" for large, small in zip(*products, strict=True)] == list(COST_OF_LARGE)


CLICKS = [
    {
        "id": f"a{i}",
        "search_term": f"how do I open door {i}",
        "clicked_doc": f"turn the key of door {i}",
        "snippet": f"a door {i}",
    }
    for i in range(40)
]


def test_columns_that_the_user_names_are_taken(tmp_path):
    """Three columns of texts with names of their own can't be told apart, and the user knows which is which."""
    path = write(tmp_path / "log.csv", CLICKS)
    assert "--columns anchor=...,positive=..." in refused(path).faults[0].fix
    named = {"anchor": "search_term", "positive": "clicked_doc"}
    text = starter(path, write(tmp_path / "usual.jsonl", PAIRS), columns=named)
    config = loaded(tmp_path, text)
    assert rows_of(config)[0].positives == ("turn the key of door 0",)
    assert [source.columns and source.columns.model_dump(exclude_none=True) for source in config.data.train] == [named, None]
    assert "# Not read: id, snippet." in text
    labelled = write(tmp_path / "labels.csv", [{"name": row["text"], "note": "a note", "kind": row["label"]} for row in LABELLED])
    (source,) = loaded(tmp_path, starter(labelled, columns={"text": "name", "label": "kind"})).data.train
    assert (source.source, source.columns.text, source.columns.label) == ("classification", "name", "kind")
    scored = write(tmp_path / "s.csv", [{"a": row["sentence1"], "b": row["sentence2"], "mark": row["score"]} for row in SCORED])
    marks = {"text1": "a", "text2": "b", "score": "mark"}
    (task,) = loaded(tmp_path, starter(write(tmp_path / "p.jsonl", PAIRS), scored, columns=marks)).evaluation.tasks
    assert (task.type, task.columns.text1, task.columns.score) == ("sts", "a", "mark")


@pytest.mark.parametrize(
    ("columns", "told"),
    [
        ("anchor=search_term", "--columns"),
        ("anchor=search_term, positive=", "--columns"),
        ("anchor=search_term,passage=clicked_doc", "--columns"),
        ("search_term,clicked_doc", "--columns"),
        ("anchor=serch_term,positive=clicked_doc", "no telling which"),
        ("text=search_term,label=clicked_doc", "hardly repeat"),
        ("anchor=number,positive=clicked_doc", '"number" with 7'),
    ],
)
def test_columns_that_can_not_be_so_are_refused(tmp_path, columns, told):
    """A slip of the pen must not fall back to a guess without a word."""
    path = write(tmp_path / "log.jsonl", [{**row, "number": 7} for row in CLICKS])
    ended = gist("init", path, "--to", tmp_path / "my.yaml", "--guide", "a/b", "--model", "c/d", "--columns", columns)
    assert (ended.code, told in ended.err, (tmp_path / "my.yaml").exists()) == (2, True, False)
    if "serch_term" in columns:
        ended = gist(
            "init", write(tmp_path / "usual.jsonl", PAIRS), "--to", tmp_path / "my.yaml", "--model", "c/d", "--columns", columns
        )
        assert (ended.code, '"serch_term", "clicked_doc", which no file has; columns: "anchor", "positive"' in ended.err) == (
            2,
            True,
        )


@pytest.mark.parametrize(("words", "length"), [(6, 64), (60, 128), (180, 256), (900, 512)])
def test_texts_are_read_nearly_whole(tmp_path, words, length):
    """A length of 512 for short questions says nothing; of 64 for manuals it would cut them to a tenth."""
    rows = [{"anchor": f"question {n}", "positive": "word " * words + str(n)} for n in range(20)]
    config = loaded(tmp_path, starter(write(tmp_path / "f.jsonl", rows)))
    assert (config.model.max_length, config.guide.max_length) == (length, length)
    if words == 60:  # signs that are tokens of their own
        rows = [{**row, "positive": "\N{CJK UNIFIED IDEOGRAPH-4E2D}" * 200} for row in rows]
        assert loaded(tmp_path, starter(write(tmp_path / "g.jsonl", rows))).model.max_length == 256
    (tmp_path / "short").mkdir()
    (tmp_path / "short" / "config.json").write_text('{"max_position_embeddings": 40}')
    config = loaded(tmp_path, starter(tmp_path / "f.jsonl", model=str(tmp_path / "short")))
    assert (config.model.max_length, config.guide.max_length) == (40, length)


@pytest.mark.parametrize(
    ("to", "name"),
    [
        ("my data.yaml", "my-data"),
        ("a/b.c.yaml", "b.c"),
        ("...yaml", "my-model"),
        ("Übung 1.yaml", "bung-1"),
        ("é.yaml", "my-model"),
    ],
)
def test_run_name(to, name):
    """The name is a folder's: with spaces or other signs the config would be refused."""
    assert run_name(Path(to)) == name


@pytest.mark.usefixtures("on_cpu")
def test_a_corpus_and_a_plan_come_of_it(tmp_path, monkeypatch, make_model):
    """A starter that loads but gives no whole batch fails at the first command that the user is told to run."""
    monkeypatch.chdir(tmp_path)
    tiny = make_model(width=48, layers=1, cased=True, vocabulary=300, seed=1)
    once = {"text": "only once", "label": "alone"}
    cases = {
        "pairs": ([write(tmp_path / "f.jsonl", ASKED)], 32),
        "few": ([write(tmp_path / "few.csv", ASKED[:5])], 4),
        "some": ([write(tmp_path / "some.csv", ASKED[:35])], 16),  # 7 of them are held out
        "one": ([write(tmp_path / "one.csv", ASKED[:1])], 1),
        "labels": ([write(tmp_path / "l.csv", [*LABELLED[:8], once, LABELLED[0]])], 4),
        "both": ([tmp_path / "few.csv", tmp_path / "l.csv", write(tmp_path / "s.tsv", SCORED)], 8),
    }
    for name, (files, batch_size) in cases.items():
        config = loaded(tmp_path, starter(*files, model=str(make_model()), guide=str(tiny)))
        assert config.training.batch_size == batch_size, name
        corpus = prepare_corpus(config, torch.device("cpu"), QUIET)
        assert batch_plan(config, corpus).steps_per_epoch >= 1
    assert yaml.safe_load((tmp_path / "written.yaml").read_text())["guide"] == {"name": str(tiny), "max_length": 64}


@pytest.mark.parametrize("delimiter", [";", "\t", "|"])
def test_any_delimiter_is_guessed(tmp_path, delimiter):
    """Half of Europe's spreadsheets write semicolons; the YAML must say so, and load."""
    path = tmp_path / "faq.csv"
    lines = [f"anchor{delimiter}positive"] + [f"question {n}, and more{delimiter}answer {n}" for n in range(20)]
    path.write_text("\ufeff" + "\n".join(lines) + "\n", encoding="utf-8")
    (tmp_path / "my.yaml").write_text(starter(path))
    (source,) = load_config(tmp_path / "my.yaml").data.train
    assert source.delimiter == delimiter
    (first, *_) = read_rows(source, "data.train[0]")
    assert (first.anchor, first.positives) == ("question 0, and more", ("answer 0",))


def test_tasks_are_read_as_their_files_are_written(tmp_path):
    """Scored pairs with semicolons between the columns judged nothing, and were refused."""
    rows = "".join(f"a text {n};and another;{n % 5}\n" for n in range(20))
    (tmp_path / "sts.csv").write_text("sentence1;sentence2;score\n" + rows)
    write(tmp_path / "faq.jsonl", PAIRS)
    (task,) = loaded(tmp_path, starter(tmp_path / "sts.csv", tmp_path / "faq.jsonl")).evaluation.tasks
    assert task.delimiter == ";"
    (read,) = load_tasks([task])
    assert len(read.scores) == 20


def test_the_parts_of_one_file_are_one_source(tmp_path):
    """A YAML of 200 sources, and as many tasks, is nothing that anybody reads."""
    for n in range(4):
        write(tmp_path / "data" / f"train-{n:05}-of-00004.parquet", PAIRS)
    train, _, _ = started(tmp_path, tmp_path / "data")
    assert list(train) == ["data/train*.parquet"]
    write(tmp_path / "data" / "train-extra.parquet", PAIRS)  # which the pattern would take too
    train, _, _ = started(tmp_path, tmp_path / "data")
    assert len(train) == 5


def test_a_bad_file_of_a_folder_is_listed(tmp_path):
    """One log among the data must not keep the user from a first YAML; a file that is named must be of use."""
    write(tmp_path / "data" / "good.jsonl", PAIRS)
    (tmp_path / "data" / "log.jsonl").write_text("not JSON\n")
    train, _, text = started(tmp_path, tmp_path / "data")
    assert list(train) == ["data/good.jsonl"]
    (line,) = [line for line in text.splitlines() if "log.jsonl" in line]
    assert "not JSON" in line
    with pytest.raises(UserError, match="not JSON"):
        starter(tmp_path / "data" / "good.jsonl", tmp_path / "data" / "log.jsonl")


def test_an_existing_yaml_is_replaced_only_by_force(tmp_path):
    """It may hold an hour's work."""
    path, to = write(tmp_path / "a.jsonl", PAIRS), tmp_path / "my.yaml"
    assert gist("init", path, "--to", to).code == 0
    to.write_text("mine")
    again = gist("init", path, "--to", to)
    assert (again.code, "--force" in again.err, to.read_text()) == (2, True, "mine")
    assert gist("init", path, "--to", to, "--force").code == 0
    assert to.read_text() != "mine"


def test_rows_of_objects_are_read_as_they_are_guessed(tmp_path):
    """An anchor that is an object with a text looked usable to init, and was no string to whoever read the rows."""
    asked = [{"query": {"text": f"why {n}", "lang": "en"}, "passage": {"title": "t", "text": f"since {n}"}} for n in range(40)]
    rows = rows_of(loaded(tmp_path, starter(write(tmp_path / "nested.jsonl", asked))))
    assert [(row.anchor, row.positives) for row in rows] == [(f"why {n}", (f"t since {n}",)) for n in range(40)]


def test_an_empty_negative_is_no_text(tmp_path):
    """init counted fewer bad rows than plan."""
    rows = [{"anchor": f"a {n}", "positive": f"b {n}", "negative": ["" if n == 3 else "c", "d"]} for n in range(40)]
    assert "1 of them not to be used" in starter(write(tmp_path / "rows.jsonl", rows))
