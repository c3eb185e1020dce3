"""benchmarks/trainer_step.py, on a few rows: all sides do the same work, and the output is what it says."""

import importlib
import json

import pytest
from support.trainers import opened


@pytest.fixture
def benchmark():
    """The script as a module."""
    return importlib.import_module("benchmarks.trainer_step")


@pytest.fixture
def words(shared_data, make_model, tmp_path):
    """What it is called with: tiny models, and two batches."""
    opened(make_model()).save_pretrained(str(tmp_path / "model"), create_model_card=False)
    options = ["--batches", "2", "--pairs", "1", "--device", "cpu"]
    return ["--data", str(shared_data), "--model", str(tmp_path / "model"), *options]


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("cases", [["mixed"], pytest.param(["task", "cached"], marks=pytest.mark.slow)], ids=str)
def test_all_sides_do_the_same_work(benchmark, words, capsys, cases):
    """A ratio of two different works says nothing; and --json is one object alone."""
    assert benchmark.main([*words, "--json", "--only", *cases]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [*rows] == cases
    for row in rows.values():
        assert row["same_work"]
        assert row["largest_loss_difference"] < 1e-4
        assert len({*row["tokens"].values()}) == 1
        assert row["tokens"]["ours"] > 3 * row["triplets"]
        assert min(row["seconds"].values()) > 0
        assert row["guide_pass"]["texts"] > 2 * row["triplets"]


@pytest.mark.usefixtures("on_cpu")
def test_other_losses_are_told(benchmark, words, monkeypatch, capsys):
    """A side that gives up on correctness would win every race."""
    monkeypatch.setattr(benchmark, "_train", lambda _, side, *__, **___: (1.0, [0.3 if side == "packed" else 0.2], 100))
    assert benchmark.main([*words, "--only", "task"]) == 1
    printed = capsys.readouterr()
    assert "task: losses differ by up to 1.0e-01" in printed.err
    assert "NOT the same work" in printed.out


def test_missing_data_are_told(benchmark, tmp_path, capsys):
    """No traceback for a folder that is not there."""
    assert benchmark.main(["--data", str(tmp_path / "nowhere")]) == 2
    assert "medi_like_train.json.gz" in capsys.readouterr().err
