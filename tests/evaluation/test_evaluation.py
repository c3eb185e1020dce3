"""Evaluation: scores against values worked out by hand, and what the readers say of files that are wrong."""

import gzip
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gist_train.config.errors import Fault, UserError
from gist_train.config.evaluation import (
    ClassificationTask,
    ClusteringTask,
    EvaluationTask,
    LabelColumns,
    PairTask,
    RetrievalTask,
    StsColumns,
    StsTask,
    TripletTask,
)
from gist_train.config.sources import RowColumns
from gist_train.evaluation import retrieval
from gist_train.evaluation.classification import LoadedClassification, drawn_rows
from gist_train.evaluation.clustering import LoadedClustering
from gist_train.evaluation.encoding import TextEncoder
from gist_train.evaluation.metrics import score_of
from gist_train.evaluation.pairs import LoadedPairs
from gist_train.evaluation.retrieval import LoadedRetrieval
from gist_train.evaluation.sts import LoadedSts
from gist_train.evaluation.tasks import LoadedTask, content_hash, load_tasks, measure
from gist_train.evaluation.triplets import LoadedTriplets

DATA = Path(os.environ.get("GIST_TRAIN_DATA", Path(__file__).parents[2] / "../shared/data"))
QRELS = "query-id\tcorpus-id\tscore\n"


class Table:
    """An encoder that looks vectors up, and remembers what it was asked."""

    def __init__(self, vectors: dict[str, Sequence[float]]):
        self.vectors = vectors
        self.asked: list[str] = []

    prompts: ClassVar[dict[str, str]] = {}

    def encode(self, texts: Sequence[str], prompt: str | None = None) -> Any:  # noqa: ARG002
        self.asked += texts
        return np.array([self.vectors[text] for text in texts], dtype=np.float32)


def values_of(encoder: TextEncoder, task: LoadedTask) -> dict[str, float]:
    """Scores without their items, from which each must come out again."""
    scores = measure(encoder, [task])
    for key, score in scores.items():
        assert score.items is not None
        assert score_of(key.rsplit("/", 1)[1], score.items) == score.value
    return {key: score.value for key, score in scores.items()}


def angle(degrees: float, length: float = 1.0) -> list[float]:
    return [length * math.cos(math.radians(degrees)), length * math.sin(math.radians(degrees))]


def lines(path: Path, *rows: Any) -> str:
    """A JSONL file, compressed where its name says so."""
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return str(path)


def text(path: Path, content: str) -> str:
    path.parent.mkdir(exist_ok=True)
    path.write_text(content, encoding="utf-8")
    return str(path)


def refused(*tasks: EvaluationTask) -> tuple[Fault, ...]:
    with pytest.raises(UserError) as caught:
        load_tasks(tasks)
    return caught.value.faults


def beir(folder: Path, *, qrels: str = "q1\td1\t1\n", split: str = "test") -> RetrievalTask:
    """Three documents and two queries in BEIR's layout."""
    lines(folder / "corpus.jsonl", *({"_id": f"d{n}", "title": "", "text": f"doc {n}"} for n in (1, 2, 3)))
    lines(folder / "queries.jsonl", {"_id": "q1", "text": "query 1"}, {"_id": "q2", "text": "query 2"})
    text(folder / "qrels" / f"{split}.tsv", QRELS + qrels)
    return RetrievalTask(name="r", path=str(folder), split=split)


def labelled(path: Path, *labels: Any) -> str:
    return lines(path, *({"text": f"{path.stem} {n}", "label": label} for n, label in enumerate(labels)))


# Scores


def test_sts_is_the_correlation_of_cosines_with_scores():
    """Dot products in place of cosines would let the long vector of the third pair win, and turn the order around."""
    task = LoadedSts("s", ("a", "a", "a"), ("b", "c", "d"), np.array([5.0, 3.0, 0.0]))
    encoder = Table({"a": angle(0, 2), "b": angle(0), "c": angle(60), "d": angle(90, 50)})
    scores = values_of(encoder, task)
    # Cosines 1, 1/2, 0 (mean 1/2) with scores 5, 3, 0 (mean 8/3): covariance 5/2, variances 1/2 and 38/3.
    assert list(scores) == ["s/spearman", "s/pearson"]
    assert scores["s/spearman"] == pytest.approx(1.0)
    assert scores["s/pearson"] == pytest.approx(2.5 / math.sqrt(0.5 * 38 / 3))
    assert encoder.asked == ["a", "b", "c", "d"]  # the text of three pairs once


def test_a_collapsed_model_has_correlation_zero():
    """scipy's nan would stand in a JSON file that jq then refuses to open."""
    task = LoadedSts("s", ("a", "b"), ("b", "a"), np.array([1.0, 2.0]))
    assert values_of(Table({"a": [1, 0], "b": [1, 0]}), task) == {"s/spearman": 0.0, "s/pearson": 0.0}


def by_hand() -> tuple[LoadedRetrieval, Table]:
    """Twelve documents at 0, 5, ... 55 degrees, a query at 0 and one at 55, so that their rankings are each other's reverse."""
    documents = tuple(f"d{n}" for n in range(12))
    task = LoadedRetrieval("r", ("q", "p"), documents, ({1: 1.0, 3: 2.0, 11: 1.0}, {11: 1.0}))
    vectors = {name: angle(5 * n, 1 + n) for n, name in enumerate(documents)}
    return task, Table(vectors | {"q": angle(-1, 7), "p": angle(56, 3)})


def test_ndcg_is_the_value_by_hand():
    """Gains are linear: with 2**judgement - 1 the second relevant document would weigh 3. Rank 12 is beyond the ten and counts
    nothing, but stands in the ideal; document 11 is rank 1 of the second query."""
    task, encoder = by_hand()
    gained = 1 / math.log2(3) + 2 / math.log2(5)
    ideal = 2 / math.log2(2) + 1 / math.log2(3) + 1 / math.log2(4)
    assert values_of(encoder, task)["r/ndcg@10"] == pytest.approx((gained / ideal + 1) / 2)


