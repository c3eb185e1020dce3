"""`gist-train select` from the command line, on a tiny run: what it chooses, keeps, says and refuses."""

import json
import shutil

import numpy as np
import pytest
from running import gist
from safetensors.torch import load_file

from gist_train.config.loading import load_config
from gist_train.model.pretrained import load_finished
from gist_train.results.measuring import Measuring
from gist_train.training.checkpoint import checkpoint_folder, saved_steps

pytestmark = pytest.mark.usefixtures("on_cpu")
METRIC = "pairs/spearman"


@pytest.fixture(scope="module")
def trained(tmp_path_factory, make_model, triplets):
    """A run with checkpoints at 4, 8, 12 and 16 and two tasks; nothing measured yet."""
    folder = tmp_path_factory.mktemp("selecting")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in triplets))
    texts = [row["anchor"] for row in triplets]
    pairs = [f"{a}\t{b}\t{i % 6}\n" for i, (a, b) in enumerate(zip(texts[:30], texts[30:60], strict=True))]
    (folder / "pairs.tsv").write_text("sentence1\tsentence2\tscore\n" + "".join(pairs))
    labelled = [json.dumps({"text": row["anchor"], "label": row["task"]}) + "\n" for row in triplets]
    (folder / "labelled.jsonl").write_text("".join(labelled))
    config = {
        "name": "run",
        "output_dir": str(folder / "runs"),
        "model": {"name": str(make_model())},
        "data": {"train": [{"source": "jsonl", "path": str(folder / "rows.jsonl")}]},
        "training": {"batch_size": 8, "max_steps": 16, "precision": "float32"},
        "optimizer": {"lr": 1e-3},
        "checkpoint": {"every": 4, "keep_last": 10},
        "tracking": {"log_every": 2},
        "evaluation": {
            "tasks": [
                {"type": "sts", "name": "pairs", "path": str(folder / "pairs.tsv")},
                {"type": "clustering", "name": "kinds", "path": str(folder / "labelled.jsonl")},
            ]
        },
    }
    (folder / "run.yaml").write_text(json.dumps(config))
    ended = gist("train", folder / "run.yaml")
    assert ended.code == 0, ended.err
    return folder / "runs" / "run"


@pytest.fixture
def run(trained, tmp_path):
    """A copy of the run, so that no test sees another's choice."""
    return shutil.copytree(trained, tmp_path / "copy")


def selected(run, *words):
    ended = gist("select", run, *words, "--json")
    assert ended.code == 0, ended.err
    told = json.loads(ended.out)
    kept = json.loads((run / "selected.json").read_text())
    assert {**kept, "checkpoint": str(run / kept["checkpoint"])} == told
    return told


def test_the_best_by_the_metric_is_chosen(run):
    """A choice by another figure, or of the newest, would look the same to whoever does not measure again."""
    told = selected(run, "--metric", METRIC)
    measuring = Measuring.of(load_config(run / "config.yaml", []))
    figures = {}
    for step in (4, 8, 12, 16):
        of_model = measuring.of_model(load_finished(str(checkpoint_folder(run, step))))
        figures[step] = {key: figure.value for key, figure in of_model.items()}
    best = max(figures, key=lambda step: figures[step][METRIC])
    assert (told["step"], told["rule"], told["checkpoint"]) == (best, "metric", str(checkpoint_folder(run, best)))
    assert told["figures"] == pytest.approx(figures[best])
    assert sorted(told["base"]) == ["kinds/v_measure", "pairs/pearson", METRIC]
    scores = [of["score"] for of in told["candidates"]]
    assert scores == sorted(scores, reverse=True)
    assert {of["steps"][0]: of["score"] for of in told["candidates"]} == pytest.approx(
        {s: of[METRIC] for s, of in figures.items()}
    )
    runner_up = told["candidates"][1]
    assert runner_up["behind"] == pytest.approx(scores[0] - scores[1])
    assert runner_up["interval"][0] <= runner_up["behind"] <= runner_up["interval"][1]
    assert runner_up["within_noise"] == (runner_up["interval"][0] <= 0)


