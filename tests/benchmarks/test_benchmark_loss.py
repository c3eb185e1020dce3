"""benchmarks/loss.py, on a few rows: all ways give the same loss, and the output is what it says."""

import importlib
import json
from types import ModuleType

import pytest
import torch


@pytest.fixture
def benchmark() -> ModuleType:
    """The script as a module."""
    return importlib.import_module("benchmarks.loss")


@pytest.mark.slow
def test_all_ways_give_the_same_loss(benchmark, capsys):
    """A ratio of two different works says nothing; a peak of the wrong process neither; and --json is one object alone."""
    words = ["--sizes", "24", "--pairs", "1", "--block-size", "16", "--memory", "1", "--threads", "1", "--json"]
    assert benchmark.main(words) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert set(row["losses"]) == set(row["seconds"]) == {"blocks", "whole", "peer"}
    assert row["largest_gradient_difference"] < 1e-5
    assert all(0.1 < row["peak_gb"][way] < 3.0 and row["peak_gb"][way] > row["over_inputs_gb"][way] for way in row["losses"])
    assert set(row["times_blocks"]) == {"whole", "peer"}


def peak(way, size):
    """What a child says, without the child."""
    return {"seconds": 1.0, "loss": 2.0 + size * (way == "whole") * 1e-5, "peak_gb": 1.5, "over_inputs_gb": 0.5}


@pytest.fixture
def without_children(benchmark, monkeypatch):
    """Peaks from `peak`."""

    def run(command, **_):
        found = peak(command[-1], int(command[command.index("--sizes") + 1]))
        return type("Ended", (), {"stdout": json.dumps(found)})

    monkeypatch.setattr(benchmark.subprocess, "run", run)
    return benchmark


def test_what_does_not_fit_is_calculated(without_children, capsys):
    """A machine that swaps, or a process that is killed, ends the benchmark; a way that gives another loss must not win it."""
    words = ["--sizes", "8", "16", "32", "--pairs", "1", "--memory", "0.02", "--json"]
    assert without_children.main(words) == 1
    told = capsys.readouterr()
    rows = json.loads(told.out)["rows"]
    assert [list(row["left_out"]) for row in rows] == [[], [], ["peer"]]
    assert rows[2]["left_out"]["peer"] == pytest.approx(25e-6 * 32**2)
    assert [row["equal"] for row in rows] == [True, False, False]
    assert "32 triplets: not the same loss" in told.err


def test_other_gradients_are_told(without_children, monkeypatch, capsys):
    """The loss alone does not show a backward that forgets a tile."""
    backward = without_children._run

    def run(way, embeddings, block_size):
        found = backward(way, embeddings, block_size)
        return {**found, "gradients": [x + (way == "blocks") * x.abs().max() * 1e-4 for x in found["gradients"]]}

    monkeypatch.setattr(without_children, "_run", run)
    monkeypatch.setattr(without_children, "LOSS_TOLERANCE", 1.0)
    assert without_children.main(["--sizes", "8", "--pairs", "1", "--threads", str(torch.get_num_threads())]) == 1
    told = capsys.readouterr()
    assert "8 triplets: not the same loss or gradients" in told.err
    assert "whole / blocks" in told.out
