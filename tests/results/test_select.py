"""`gist-train select` from the command line, on a tiny run: what it chooses, keeps, says and refuses."""

import io
import json
import shutil

import numpy as np
import pytest
from rich.console import Console
from safetensors.torch import load_file
from support.running import gist

from gist_train.config.loading import load_config
from gist_train.evaluation.measuring import Measuring
from gist_train.model.loading import load_finished
from gist_train.progress import terminal
from gist_train.results.selected import Selected
from gist_train.results.selection_table import selection_page
from gist_train.run_folder import Run

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
    measuring = Measuring.of(load_config(run / "config.yaml", []), terminal())
    figures = {}
    for step in (4, 8, 12, 16):
        of_model = measuring.of_model(load_finished(str(Run(run).checkpoint(step))))
        figures[step] = {key: figure.value for key, figure in of_model.items()}
    best = max(figures, key=lambda step: figures[step][METRIC])
    assert (told["step"], told["rule"], told["checkpoint"]) == (best, "metric", str(Run(run).checkpoint(best)))
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

    monkeypatch.setattr("gist_train.evaluation.measuring.measure", refuse)
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
    monkeypatch.setattr(
        "gist_train.results.select.ranked", lambda candidates, _: sorted(candidates, key=lambda one: -len(one.steps))
    )
    told = selected(run, "--metric", METRIC, "--average", 2)
    assert (len(told["steps"]), told["step"]) == (2, max(told["steps"]))
    assert [str(path) for path in run.glob("averaged-*")] == [told["checkpoint"]]
    monkeypatch.undo()
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert gist("export", run, "--to", tmp_path / "model").code == 0
    exported = load_file(tmp_path / "model" / "model.safetensors")
    files = [load_file(Run(run).checkpoint(step) / "model.safetensors") for step in told["steps"]]
    name = "encoder.layer.0.output.dense.weight"
    assert np.allclose(exported[name], (files[0][name] + files[1][name]) / 2, atol=1e-6)
    figures = json.loads(gist("evaluate", run, "--json").out)["tuned"]
    assert figures == pytest.approx(told["figures"])
    assert json.loads(gist("evaluate", run, "--steps", "selected", "--json").out) == pytest.approx(told["figures"])
    assert selected(run, "--around", 8)["checkpoint"] == str(Run(run).checkpoint(8))
    assert list(run.glob("averaged-*")) == []  # the earlier choice's


def test_the_table_shows_falls_as_it_shows_rises(run):
    """Every task stands in it, also those that the choice did not look at."""
    ended = gist("select", run, "--metric", METRIC)
    assert ended.code == 0
    told = json.loads((run / "selected.json").read_text())
    for key, value in told["figures"].items():
        (line,) = [line for line in ended.out.splitlines() if f" {key} " in line and line.startswith("│")][-1:]
        assert f"{100 * (round(value, 4) - round(told['base'][key], 4)):+.2f}" in line
    fell = sum(round(value, 4) < round(told["base"][key], 4) for key, value in told["figures"].items())
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
    assert Run(run).saved_steps() == [4, 16]
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
        (["--window", 4], ["--window", "a step to choose around"]),
        (["--metric", METRIC, "--average-of", "last"], ["--average-of", "with --average"]),
        (["--metric", METRIC, "--metric", f"{METRIC}=2"], ["each metric once"]),
        (["--metric", f"{METRIC}=1e308"], ["at most 1,000,000"]),
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
    shutil.rmtree(Run(run).checkpoint(8))
    for command in (["export", run], ["evaluate", run], ["evaluate", run, "--steps", "selected"]):
        ended = gist(*command)
        assert ended.code == 2
        assert "select again" in ended.err
    shutil.rmtree(run / "checkpoints")
    ended = gist("select", run, "--around", 8)
    assert ended.code == 2
    assert "no checkpoint" in ended.err


def test_state_that_was_spoilt_is_told(run):
    """A torn line of metrics costs its row alone; a selected.json that says one thing here and another there is refused where it
    is needed, and nowhere else; a run.json that can't be read is named."""
    with (run / "metrics.jsonl").open("a") as file:
        file.write('5\n{"step": 16, "loss_mean": NaN}\n{"step": 12, "lo')
    told = selected(run, "--rule", "loss-percentile", 0.025)
    assert all(of["loss"] is not None for of in told["candidates"])
    path = run / "selected.json"
    leaky = json.dumps({**json.loads(path.read_text()), "leakage": [{"task": 5}]})
    for spoilt in ("{", "5", '{"step": 4}', leaky, path.read_text().replace('"checkpoints/step-', '"/tmp/step-')):
        path.write_text(spoilt)
        assert gist("evaluate", run, "--steps", "4").code == 0
        for command in (["evaluate", run, "--steps", "selected"], ["export", run]):
            ended = gist(*command)
            assert (ended.code, ended.out) == (2, "")
            assert "selected.json" in ended.err
    assert selected(run, "--around", 8)["step"] == 8  # another choice fixes it
    (run / "run.json").write_text("{")
    ended = gist("select", run, "--around", 4)
    assert ended.code == 2
    assert "run.json" in ended.err