def test_what_is_there_is_not_measured_again(run, monkeypatch):
    """Two hundred checkpoints are hours; only the tasks of the metric are measured of those that are not chosen."""
    told = selected(run, "--metric", METRIC)
    rows = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
    assert {row["step"] for row in rows if row["task"] == "kinds"} == {0, told["step"]}
    assert {row["step"] for row in rows if row["task"] == "pairs"} == {0, 4, 8, 12, 16}

    def refuse(*_: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr("gist_train.results.measuring.evaluate", refuse)
    assert selected(run, "--metric", METRIC) == told


def test_weights_and_the_config_say_by_what(run):
    """`--metric a=2 --metric b` is a weighted mean, and selection.metric of the config counts where the command says nothing."""
    both = selected(run, "--metric", f"{METRIC}=3", "--metric", "kinds/v_measure")
    first = both["candidates"][0]
    assert both["metric"] == {METRIC: 3.0, "kinds/v_measure": 1.0}
    expected = (3 * first["figures"][METRIC] + first["figures"]["kinds/v_measure"]) / 4
    assert first["score"] == pytest.approx(expected)
    by_config = selected(run, "--set", f"selection.metric={{{METRIC}: 3, kinds/v_measure: 1}}")
    assert by_config == both


def test_around_and_window_bound_the_choice(run):
    """Without a metric the step itself is chosen; with one, the best of the window."""
    assert selected(run, "--around", 8)["step"] == 8
    told = selected(run, "--around", 8, "--window", 4, "--metric", METRIC)
    assert {of["steps"][0] for of in told["candidates"]} == {4, 8, 12}
    assert selected(run, "--set", "selection.around=12")["step"] == 12
    ended = gist("select", run, "--around", 9)
    assert ended.code == 2
    assert "4, 8, 12" in ended.err
    ended = gist("select", run, "--around", 100, "--window", 10, "--metric", METRIC)
    assert ended.code == 2
    assert "the nearest is step 16" in ended.err


def test_the_loss_rule_goes_by_the_training_loss(run):
    """Index int(4 * 0.5) of the losses in order: the third lowest of the means that metrics.jsonl has at the checkpoints."""
    means = {row["step"]: row["loss_mean"] for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())}
    ascending = sorted((4, 8, 12, 16), key=means.__getitem__)
    told = selected(run, "--rule", "loss-percentile", 0.5)
    assert (told["step"], told["rule"], told["metric"]) == (ascending[2], "loss-percentile 0.5", None)
    assert [of["loss"] for of in told["candidates"]] == pytest.approx(
        [means[s] for s in (ascending[2], ascending[0], ascending[1], ascending[3])]
    )
    assert sorted(told["figures"]) == ["kinds/v_measure", "pairs/pearson", METRIC]
    assert selected(run, "--rule", "loss-percentile", 0.025)["step"] == ascending[0]


def test_a_mean_is_evaluated_before_it_may_be_chosen(run):
    """The mean of the last three and a mixture with the base stand in the table with their own figures, whoever wins."""
    told = selected(run, "--metric", METRIC, "--average", 3, "--average-of", "last", "--merge-base", 0.5)
    names = [of["name"] for of in told["candidates"]]
    assert {"mean of steps 8, 12, 16", "mean of steps 8, 12, 16, 0.5 of base"} <= set(names)
    assert len(names) == 6
    scores = [of["score"] for of in told["candidates"]]
    assert scores == sorted(scores, reverse=True)
    made = [of for of in told["candidates"][1:] if len(of["steps"]) > 1]
    assert all(of["interval"] is not None for of in made)


