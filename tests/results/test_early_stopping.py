"""A run that ends when its metric no longer rises, and goes on when told to."""

import json

import pytest
import yaml
from support.running import WHOLE, add_scores, assert_same_run, gist, metrics

from gist_train.config.loading import load_config
from gist_train.evaluation import measuring as measured
from gist_train.evaluation.measuring import Measuring
from gist_train.evaluation.metrics import Score
from gist_train.evaluation.score_file import read_scores
from gist_train.evaluation.tasks import content_hash
from gist_train.progress import terminal
from gist_train.results.early_stopping import out_of_patience, remember_end, stays_ended
from gist_train.run_folder import Run

pytestmark = pytest.mark.usefixtures("on_cpu")


@pytest.fixture
def stopping(write_config, triplets, tmp_path):
    """Writes the YAML of a run of 12 steps, evaluated every 2, that ends after 2 evaluations without a rise."""
    texts = [row["anchor"] for row in triplets]
    pairs = [f"{a}\t{b}\t{i % 6}\n" for i, (a, b) in enumerate(zip(texts[:9], texts[9:18], strict=True))]
    (tmp_path / "pairs.tsv").write_text("sentence1\tsentence2\tscore\n" + "".join(pairs))
    tasks = [{"type": "sts", "name": "pairs", "path": str(tmp_path / "pairs.tsv")}]

    def write(name="run", *, stop_after=2, stop_at_step=None, max_steps=12, checkpoint=4):
        return write_config(
            name,
            evaluation={"every": 2, "tasks": tasks, "stop_after": stop_after},
            selection={"metric": "pairs/spearman"},
            training={"batch_size": 8, "max_steps": max_steps, "stop_at_step": stop_at_step, "precision": "float32"},
            checkpoint={"every": checkpoint, "keep_last": 20},
        )

    return write


@pytest.fixture
def scores(monkeypatch):
    """What each evaluation finds, in turn: by their number they are the steps 0, 2, 4 ..."""
    given: list[float] = []
    taken: list[float] = []

    def measure(_encoder, tasks):
        taken.append(given[len(taken)])
        return {f"{task.name}/{metric}": Score(taken[-1], None) for task in tasks for metric in ("spearman", "pearson")}

    monkeypatch.setattr(measured, "measure", measure)
    return given


def test_it_ends_and_stays_ended_and_goes_on(stopping, scores, tmp_path):
    """Ended at step 6, the second evaluation after the best; again the same command does nothing; stop_at_step raised lets it go
    on, with patience anew; and its weights are those of a run that never ended. Every evaluated step has a checkpoint."""
    scores += [0.1, 0.5, 0.4, 0.5, 0.3, 0.2, 0.9]
    run = tmp_path / "runs" / "run"
    ended = gist("train", stopping())
    assert ended.code == 0, ended.err
    assert "pairs/spearman was 50.00 at step 2, and no evaluation since was better" in ended.err
    assert "step 6: pairs/spearman 50.0" in ended.err
    assert Run(run).saved_steps() == [2, 4, 6]
    assert metrics(run)[-1]["step"] == 6
    assert json.loads((run / "ended.json").read_text())["step"] == 6

    again = gist("train", stopping())
    assert again.code == 0
    assert "ended early" in again.err
    assert Run(run).saved_steps() == [2, 4, 6]

    # Steps 8 and 10 are no rise either: the patience that was used up counts anew from step 6.
    further = gist("train", stopping(stop_at_step=11))
    assert further.code == 0, further.err
    assert Run(run).saved_steps() == [2, 4, 6, 8, 10]
    assert json.loads((run / "early-stop.json").read_text())["step"] == 10
    last = gist("train", stopping(stop_after=None, stop_at_step=11))
    assert last.code == 0, last.err
    assert "ended early" not in last.err
    assert Run(run).saved_steps()[-1] == 11
    # The end is measured too, though no evaluation is due at step 11.
    assert [*read_scores(Run(run), WHOLE)] == [0, 2, 4, 6, 8, 10, 11]
    scores[:0] = [0.0] * 7
    whole = gist("train", stopping("whole", stop_after=None, stop_at_step=11))
    assert whole.code == 0, whole.err
    assert_same_run(run, tmp_path / "runs" / "whole", 11)


def test_a_rise_in_time_lets_it_go_on(stopping, scores, tmp_path):
    """Two evaluations without a rise must follow one another."""
    scores += [0.1, 0.05, 0.2, 0.1, 0.3, 0.2, 0.4]
    assert gist("train", stopping()).code == 0
    assert Run(tmp_path / "runs" / "run").saved_steps()[-1] == 12


def test_what_an_interruption_left_out_is_measured(stopping, scores, tmp_path):
    """Stopped at step 4 before it was evaluated, a run that goes on measures step 4 first, or patience would miscount."""
    scores += [0.5, 0.6, 0.7, 0.1, 0.2]
    run = tmp_path / "runs" / "run"
    assert gist("train", stopping(stop_at_step=4)).code == 0
    (run / "evaluations.jsonl").write_text("".join((run / "evaluations.jsonl").read_text().splitlines(keepends=True)[:-2]))
    assert [*read_scores(Run(run), WHOLE)] == [0, 2]
    scores[3:3] = [0.7]  # step 4, again
    assert gist("train", stopping()).code == 0
    assert read_scores(Run(run), WHOLE)[4]["pairs/spearman"] == 0.7
    assert Run(run).saved_steps()[-1] == 8


