"""What a guide finds of rows, against loops over rows and texts, and on planted faults.

Legend: R rows, N texts.
"""

import numpy as np
import pytest
import torch
from support.corpora import built, data_of

from gist_train.model import pair_scores
from gist_train.model.pair_scores import NEAR, PairScores

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def corpus(tmp_path, write_rows):
    """60 rows over two tasks, with several positives and negatives, some of them those of other rows."""
    random = np.random.default_rng(0)
    rows = []
    for row in range(60):
        positives, own = ([f"d{n}" for n in random.integers(0, 40, count)] for count in (1 + row % 2, row % 3))
        rows.append({"anchor": f"q{row % 50}", "positive": positives, "negative": own, "task": "ab"[row % 3 == 0]})
    return built(tmp_path / "corpus", data_of(write_rows("rows.jsonl", rows)))


@pytest.fixture
def vectors(corpus):
    """(N, 3) of length 1: in three dimensions many are near."""
    drawn = torch.randn(corpus.text_count, 3, generator=torch.Generator().manual_seed(1))
    return torch.nn.functional.normalize(drawn, dim=1)


def looked(corpus, vectors):
    def look_up(ids):
        return vectors[torch.from_numpy(np.asarray(ids).astype(np.int64))]

    found = PairScores(corpus, look_up, look_up, look_up)
    assert list(found.look())[-1] == corpus.row_count
    return found


def texts_of(corpus, row):
    positives = corpus.positive[corpus.positive_offsets[row] : corpus.positive_offsets[row + 1]]
    negatives = corpus.negative[corpus.negative_offsets[row] : corpus.negative_offsets[row + 1]]
    return int(corpus.anchor[row]), positives.tolist(), negatives.tolist()


@pytest.mark.parametrize("at_a_time", [7, 2048])
def test_scores_equal_a_loop(corpus, vectors, monkeypatch, at_a_time):
    monkeypatch.setattr(pair_scores, "AT_A_TIME", at_a_time)
    found = looked(corpus, vectors)
    exact = vectors.double().numpy()
    for row in range(corpus.row_count):
        task = [other for other in range(corpus.row_count) if corpus.task[other] == corpus.task[row]]
        pool = sorted({text for other in task for text in texts_of(corpus, other)[1]})
        anchor, positives, negatives = texts_of(corpus, row)
        own = [exact[anchor] @ exact[text] for text in positives]
        shares = [np.mean([exact[anchor] @ exact[text] > one + 1e-6 for text in pool]) for one in own]
        assert found.scores["outranked"][row] == pytest.approx(max(shares), abs=1e-6)
        assert found.cosine[row] == pytest.approx(min(own), abs=1e-5)
        nearest = max([exact[anchor] @ exact[text] for text in negatives], default=-np.inf)
        assert found.scores["negative_nearer"][row] == pytest.approx(max(0, nearest - min(own)), abs=1e-5)
        alike, apart = [0.0], [0.0]
        for other in task:
            by_anchor = exact[anchor] @ exact[texts_of(corpus, other)[0]]
            by_positive = exact[positives[0]] @ exact[texts_of(corpus, other)[1][0]]
            alike += [min(by_anchor, by_positive)] if other < row and min(by_anchor, by_positive) >= NEAR else []
            apart += [by_anchor - by_positive] if other != row and by_anchor >= NEAR else []
        assert found.scores["duplicate"][row] == pytest.approx(max(alike), abs=1e-5)
        assert found.scores["disagreeing"][row] == pytest.approx(max(apart), abs=1e-5)


def test_unusual_is_what_is_below_its_own_task(corpus, vectors):
    """A cosine that is low in one task is what another task has throughout."""
    found = looked(corpus, vectors)
    for task in range(2):
        rows = np.flatnonzero(corpus.task == task)
        cosine = found.cosine[rows]
        deviation = 1.4826 * np.median(np.abs(cosine - np.median(cosine)))
        unusual = cosine < np.median(cosine) - 0.5 * deviation
        expected = np.where(unusual, found.scores["outranked"][rows], 0)
        assert np.array_equal(found.scores["unrelated"][rows], expected)
        assert 0 < unusual.sum() < len(rows)


def test_many_rows_are_compared_with_their_neighbours(tmp_path, write_rows, monkeypatch):
    """Of a task of millions not every pair of rows: those next to each other along a direction, where copies are."""
    monkeypatch.setattr(pair_scores, "WINDOW", 8)
    monkeypatch.setattr(pair_scores, "AT_A_TIME", 16)
    rows = [{"anchor": f"q{n % 90}", "positive": f"d{n % 90}"} for n in range(100)]
    corpus = built(tmp_path / "corpus", data_of(write_rows("rows.jsonl", rows)))
    drawn = torch.randn(corpus.text_count, 8, generator=torch.Generator().manual_seed(1))
    found = looked(corpus, torch.nn.functional.normalize(drawn, dim=1))
    assert np.flatnonzero(found.scores["duplicate"] > 0.999).tolist() == list(range(90, 100))


def test_one_text_is_as_like_itself_as_can_be():
    """With a threshold of 1, copies were missed for the rounding of their vectors; others scored more than 1."""
    vectors = torch.tensor([[0.9999, 0.0], [0.9999, 0.0], [1.0001, 0.0]])
    first, second = torch.tensor([0, 0, 2]), torch.tensor([1, 1, 2])
    cosines = pair_scores._similarities(np.array([5, 5, 8]), np.array([5, 6, 9]), vectors, first, second)
    assert cosines[0] == 1
    assert 0.99 < cosines[1] < 1
    assert cosines[2] == 1


def test_labelled_texts_are_judged_by_their_labels(tmp_path, write_rows):
    from gist_train.config.models import GuideConfig
    from gist_train.config.schema import DataConfig
    from gist_train.config.sources import ClassificationSource, MiningConfig
    from gist_train.data.building import build_corpus
    from gist_train.data.corpus import Corpus

    rows = [{"text": f"t{n}", "label": "xy"[n % 2]} for n in range(12)]
    source = ClassificationSource(path=str(write_rows("rows.jsonl", rows)), mining=MiningConfig(model=GuideConfig(name="m")))
    random = torch.Generator().manual_seed(1)
    drawn = torch.nn.functional.normalize(torch.randn(12, 8, generator=random), dim=1)
    drawn[3], drawn[5] = drawn[0], drawn[1]  # of another label, and of the same

    def embeddings(_, texts):
        return np.stack([drawn[int(text[1:])].numpy() for text in texts])

    list(build_corpus(tmp_path / "corpus", DataConfig(train=[source]), "f" * 32, embeddings, lambda: None))
    corpus = Corpus(tmp_path / "corpus")
    numbers = torch.tensor([int(corpus.text(i)[1:]) for i in range(corpus.text_count)])
    found = looked(corpus, drawn[numbers])
    by_text = {corpus.text(int(corpus.anchor[row])): row for row in range(corpus.row_count)}
    labels, duplicate = found.scores["labels"], found.scores["duplicate"]
    assert {text for text, row in by_text.items() if labels[row] > NEAR} == {"t0", "t3"}
    assert {text for text, row in by_text.items() if duplicate[row] > NEAR} == {"t5"}  # the later one in the file
    assert not found.scores["disagreeing"].any()