def test_recall_and_reciprocal_rank_are_the_values_by_hand():
    """The first relevant document of q is at rank 2, of p at rank 1; both find all of theirs among a hundred. One of two at rank
    101 halves recall, and a first one at rank 11 has no reciprocal rank at 10."""
    task, encoder = by_hand()
    scores = values_of(encoder, task)
    assert (scores["r/recall@100"], scores["r/mrr@10"]) == (1.0, pytest.approx((1 / 2 + 1) / 2))
    documents = tuple(f"d{n}" for n in range(150))
    far = LoadedRetrieval("r", ("q",), documents, ({10: 1.0, 100: 3.0},))
    scores = values_of(Table({name: angle(n / 2) for n, name in enumerate(documents)} | {"q": angle(-1)}), far)
    assert (scores["r/recall@100"], scores["r/mrr@10"]) == (0.5, 0.0)


def test_the_near_documents_decide_as_all_would(monkeypatch):
    """Only the hundred nearest, those that tie with the last of them and the judged are ranked: ties, a relevant document far
    behind, fewer documents than a hundred must give what a ranking of all gives."""
    random = np.random.default_rng(7)
    documents = tuple(f"d{n}" for n in range(400))
    # Few different directions: many documents of one similarity, across the hundredth place too.
    vectors = {name: angle(float(random.integers(0, 12)) * 7, 1 + random.random()) for name in documents}
    queries = tuple(f"q{n}" for n in range(30))
    vectors |= {name: angle(float(random.integers(0, 90))) for name in queries}
    judged = tuple(
        {int(at): float(gain) for at, gain in zip(random.integers(400, size=4), random.integers(1, 4, size=4), strict=True)}
        for _ in queries
    )
    task = LoadedRetrieval("r", queries, documents, judged)
    near = values_of(Table(vectors), task)
    monkeypatch.setattr(retrieval, "_near", lambda similarities, _: np.arange(len(similarities)))
    assert values_of(Table(vectors), task) == pytest.approx(near)
    assert 0 < near["r/ndcg@10"] < near["r/recall@100"] < 1


def test_queries_in_chunks_give_the_same_score(monkeypatch):
    """A mean of the chunks' means, or judgements of the wrong chunk, would show where queries don't fit at once."""
    task, encoder = by_hand()
    task = LoadedRetrieval("r", ("q", "p", "q"), task.documents, (*task.judgements, {0: 1.0}))
    whole = values_of(encoder, task)
    monkeypatch.setattr(retrieval, "RANKED", 25)  # two queries of twelve documents, then one
    assert values_of(encoder, task) == pytest.approx(whole)


def test_classification_fits_on_train_and_counts_on_test():
    """Fitted or judged on the wrong file, a label that train has not (3 of 4 right) could not be there. F1 is the mean over
    three classes (1, 2/3, 0), not weighted by their rows."""
    task = LoadedClassification(
        "c", ("a", "b", "a", "b"), np.array([0, 1, 0, 1]), ("a", "a", "b", "c"), np.array([0, 0, 1, 2]), None
    )
    scores = values_of(Table({"a": [9, 0], "b": [0, 9], "c": [0, 8]}), task)
    assert (scores["c/accuracy"], scores["c/f1"]) == (0.75, pytest.approx((1 + 2 / 3 + 0) / 3))


def test_the_nearest_neighbours_vote_by_cosine():
    """By Euclidean distance the long vector of class 1 would be far from its direction, and its text go to class 0."""
    train = tuple("aaabbbbb")
    task = LoadedClassification("c", train, np.array([0] * 3 + [1] * 5), ("x", "y"), np.array([1, 0]), None)
    vectors = {"a": angle(0), "b": angle(60, 40), "x": angle(50), "y": angle(1, 90)}
    # Five neighbours: of y the three of its direction, and two of the five others.
    assert values_of(Table(vectors), task)["c/knn_accuracy"] == 1.0


def test_clustering_is_the_agreement_of_clusters_with_labels():
    """Three bundles that are the labels have V-measure 1; labels that cut across them share nothing with the clusters."""
    texts = tuple(f"t{n}" for n in range(12))
    encoder = Table({name: [*angle(120 * (n % 3)), 0.001 * n] for n, name in enumerate(texts)})
    across = np.array([0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3])
    assert values_of(encoder, LoadedClustering("k", texts, np.arange(12) % 3)) == {"k/v_measure": pytest.approx(1.0)}
    assert values_of(encoder, LoadedClustering("k", texts[:9], across[:9]))["k/v_measure"] < 0.1


def test_pairs_are_the_average_precision_of_their_cosines():
    """Together are the first and third by similarity: (1/1 + 2/3) / 2, by cosine and not by the long vectors' dot products."""
    task = LoadedPairs("p", ("a",) * 4, ("b", "c", "d", "e"), np.array([True, False, True, False]))
    encoder = Table({"a": angle(0), "b": angle(5), "c": angle(20, 50), "d": angle(40), "e": angle(80, 90)})
    assert values_of(encoder, task) == {"p/ap": pytest.approx((1 + 2 / 3) / 2)}


def test_a_triplet_counts_where_the_positive_is_nearer():
    """A model that gives all texts one vector is no success: a tie counts as a miss."""
    task = LoadedTriplets("t", ("a",) * 3, ("b", "c", "b"), ("c", "b", "b"))
    assert values_of(Table({"a": angle(0), "b": angle(5), "c": angle(50, 9)}), task) == {"t/accuracy": pytest.approx(1 / 3)}