def test_figures_that_were_garbled_are_measured_again(run):
    """NaN in a row would decide the ranking and stand in a JSON that no other program reads; a list would be a traceback."""
    first = selected(run, "--metric", METRIC)
    path = run / "evaluations.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for bad in (float("nan"), float("inf"), None, "x", [1]):
        spoilt = [{**row, "value": bad} if row["step"] == 4 else row for row in rows]
        path.write_bytes("".join(json.dumps(row) + "\n" for row in spoilt).encode() + b"\xff\xfe\n" + b"[" * 5000)
        assert selected(run, "--metric", METRIC) == first


def test_another_base_model_is_measured_anew(run, make_model):
    """Rises and falls against the figures of a base that is no longer the base would all be wrong."""
    before = selected(run, "--around", 8)["base"]
    other = make_model(seed=9)
    ended = gist("evaluate", run, "--set", f"model.name={other}", "--json")
    assert ended.code == 0, ended.err
    figures = json.loads(ended.out)["base"]
    assert figures != before
    assert figures == pytest.approx(json.loads(gist("evaluate", run, "--model", other, "--json").out))
    assert selected(run, "--around", 8)["base"] == before


def test_a_better_step_without_a_checkpoint_is_named(run):
    """Chosen among what retention left, a model may be worse than one that was measured: the user must hear of it."""
    selected(run, "--metric", METRIC)
    path = run / "evaluations.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({**row, "value": 0.99} if row["step"] == 4 else row) + "\n" for row in rows))
    shutil.rmtree(Run(run).checkpoint(4))
    ended = gist("select", run, "--metric", METRIC)
    assert ended.code == 0
    assert "step 4 was better (99.00 against" in " ".join(ended.err.split())


def test_tasks_that_came_after_the_training_are_in_the_card(trained, tmp_path):
    """The config that was selected with counts, not the one of the training: its tasks, lengths and kinds."""
    run = shutil.copytree(trained, tmp_path / "runs" / "run")
    folder = trained.parents[1]
    config = json.loads((folder / "run.yaml").read_text())
    config["output_dir"] = str(tmp_path / "runs")
    config["evaluation"] = {
        "max_length": 16,
        "tasks": [{"type": "sts", "name": "later", "path": str(folder / "pairs.tsv")}],
    }
    (tmp_path / "later.yaml").write_text(json.dumps(config))
    told = selected(run, "--metric", METRIC)
    assert told["leakage"] == [
        {"task": "pairs", "part": "pairs", "texts": 60, "shared": 60, "rows": told["leakage"][0]["rows"]},
        {"task": "kinds", "part": "texts", "texts": 96, "shared": 96, "rows": 96},
    ]
    assert gist("select", tmp_path / "later.yaml", "--metric", "later/spearman").code == 0
    assert gist("export", run).code == 0
    card = (run / "export" / "README.md").read_text()
    assert "type: spearman_cosine" in card
    assert "| later/spearman | " in card
    assert "| later | not checked" in card
    assert "kinds" not in card.split("## Config")[0]


def said_of(chosen):
    """The page, its lines joined."""
    console = Console(file=io.StringIO(), width=200)
    console.print(selection_page(chosen))
    return " ".join(console.file.getvalue().split())


def test_a_choice_below_the_base_is_told(run):
    """A table of falls is easily taken for one of rises: the model that people had is the better one."""
    selected(run, "--metric", METRIC)
    chosen = Selected.model_validate_json((run / "selected.json").read_text())
    best = chosen.candidates[0].score
    for base, told in ((best + 0.01, True), (best, True), (best - 0.01, False)):
        below = chosen.model_copy(update={"base": {**chosen.base, METRIC: base}})
        line = f"is better than the base model: {100 * best:.2f} against {100 * base:.2f}."
        assert (f"No checkpoint {line}" in said_of(below)) is told
        below = below.model_copy(update={"around": 8000, "window": 4})  # of the others nothing is known
        assert (f"No checkpoint within 4 steps of 8,000 {line}" in said_of(below)) is told


def test_falls_alone_are_told_without_a_metric(run):
    """Who chooses by loss or by step looks at no score, and would export a model that is worse in all of them."""
    for words in (("--rule", "loss-percentile", "0.025"), ("--around", "8")):
        selected(run, *words)
        chosen = Selected.model_validate_json((run / "selected.json").read_text())
        for by, told in ((0.01, True), (0.0, False), (-0.01, False)):
            page = said_of(chosen.model_copy(update={"base": {key: value + by for key, value in chosen.scores.items()}}))
            assert ("The selected model is better than the base model in no score." in page) is told
        rose, fell = list(chosen.scores)[:2]
        mixed = {**chosen.scores, rose: chosen.scores[rose] - 0.01, fell: chosen.scores[fell] + 0.01}
        assert "in no score" not in said_of(chosen.model_copy(update={"base": mixed}))
