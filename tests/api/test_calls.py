"""The whole from Python: what calls and runs give is what the commands give."""

import json
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import pytest
from IPython.core.formatters import DisplayFormatter
from sentence_transformers import SentenceTransformer
from support.running import gist

import gist_train
from gist_train import Run, UserError, load_config

pytestmark = pytest.mark.usefixtures("on_cpu")


@pytest.fixture
def path(write_config, write_pairs) -> Path:
    """The YAML of a run that is evaluated as it trains."""
    return write_config(
        evaluation={**write_pairs(["how are you", "turn it off", "and now", "the last"]), "every": 4},
        selection={"metric": "pairs/spearman"},
    )


def test_a_run_is_trained_looked_at_and_exported(path, tmp_path):
    """The way of a notebook, from the config to the model."""
    run = gist_train.train(load_config(path))
    folder = tmp_path / "runs" / "run"
    assert (run.folder, run.steps, repr(run)) == (folder, [4, 8, 12], f'Run("{folder}")')
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    metrics = run.metrics()
    assert metrics.index.tolist() == list(range(1, 13))
    assert metrics["loss"].tolist() == [row["loss"] for row in rows]
    assert {*metrics.columns, "step"} == {*rows[0]}
    assert run.selected is None
    selected = run.select()
    assert run.selected == selected
    told = json.loads(gist("select", path, "--json").out)
    assert selected.model_dump(mode="json", by_alias=True) == told
    assert selected.step in run.steps
    assert len(selected.candidates) == 3
    assert SentenceTransformer(selected.checkpoint, device="cpu").encode("how are you").shape == (32,)
    model = run.export(tmp_path / "model")
    assert model == tmp_path / "model"
    assert SentenceTransformer(str(model), device="cpu").encode("how are you").shape == (32,)
    assert run.export(step=4) == folder / "export"
    page = run.report(tmp_path / "page.html")
    assert "pairs/spearman" in page.read_text(encoding="utf-8")


def test_scores_are_a_table_of_steps_and_metrics(path):
    """Evaluations of a run, as evaluations.jsonl has them a line each."""
    run = gist_train.train(load_config(path))
    scores = run.scores()
    assert scores.index.tolist() == [0, 4, 8, 12]
    assert scores.index.name == "step"
    lines = [json.loads(line) for line in (run.folder / "evaluations.jsonl").open()]
    for line in lines:
        assert scores.loc[line["step"], f"{line['task']}/{line['metric']}"] == line["value"]
    assert scores.size == len(lines)


def test_an_evaluation_is_a_table_of_models(path, make_model):
    """Side by side, as `evaluate` prints them; of one config, of models by name and of steps."""
    config = load_config(path)
    run = gist_train.train(config)
    table = gist_train.evaluate(config)
    assert table.index.tolist() == ["base", "tuned", "guide"]
    told = json.loads(gist("evaluate", path, "--json").out)
    assert table.to_dict(orient="index") == told
    assert run.evaluate(steps=[4, 8]).index.tolist() == ["step 4", "step 8"]
    assert run.evaluate(steps="all", dimensions=[16]).index.tolist()[:2] == ["step 4", "step 4, 16 dimensions"]
    other = make_model(width=16)
    assert gist_train.evaluate(config, [other]).index.tolist() == [str(other)]
    assert table.loc["tuned"].equals(run.scores().loc[12].rename("tuned"))


def test_a_run_is_opened_by_its_folder_or_its_yaml(path, tmp_path, monkeypatch):
    """The day after, in another notebook."""
    config = load_config(path)
    gist_train.train(config)
    by_folder, by_yaml = Run(tmp_path / "runs" / "run"), Run(path)
    assert by_folder.config == by_yaml.config == config
    assert by_folder.steps == by_yaml.steps == Run(config).steps == [4, 8, 12]
    monkeypatch.chdir(tmp_path)
    assert Run("runs/run").scores().equals(by_yaml.scores())
    with pytest.raises(UserError, match="no such file or folder"):
        Run("runs/other")


def test_a_run_that_has_not_begun_has_empty_tables(path):
    """A notebook that looks before it trains gets no traceback."""
    run = Run(load_config(path))
    assert (run.steps, run.selected) == ([], None)
    assert (len(run.metrics()), len(run.scores())) == (0, 0)
    with pytest.raises(UserError, match="no checkpoint"):
        run.export()


def test_a_plan_is_what_the_command_says(path):
    """Its JSON has the same numbers, but for the disk that is free."""
    plan, told = asdict(gist_train.plan(load_config(path))), json.loads(gist("plan", path, "--json").out)
    for one in (plan, told):
        one.pop("disk")
    assert json.loads(json.dumps(plan)) == told


