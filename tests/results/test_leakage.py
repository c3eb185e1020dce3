"""Which texts a task is judged on, and what is told of those that were trained on."""

import io
import json

import numpy as np
import pytest
from rich.console import Console
from support.corpora import built, data_of

from gist_train.results import leakage
from gist_train.results.leakage import Leak, count_leaks, evaluation_texts, leakage_line, leakage_table, leaks_of
from gist_train.results.loaded_tasks import (
    LoadedClassification,
    LoadedClustering,
    LoadedMteb,
    LoadedPairs,
    LoadedRetrieval,
    LoadedSts,
    LoadedTriplets,
)

STS = LoadedSts("sts", ("a", "b"), ("c", "A?"), np.array([0.0, 1.0]))
RETRIEVAL = LoadedRetrieval("ir", ("q", "r"), ("title text", "d", "e"), ({0: 1.0}, {1: 1.0}))
CLASSIFICATION = LoadedClassification("intents", ("fit", "on"), np.array([0, 1]), ("t", "u", "v"), np.array([0, 1, 0]), None)
ROWS = [
    {"anchor": "a", "positive": "Title: text", "negative": ["fit", "T"]},
    {"anchor": "x", "positive": ["y", "D"], "negative": ["on", "u"]},
    {"anchor": "fit", "positive": "on", "negative": "title text"},
]


def page(leaks: list[Leak]) -> list[list[str]]:
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(leakage_table(leaks))
    return [
        [cell.strip() for cell in line.split("│")[1:-1]] for line in console.export_text().splitlines() if line.startswith("│")
    ]


def test_texts_of_each_kind():
    """Queries and documents are told apart: a document that was trained on is no news, a query is. Rows that a classifier is
    fitted on are no leak."""
    assert {part: sorted(texts) for part, texts in evaluation_texts(STS).items()} == {"pairs": ["A?", "a", "b", "c"]}
    assert evaluation_texts(RETRIEVAL) == {"queries": RETRIEVAL.queries, "documents": RETRIEVAL.documents}
    assert evaluation_texts(CLASSIFICATION) == {"test": CLASSIFICATION.test_texts}
    assert evaluation_texts(LoadedClustering("k", ("a", "b", "c"), np.array([0, 1, 0]))) == {"texts": ("a", "b", "c")}
    assert evaluation_texts(LoadedPairs("p", ("a",), ("b",), np.array([True]))) == {"pairs": ("a", "b")}
    assert evaluation_texts(LoadedTriplets("t", ("a",), ("b",), ("c",))) == {"triplets": ("a", "b", "c")}
    assert evaluation_texts(LoadedMteb("m", (), False, "")) == {}


def test_leaks_are_counted_by_task_and_part(tmp_path, write_rows):
    """What the table, the card and the console say comes from these four numbers."""
    corpus = built(tmp_path / "corpus", data_of(write_rows("rows.jsonl", ROWS)))
    assert count_leaks(corpus, [RETRIEVAL, STS, CLASSIFICATION]) == [
        Leak("ir", "queries", 2, 0, 0),
        Leak("ir", "documents", 3, 2, 3),
        Leak("sts", "pairs", 3, 1, 1),
        Leak("intents", "test", 3, 2, 2),
    ]
    assert count_leaks(corpus, []) == []


def test_a_task_whose_texts_are_not_read_is_not_acquitted(tmp_path, write_rows, monkeypatch):
    """ "0 shared" of a task that nobody looked at would be a lie."""
    corpus = built(tmp_path / "corpus", data_of(write_rows("rows.jsonl", ROWS)))
    real = leakage.evaluation_texts
    monkeypatch.setattr(leakage, "evaluation_texts", lambda task: {} if task is STS else real(task))
    leaks = count_leaks(corpus, [STS, CLASSIFICATION])
    assert leaks == [Leak("sts", None, 0, 0, 0), Leak("intents", "test", 3, 2, 2)]
    assert page(leaks) == [["sts", "not checked", "", "", ""], ["intents", "test", "3", "2", "2"]]
    assert "sts" not in str(leakage_line(leaks))


def test_the_line_names_what_leaks_and_nothing_else():
    """It is the one line that a user reads before hours of training: task, counts, and the key that fixes it."""
    clean = Leak("sts", "pairs", 3_000, 0, 0)
    assert leakage_line([]) is None
    assert leakage_line([clean]) is None
    line = str(leakage_line([clean, Leak("ir", "documents", 5_183, 1_002, 4), Leak("b77", "test", 9, 1, 1)]))
    assert "1,002 of 5,183 texts of ir (documents), 1 of 9 texts of b77 (test)" in line
    assert "data.exclude_evaluation_texts: true" in line
    assert "sts" not in line
    assert "\n" not in line


def test_leaks_outlive_the_run(tmp_path):
    """A card is written weeks later, from the run folder alone; one of before leaks were counted opens too."""
    leaks = [Leak("sts", "pairs", 3, 1, 1), Leak("mteb", None, 0, 0, 0)]
    unchecked = [Leak("sts", None, 0, 0, 0), Leak("mteb", None, 0, 0, 0)]
    assert leaks_of(tmp_path, []) == []
    assert leaks_of(tmp_path, ["sts", "mteb"]) == unchecked
    (tmp_path / "run.json").write_text("{}")
    assert leaks_of(tmp_path, ["sts", "mteb"]) == unchecked
    (tmp_path / "run.json").write_text(json.dumps({"leakage": [leak.told() for leak in leaks]}))
    assert leaks_of(tmp_path, ["sts", "mteb"]) == leaks
    assert leaks_of(tmp_path, ["later", "sts"]) == [Leak("later", None, 0, 0, 0), leaks[0]]


@pytest.mark.parametrize("leak", [Leak("ir", "queries", 300, 0, 0), Leak("ir", "documents", 1_000, 14, 37)])
def test_the_table_has_every_part(leak):
    """Also those without a leak: that they were looked at is the good news."""
    assert page([leak]) == [["ir", leak.part, f"{leak.texts:,}", f"{leak.shared}", f"{leak.rows}"]]
