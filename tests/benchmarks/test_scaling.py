"""The model of a step's time: its parts add up as its formula says, and its picture is the same each time."""

import numpy as np
import pytest

from benchmarks import data_scaling, step_model
from benchmarks.step_model import H100, Parts, draw, last_worth, most_tokens, predict

PARTS = Parts("here", 1e-3, 0.01, 0.5, 1e-6, 100, 8000, 0.001, 1e6, 0.0)


def test_a_step_of_one_process_waits_for_nobody():
    seconds = PARTS.step(10, 1, 200)
    assert seconds == {"encoder": pytest.approx(0.2), "fixed": pytest.approx(0.01), "loss": pytest.approx(1e-4), "wire": 0.0}


def test_a_step_of_several_is_launched_and_sends():
    """Embeddings once around and their gradients twice, gradients of weights twice, each less the process' own share."""
    seconds = PARTS.step(10, 4, 50)
    assert seconds["encoder"] == pytest.approx(0.05)
    assert seconds["fixed"] == pytest.approx(0.45)  # the host takes half a second to launch the step
    assert seconds["loss"] == pytest.approx(1e-4 / 4)
    embeddings, weights = (0.75 + 1.5) * 3 * 10 * 100 * 4 / 1e6, 1.5 * 8000 / 1e6
    assert seconds["wire"] == pytest.approx(embeddings + weights + 4 * 0.001 * 2)


def test_the_fullest_process_has_at_least_its_share():
    tokens = np.random.default_rng(0).integers(3, 300, 64)
    for ranks in (1, 2, 5, 64):
        assert tokens.sum() / ranks <= most_tokens(tokens, ranks) <= tokens.sum()
    assert most_tokens(tokens, 64) == tokens.max()


def test_more_processes_pay_with_larger_batches():
    rows = predict(H100, np.full(1000, 100))
    worth = [last_worth(rows, size) for size in step_model.SIZES]
    assert worth == sorted(worth)
    assert worth[0] == 1
    assert worth[-1] >= 64


def test_the_picture_is_the_same_each_time(tmp_path):
    rows = predict(H100, np.full(1000, 100))
    for name in ("one.svg", "two.svg"):
        draw(rows, "t", tmp_path / name)
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()
    assert b"triplets a second" in (tmp_path / "one.svg").read_bytes()


def test_growth_is_a_line_through_the_smallest_and_the_largest():
    def measured(texts, seconds):
        return {"texts": texts, "store": {"seconds": seconds, "peak_bytes": 1e9 + 100 * texts}}

    predicted = data_scaling.predict([measured(10**6, 3.0), measured(2 * 10**6, 6.0), measured(3 * 10**6, 7.0)])
    of_seconds = predicted["store.seconds"]
    assert of_seconds["a_text"] == pytest.approx(2e-6)
    assert of_seconds["off_between"] == [pytest.approx(5 / 6 - 1)]
    assert of_seconds["at"][10**8] == pytest.approx(201.0)
    assert predicted["store.peak_bytes"]["texts_in_memory"] == pytest.approx(63e9 / 100)


@pytest.mark.slow
def test_children_measure_themselves():
    """What the program before them held is not theirs."""
    for name, told in (("_store", {"texts": 1000}), ("_epoch", {"texts": 10_000, "batching": "task"})):
        found = data_scaling.CHILDREN[name](told)
        assert found["seconds"] > 0
        assert found["peak_bytes"] > 1e7
