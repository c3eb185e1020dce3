"""The choice itself, against values by hand, and the noise against a slow bootstrap."""

import numpy as np
import pytest
from sklearn.metrics import f1_score

from gist_train.evaluation.metrics import score_of
from gist_train.results.ranking import (
    RESAMPLES,
    Candidate,
    Distance,
    by_loss,
    distance,
    evaluations_since_rise,
    ranked,
    resampled_scores,
    weighted_score,
)


def candidate(*steps, base_weight=0.0, **figures):
    return Candidate(steps, base_weight, {key.replace("_", "/"): value for key, value in figures.items()})


def test_a_score_is_the_weighted_mean():
    """Weights that do not add up to 1 would make scores of two metrics incomparable with one's."""
    figures = {"a/x": 0.5, "b/y": 0.8, "c/z": 0.1}
    assert weighted_score(figures, {"a/x": 1.0}) == 0.5
    assert weighted_score(figures, {"a/x": 1.0, "b/y": 1.0}) == pytest.approx(0.65)
    assert weighted_score(figures, {"a/x": 1.0, "b/y": 2.0}) == pytest.approx(0.7)


def test_the_best_is_first_and_of_two_alike_the_simpler():
    """A mean of three that is no better than a checkpoint is not worth its explanation."""
    told = [
        candidate(100, a_x=0.5),
        candidate(100, 200, a_x=0.7),
        candidate(300, a_x=0.7),
        candidate(200, a_x=0.7),
        candidate(200, base_weight=0.2, a_x=0.7),
        candidate(400, a_x=0.9),
    ]
    assert [of.name for of in ranked(told, {"a/x": 1.0})] == [
        "step 400",
        "step 200",
        "step 300",
        "step 200, 0.2 of base",
        "mean of steps 100, 200",
        "step 100",
    ]


@pytest.mark.parametrize(
    ("count", "percentile", "index"), [(12, 0.025, 0), (200, 0.025, 5), (79, 0.025, 1), (10, 0.99, 9), (1, 0.5, 0)]
)
def test_the_rule_of_the_authors(count, percentile, index):
    """Snapshots sorted by training loss, index int(n * percentile): of 200 and 0.025 the sixth lowest, not the lowest."""
    order = np.random.default_rng(0).permutation(count).tolist()
    losses = {500 * (at + 1): 0.1 * (rank + 1) for at, rank in enumerate(order)}
    chosen, *others = by_loss(losses, percentile)
    assert losses[chosen] == pytest.approx(0.1 * (index + 1))
    assert sorted([chosen, *others]) == sorted(losses)
    assert [losses[step] for step in others] == sorted(losses[step] for step in others)


def slow_interval(ours, theirs, task, metric):
    """The bootstrap as a loop over items."""
    generator, found = np.random.default_rng([42, *task.encode()]), []
    for _ in range(RESAMPLES):
        draw = generator.integers(len(ours), size=len(ours)).tolist()
        found.append(metric([ours[i] for i in draw]) - metric([theirs[i] for i in draw]))
    return np.quantile(found, [0.025, 0.975])


def mean(items):
    return sum(items) / len(items)


def macro_f1(items):
    said, labels = zip(*items, strict=True)
    return f1_score(labels, said, average="macro", zero_division=0)


def test_macro_f1_is_that_of_scikit_learn():
    """Ours is a few counts, for resamples; of classes that nobody has or nobody says, both must say 0."""
    random = np.random.default_rng(7)
    for rows in (1, 2, 40, 300):
        for classes in (1, 3, 80):
            items = random.integers(-1, classes, size=(rows, 2)).astype(float)
            assert score_of("f1", items) == pytest.approx(macro_f1(items.tolist()), abs=1e-12)


@pytest.mark.parametrize(("name", "metric", "columns"), [("mrr@10", mean, 1), ("f1", macro_f1, 2)])
def test_the_interval_is_the_bootstrap_over_paired_items(name, metric, columns):
    """Unpaired draws would call almost every difference noise: which queries are hard is the same for both."""
    random = np.random.default_rng(3)
    hard = random.random(60)
    ours = hard + 0.05 * random.random(60) if columns == 1 else np.stack([random.integers(3, size=60), np.arange(60) % 3], axis=1)
    theirs = hard if columns == 1 else np.stack([random.integers(3, size=60), np.arange(60) % 3], axis=1)
    ours, theirs = ours.astype(float), theirs.astype(float)
    behind = metric(ours.tolist()) - metric(theirs.tolist())
    resampled = [resampled_scores({f"t/{name}": items}, {f"t/{name}": 3.0}) for items in (ours, theirs)]
    found = distance(behind, *resampled)
    expected = slow_interval(ours.tolist(), theirs.tolist(), "t", metric)
    assert [found.low, found.high] == pytest.approx(expected)
    if columns == 1:
        assert found.within_noise is False  # each query is a little better: no draw turns that around
    assert distance(0.0, resampled[0], resampled[0]) == Distance(0.0, 0.0, 0.0)


def test_the_interval_of_a_mean_over_tasks():
    """Half the weight on a task that does not differ halves the distance and its interval."""
    random = np.random.default_rng(5)
    a, b, same = random.random(40), random.random(40), random.random(30)
    alone = {"r/mrr@10": 1.0}
    both = {"r/mrr@10": 1.0, "q/mrr@10": 1.0}
    of_first, of_second = {"r/mrr@10": a, "q/mrr@10": same}, {"r/mrr@10": b, "q/mrr@10": same}
    behind = a.mean() - b.mean()
    first = distance(behind, resampled_scores(of_first, alone), resampled_scores(of_second, alone))
    second = distance(behind / 2, resampled_scores(of_first, both), resampled_scores(of_second, both))
    assert [second.low, second.high] == pytest.approx([first.low / 2, first.high / 2])
    assert first.low < behind < first.high


def test_without_items_there_is_a_distance_and_no_interval():
    """A benchmark that gives one number has no items: an interval of [0, 0] would call every difference certain."""
    assert resampled_scores({"a/ap": np.ones((4, 2)), "b/x": None}, {"a/ap": 1.0, "b/x": 1.0}) is None
    some = resampled_scores({"a/ap": np.ones((4, 2))}, {"a/ap": 1.0})
    for found in (distance(0.1, None, some), distance(0.1, some, None), distance(0.1, None, None)):
        assert (found.behind, found.low, found.high, found.within_noise) == (0.1, None, None, None)


def test_patience_counts_evaluations_since_the_best():
    """An equal score is no rise. After a run was told to go on, what came before does not count again."""
    scores = {0: 0.5, 10: 0.6, 20: 0.6, 30: 0.55, 40: 0.4}
    assert evaluations_since_rise(scores, after=0) == 3
    assert evaluations_since_rise({**scores, 50: 0.61}, after=0) == 0
    assert evaluations_since_rise(scores, after=30) == 1
    assert evaluations_since_rise(scores, after=40) == 0
    assert evaluations_since_rise({}, after=0) == 0