def test_a_task_of_other_content_is_another():
    """Scores of one task file would pass for those of another after an edit of a single text, score or label."""
    task = LoadedSts("s", ("a", "b"), ("c", "d"), np.array([1.0, 2.0]))
    assert content_hash(task) == content_hash(LoadedSts("renamed", ("a", "b"), ("c", "d"), np.array([1.0, 2.0])))
    others = [
        LoadedSts("s", ("a", "b"), ("c", "e"), np.array([1.0, 2.0])),
        LoadedSts("s", ("a", "bc"), ("", "d"), np.array([1.0, 2.0])),
        LoadedSts("s", ("a", "b"), ("c", "d"), np.array([1.0, 3.0])),
        LoadedSts("s", ("b", "a"), ("c", "d"), np.array([1.0, 2.0])),
        LoadedPairs("s", ("a", "b"), ("c", "d"), np.array([True, False])),
        LoadedTriplets("s", ("a", "b"), ("c", "d"), ("c", "d")),
    ]
    assert len({content_hash(task), *map(content_hash, others)}) == 7


def test_only_drawn_rows_are_encoded():
    """Encoding all of train costs minutes where 16 a class cost seconds."""
    train = tuple(f"t{n}" for n in range(40))
    task = LoadedClassification("c", train, np.arange(40) % 2, ("t0",), np.array([0]), 3)
    encoder = Table({name: [n % 2, 1] for n, name in enumerate(train)})
    assert measure(encoder, [task])["c/accuracy"].value == 1.0
    assert len(set(encoder.asked) - {"t0"}) in (5, 6)


def test_the_draw_is_the_same_each_time_and_class_by_class():
    """Another draw for another model, or for the others when one class grows, would make scores not comparable."""
    labels = np.arange(60) % 3
    rows = drawn_rows(labels, 4)
    assert rows.tolist() == sorted(set(rows.tolist()))
    assert np.bincount(labels[rows]).tolist() == [4, 4, 4]
    grown = drawn_rows(np.append(labels, [2, 2, 2]), 4)
    assert [row for row in grown if labels[row % 60] < 2 and row < 60] == [row for row in rows if labels[row] < 2]
    assert rows.tolist() != [*range(12)]  # not simply the first of each
    assert drawn_rows(labels, 100).tolist() == drawn_rows(labels, None).tolist() == [*range(60)]


@pytest.mark.parametrize("vectors", [{"a": [math.nan, 1], "b": [1, 0]}, {"a": [math.inf, 1], "b": [1, 0]}])
def test_vectors_that_are_not_finite_are_refused(vectors):
    """A diverged model would otherwise get a score of nan, or an error of scikit-learn's that names no task."""
    with pytest.raises(FloatingPointError, match=r"^s: 1 of 2 embeddings hold a value that is not finite"):
        measure(Table(vectors), [LoadedSts("s", ("a", "b"), ("b", "b"), np.array([1.0, 2.0]))])


def test_a_vector_too_few_is_refused():
    """Numpy's indexing would take the wrong row for a text and say nothing."""

    class Short:
        prompts: ClassVar[dict[str, str]] = {}

        def encode(self, texts: Sequence[str], prompt: str | None = None) -> Any:  # noqa: ARG002
            return np.ones((len(texts) - 1, 2), np.float32)

    with pytest.raises(ValueError, match=r"^s: the encoder gave an array of shape \(1, 2\) for 2 texts"):
        measure(Short(), [LoadedSts("s", ("a",), ("b",), np.array([1.0]))])


# Good files


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.tsv", 'score\tone\ttwo\n5.0\t"open\tb, c\n\n1\tc\td"e\n'),
        ("p.csv", '\ufeffone,two,score\r\n"""open","b, c",5\r\nc,"d""e",1\r\n'),
        (
            "p.jsonl",
            '{"score": 5, "one": "\\"open", "two": "b, c"}\n\n{"score": "1", "one": " c", "two": "d\\"e"}\n',
        ),
    ],
)
def test_sts_reads_each_format(tmp_path, name, content):
    """In a TSV a quote is a quote: read as quoting, STS-B's files lose rows and say nothing. A byte-order mark is no column."""
    path = text(tmp_path / name, content)
    (task,) = load_tasks([StsTask(name="s", path=path, columns=StsColumns(text1="one", text2="two"))])
    assert isinstance(task, LoadedSts)
    assert (task.texts1, task.texts2, task.scores.tolist()) == (('"open', "c"), ("b, c", 'd"e'), [5.0, 1.0])


def test_parquet_is_read_as_the_other_formats_are(tmp_path):
    """People keep what they train and judge on in one format: scores are numbers there, labels whole ones."""
    columns = {"sentence1": ['"open', "c "], "sentence2": ["b, c", 'd"e'], "score": [5, 1]}
    pq.write_table(pa.table(columns), tmp_path / "p.parquet")
    pq.write_table(pa.table({"text": ["a", "b"], "label": [7, 8]}), tmp_path / "train.parquet")
    train, test = str(tmp_path / "train.parquet"), labelled(tmp_path / "test.jsonl", 8)
    pairs, intents = load_tasks(
        [StsTask(name="s", path=str(tmp_path / "p.parquet")), ClassificationTask(name="c", train=train, test=test)]
    )
    assert isinstance(pairs, LoadedSts)
    assert (pairs.texts1, pairs.texts2, pairs.scores.tolist()) == (('"open', "c"), ("b, c", 'd"e'), [5.0, 1.0])
    assert isinstance(intents, LoadedClassification)
    assert (intents.train_labels.tolist(), intents.test_labels.tolist()) == ([0, 1], [1])


