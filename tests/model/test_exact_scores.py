"""Rows that stand twice and positives of many rows, against loops."""

import numpy as np
import pytest
from support.corpora import built, data_of

from gist_train.model.exact_scores import repeated_rows, times_repeated


@pytest.fixture
def corpus(tmp_path, write_rows):
    """200 rows of few texts: pairs and rows with two positives, many of them twice."""
    random = np.random.default_rng(0)
    rows = [
        {
            "anchor": f"t{random.integers(9)}",
            "positive": [f"t{n}" for n in random.integers(0, 9, 1 + row % 2)],
            "task": "ab"[row % 2],
        }
        for row in range(200)
    ]
    return built(tmp_path / "corpus", data_of(write_rows("rows.jsonl", rows)))


def positives_of(corpus, row):
    return corpus.positive[corpus.positive_offsets[row] : corpus.positive_offsets[row + 1]].tolist()


def test_a_row_is_repeated_where_all_its_pairs_are(corpus):
    """To drop a row of which one pair is new loses that pair."""
    scores, before = repeated_rows(corpus), set()
    for row in range(corpus.row_count):
        pairs = {(int(corpus.anchor[row]), positive) for positive in positives_of(corpus, row)}
        assert scores[row] == (pairs <= before)
        before |= pairs
    assert 0 < scores.sum() < corpus.row_count


@pytest.mark.parametrize("guided", [True, False])
def test_positives_are_counted(corpus, guided):
    """A boilerplate answer is one that is mostly far from its questions, where a guide says how far that is."""
    unusual = np.arange(corpus.row_count) % 5 < 3 if guided else None
    scores = times_repeated(corpus, unusual)
    every = [(row, positive) for row in range(corpus.row_count) for positive in positives_of(corpus, row)]
    for row in range(corpus.row_count):
        counted = [0]
        for positive in positives_of(corpus, row):
            those = [other for other, one in every if one == positive]
            if unusual is None or np.mean(unusual[those]) > 0.5:
                counted.append(len(those))
        assert scores[row] == max(counted)
