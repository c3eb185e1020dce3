"""benchmarks/encode.py, on a few texts: both sides give the same vectors, and the output is what it says."""

import importlib
import json
from types import ModuleType

import numpy as np
import pytest


@pytest.fixture
def benchmark() -> ModuleType:
    """The script as a module."""
    return importlib.import_module("benchmarks.encode")


def test_both_sides_give_the_same_vectors(benchmark, shared_data, make_model, capsys):
    """A ratio of two different works says nothing; and --json is one object alone."""
    words = [
        "--data",
        str(shared_data),
        "--model",
        str(make_model()),
        "--texts",
        "40",
        "--pairs",
        "2",
        "--device",
        "cpu",
        "--json",
    ]
    assert benchmark.main([*words, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert {name: row["texts"] for name, row in rows.items()} == {"stsb": 40, "scifact_1k": 40, "banking77": 40}
    assert all(row["largest_difference"] < 1e-5 and row["ratio"]["min"] > 0 and row["tokens"] > 40 for row in rows.values())


def test_other_vectors_are_told(benchmark, shared_data, make_model, monkeypatch, capsys):
    """A side that gives up on correctness would win every race."""
    encode = benchmark.Pretrained.encode
    monkeypatch.setattr(benchmark.Pretrained, "encode", lambda self, texts: encode(self, texts) + np.float32(1e-3))
    words = ["--data", str(shared_data), "--model", str(make_model()), "--texts", "20", "--pairs", "1", "--device", "cpu"]
    assert benchmark.main(words) == 1
    assert "stsb: vectors differ by up to 1.0e-03" in capsys.readouterr().err


def test_missing_data_are_told(benchmark, tmp_path, capsys):
    """No traceback for a folder that is not there."""
    assert benchmark.main(["--data", str(tmp_path / "nowhere")]) == 2
    assert "stsb_dev.tsv" in capsys.readouterr().err