def test_a_column_that_is_there_twice_is_refused(tmp_path):
    """Which of the two is meant nobody knows; the first was taken without a word."""
    path = text(tmp_path / "p.csv", "sentence1,sentence2,score,score\na,b,1,2\nc,d,2,1\n")
    (fault,) = refused(StsTask(name="s", path=path))
    assert fault.found == 'two columns "score"'


def test_labels_are_numbered_as_they_appear(tmp_path):
    """Renamed labels must draw the same rows, JSON's 7 be CSV's 7, and a label of test alone have a number of its own."""
    train = labelled(tmp_path / "train.jsonl", "z", 7, "z", "a")
    test = text(tmp_path / "test.csv", "label,text\n7,x\nnew,y\nz,x\n")
    (task,) = load_tasks([ClassificationTask(name="c", train=train, test=test, per_class=1)])
    assert isinstance(task, LoadedClassification)
    assert task.train_labels.tolist() == [0, 1, 0, 2]
    assert (task.test_labels.tolist(), task.test_texts, task.per_class) == ([1, 3, 0], ("x", "y", "x"), 1)


def test_beir_folder(tmp_path):
    """Unjudged queries (of other splits, too) and those without a judgement above 0 are no part of the mean: counted as 0,
    every score would be too low."""
    (task,) = load_tasks([beir(tmp_path, qrels="q2\td3\t2\nq2\td1\t0\nq1\td2\t-1\n")])
    assert task == LoadedRetrieval("r", ("query 2",), ("doc 1", "doc 2", "doc 3"), ({2: 2.0},))


def test_flat_folder_gz_and_titles(tmp_path):
    """Titles hold much of what is asked for: a reader that leaves them out still works, only worse."""
    documents = [{"_id": 1, "title": "T", "text": "x"}, {"_id": "2", "title": "T", "text": " "}, {"_id": "3", "text": "x"}]
    lines(tmp_path / "corpus.jsonl.gz", *documents)
    lines(tmp_path / "queries.dev.jsonl.gz", {"_id": "q", "text": "T x"})
    lines(tmp_path / "queries.jsonl", {"_id": "other", "text": "of another split"})
    text(tmp_path / "qrels.dev.tsv", QRELS + "q\t1\t1\n")
    (task,) = load_tasks([RetrievalTask(name="r", path=str(tmp_path), split="dev")])
    assert task == LoadedRetrieval("r", ("T x",), ("T x", "T", "x"), ({0: 1.0},), bodies=("x",))


# Faults


def test_all_faults_of_all_tasks_come_at_once(tmp_path):
    """A user who fixes one file at a time starts the command once a fault."""
    pairs = text(tmp_path / "p.tsv", "sentence1\tsentence2\tscore\na\tb\tgood\n\t b\t1\na\tb\n")
    empty = text(tmp_path / "empty.jsonl", "")
    faults = refused(
        StsTask(name="s", path=pairs),
        ClassificationTask(name="c", train=labelled(tmp_path / "one.jsonl", "x", "x"), test=empty),
        RetrievalTask(name="r", path=str(tmp_path / "none")),
    )
    assert [(fault.where, fault.found) for fault in faults[:5]] == [
        ('evaluation.tasks[0] (s): p.tsv, row 1: "score" is not a number', '"good"'),
        ('evaluation.tasks[0] (s): p.tsv, row 2: "sentence1" is empty', '""'),
        ("evaluation.tasks[0] (s): p.tsv, row 3: not as many fields as the header", "2: ['a', 'b']"),
        ("evaluation.tasks[1] (c): one.jsonl: label", 'only "x"'),
        ("evaluation.tasks[1] (c): empty.jsonl", "no rows"),
    ]
    assert len(faults) == 6
    assert faults[5].where == "evaluation.tasks[2] (r): path"
    assert "neither folder nor file in" in faults[5].found


@pytest.mark.parametrize("score", ["nan", "inf", "", "1,5"])
def test_a_score_is_a_finite_number(tmp_path, score):
    """float() takes nan and inf, and one of them makes the whole correlation nan."""
    (fault,) = refused(StsTask(name="s", path=text(tmp_path / "p.tsv", f"sentence1\tsentence2\tscore\na\tb\t{score}\n")))
    assert fault.where.endswith('p.tsv, row 1: "score" is not a number')
    assert fault.expected == "a finite number"


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ("[1]", "not an object"),
        ('{"text": "a"', "not JSON"),
        ('{"text": "a"}', '"label" is missing'),
        ('{"text": 5, "label": "x"}', '"text" is not a string'),
        ('{"text": "a", "label": null}', '"label" is not a string'),
        ('{"text": "\\ud800", "label": "x"}', '"text" holds half of a surrogate pair'),
    ],
)
def test_bad_jsonl_rows(tmp_path, row, what):
    """The row is the line, blank ones counted: it must be the number that the editor shows."""
    train = text(tmp_path / "train.jsonl", f'{{"text": "a", "label": "x"}}\n\n{row}\n')
    (fault,) = refused(ClassificationTask(name="c", train=train, test=labelled(tmp_path / "test.jsonl", "x")))
    assert fault.where == f"evaluation.tasks[0] (c): train.jsonl, row 3: {what}"


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        (StsTask, ("text1", "text2", "similarity")),
        (StsTask, ("question1", "question2", "similarity_score")),
        (PairTask, ("question1", "question2", "is_duplicate")),
        (TripletTask, ("query", "pos", "neg")),
        (TripletTask, ("anchor", "positives", "hard_negative")),
        (ClusteringTask, ("text", "intent")),
    ],
)
def test_other_usual_names_of_columns_are_taken(tmp_path, kind, names):
    """A file that trains under these names must not need a `columns` to judge; what the config names is asked for as it is."""
    lasts = [0, 1, 0, 1] if names[-1] not in ("neg", "hard_negative") else [f"no {n}" for n in range(4)]
    rows = [dict(zip(names, ["a b", "c d", "e f", "g h"][n:] + ["x"] * n, strict=False)) for n in range(4)]
    rows = [{**row, names[-1]: last} for row, last in zip(rows, lasts, strict=True)]
    path = tmp_path / "f.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (task,) = load_tasks([kind(name="t", path=str(path))])
    columns = kind.model_fields["columns"].default
    usual = columns.model_dump().values()
    renamed = tmp_path / "g.jsonl"
    renamed.write_text("".join(json.dumps(dict(zip(usual, row.values(), strict=True))) + "\n" for row in rows))
    (other,) = load_tasks([kind(name="t", path=str(renamed))])
    assert content_hash(task) == content_hash(other)
    first = next(iter(columns.model_dump()))
    (fault,) = refused(kind(name="t", path=str(path), columns={first: "elsewhere"}))
    assert fault.expected == 'a column "elsewhere"'


