"""Bare texts: rows of two that follow each other, and a training that learns how the guide orders them and nothing else."""

import json

import pytest
from support.running import gist, metrics

from gist_train.config.errors import Fault, UserError
from gist_train.config.sources import TextsSource
from gist_train.data.rows import Row
from gist_train.data.sources import read_rows

pytestmark = pytest.mark.usefixtures("on_cpu")


def rows_of(path, **settings):
    return list(read_rows(TextsSource(path=str(path), **settings), "data.train[0]"))


def test_two_that_follow_each_other_are_a_row(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffone\n\n  two \nthree\r\nfour\nfive".encode())
    rows = rows_of(tmp_path / "a.txt", prompt="q: ")
    assert [(row.anchor, row.positives) for row in rows] == [("one", ("two",)), ("three", ("four",)), ("five", ("one",))]
    assert {(row.task, row.negatives, row.prompts) for row in rows} == {("a", (), ("q: ", "q: ", "q: "))}


@pytest.mark.parametrize("ending", ["jsonl", "csv"])
def test_tables_of_texts(tmp_path, ending):
    texts = ["one", "two", "", "three", "four"]
    lines = [json.dumps({"body": text}) for text in texts] if ending == "jsonl" else ["body", *(f'"{text}"' for text in texts)]
    (tmp_path / f"a.{ending}").write_text("\n".join(lines) + "\n")
    rows = rows_of(tmp_path / f"a.{ending}", columns={"text": "body"})
    assert [row.anchor for row in rows if isinstance(row, Row)] == ["one", "three"]
    assert [row.where for row in rows if isinstance(row, Fault)] == [f'data.train[0]: a.{ending}, row 3: "body" is empty']


def test_a_file_without_texts_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("\n\n")
    with pytest.raises(UserError, match="no rows"):
        rows_of(tmp_path / "a.txt")


@pytest.fixture
def texts(tmp_path, triplets):
    (tmp_path / "texts.txt").write_text("\n".join(row["anchor"] for row in triplets) + "\n", encoding="utf-8")
    return {"train": [{"source": "texts", "path": str(tmp_path / "texts.txt")}]}


def test_texts_alone_are_trained_on(write_config, texts, tmp_path):
    """Small models are made from large ones with nothing but texts: the divergence falls."""
    path = write_config(
        data=texts,
        loss={"weight": 0.0},
        distillation={"weight": 1.0},
        training={"batch_size": 16, "max_steps": 60, "precision": "float32"},
        optimizer={"lr": 3e-3},
        checkpoint={"every": 1000},
    )
    ended = gist("train", path)
    assert ended.code == 0, ended.err
    assert "warning" not in ended.err
    rows = metrics(tmp_path / "runs" / "run")
    assert all(row["loss"] == pytest.approx(row["distillation_loss"]) for row in rows)
    first, last = (sum(row["loss"] for row in some) / 10 for some in (rows[:10], rows[-10:]))
    assert last < 0.7 * first


@pytest.mark.parametrize(
    ("sections", "where"),
    [
        ({}, "data.train[0].source"),
        ({"loss": {"weight": 0}, "distillation": {"weight": 1}, "evaluation": {"held_out": 0.1}}, "evaluation.held_out"),
    ],
)
def test_texts_are_no_pairs(write_config, texts, sections, where):
    """What follows each other in a file does not belong together: contrasting it, or judging by it, would be wrong."""
    ended = gist("plan", write_config(data=texts, **sections))
    assert ended.code == 2
    assert where in ended.err


def test_texts_have_no_negatives(write_config, texts):
    sections = {"loss": {"weight": 0}, "distillation": {"weight": 1}}
    ended = gist("plan", write_config(data={**texts, "hard_negatives": {}}, **sections))
    assert ended.code == 2
    assert "bare texts" in ended.err
