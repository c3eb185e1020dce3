"""Which texts a task is judged on, and what is told of those that were trained on."""

import io
import json
from dataclasses import asdict

import numpy as np
import pytest
from rich.console import Console
from support.corpora import built, data_of

from gist_train.config.evaluation import EvaluationConfig, StsTask
from gist_train.evaluation.classification import LoadedClassification
from gist_train.evaluation.clustering import LoadedClustering
from gist_train.evaluation.leakage import Leak, count_leaks, leakage_line, leakage_table, leaks_of
from gist_train.evaluation.mteb_tasks import LoadedMteb
from gist_train.evaluation.pairs import LoadedPairs
from gist_train.evaluation.retrieval import LoadedRetrieval
from gist_train.evaluation.sts import LoadedSts
from gist_train.evaluation.triplets import LoadedTriplets
from gist_train.run_folder import Run

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
    assert {part: sorted(texts) for part, texts in STS.judged_texts().items()} == {"pairs": ["A?", "a", "b", "c"]}
    assert RETRIEVAL.judged_texts() == {"queries": RETRIEVAL.queries, "documents": RETRIEVAL.documents}
    assert CLASSIFICATION.judged_texts() == {"test": CLASSIFICATION.test_texts}
    assert LoadedClustering("k", ("a", "b", "c"), np.array([0, 1, 0])).judged_texts() == {"texts": ("a", "b", "c")}
    assert LoadedPairs("p", ("a",), ("b",), np.array([True])).judged_texts() == {"pairs": ("a", "b")}
    assert LoadedTriplets("t", ("a",), ("b",), ("c",)).judged_texts() == {"triplets": ("a", "b", "c")}
    assert LoadedMteb("m", (), False, "").judged_texts() == {}


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


def test_a_task_whose_texts_are_not_read_is_not_acquitted(tmp_path, write_rows):
    """ "0 shared" of a task that nobody looked at would be a lie."""
    corpus = built(tmp_path / "corpus", data_of(write_rows("rows.jsonl", ROWS)))
    leaks = count_leaks(corpus, [LoadedMteb("mteb", (), False, ""), CLASSIFICATION])
    assert leaks == [Leak("mteb", None, 0, 0, 0), Leak("intents", "test", 3, 2, 2)]
    assert page(leaks) == [["mteb", "not checked", "", "", ""], ["intents", "test", "3", "2", "2"]]
    assert "mteb" not in str(leakage_line(leaks))


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

    def known(*names: str, held_out: float | None = None) -> list[Leak]:
        tasks = [StsTask(name=name, path="f.tsv") for name in names]
        return leaks_of(Run(tmp_path), EvaluationConfig(tasks=tasks, held_out=held_out))

    assert known() == []
    assert known("sts", "mteb") == unchecked
    (tmp_path / "run.json").write_text("{}")
    assert known("sts", "mteb") == unchecked
    (tmp_path / "run.json").write_text(json.dumps({"leakage": [asdict(leak) for leak in leaks]}))
    assert known("sts", "mteb") == leaks
    assert known("later", "sts") == [Leak("later", None, 0, 0, 0), leaks[0]]
    held_out = Leak("held_out", "queries", 20, 0, 0)
    (tmp_path / "run.json").write_text(json.dumps({"leakage": [asdict(held_out), asdict(leaks[0])]}))
    assert known("sts", held_out=0.1) == [leaks[0], held_out]


@pytest.mark.parametrize("leak", [Leak("ir", "queries", 300, 0, 0), Leak("ir", "documents", 1_000, 14, 37)])
def test_the_table_has_every_part(leak):
    """Also those without a leak: that they were looked at is the good news."""
    assert page([leak]) == [["ir", leak.part, f"{leak.texts:,}", f"{leak.shared}", f"{leak.rows}"]]