def test_a_missing_column_is_told_once_with_what_is_there(tmp_path):
    """Told a row at a time, a wrong column name would bury the other faults."""
    columns = LabelColumns(text="question", label="intent")
    files = [labelled(tmp_path / name, "x", "y") for name in ("train.jsonl", "test.jsonl")]
    faults = refused(ClassificationTask(name="c", train=files[0], test=files[1], columns=columns))
    assert [fault.where.split(": ", 1)[1] for fault in faults] == [
        f"{name}.jsonl: no column for {key}" for name in ("train", "test") for key in ("text", "label")
    ]
    assert (faults[0].found, faults[0].expected) == ('the columns "text", "label"', 'a column "question"')
    assert faults[0].fix == "name the right column in columns.text, or add it to the file"


def test_many_bad_rows_are_counted(tmp_path):
    """Ten thousand faults on a screen hide the one of another file."""
    path = text(tmp_path / "p.tsv", "sentence1\tsentence2\tscore\n" + "a\tb\tx\n" * 1500)
    faults = refused(StsTask(name="s", path=path))
    assert len(faults) == 11
    assert faults[-1].found == "1,490 more bad rows"


def test_bad_rows_are_left_out_where_the_task_says_so(tmp_path, caplog):
    """One empty cell of 2,000 rows need not send the user back to the file."""
    path = text(tmp_path / "p.tsv", "sentence1\tsentence2\tscore\na\tb\t1\nc\t\t2\nd\te\tx\nf\tg\t3\n")
    (task,) = load_tasks([StsTask(name="s", path=path, on_bad_row="skip")])
    assert (task.texts1, task.texts2, list(task.scores)) == (("a", "f"), ("b", "g"), [1, 3])
    (line,) = caplog.messages
    for part in ("evaluation.tasks[0] (s): p.tsv", "2 of 4 rows left out", 'row 2: "sentence2" is empty'):
        assert part in line


def test_a_file_of_bad_rows_alone_is_refused_all_the_same(tmp_path):
    """Nothing would be left to measure."""
    path = text(tmp_path / "p.tsv", "sentence1\tsentence2\tscore\na\tb\tx\n")
    faults = refused(StsTask(name="s", path=path, on_bad_row="skip"))
    assert [fault.where for fault in faults] == ['evaluation.tasks[0] (s): p.tsv, row 1: "score" is not a number']


def test_bad_rows_of_a_folder_take_what_judges_them_along(tmp_path, caplog):
    """A query that was left out is not asked; a document that was is not found."""
    task = beir(tmp_path, qrels="q1\td1\t1\nq2\td2\t1\nq2\td3\tbad\n")
    lines(tmp_path / "queries.jsonl", {"_id": "q1", "text": " "}, {"_id": "q2", "text": "query 2"})
    lines(tmp_path / "corpus.jsonl", *({"_id": f"d{n}", "text": f"doc {n}"} for n in (1, 2, 3)), {"_id": "d4", "text": 7})
    (read,) = load_tasks([task.model_copy(update={"on_bad_row": "skip"})])
    assert read.queries == ("query 2",)
    assert read.documents == ("doc 1", "doc 2", "doc 3")
    assert read.judgements == ({1: 1.0},)
    said = " ".join(caplog.messages)
    for part in ("queries.jsonl: 1 of 2 rows", "corpus.jsonl: 1 of 4 rows", "test.tsv: 1 of 3 rows"):
        assert part in said


@pytest.mark.parametrize("kind", [StsTask, PairTask])
def test_other_delimiters_and_files_without_header(tmp_path, kind):
    """As a source does: a file that trains could not judge."""
    key = "score" if kind is StsTask else "label"
    path = text(tmp_path / "p.csv", "a;b;1\nc;d, e;0\n")
    columns = kind.model_fields["columns"].annotation(**{"text1": "1", "text2": "2", key: "3"})
    (task,) = load_tasks([kind(name="s", path=path, delimiter=";", header=False, columns=columns)])
    assert (task.texts1, task.texts2) == (("a", "c"), ("b", "d, e"))


def test_files_that_cannot_be_read(tmp_path):
    """A traceback of gzip or of the decoder names no file."""
    cut = tmp_path / "cut.jsonl.gz"
    cut.write_bytes(gzip.compress(os.urandom(4000).hex().encode())[:2000])
    latin = tmp_path / "latin.tsv"
    latin.write_bytes("sentence1\tsentence2\tscore\né\tb\t1\n".encode("latin-1"))
    quotes = text(tmp_path / "quotes.csv", 'sentence1,sentence2,score\na,b,1\n"a,b,1\n')
    paths = [str(cut), str(latin), quotes, str(tmp_path), str(tmp_path / "no.tsv"), text(tmp_path / "p.txt", "x")]
    (tmp_path / "dir.tsv").mkdir()
    faults = refused(*(StsTask(name=f"s{n}", path=path) for n, path in enumerate([*paths, str(tmp_path / "dir.tsv")])))
    assert len(faults) == 7
    assert [fault.expected for fault in faults[:2]] == ["a whole file", "UTF-8"]
    assert faults[2].where == "evaluation.tasks[2] (s2): quotes.csv, row 2: broken quoting"
    assert faults[3].found.endswith(", a folder")
    assert "which is no file in" in faults[4].found
    assert (faults[5].found, faults[5].expected.split(",")[0]) == ('the ending ".txt"', "a file that ends in .jsonl")
    assert faults[6].found.endswith(", a folder")