def test_a_chosen_mean_is_exported_and_evaluated(run, tmp_path, monkeypatch):
    """`export` and `evaluate` must take the averaged weights, not those of its newest checkpoint."""
    monkeypatch.setattr("gist_train.results.selecting.ranked", lambda of, _: sorted(of, key=lambda one: -len(one.steps)))
    told = selected(run, "--metric", METRIC, "--average", 2)
    assert (told["checkpoint"], len(told["steps"]), told["step"]) == (str(run / "averaged"), 2, max(told["steps"]))
    monkeypatch.undo()
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert gist("export", run, "--to", tmp_path / "model").code == 0
    exported = load_file(tmp_path / "model" / "model.safetensors")
    files = [load_file(checkpoint_folder(run, step) / "model.safetensors") for step in told["steps"]]
    name = "encoder.layer.0.output.dense.weight"
    assert np.allclose(exported[name], (files[0][name] + files[1][name]) / 2, atol=1e-6)
    figures = json.loads(gist("evaluate", run, "--json").out)["tuned"]
    assert figures == pytest.approx(told["figures"])
    assert json.loads(gist("evaluate", run, "--steps", "selected", "--json").out) == pytest.approx(told["figures"])
    assert selected(run, "--around", 8)["checkpoint"] == str(checkpoint_folder(run, 8))
    assert not (run / "averaged").exists()  # the earlier choice's


def test_the_table_shows_falls_as_it_shows_rises(run):
    """Every task stands in it, also those that the choice did not look at."""
    ended = gist("select", run, "--metric", METRIC)
    assert ended.code == 0
    told = json.loads((run / "selected.json").read_text())
    for key, value in told["figures"].items():
        (line,) = [line for line in ended.out.splitlines() if f" {key} " in line and line.startswith("│")][-1:]
        assert f"{100 * (value - told['base'][key]):+.1f}" in line
    fell = sum(value < told["base"][key] for key, value in told["figures"].items())
    assert f"{fell} fell" in ended.out
    assert f"selected: step {told['step']}" in " ".join(ended.out.split())


def test_the_selected_checkpoint_outlives_retention(run):
    """Training that goes on deletes all but the newest one: never what was chosen."""
    selected(run, "--around", 4)
    config = run / "config.yaml"
    ended = gist(
        *("train", config, "--set", "name=copy", "--set", f"output_dir={run.parent}", "--set", "checkpoint.keep_last=1"),
        *("--resume", "12"),
    )
    assert ended.code == 0, ended.err
    assert saved_steps(run) == [4, 16]
    assert gist("export", run).code == 0


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--metric", "pairs/sperman"], ["pairs/spearman, pairs/pearson, kinds/v_measure"]),
        (["--metric", f"{METRIC}=x"], ["a weight above 0"]),
        (["--metric", METRIC, "--average", 1], ["2 checkpoints or more"]),
        (["--metric", METRIC, "--average", 9], ["9, of 4 checkpoints"]),
        (["--metric", METRIC, "--merge-base", 1], ["between 0 and 1"]),
        (["--around", 8, "--average", 2], ["--average", "a metric to judge it by"]),
        (["--rule", "loss-percentile", 0.1, "--merge-base", 0.5], ["--merge-base", "a metric to judge it by"]),
        (["--rule", "loss", 0.1], ["loss-percentile"]),
        (["--rule", "loss-percentile", 1.5], ["from 0 to below 1"]),
        (["--rule", "loss-percentile", 0.1, "--metric", METRIC], ["one of the two"]),
        ([], ["no metric, no rule and no step", METRIC]),
        (["--metric", "a/b", "--metric", "c/d", "--average", 0], ['"a/b"', '"c/d"', "2 checkpoints or more"]),
    ],
)
def test_what_makes_no_sense_is_said_at_once(run, words, told):
    """Exit 2 with what exists, before anything is measured, and nothing is chosen."""
    ended = gist("select", run, *words)
    assert ended.code == 2, ended.err
    assert all(part in ended.err for part in told), ended.err
    assert ended.out == ""
    assert not (run / "selected.json").exists()
    assert not (run / "evaluations.jsonl").exists()


def test_a_run_without_checkpoints_has_nothing_to_choose(run):
    """And a selected.json whose checkpoint is gone is no reason for a traceback."""
    selected(run, "--around", 8)
    shutil.rmtree(checkpoint_folder(run, 8))
    for command in (["export", run], ["evaluate", run], ["evaluate", run, "--steps", "selected"]):
        ended = gist(*command)
        assert ended.code == 2
        assert "select again" in ended.err
    shutil.rmtree(run / "checkpoints")
    ended = gist("select", run, "--around", 8)
    assert ended.code == 2
    assert "no checkpoint" in ended.err
