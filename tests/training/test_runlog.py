"""metrics.jsonl and the trackers: a row every `log_every` steps, each step once."""

import importlib.util
import json
import sys
from importlib.machinery import ModuleSpec
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.running import gist

from gist_train.config.schema import Config
from gist_train.run_folder import Run
from gist_train.training.checkpoint import LogSums
from gist_train.training.loop import NonFiniteError, StepRecord
from gist_train.training.runlog import RunLog
from gist_train.training.throughput import PARTS, StepClock

START = LogSums(0)
ROW = [
    *("step", "time", "epoch", "loss", "loss_mean", "lr", "grad_norm"),
    *("masked_ap", "masked_an", "masked_aa", "masked_pp", "triplets_per_second", "tokens_per_second", "padding_share", "mfu"),
    *("checkpoint_share", "step_seconds", *(f"{part}_seconds" for part in PARTS), "peak_memory_bytes"),
]


SECONDS = {"data": 0.0, "forward": 0.1, "loss": 0.05, "backward": 0.2, "optimizer": 0.1, "communication": 0.05, "graph": 0.0}


DISTILLATION = 0.25


class Clock(StepClock):
    """One that stands at the same parts each step."""

    def seconds(self):
        return dict(SECONDS)


def record(step, loss=None, frozen=0.0, scale=0.0, spikes=(0.0, 0.0)):
    counts = [1, 2, 3, 4, 10, 10, 10, 10]
    return StepRecord(
        step=step,
        epoch=step / 10,
        lr=step * 1e-6,
        rows=np.arange(8),
        tokens=100 * step,
        computed_tokens=200 * step,
        groups=((2, 5),),
        clock=Clock(torch.device("cpu")),
        gathered=(16,),
        seconds=0.5,
        metrics=torch.tensor(
            [step * step if loss is None else loss, 2.0, *counts, DISTILLATION, 0.5, 0.25, scale, *spikes, frozen]
        ),
    )


def log_of(run, sums=START, last=100, distillation=0.0, of_rows=(0,) * 8, **tracking):
    data = {"train": [{"source": "jsonl", "path": "rows.jsonl"}]}
    sections = {"guide": {"name": "g"}, "distillation": {"weight": distillation}, "tracking": tracking}
    config = Config.model_validate({"name": "run", "model": {"name": "m"}, "data": data, **sections})
    corpus = SimpleNamespace(tasks=["t", "u"], task=np.array(of_rows), folder=run)
    return RunLog(None if run is None else Run(run), config, sums, corpus, last)