def test_the_best_checkpoint_outlives_retention(stopping, scores, tmp_path):
    """With patience longer than keep_last the best step would be gone by the time the run ends, and nothing left to select."""
    scores += [0.1, 0.9, 0.4, 0.5, 0.3]
    path = stopping(stop_after=3)
    config = yaml.safe_load(path.read_text())
    config["checkpoint"] = {"every": 2, "keep_last": 1}
    path.write_text(yaml.safe_dump(config))
    run = tmp_path / "runs" / "run"
    assert gist("train", path).code == 0
    assert Run(run).saved_steps() == [2, 8]
    assert json.loads(gist("select", path, "--json").out)["step"] == 2


def test_others_evaluations_use_no_patience_up(stopping, scores, tmp_path):
    """A watcher's figures of steps in between would end a run by a race, and end it otherwise than an uninterrupted one."""
    config = load_config(stopping(stop_after=2), [])
    run = tmp_path / "runs" / "run"
    run.mkdir(parents=True)
    measuring = Measuring.of(config, terminal())
    content = content_hash(measuring.tasks[0])
    for step, value in ((0, 0.5), (1, 0.9), (2, 0.4), (3, 0.1)):
        add_scores(run, step, {"pairs/spearman": value}, content=content)
    assert not out_of_patience(config, Run(run), measuring, 2)
    add_scores(run, 4, {"pairs/spearman": 0.3}, content=content)
    assert out_of_patience(config, Run(run), measuring, 4)
    assert scores == []


def test_a_run_that_goes_back_decides_anew(stopping, scores, tmp_path):
    """What is known of an end lies before it again: kept, it would let the run go past the step where it ended first."""
    scores += [0.1, 0.5, 0.4, 0.3]
    run = tmp_path / "runs" / "run"
    assert gist("train", stopping()).code == 0
    assert Run(run).saved_steps() == [2, 4, 6]
    scores += [0.4, 0.3]
    again = gist("train", stopping(), "--resume", 2)
    assert again.code == 0, again.err
    assert "ended early" in again.err
    assert Run(run).saved_steps() == [2, 4, 6]
    (run / "early-stop.json").write_text("{")
    spoilt = gist("train", stopping())
    assert spoilt.code == 2
    assert "early-stop.json" in spoilt.err


def test_a_failed_evaluation_costs_no_step(stopping, monkeypatch, tmp_path):
    """A data set that can't be reached for a minute must not cost the steps since the last checkpoint; the same command goes on,
    and the last step's evaluation is made up for as well."""
    real = measured.measure

    def fail(*_):
        raise OSError("no route to host")

    run = tmp_path / "runs" / "run"
    path = stopping(stop_after=None, checkpoint=100, max_steps=4)
    assert gist("train", path, "--set", "training.stop_at_step=1").code == 0
    monkeypatch.setattr(measured, "measure", fail)
    for step in (2, 2):  # again: it is asked for first, before any step
        ended = gist("train", path)
        assert ended.code == 1
        assert "no route to host" in ended.err
        assert Run(run).saved_steps()[-1] == step
    monkeypatch.setattr(measured, "measure", real)
    assert gist("train", path, "--set", "evaluation.every=0").code == 0
    assert Run(run).saved_steps()[-1] == 4
    assert 4 not in read_scores(Run(run), WHOLE)
    assert gist("train", path).code == 0
    assert sorted(read_scores(Run(run), WHOLE)) == [0, 1, 4]


def test_the_decision_rests_on_what_is_in_the_folder(stopping, tmp_path):
    """Another process must decide the same: nothing is counted in memory. Figures of an edited task file do not count."""
    config = load_config(stopping(stop_after=2), [])
    run = tmp_path / "runs" / "run"
    run.mkdir(parents=True)
    measuring = Measuring.of(config, terminal())
    content = content_hash(measuring.tasks[0])
    for step, value in ((0, 0.5), (2, 0.4)):
        add_scores(run, step, {"pairs/spearman": value}, content=content)
    assert not out_of_patience(config, Run(run), measuring, 2)
    add_scores(run, 4, {"pairs/spearman": 0.3}, content="edited")
    assert not out_of_patience(config, Run(run), measuring, 4)
    add_scores(run, 4, {"pairs/spearman": 0.3}, content=content)
    assert out_of_patience(config, Run(run), measuring, 4)
    assert not stays_ended(config, Run(run), 4)  # nobody has ended it yet
    remember_end(config, Run(run), 4)
    assert stays_ended(config, Run(run), 4)
    assert not stays_ended(config, Run(run), 2)
    raised = [{"stop_after": 3}, {"stop_after": None}]
    assert not any(stays_ended(load_config(stopping(**change), []), Run(run), 4) for change in [*raised, {"stop_at_step": 6}])
    assert stays_ended(load_config(stopping(stop_after=1), []), Run(run), 4)
    assert stays_ended(load_config(stopping(stop_at_step=4), []), Run(run), 4)
    assert not out_of_patience(config, Run(run), measuring, 4)  # patience counts anew from where it was ended
    assert yaml.safe_load(stopping().read_text())["evaluation"]["stop_after"] == 2