def test_rows_are_mined_and_audited_as_by_the_commands(path, tmp_path):
    """Files of the same rows, and suspects as a table."""
    config = load_config(path)
    mined = gist_train.mine(config, tmp_path / "ours.jsonl")
    assert gist("mine", path, "--to", tmp_path / "told.jsonl").code == 0
    assert mined.read_text() == (tmp_path / "told.jsonl").read_text()
    files = {name: tmp_path / f"{name}.jsonl" for name in ("write_suspects", "write_clean")}
    audited = gist_train.audit(config, margins=[0.1], thresholds={"unrelated": 0.3}, **files)
    ended = gist("audit", path, "--margins", "0.1", "--threshold", "unrelated=0.3", "--json")
    record, told = audited.record().model_dump(mode="json"), json.loads(ended.out)
    assert {**record, "made": None} == {**told, "made": None}
    suspects = pd.DataFrame(audited.lines())
    assert len(suspects) == len(files["write_suspects"].read_text().splitlines()) > 0
    assert suspects.columns.tolist() == ["kind", "score", "task", "source", "row", "anchor", "positives", "negatives"]
    assert len(files["write_clean"].read_text().splitlines()) == 96 - len(audited.all_suspects())


def test_a_cell_shows_the_page_of_the_command(path):
    """A cell that ends with a call shows what it returned: thousands of characters of fields, or the page that people know."""
    config = load_config(str(path), "training.max_steps=4")  # one change needs no list
    selected = gist_train.train(config).select()
    pages = {
        "gist-train plan: run": gist_train.plan(config),
        "may be bad": gist_train.audit(config),
        "selected: step 4": selected,
    }
    for words, result in pages.items():
        shown = DisplayFormatter().format(result)[0]["text/plain"]
        assert words in shown
        assert "Config(" not in shown
        assert "\x1b" not in shown  # of colours, which a cell of text can't show
        assert max(map(len, shown.splitlines())) <= 110


@pytest.mark.parametrize("call", [gist_train.mine, lambda config, to: gist_train.audit(config, write_clean=to)])
def test_a_file_of_another_ending_is_refused_first(path, tmp_path, call):
    """After an hour of mining there would be no file to write to."""
    with pytest.raises(UserError, match=r"rows\.docx"):
        call(load_config(path), tmp_path / "rows.docx")
    assert not (tmp_path / "runs").exists()


def test_a_criterion_that_is_not_measured_is_refused(path):
    """The same fault as on the command line, before a model is loaded."""
    run = gist_train.train(load_config(path, ["training.max_steps=4"]))
    with pytest.raises(UserError, match="nowhere/spearman"):
        run.select({"pairs/spearman": 1, "nowhere/spearman": 2})
    assert run.select("pairs/pearson").metric == {"pairs/pearson": 1.0}
    assert run.select(around=4).step == 4


@pytest.mark.parametrize("call", ["evaluate", "select", "export", "report"])
def test_what_is_for_one_process_refuses_several(path, monkeypatch, call):
    """Two processes would write into one folder, and the launcher would end the one that waits."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(UserError, match="one of 2 processes"):
        getattr(Run(path), call)()


def test_a_program_of_several_processes_may_not_extend(path, monkeypatch):
    """Each would copy the model that the new run begins with."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match="one of 2 processes"):
        Run(path).extend(1)


@pytest.mark.parametrize("call", [gist_train.plan, gist_train.audit, gist_train.train, gist_train.Run])
@pytest.mark.parametrize("given", [{"name": "a"}, 7])
def test_what_is_no_config_is_told(call, given):
    """A dict has to be loaded first; Python's own words say nothing of that."""
    with pytest.raises(UserError, match="load_config"):
        call(given)


def test_one_model_and_one_step_need_no_list(path, make_model):
    """A name's letters would be taken for models."""
    run = gist_train.train(load_config(path))
    assert len(run.evaluate(make_model(seed=3))) == 1
    assert len(run.evaluate(steps=8)) == 1


def test_a_faulty_selection_stops_a_training(path):
    """What it says may end the training early, and keeps checkpoints: to go on without it would be another training."""
    faulty = path.with_name("faulty.yaml")
    faulty.write_text(path.read_text().replace("pairs/spearman", "pears/spearman"))
    with pytest.raises(UserError, match="pears"):
        Run(faulty).train()


def test_an_audit_is_in_the_report(path):
    """The page of a run says what the audit of its data found, whoever called it."""
    config = load_config(path)
    gist_train.audit(config)
    run = gist_train.train(config)
    assert "Not looked for" not in run.report().read_text(encoding="utf-8")


def test_weights_of_metrics_are_kept_to_the_last_digit(path, monkeypatch):
    """Of two steps whose scores nearly agree a rounded weight would choose the other."""
    asked = []
    monkeypatch.setattr("gist_train.api.run.criteria_of", lambda *_, metrics, **__: asked.extend(metrics) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        gist_train.Run(path).select({"a/b": 0.123456789, "c/d": 2})
    assert asked == ["a/b=0.123456789", "c/d=2"]