def test_constant_scores(tmp_path):
    """A correlation with a constant is nan: the column is the wrong one."""
    path = text(tmp_path / "p.tsv", "sentence1\tsentence2\tscore\na\tb\t1\nc\td\t1.0\n")
    (fault,) = refused(StsTask(name="s", path=path))
    assert (fault.where, fault.found) == ("evaluation.tasks[0] (s): p.tsv: score", "1 in each of 2 rows")


def test_faults_of_judgements(tmp_path):
    """A judgement that nobody can read, or two of one pair, must not be guessed at."""
    faults = refused(beir(tmp_path, qrels="q1\td1\t1\nq1\td1\t2\nq1\td2\tyes\n"))
    assert [(fault.where.removeprefix("evaluation.tasks[0] (r): "), fault.found) for fault in faults] == [
        ("qrels/test.tsv, row 2: a pair that was judged before", "2, 1 before"),
        ('qrels/test.tsv, row 3: "score" is not a number', '"yes"'),
    ]


def test_a_file_of_rows_asks_each_anchor_for_its_positives(tmp_path):
    """Held-out pairs judge a search without a folder of three files made of them."""
    rows = [
        {"query": "q1", "pos": ["a", "b"], "neg": ["c"], "lang": "en"},
        {"query": "q2", "pos": "a", "neg": [], "lang": "en"},
        {"query": "q1", "pos": "d", "neg": "q2", "lang": "en"},
        {"query": "q3", "pos": "d", "neg": None, "lang": "de"},
    ]
    task = RetrievalTask(name="faq", path=lines(tmp_path / "faq.jsonl", *rows), where='lang == "en"')
    (read,) = load_tasks([task])
    assert (read.queries, read.documents) == (("q1", "q2"), ("a", "b", "c", "d", "q2"))
    assert read.judgements == ({0: 1, 1: 1, 3: 1}, {0: 1})
    assert read.itself == (-1, 4)  # q2 is a document too, and no hit of itself
    named = text(tmp_path / "faq.csv", "ask;say\nq1;a\nq2;b\n")
    columns = RowColumns(anchor="ask", positive="say")
    (of_csv,) = load_tasks([RetrievalTask(name="faq", path=named, columns=columns, delimiter=";")])
    assert (of_csv.queries, of_csv.documents, of_csv.judgements) == (("q1", "q2"), ("a", "b"), ({0: 1}, {1: 1}))


def test_rows_of_a_file_are_judged_as_the_same_folder_is(tmp_path):
    """The same question must not get another figure by how its texts are written."""
    (tmp_path / "beir").mkdir()
    folder = beir(tmp_path / "beir", qrels="q1\td1\t1\nq1\td3\t1\nq2\td2\t1\n")
    rows = [{"anchor": "query 1", "positive": ["doc 1", "doc 3"]}, {"anchor": "query 2", "positive": "doc 2"}]
    file = RetrievalTask(name="r", path=lines(tmp_path / "rows.jsonl", *rows))
    names = ("query 1", "query 2", "doc 1", "doc 2", "doc 3")
    encoder = Table({name: angle(degrees) for name, degrees in zip(names, (0, 40, 50, 10, 20), strict=True)})
    of_folder, of_file = (values_of(encoder, load_tasks([task])[0]) for task in (folder, file))
    assert of_folder == of_file
    assert of_file["r/ndcg@10"] < 1


def test_faults_of_a_file_of_rows(tmp_path):
    """The fix names this task's key and not the training's."""
    path = lines(tmp_path / "rows.jsonl", {"anchor": "a", "positive": "b"}, {"anchor": " ", "positive": "c"})
    (fault,) = refused(RetrievalTask(name="r", path=path))
    assert fault.where == 'evaluation.tasks[0] (r): rows.jsonl, row 2: "anchor" is empty'
    assert fault.fix == "fix the row, drop it, or set on_bad_row: skip for r"
    (fault,) = refused(RetrievalTask(name="r", path=path, on_bad_row="skip"))
    assert (fault.found, fault.expected) == ("1 different positives and negatives in 1 rows", "two or more")
    assert next(fault.fix for fault in refused(RetrievalTask(name="r", path=path, split="dev"))) == "take split out"
    (tmp_path / "f").mkdir()
    (fault,) = refused(beir(tmp_path / "f").model_copy(update={"where": "lang == 'en'", "delimiter": ";"}))
    assert (fault.where, fault.fix) == ("evaluation.tasks[0] (r): where", "take where and delimiter out, or name a file of rows")
    (fault,) = refused(RetrievalTask(name="r", path=text(tmp_path / "rows.txt", "a")))
    assert 'a file that ends in ".txt"' in fault.found


def test_files_that_do_not_belong_together_are_refused(tmp_path):
    """Where most judgements are of ids that are not there, it is another data set's file, or another split's."""
    queries, documents = refused(beir(tmp_path, qrels="x1\ty1\t1\nx2\ty2\t1\nq1\td1\t1\n"))
    assert "2 of 3 judgements of queries that are not there" in queries.found
    assert "2 of 3 judgements of documents that are not there" in documents.found


