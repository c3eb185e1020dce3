"""A run folder that commit cfed4c2 wrote: people upgrade in the middle of a training, and export a model months later."""

import json
import shutil

import pytest
from conftest import ROOT
from sentence_transformers import SentenceTransformer
from support.running import gist, metrics

OLD = ROOT / "tests" / "fixtures" / "run_of_cfed4c2"
"""A tiny student and guide, 32 rows, 12 pairs; 6 of 9 steps, with a checkpoint, an evaluation and a choice at 3 and 6."""
LOSSES = {7: 3.0803144, 8: 3.1571007, 9: 2.0810356}
"""What cfed4c2 itself gave when it resumed at step 6."""

pytestmark = pytest.mark.usefixtures("on_cpu")


@pytest.fixture
def old(tmp_path, monkeypatch):
    """A copy, in the current folder: its paths are relative."""
    shutil.copytree(OLD, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "run"


def test_it_resumes(old):
    """The same losses as before the upgrade, and no score that is there is measured again."""
    before = (old / "evaluations.jsonl").read_text()
    ended = gist("train", "run.yaml", "--set", "training.stop_at_step=9")
    assert ended.code == 0, ended.err
    assert "resuming from step 6" in ended.err
    rows = metrics(old)
    assert [row["step"] for row in rows] == [*range(1, 10)]
    assert {row["step"]: row["loss"] for row in rows[6:]} == pytest.approx(LOSSES, rel=1e-4)
    after = (old / "evaluations.jsonl").read_text()
    assert after.startswith(before)
    assert {json.loads(line)["step"] for line in after.removeprefix(before).splitlines()} == {9}


def test_it_is_selected_anew(old):
    """The same choice by the same metric, read from the old scores."""
    before = json.loads((old / "selected.json").read_text())
    ended = gist("select", "run", "--json")
    assert ended.code == 0, ended.err
    after = json.loads(ended.out)
    assert after.pop("checkpoint") == f"run/{before.pop('checkpoint')}"
    for old_one, new_one in zip(before.pop("candidates"), after.pop("candidates"), strict=True):
        assert new_one.pop("interval") == pytest.approx(old_one.pop("interval"))
        assert new_one == old_one
    old_tasks, new_tasks = before.pop("evaluation")["tasks"], after.pop("evaluation")["tasks"]
    assert [{**new, **old} for new, old in zip(new_tasks, old_tasks, strict=True)] == new_tasks  # keys of since then aside
    assert after == before
    assert "measuring" not in ended.err


def test_it_is_evaluated_and_exported(old):
    """The model that was selected, with the scores that it was selected by."""
    selected = json.loads((old / "selected.json").read_text())
    evaluated = gist("evaluate", "run", "--steps", "selected", "--json")
    assert evaluated.code == 0, evaluated.err
    assert json.loads(evaluated.out) == selected["figures"]
    exported = gist("export", "run")
    assert exported.code == 0, exported.err
    card = (old / "export" / "README.md").read_text(encoding="utf-8")
    assert f"| pairs/pearson | {selected['base']['pairs/pearson']:.4f} | {selected['figures']['pairs/pearson']:.4f} |" in card
    assert SentenceTransformer(str(old / "export"), device="cpu").encode("a text").shape == (16,)
