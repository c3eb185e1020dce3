"""Mining against the procedure written out plainly, and what its draws promise.

Legend: N rows, G the embeddings' width.
"""

import math
from collections import Counter

import numpy as np
import pytest
import torch

from gist_train.data import mining
from gist_train.data.mining import Mined, mine_triplets


def classes(*sizes: int, width: int = 6, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Embeddings near the centre of their class, labels in no order, and texts that all differ."""
    draw = np.random.default_rng(seed)
    labels = draw.permutation(np.repeat(np.arange(len(sizes)), sizes))
    centres = draw.normal(size=(len(sizes), width))
    embeddings = (centres[labels] + 0.7 * draw.normal(size=(len(labels), width))).astype(np.float32)
    return embeddings, labels, np.arange(len(labels))


def plain(embeddings, labels, *, positives, temperature, negatives, pool) -> dict[int, tuple[list, list]]:
    """RECIPE: for each row, (candidates, probabilities) of its positive and of its negative."""
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    found = {}
    for i in range(len(labels)):
        others = [j for j in range(len(labels)) if labels[j] == labels[i] and j != i]
        if not others:
            continue
        cosines = {j: float(unit[i] @ unit[j]) for j in range(len(labels))}
        near = sorted(others, key=lambda j: -cosines[j])[:positives]
        weights = [math.exp(cosines[j] / temperature) for j in near]
        strangers = [j for j in range(len(labels)) if labels[j] != labels[i]]
        if negatives == "least_similar":
            strangers = sorted(strangers, key=lambda j: cosines[j])[:pool]
            odds = [math.exp(-cosines[j] / temperature) for j in strangers]
        else:
            odds = [1.0] * len(strangers)
        found[i] = ((near, [w / sum(weights) for w in weights]), (strangers, [o / sum(odds) for o in odds]))
    return found


def by_anchor(mined: Mined) -> dict[int, tuple[int, int]]:
    rows = zip(mined.anchor.tolist(), mined.positive.tolist(), mined.negative.tolist(), strict=True)
    return {anchor: (positive, negative) for anchor, positive, negative in rows}


@pytest.mark.parametrize("negatives", ["uniform", "least_similar"])
@pytest.mark.parametrize("block", [1 << 24, 64], ids=["whole", "blocks"])
def test_draws_are_the_plain_procedures(monkeypatch, negatives, block):
    """Each draw inverts the cumulative distribution of the plain procedure at the row's own number: the same rows, to the
    last one. The wrong temperature, side or class still gives triplets, only others."""
    monkeypatch.setattr(mining, "SIMILARITIES", block)
    embeddings, labels, texts = classes(30, 12, 1, 25)
    settings = {"positives": 8, "temperature": 0.3, "negatives": negatives}
    mined = mine_triplets(embeddings, labels, texts, seed=5, negative_pool=6, **settings)
    expected = plain(embeddings, labels, pool=6, **settings)
    draw = np.random.default_rng(5)
    order = draw.permutation(len(labels))
    numbers = draw.random((2, len(labels)))

    def inverted(candidates: list[int], probabilities: list[float], number: float) -> int:
        return candidates[int(np.searchsorted(np.cumsum(probabilities), number, side="right"))]

    found = by_anchor(mined)
    assert found.keys() == expected.keys()
    for row, (positive, negative) in expected.items():
        assert found[row][0] == inverted(*positive, numbers[0][row])
        if negatives == "least_similar":
            assert found[row][1] == inverted(*negative, numbers[1][row])
        else:
            assert found[row][1] in negative[0]
    assert mined.anchor.tolist() == [row for row in order if row in expected]
    assert (mined.alone, mined.same_text) == (1, 0)


def test_a_positive_is_drawn_by_its_similarity():
    """softmax(cos / 0.05): of two candidates at cosines 0.9 and 0.8 the nearer is drawn 7.4 times as often."""
    angles = torch.tensor([0.0, math.acos(0.9), -math.acos(0.8), math.pi])
    embeddings = torch.stack([angles.cos(), angles.sin()], dim=1).numpy()
    drawn = Counter(
        by_anchor(mine_triplets(embeddings, np.array([0, 0, 0, 1]), np.arange(4), seed=seed))[0][0] for seed in range(2000)
    )
    assert set(drawn) == {1, 2}
    assert drawn[1] / 2000 == pytest.approx(math.exp(2) / (1 + math.exp(2)), abs=0.03)


def test_a_uniform_negative_is_any_row_of_another_class():
    """All rows of other classes come up, large classes more often than small ones, and no row of the anchor's own ever."""
    embeddings, labels, texts = classes(4, 5, 20)
    drawn = [by_anchor(mine_triplets(embeddings, labels, texts, seed=seed)) for seed in range(300)]
    counts = Counter(negative for found in drawn for anchor, (_, negative) in found.items() if labels[anchor] == 0)
    assert set(counts) == set(np.flatnonzero(labels != 0).tolist())
    assert sum(counts[row] for row in np.flatnonzero(labels == 2)) / counts.total() == pytest.approx(20 / 25, abs=0.05)


@pytest.mark.parametrize("negatives", ["uniform", "least_similar"])
def test_same_seed_same_triplets_whatever_the_blocks(monkeypatch, negatives):
    """A machine with less memory, or vectors that are not normalised, must not make other triplets."""
    embeddings, labels, texts = classes(40, 40)
    first = mine_triplets(embeddings, labels, texts, negatives=negatives)
    monkeypatch.setattr(mining, "SIMILARITIES", 100)
    again = mine_triplets(embeddings * 3, labels, texts, negatives=negatives)
    assert by_anchor(first) == by_anchor(again)
    assert (first.anchor == again.anchor).all()
    assert by_anchor(first) != by_anchor(mine_triplets(embeddings, labels, texts, seed=1, negatives=negatives))


def test_rows_whose_partner_is_the_same_text_are_dropped():
    """Banking77 has the same question twice: as its own positive it teaches nothing, as its own negative it lies."""
    embeddings = np.eye(4, dtype=np.float32)[[0, 0, 1, 1]]
    mined = mine_triplets(embeddings, np.array([0, 0, 1, 1]), np.array([7, 7, 8, 9]))
    assert sorted(mined.anchor.tolist()) == [2, 3]
    assert mined.same_text == 2
    crossed = mine_triplets(embeddings[[0, 1, 2]], np.array([0, 0, 1]), np.array([5, 6, 5]))
    # The only negative of row 0 is its own text, that of row 1 is its positive's; row 2 is alone.
    assert crossed.anchor.tolist() == []
    assert (crossed.same_text, crossed.alone) == (2, 1)


def test_what_can_not_be_mined_is_refused():
    """One class has no negatives; arrays of unlike length would pair texts with strangers' vectors."""
    embeddings, _, texts = classes(4)
    with pytest.raises(ValueError, match="one class"):
        mine_triplets(embeddings, np.zeros(4, np.int64), texts)
    with pytest.raises(ValueError, match="3 embeddings, 4 labels and 4 text ids"):
        mine_triplets(embeddings[:3], np.array([0, 0, 1, 1]), texts)


def test_blocks_bound_the_similarities(monkeypatch):
    """50,000 rows of two classes would be a matrix of 10 GB: no block may hold more than the bound."""
    sizes = []
    real = mining._softmax_draw

    def noted(scores, *rest):
        sizes.append(scores.numel())
        return real(scores, *rest)

    monkeypatch.setattr(mining, "SIMILARITIES", 4096)
    monkeypatch.setattr(mining, "_softmax_draw", noted)
    mine_triplets(*classes(700, 500), negatives="least_similar")
    assert len(sizes) > 300
    assert max(sizes) <= 4096