def test_what_beirs_downloads_lack_is_left_out_as_beir_does(tmp_path, caplog):
    """FiQA has documents without text, NFCorpus judges queries and ArguAna documents that are not there. Such a query is not
    asked; such a document can't be found, and is still part of what was to be found."""
    judged = "".join(f"q1\td{n}\t1\n" for n in (1, 2, 3)) + "q2\td3\t1\nq2\tgone\t1\n"
    beir(tmp_path, qrels=judged * 1 + "nobody\td1\t1\n")
    documents = [{"_id": f"d{n}", "title": "", "text": f"doc {n}"} for n in (1, 2, 3)]
    lines(tmp_path / "corpus.jsonl", *documents, {"_id": "empty", "title": "", "text": " "})
    (task,) = load_tasks([RetrievalTask(name="r", path=str(tmp_path))])
    assert isinstance(task, LoadedRetrieval)
    assert task.documents == ("doc 1", "doc 2", "doc 3")
    assert task.judgements == ({0: 1.0, 1: 1.0, 2: 1.0}, {2: 1.0, 3: 1.0})
    assert task.itself == ()
    for words in ("1 documents without a text", "1 judgements of queries", "1 judgements of documents"):
        assert words in caplog.text
    encoder = Table({"doc 1": angle(0), "doc 2": angle(90), "doc 3": angle(45), "query 1": angle(0), "query 2": angle(45)})
    scores = values_of(encoder, task)
    # The second query finds one of two: 1 / (1 + 1 / log2(3)) and one half.
    assert scores["r/ndcg@10"] == pytest.approx((1 + 1 / (1 + 1 / math.log2(3))) / 2)
    assert scores["r/recall@100"] == pytest.approx(0.75)


def test_a_query_is_no_hit_of_itself(tmp_path):
    """ArguAna's and Quora's queries are documents too: the first hit would always be the query. An id alone says nothing."""
    qrels = "q1\td1\t1\nq2\td2\t1\n"
    task = beir(tmp_path, qrels=qrels)
    documents = [{"_id": f"d{n}", "title": "", "text": f"doc {n}"} for n in (1, 2)]
    same = [{"_id": f"q{n}", "title": "", "text": f"query {n}"} for n in (1, 2)]
    lines(tmp_path / "corpus.jsonl", *documents, *same)
    (loaded,) = load_tasks([task])
    assert isinstance(loaded, LoadedRetrieval)
    assert loaded.itself == (2, 3)
    encoder = Table({"doc 1": angle(10), "doc 2": angle(80), "query 1": angle(0), "query 2": angle(90)})
    assert values_of(encoder, loaded)["r/mrr@10"] == 1.0
    lines(tmp_path / "corpus.jsonl", *documents, *({**one, "title": "A title"} for one in same))  # as ArguAna has them
    (titled,) = load_tasks([task])
    assert isinstance(titled, LoadedRetrieval)
    assert titled.itself == (2, 3)
    lines(tmp_path / "corpus.jsonl", *documents, *({**one, "text": f"other {one['_id']}"} for one in same))
    (other,) = load_tasks([task])
    assert isinstance(other, LoadedRetrieval)
    assert other.itself == ()
    assert len({content_hash(loaded), content_hash(other)}) == 2


def test_faults_of_a_folder(tmp_path):
    """An id that comes twice is two documents; a wrong split must show which files there are."""
    task = beir(tmp_path)
    lines(tmp_path / "corpus.jsonl", {"_id": "d1", "text": "w"}, {"_id": "d2", "text": "x"}, {"_id": "d2", "text": "y"})
    assert [fault.where.split(": ", 1)[1] for fault in refused(task)] == ['corpus.jsonl, row 3: "_id" was there before']
    lines(tmp_path / "corpus.jsonl", {"_id": "d1", "text": "x"})
    one, split = refused(task, RetrievalTask(name="dev", path=str(tmp_path), split="dev"))[:2]
    assert one.found == "not two documents with a text"
    assert "qrels/test.tsv" in refused(RetrievalTask(name="dev", path=str(tmp_path), split="dev"))[0].found
    assert split.where.startswith("evaluation.tasks[1] (dev)")


def test_no_relevant_document(tmp_path):
    """The mean over no query is a division by zero."""
    (fault,) = refused(beir(tmp_path, qrels="q1\td1\t0\n"))
    assert (fault.where, fault.found) == ("evaluation.tasks[0] (r): qrels/test.tsv: score", "no score above 0")


def test_the_other_kinds_are_read(tmp_path):
    """Labels by name, 1 and 0 as numbers, text or JSON's own truth, triplets in the order of their columns."""
    clusters = labelled(tmp_path / "c.jsonl", "x", 7, "x")
    pairs = text(tmp_path / "p.tsv", "sentence1\tsentence2\tlabel\na\tb\t1\nc\td\t0\n")
    true = lines(tmp_path / "t.jsonl", *({"one": "a", "two": "b", "same": same} for same in (True, 1, "0", False)))
    triplets = text(tmp_path / "t.csv", "negative,positive,anchor\nn,p,a\nm,q,b\n")
    loaded = load_tasks(
        [
            ClusteringTask(name="k", path=clusters),
            PairTask(name="p", path=pairs),
            PairTask.model_validate({"name": "t", "path": true, "columns": {"text1": "one", "text2": "two", "label": "same"}}),
            TripletTask(name="tri", path=triplets),
        ]
    )
    clustering, first, second, of_three = loaded
    assert isinstance(clustering, LoadedClustering)
    assert (clustering.texts, clustering.labels.tolist()) == (("c 0", "c 1", "c 2"), [0, 1, 0])
    assert isinstance(first, LoadedPairs)
    assert isinstance(second, LoadedPairs)
    assert (first.texts1, first.texts2, first.together.tolist()) == (("a", "c"), ("b", "d"), [True, False])
    assert second.together.tolist() == [True, True, False, False]
    assert of_three == LoadedTriplets("tri", ("a", "b"), ("p", "q"), ("n", "m"))