def written(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_the_last_step_has_a_row(tmp_path):
    """A run whose length is no multiple of log_every would end in the dark, and its last checkpoint go by an older loss."""
    with log_of(tmp_path, log_every=3, last=5) as log:
        for step in range(1, 6):
            log.add(record(step), flops=10, peak_flops=40.0)
    assert [(row["step"], row["loss_mean"]) for row in written(tmp_path)] == [(3, pytest.approx(14 / 3)), (5, (16 + 25) / 2)]


def test_a_row_names_the_task_of_its_step(tmp_path):
    """What a guide masks is told by task: a step of two would count as the first's."""
    for name, of_rows, task in (("one", (1,) * 8, "u"), ("two", (0,) * 7 + (1,), None)):
        (tmp_path / name).mkdir()
        with log_of(tmp_path / name, of_rows=of_rows, log_every=1) as log:
            numbers = log.add(record(1), flops=10, peak_flops=40.0)
        assert [row["task"] for row in written(tmp_path / name)] == [task]
        assert "task" not in numbers  # trackers take numbers


def test_a_row_has_the_divergence_where_it_is_learned(tmp_path):
    """`loss` has it in it, times its weight: alone it can be compared between weights."""
    for name, weight in (("on", 2.0), ("off", 0.0)):
        (tmp_path / name).mkdir()
        with log_of(tmp_path / name, log_every=1, distillation=weight) as log:
            log.add(record(1), flops=10, peak_flops=40.0)
    (on,), (off,) = (written(tmp_path / name) for name in ("on", "off"))
    assert on["distillation_loss"] == DISTILLATION
    assert "distillation_loss" not in off


def test_no_share_of_the_machine_is_more_than_all(tmp_path):
    """Its rate is measured once, maybe beside other work: 284 % of it is a figure that nobody can believe or compare."""
    with log_of(tmp_path, log_every=1) as log:
        rows = [log.add(record(step), flops=flops, peak_flops=40.0) for step, flops in enumerate((10, 50, 25, 100), 1)]
    # A step takes half a second: 20, 100, 50 and 200 FLOP/s.
    assert [row["mfu"] for row in rows] == pytest.approx([0.5, 1.0, 0.5, 1.0], rel=0.05)
    assert max(row["mfu"] for row in rows) <= 1


def test_a_row_has_its_own_loss_and_the_mean_since_the_last(tmp_path):
    """A mean over the steps since the start hides what happens now; the last step's loss alone is noise."""
    with log_of(tmp_path, log_every=3) as log:
        rows = [log.add(record(step), flops=10, peak_flops=40.0) for step in range(1, 9)]
    assert [row is not None for row in rows] == [False, False, True, False, False, True, False, False]
    assert written(tmp_path) == [{**row, "task": "t"} for row in (rows[2], rows[5])]
    first, second = written(tmp_path)
    assert list(first) == [*ROW, "task"]
    assert (first["step"], first["loss"], first["loss_mean"]) == (3, 9.0, pytest.approx((1 + 4 + 9) / 3))
    assert (second["step"], second["loss"], second["loss_mean"]) == (6, 36.0, pytest.approx((16 + 25 + 36) / 3))
    assert (first["lr"], first["epoch"], first["masked_pp"]) == (3e-6, 0.3, pytest.approx(0.4))
    # The half second of each step, and what it took to read the losses.
    assert first["tokens_per_second"] == pytest.approx(600 / 1.5, rel=0.05)
    assert first["triplets_per_second"] == pytest.approx(24 / 1.5, rel=0.05)
    assert first["padding_share"] == pytest.approx(0.5)
    assert first["mfu"] == pytest.approx(30 / 1.5 / 40, rel=0.05)
    assert first["step_seconds"] == pytest.approx(0.5, rel=0.05)
    assert {part: first[f"{part}_seconds"] for part in PARTS} == pytest.approx(SECONDS)
    assert 1 << 24 < first["peak_memory_bytes"] < 1 << 40
    assert first["time"] <= second["time"]


def test_a_resumed_log_goes_on_with_its_sums(tmp_path):
    """A checkpoint at step 4 with rows at 3 and 6: step 4's loss is part of row 6."""
    with log_of(tmp_path, log_every=3) as log:
        for step in range(1, 5):
            log.add(record(step), 10, 40.0)
        sums = log.sums()
    assert sums == LogSums(4, 16.0, 1, 400, 800)
    with log_of(tmp_path, sums, log_every=3) as log:
        for step in (5, 6):
            log.add(record(step), 10, 40.0)
    assert [row["step"] for row in written(tmp_path)] == [3, 6]
    assert written(tmp_path)[1]["loss_mean"] == pytest.approx((16 + 25 + 36) / 3)
    assert written(tmp_path)[1]["padding_share"] == pytest.approx(0.5)
    # What the clock measures is this process' own: its tokens over its seconds.
    assert written(tmp_path)[1]["tokens_per_second"] == pytest.approx((500 + 600) / 1.0, rel=0.05)


def test_nothing_is_told_of_steps_that_were_not_finite(tmp_path):
    """A checkpoint, or a row, of weights that stand still since step 2 would pass for a training that went on."""
    with log_of(tmp_path, log_every=2) as log:
        log.add(record(1), 10, 40.0)
        with pytest.raises(NonFiniteError, match=r"step 2: loss 4.0, gradient norm 2.0.*\n.*\n  tasks    t\n"):
            log.add(record(2, frozen=1.0), 10, 40.0)
    assert written(tmp_path) == []
    with log_of(tmp_path, log_every=5) as log:
        log.add(record(1), 10, 40.0)
        log.add(record(2, frozen=1.0), 10, 40.0)
        with pytest.raises(NonFiniteError, match="step 2"):
            log.sums()


def test_a_row_tells_the_loss_scale_under_fp16(tmp_path):
    """A scale that falls and falls is what a run that overflows looks like."""
    with log_of(tmp_path, log_every=1) as log:
        assert "loss_scale" not in log.add(record(1), 10, 40.0)
        assert log.add(record(2, scale=1024.0), 10, 40.0)["loss_scale"] == 1024.0


@pytest.mark.parametrize("torn", ["", '{"step": 9, "lo', '{"step": 9, "loss": 1.0}\n{"st'])
def test_rows_after_the_checkpoint_are_cut(tmp_path, torn):
    """The steps after the checkpoint are trained again: their rows would stand twice, and a torn line would stop every reader."""
    with log_of(tmp_path, log_every=1) as log:
        for step in range(1, 9):
            log.add(record(step), 10, 40.0)
    lines = (tmp_path / "metrics.jsonl").read_text()
    (tmp_path / "metrics.jsonl").write_text(lines + torn)
    with log_of(tmp_path, LogSums(6), log_every=1) as log:
        assert [row["step"] for row in written(tmp_path)] == [1, 2, 3, 4, 5, 6]
        log.add(record(7), 10, 40.0)
    assert [row["step"] for row in written(tmp_path)] == [1, 2, 3, 4, 5, 6, 7]
    assert (tmp_path / "metrics.jsonl").read_text().splitlines()[:6] == lines.splitlines()[:6]


def test_other_ranks_write_nothing(tmp_path, monkeypatch):
    """Every rank would write the same row."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "wandb", None)  # whoever imports it fails
    with log_of(None, log_every=1, wandb={"project": "p"}) as log:
        row = log.add(record(1), 10, 40.0)
    assert row is not None
    assert row["loss_mean"] == 1.0
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in that notes its calls."""
    calls = []

    def init(**options):
        calls.append(("init", options))
        return SimpleNamespace(
            log=lambda row, step: calls.append(("log", step, row)),
            finish=lambda exit_code: calls.append(("finish", exit_code)),
            settings=SimpleNamespace(sync_dir="somewhere"),
        )

    stand_in = SimpleNamespace(init=init, Settings=dict, __spec__=ModuleSpec("wandb", None))
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    return calls


def test_wandb_gets_every_row_and_the_same_run_after_a_resume(tmp_path, wandb):
    """An id that is drawn anew makes a second run of every resume."""
    tracking = {"log_every": 2, "wandb": {"project": "gist", "mode": "offline", "entity": "us"}}
    with log_of(tmp_path, **tracking) as log:
        for step in range(1, 5):
            log.add(record(step), 10, 40.0)

    def fail():
        with log_of(tmp_path, LogSums(4), **tracking):
            raise ArithmeticError

    with pytest.raises(ArithmeticError):
        fail()
    assert [call[0] for call in wandb] == ["init", "log", "log", "finish", "init", "finish"]
    first, again = wandb[0][1], wandb[4][1]
    assert (first["project"], first["mode"], first["entity"], first["name"]) == ("gist", "offline", "us", "run")
    assert (first["resume"], first["dir"], first["config"]["model"]["name"]) == ("allow", str(tmp_path), "m")
    assert first["id"] == again["id"] == (tmp_path / "wandb-id.txt").read_text().strip()
    assert [call[1] for call in wandb if call[0] == "log"] == [2, 4]
    assert [{**call[2], "task": "t"} for call in wandb if call[0] == "log"] == written(tmp_path)
    assert [call[1] for call in wandb if call[0] == "finish"] == [0, 1]


@pytest.mark.usefixtures("on_cpu")
def test_wandb_gets_the_scores_of_every_evaluation(write_config, write_pairs, tmp_path, wandb):
    """Without them the page of a run has a loss and no curve of what the loss is for."""
    evaluation = {**write_pairs(["one", "two", "three"]), "every": 4}
    tracking = {"log_every": 6, "wandb": {"project": "gist", "mode": "offline"}}
    assert gist("train", write_config(evaluation=evaluation, tracking=tracking)).code == 0
    logged = [(step, row) for kind, step, row in (call for call in wandb if call[0] == "log")]
    scores = {step: row for step, row in logged if "evaluation/pairs/spearman" in row}
    assert list(scores) == [0, 4, 8, 12]
    kept = [json.loads(line) for line in (tmp_path / "runs" / "run" / "evaluations.jsonl").read_text().splitlines()]
    told = {(row["step"], row["metric"]): row["value"] for row in kept}
    for step, row in scores.items():
        assert row == {f"evaluation/pairs/{metric}": told[step, metric] for metric in ("spearman", "pearson")}
    assert [step for step, row in logged if "loss" in row] == [6, 12]
    assert [step for step, _ in logged] == sorted(step for step, _ in logged)  # else they are dropped there


@pytest.mark.parametrize("options", [{}, {"wandb": {"project": "gist", "mode": "disabled"}}])
def test_wandb_is_not_imported_unless_asked_for(tmp_path, wandb, options):
    """It is an extra, slow to import, and tells the world."""
    with log_of(tmp_path, log_every=1, **options) as log:
        log.add(record(1), 10, 40.0)
    assert wandb == []
    assert not (tmp_path / "wandb-id.txt").exists()


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
def test_wandb_offline_writes_a_folder(tmp_path):
    """The real one takes the arguments that we give it."""
    with log_of(tmp_path, log_every=1, wandb={"project": "gist", "mode": "offline"}) as log:
        log.add(record(1), 10, 40.0)
    assert list((tmp_path / "wandb").glob("offline-run-*"))
