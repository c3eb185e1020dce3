"""Scores that rows came with, from file to batch."""

import numpy as np
import pytest
from support.corpora import built

from gist_train.config.errors import Fault, UserError
from gist_train.config.loading import load_config
from gist_train.config.schema import DataConfig, mathematics
from gist_train.config.sources import Columns, CsvSource, JsonlSource
from gist_train.data.sources import read_rows

WHERE = "data.train[0]"
ROWS = [
    {"query": "a", "pos": ["p", "q"], "neg": ["n"], "pos_scores": [2.5, 1], "neg_scores": [-3.0]},
    {"query": "b", "pos": ["r"], "neg": [], "pos_scores": [0.5], "neg_scores": []},
    {"query": "c", "pos": ["s"], "neg": ["n", "t", "n"], "pos_scores": [7], "neg_scores": [1.0, 2.0, 3.0]},
]


def rows_of(path, **settings):
    return list(read_rows(JsonlSource(path=str(path), scores="texts", **settings), WHERE))


def test_scores_of_texts_as_flag_embedding_writes_them(write_rows):
    rows = rows_of(write_rows("rows.jsonl", ROWS))
    assert [(row.positive_scores, row.negative_scores) for row in rows] == [
        ((2.5, 1.0), (-3.0,)),
        ((0.5,), ()),
        ((7.0,), (1.0, 2.0, 3.0)),
    ]
    assert all(row.positive_scores == () for row in read_rows(JsonlSource(path=str(write_rows("rows.jsonl", ROWS))), WHERE))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"pos_scores": [1.0]}, '"pos_scores" has 1 numbers, for 2 texts'),
        ({"neg_scores": None}, '"neg_scores" has 1 numbers, for 1 texts'),
        ({"neg_scores": ["high"]}, '"neg_scores" is no finite number'),
        ({"pos_scores": [1.0, "inf"]}, '"pos_scores" is no finite number'),
        ({"pos_scores": [True, 1.0]}, '"pos_scores" is no finite number'),
    ],
)
def test_scores_that_do_not_fit_are_a_bad_row(write_rows, change, told):
    (row,) = rows_of(write_rows("rows.jsonl", [{**ROWS[0], **change}]))
    assert isinstance(row, Fault)
    assert told.split(",")[0].rsplit(" has ", 1)[0] in row.where or told in row.where


def test_a_score_of_a_pair(tmp_path):
    """STS files: no judgement of whether the pair belongs together, but what is to be learned."""
    path = tmp_path / "sts.csv"
    path.write_text("anchor,positive,score\na,b,0.0\nc,d,4.5\n", encoding="utf-8")
    rows = list(read_rows(CsvSource(path=str(path), scores="pairs"), WHERE))
    assert [row.positive_scores for row in rows] == [(0.0,), (4.5,)]
    path.write_text("anchor,positive,likeness\na,b,0.0\nc,d,4.5\n", encoding="utf-8")
    named = list(read_rows(CsvSource(path=str(path), scores="pairs", columns=Columns(score="likeness")), WHERE))
    assert named == rows
    with pytest.raises(UserError, match="score"):
        list(read_rows(CsvSource(path=str(path), scores="pairs"), WHERE))


def test_a_pair_with_a_score_has_one_positive_alone(write_rows):
    path = write_rows("rows.jsonl", [{"anchor": "a", "positive": "b", "negative": "c", "score": 1.0}])
    (row,) = read_rows(JsonlSource(path=str(path), scores="pairs"), WHERE)
    assert isinstance(row, Fault)


def test_a_batch_has_the_scores_of_what_was_drawn(tmp_path, write_rows):
    source = JsonlSource(path=str(write_rows("rows.jsonl", ROWS)), scores="texts")
    corpus = built(tmp_path / "corpus", DataConfig(train=[source]))
    ids = {corpus.text(i): i for i in range(corpus.text_count)}
    rows, drawn = np.array([2, 0, 1]), np.array([ids["s"], ids["q"], ids["r"]], np.int32)
    positives, negatives = corpus.scores(rows, drawn)
    assert positives.tolist() == [7.0, 1.0, 0.5]
    assert negatives.tolist() == [1.0, 2.0, 3.0, -3.0]
    assert corpus.scores(rows[:0], drawn[:0])[1].shape == (0,)


def test_scores_and_their_loss_come_together(write_config, write_rows):
    path = str(write_rows("scored.jsonl", ROWS))
    data = {"train": [{"source": "jsonl", "path": path, "scores": "texts"}]}
    assert load_config(write_config(data=data, distillation={"scores": 1.0})).distillation.on
    for sections in ({"data": data}, {"distillation": {"scores": 1.0}}):
        with pytest.raises(UserError, match=r"distillation\.scores"):
            load_config(write_config(**sections))
    data["train"][0] |= {"scores": "pairs", "columns": {"pos_scores": "p"}}
    with pytest.raises(UserError, match=r"columns\.pos_scores"):
        load_config(write_config(data=data, distillation={"scores": 1.0}))


@pytest.mark.parametrize("asked", [{"hard_negatives": {}}, {"drop_suspects": {"unrelated": 0.1}}])
def test_graded_pairs_get_no_negatives_and_may_be_unrelated(write_config, write_rows, asked):
    """A pair of score 0 against negatives would be trained as one that belongs together."""
    rows = [{"anchor": "a", "positive": "b", "score": 0.0}]
    data = {"train": [{"source": "jsonl", "path": str(write_rows("sts.jsonl", rows)), "scores": "pairs"}], **asked}
    with pytest.raises(UserError, match="graded pairs"):
        load_config(write_config(data=data, distillation={"scores": 1.0}))


def test_what_is_scored_may_not_change_on_resume(write_config, write_rows):
    """Of the same numbers: pairs keep to themselves, rows with scores of texts do not."""
    rows = [{"anchor": "a", "positive": "b", "score": 0.0}]
    path = str(write_rows("sts.jsonl", rows))
    pairs = {"source": "jsonl", "path": path, "scores": "pairs"}
    texts = {"source": "jsonl", "path": path, "scores": "texts", "columns": {"pos_scores": "score"}}
    names = {"pairs": pairs, "texts": texts}
    configs = [write_config(name, data={"train": [source]}, distillation={"scores": 1.0}) for name, source in names.items()]
    found = [mathematics(load_config(config)) for config in configs]
    assert found[0] != found[1]