def test_the_other_kinds_say_what_is_wrong(tmp_path):
    """scikit-learn's own errors would name neither file nor row, and half a class has no average precision."""
    one = labelled(tmp_path / "one.jsonl", "x", "x")
    each = labelled(tmp_path / "each.jsonl", "x", "y")
    scored = text(tmp_path / "scored.tsv", "sentence1\tsentence2\tlabel\na\tb\t0.5\nc\td\t0\n")
    alike = text(tmp_path / "alike.tsv", "sentence1\tsentence2\tlabel\na\tb\t1\nc\td\t1\n")
    short = text(tmp_path / "short.csv", "anchor,positive,negative\na,p,\n")
    faults = refused(
        ClusteringTask(name="one", path=one),
        ClusteringTask(name="each", path=each),
        PairTask(name="scored", path=scored),
        PairTask(name="alike", path=alike),
        TripletTask(name="short", path=short),
    )
    assert [(fault.where.partition(": ")[2], fault.found) for fault in faults] == [
        ("one.jsonl: label", "1 different in 2 rows"),
        ("each.jsonl: label", "2 different in 2 rows"),
        ('scored.tsv, row 1: "label" is neither 1 nor 0', '"0.5"'),
        ("alike.tsv: label", "1 in each of 2 rows"),
        ('short.csv, row 1: "negative" is empty', '""'),
    ]


@pytest.mark.skipif(not DATA.is_dir(), reason="no real data at GIST_TRAIN_DATA")
def test_real_files_are_read_whole():
    """The readers must hold on real files: unclosed quotes in STS-B, a compressed corpus, 77 intents."""
    banking = DATA / "classification/banking77"
    sts, retrieval, classification = load_tasks(
        [
            StsTask(name="stsb", path=str(DATA / "sts/stsb_dev.tsv")),
            RetrievalTask(name="scifact", path=str(DATA / "retrieval/scifact_1k")),
            ClassificationTask(name="b77", train=str(banking / "train.jsonl"), test=str(banking / "test.jsonl")),
        ]
    )
    assert isinstance(sts, LoadedSts)
    assert (len(sts.texts1), len(sts.texts2), sts.scores.shape) == (1500, 1500, (1500,))
    assert isinstance(retrieval, LoadedRetrieval)
    assert (len(retrieval.queries), len(retrieval.documents), sum(map(len, retrieval.judgements))) == (300, 1000, 339)
    assert isinstance(classification, LoadedClassification)
    assert (len(classification.train_texts), len(classification.test_texts)) == (10003, 3080)
    assert set(classification.test_labels.tolist()) == set(range(77))
    assert len(drawn_rows(classification.train_labels, 16)) == 77 * 16


def test_a_judged_document_that_is_the_query_is_never_found(tmp_path):
    """It is no hit, so it counts in the ideal alone, in all three metrics and however few documents there are."""
    task = beir(tmp_path, qrels="q1\td1\t1\nq1\tq1\t1\n")
    documents = [{"_id": "d1", "title": "", "text": "doc 1"}, {"_id": "q1", "title": "", "text": "query 1"}]
    lines(tmp_path / "corpus.jsonl", *documents)
    (loaded,) = load_tasks([task])
    scores = values_of(Table({"doc 1": angle(10), "query 1": angle(0)}), loaded)
    assert scores == pytest.approx({"r/ndcg@10": 1 / (1 + 1 / math.log2(3)), "r/recall@100": 0.5, "r/mrr@10": 1.0})


def test_an_anchor_that_is_its_own_positive_is_not_asked(tmp_path, caplog):
    """Rows for dropout alone, as SimCSE has them: whatever the model, its scores would be the same."""
    path = tmp_path / "rows.jsonl"
    own = [{"anchor": f"t{n}", "positive": f"t{n}"} for n in range(4)]
    lines(path, *own)
    (fault,) = refused(RetrievalTask(name="r", path=str(path)))
    assert fault.found == "4 of 4 anchors that are their only positive"
    lines(path, *own, {"anchor": "q", "positive": "t1"}, {"anchor": "t2", "positive": "t3"})
    (loaded,) = load_tasks([RetrievalTask(name="r", path=str(path))])
    assert isinstance(loaded, LoadedRetrieval)
    assert loaded.queries == ("q", "t2")
    assert "3 of 5 anchors that are their only positive" in caplog.text


def test_one_text_on_both_sides_of_a_triplet_is_a_tie():
    """Brought to length 1 once and twice, one vector has two cosines, and rounding decides."""
    random = np.random.default_rng(0)
    names = [f"{side}{n}" for side in "ap" for n in range(500)]
    encoder = Table(dict(zip(names, random.standard_normal((1000, 384)).tolist(), strict=True)))
    task = LoadedTriplets("t", tuple(names[:500]), tuple(names[500:]), tuple(names[500:]), prompt=None)
    assert values_of(encoder, task) == {"t/accuracy": 0.0}


@pytest.mark.parametrize("count", [21, 37, 45])
def test_documents_of_one_vector_share_their_places(count):
    """A product of matrices rounds its last columns otherwise: the last of equal documents was the first hit."""
    vector = np.random.default_rng(count).standard_normal(384).tolist()
    documents = [f"d{n}" for n in range(count)]
    encoder = Table({"q": np.random.default_rng(0).standard_normal(384).tolist(), **dict.fromkeys(documents, vector)})
    queries = tuple("q" for _ in documents)
    task = LoadedRetrieval("r", queries, tuple(documents), tuple({n: 1.0} for n in range(count)))
    gains = measure(encoder, [task])["r/ndcg@10"].items
    assert gains == pytest.approx([sum(1 / math.log2(place + 2) for place in range(10)) / count] * count)
