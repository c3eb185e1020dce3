"""Hard negatives against a loop over rows and candidates, and the files that they are written to.

Legend: R rows, N texts, P negatives that a row is to get.
"""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.corpora import built, data_of

from gist_train.config.hard_negatives import HardNegativesConfig
from gist_train.model import negatives
from gist_train.model.negatives import Counts, Guiding, labels_of_texts, negatives_of, parts_of


@pytest.fixture
def corpus(tmp_path, write_rows):
    """40 rows over three tasks, which share texts: as positives of several rows, as negatives, as anchors."""
    random = np.random.default_rng(0)
    rows = []
    for row in range(40):
        positives, own = ([f"d{n}" for n in random.integers(0, 30, count)] for count in (1 + row % 2, row % 3))
        anchor = f"d{row % 7}" if row % 5 == 0 else f"q{row % 25}"
        rows.append({"anchor": anchor, "positive": positives, "negative": own, "task": "abc"[row % 3 if row % 7 else 0]})
    return built(tmp_path / "corpus", data_of(write_rows("rows.jsonl", rows)))


@pytest.fixture
def vectors(corpus):
    """(N, 3) of length 1: in three dimensions many are near."""
    drawn = torch.randn(corpus.text_count, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return torch.nn.functional.normalize(drawn, dim=1)


def found(corpus, vectors, rules, *, labels=None, rows_at_a_time=8192, candidates_at_a_time=8192, seed=3):
    """(R, P) negatives, and the counts of all parts."""

    def look_up(ids):
        return vectors[torch.from_numpy(np.asarray(ids).astype(np.int64))]

    chosen, counts = np.full((corpus.row_count, rules.per_row), -2, np.int32), []
    for number, part in enumerate(parts_of(corpus, same_task=rules.same_task, at_a_time=rows_at_a_time)):
        random = np.random.default_rng([seed, number])
        of_texts = labels_of_texts(corpus) if labels is None else labels
        guiding = Guiding(look_up, look_up, look_up)
        chosen[part.rows], some = negatives_of(part, corpus, guiding, of_texts, rules, random, candidates_at_a_time)
        counts.append(some)
    return chosen, Counts.of_all(counts)


def row_of(corpus, row):
    """Anchor, positives and negatives of a row."""
    positives = corpus.positive[corpus.positive_offsets[row] : corpus.positive_offsets[row + 1]]
    own = corpus.negative[corpus.negative_offsets[row] : corpus.negative_offsets[row + 1]]
    return int(corpus.anchor[row]), positives.tolist(), own.tolist()


def slow_candidates(corpus, vectors, rules, row):
    """(text, similarity) of a row's candidates that are left, the nearest first, and the row's counts."""
    anchor, positives, own = row_of(corpus, row)
    limit = min(float(vectors[anchor] @ vectors[p]) for p in positives)
    limit -= rules.margin if rules.margin_strategy == "absolute" else abs(limit) * rules.margin
    others = range(corpus.row_count)
    if rules.same_task:
        others = [other for other in others if corpus.task[other] == corpus.task[row]]
    pool = {text for other in others for texts in row_of(corpus, other)[1:] for text in texts}
    mine = pool & {anchor, *positives, *own}
    nearest = sorted(pool - mine, key=lambda text: -float(vectors[anchor] @ vectors[text]))
    first, last = rules.ranks
    ranked = [(text, float(vectors[anchor] @ vectors[text])) for text in nearest][:last]
    left = [text for text, similarity in ranked[first - 1 :] if similarity <= limit]
    ahead = len(ranked[: first - 1])
    taken = min(len(left), rules.per_row)
    return left, Counts(1, len(mine), ahead, len(ranked) - ahead - len(left), len(left), taken, int(taken < rules.per_row))


RULES = [
    {},
    {"margin": 0.3, "same_task": False},
    {"margin": 0.2, "margin_strategy": "absolute", "ranks": [3, 9], "per_row": 2},
    {"margin": 0.0, "ranks": [1, 4], "per_row": 3},
]


@pytest.mark.parametrize(("rows_at_a_time", "candidates_at_a_time"), [(8192, 8192), (7, 5), (1, 1)])
@pytest.mark.parametrize("rules", RULES, ids=str)
def test_equals_a_loop(corpus, vectors, rules, rows_at_a_time, candidates_at_a_time):
    """A row's own positive among its negatives teaches the opposite, and nobody sees it in the loss."""
    rules = HardNegativesConfig(**rules)
    sizes = {"rows_at_a_time": rows_at_a_time, "candidates_at_a_time": candidates_at_a_time}
    chosen, counts = found(corpus, vectors, rules, **sizes)
    of_rows = []
    for row in range(corpus.row_count):
        left, of_row = slow_candidates(corpus, vectors, rules, row)
        wanted = left[: rules.per_row]
        assert chosen[row].tolist() == wanted + [-1] * (rules.per_row - len(wanted)), row
        of_rows.append(of_row)
    assert counts == Counts.of_all(of_rows)
    assert counts.taken > 0
    assert counts.own > 0


def test_quantiles_are_spread_over_what_is_left(corpus, vectors):
    """The nearest are often unmarked positives, the farthest teach nothing."""
    rules = HardNegativesConfig(pick="quantiles", per_row=3, same_task=False)
    chosen, _ = found(corpus, vectors, rules)
    for row in range(corpus.row_count):
        left, _ = slow_candidates(corpus, vectors, rules, row)
        wanted = [left[n * len(left) // 3] for n in range(3)] if len(left) > 3 else left + [-1] * (3 - len(left))
        assert chosen[row].tolist() == wanted


def test_random_picks_are_of_what_is_left_and_differ_by_seed(corpus, vectors):
    rules = HardNegativesConfig(pick="random", per_row=3, same_task=False)
    one, again, other = (found(corpus, vectors, rules, seed=seed)[0] for seed in (3, 3, 4))
    assert np.array_equal(one, again)
    assert not np.array_equal(one, other)
    for row in range(corpus.row_count):
        left, _ = slow_candidates(corpus, vectors, rules, row)
        taken = [text for text in one[row].tolist() if text >= 0]
        assert len({*taken}) == len(taken) == min(3, len(left))
        assert {*taken} <= {*left}


def test_texts_of_the_rows_label_are_no_negatives(corpus, vectors, monkeypatch):
    """Of labelled texts the class says what the guide may not know."""
    rules = HardNegativesConfig(same_task=False, margin=0.0)
    labels = np.arange(corpus.text_count, dtype=np.int32) % 2
    monkeypatch.setattr(corpus, "label", np.arange(corpus.row_count, dtype=np.int32) % 3 - 1)
    chosen, _ = found(corpus, vectors, rules, labels=labels)
    for row in range(corpus.row_count):
        taken = chosen[row][chosen[row] >= 0]
        if corpus.label[row] >= 0:
            assert (labels[taken] != corpus.label[row]).all()
    assert (labels[chosen[corpus.label < 0]] == 0).any()
    assert (labels[chosen[corpus.label < 0]] == 1).any()


def test_pieces_cover_every_row_once(corpus):
    for same_task in (False, True):
        rows = np.concatenate([part.rows for part in parts_of(corpus, same_task=same_task, at_a_time=6)])
        assert sorted(rows.tolist()) == list(range(corpus.row_count))
    assert negatives.NONE == -1


PIECE = """
import sys
from types import SimpleNamespace

import numpy as np
import torch

from gist_train.config.hard_negatives import HardNegativesConfig
from gist_train.model.negatives import Guiding, negatives_of, parts_of

def peak():
    return 1024 * int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))

texts, width = int(sys.argv[1]), 1024
some = torch.nn.functional.normalize(torch.randn(1000, width), dim=1)
ids = np.arange(texts, dtype=np.int32)
none = {"negative": ids[:0], "negative_offsets": np.zeros(texts + 1, np.int64), "label": np.full(texts, -1, np.int32)}
rows = {"anchor": ids, "positive": ids[::-1].copy(), "positive_offsets": np.arange(texts + 1), "row_count": texts}
corpus = SimpleNamespace(task=np.zeros(texts, np.int32), documents=ids[:0], **none, **rows)
look_up = lambda asked: some[torch.from_numpy(asked % 1000)]
part = next(parts_of(corpus, same_task=True))
before = peak()
negatives_of(part, corpus, Guiding(look_up, look_up, look_up), none["label"], HardNegativesConfig(), np.random.default_rng(0))
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs the peak of a process' memory as Linux tells it")
def test_a_piece_takes_two_gigabytes_whatever_the_corpus():
    """8,192 rows by all texts at once would be 33 GB for a million of them."""
    command = [sys.executable, "-c", PIECE]
    ended = [subprocess.run([*command, texts], capture_output=True, check=True, text=True) for texts in ("20000", "60000")]
    few, many = (int(one.stdout) for one in ended)
    assert many < 2e9
    assert many < 1.2 * few


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_label_stays_where_another_row_has_none(order):
    """The label of a text that a pair has too was gone where the pair came later: its own class became negatives. A text that is
    nobody's anchor and nobody's positive has a label too."""
    anchor, label, positive = (np.array(values)[list(order)] for values in ([0, 5], [4, -1], [1, 1]))
    negative = {"negative": np.array([2, 3]), "negative_label": np.array([7, -1])}
    corpus = SimpleNamespace(
        text_count=6, anchor=anchor, label=label, positive=positive, positive_offsets=np.array([0, 1, 2]), **negative
    )
    assert labels_of_texts(corpus).tolist() == [4, 4, 7, -1, -1, -1]
