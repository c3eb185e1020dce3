"""scripts/check_gpu.sh on a CPU, with tiny models: every stage runs, and writes what it found."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

DATA = Path(os.environ.get("GIST_TRAIN_DATA", ROOT.parent / "shared" / "data"))
HALVES = (("versions", "training"), ("2", "4", "profile", "passes"))
"""Stages by name and by number. Two halves at once take the time of the longer one."""
pytestmark = pytest.mark.skipif(not (DATA / "medi" / "medi_like_train.json.gz").exists(), reason="needs the test data")


def start(folder: Path, *words: str) -> subprocess.Popen[str]:
    """The script, with a folder of its own for what stages share."""
    (folder / "tmp").mkdir(parents=True)
    here = {"PYTHON": sys.executable, "TMPDIR": str(folder / "tmp"), "GIST_TRAIN_DATA": str(DATA), "OMP_NUM_THREADS": "1"}
    command = [str(ROOT / "scripts" / "check_gpu.sh"), str(folder / "out"), *words]
    return subprocess.Popen(command, env={**os.environ, **here}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, dict[str, Any]]]:
    """By stage, its text and its JSON; of the two runs what they printed in the end is among the texts."""
    folders = [tmp_path_factory.mktemp("half") for _ in HALVES]
    options = ["--device", "cpu", "--tiny"]
    processes = [start(folder, *options, *half) for folder, half in zip(folders, HALVES, strict=True)]
    try:
        printed = [process.communicate(timeout=200)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(printed)
    found = {"printed": ("\n".join(printed), {})}
    for folder in folders:
        for path in (folder / "out").glob("*.json"):
            told = json.loads(path.read_text(encoding="utf-8"))
            found[path.stem] = path.with_suffix(".txt").read_text(encoding="utf-8"), told
    return found


@pytest.mark.slow
def test_every_stage_writes_text_and_json(results):
    """The table at the end has a line for each."""
    stages = ["1-versions", "2-tests", "3-training", "4-step", "5-profile", "6-passes"]
    assert sorted(set(results) - {"printed"}) == stages
    for stage in stages:
        text, told = results[stage]
        number, name = stage.split("-")
        assert (told["number"], told["stage"]) == (int(number), name)
        assert told["ok"] is True
        assert told["faults"] == []
        assert told["seconds"] > 0
        assert told["device"] == "cpu"
        assert told["torch"]
        assert "ok: " in text
        assert f"\n{number} {name}" in results["printed"][0]


@pytest.mark.slow
def test_versions(results):
    """What a reader needs to tell one machine from another."""
    told = results["1-versions"][1]
    assert told["versions"]["torch"] == told["torch"]
    assert {"python", "cpu", "cores", "commit", "cuda"} <= told.keys()


@pytest.mark.slow
def test_the_tests_are_counted(results):
    """Without a GPU they are all skipped."""
    text, told = results["2-tests"]
    assert (told["passed"], told["failed"], told["errors"], told["failures"]) == (0, 0, 0, [])
    assert told["skipped"] + told["passed"] > 10
    assert f"{told['skipped']} skipped" in text


@pytest.mark.slow
def test_a_killed_training_goes_on(results):
    """It has a row for each step, like the CPU's, and figures of the evaluation."""
    told = results["3-training"][1]
    assert told["first_exit_code"] == -9
    assert 0 < min(told["checkpoints_when_killed"]) <= told["killed_after_step"] < 40
    assert told["last_row"]["step"] == 40
    assert len(told["losses"]) == len(told["losses_on_cpu"]) == 6
    assert told["largest_difference"] == pytest.approx(0, abs=1e-4)  # both on a CPU here
    assert all(-1 <= told["evaluation"][name]["stsb/spearman"] <= 1 for name in ("base", "tuned", "guide"))


@pytest.mark.slow
def test_steps_of_both_sides(results):
    """The same work on the same tokens."""
    told = results["4-step"][1]
    assert told["proof"]["equal"]
    assert [(row["side"], row["guided"], row["mode"]) for row in told["rows"]] == [
        ("ours", True, "eager"),
        ("theirs", True, "GISTEmbedLoss"),
        ("ours", False, "eager"),
        ("theirs", False, "MultipleNegativesRankingLoss"),
    ]
    assert len({row["tokens_a_step"] for row in told["rows"]}) == 1
    assert all(row["milliseconds"] > 0 for row in told["rows"])
    assert told["ratios"].keys() == {"guided 4", "unguided 4"}
    assert 0 < told["rows"][0]["mfu_of_product"] < 5


@pytest.mark.slow
def test_profile_and_passes(results):
    """Kernels with their times; seconds of passes, whose vectors are the other side's."""
    (row,) = results["5-profile"][1]["rows"]
    assert row["kernels_a_step"] > 100
    assert len(row["kernels"]) == 30
    assert 0 <= row["share_of_gaps"] < 1
    told = results["6-passes"][1]
    assert told["loss"]["triplets"] == 64
    assert told["uae_large"]["largest_difference"] < 1e-4
    assert told["bge_small"]["tokens"] > 20
    assert told["guide_store"]["texts_a_second"] > 0


def test_a_stage_that_fails_is_told(tmp_path):
    """Later stages run all the same, and the exit code is 1."""
    process = start(tmp_path, "--device", "cuda", "versions", "1")
    printed = process.communicate(timeout=60)[0]
    told = json.loads((tmp_path / "out" / "1-versions.json").read_text(encoding="utf-8"))
    if told["ok"]:
        pytest.skip("there is a GPU")
    assert process.returncode == 1
    assert printed.count("== 1 versions") == 2
    assert told["faults"] == ["there is no CUDA device: give --device cpu"]
    assert "FAILED" in printed.splitlines()[-1]


@pytest.mark.parametrize("words", [["--unknown"], ["versions", "7"]])
def test_words_that_mean_nothing(words, tmp_path):
    """Exit code 2, and how it is used."""
    process = start(tmp_path, *words)
    printed = process.communicate(timeout=20)[0]
    assert process.returncode == 2
    assert "scripts/check_gpu.sh OUT" in printed
