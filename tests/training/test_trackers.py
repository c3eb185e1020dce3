"""Weights & Biases as it really is, against a server on loopback, and where there is no key, no network and no room."""

import importlib.util
import json
import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.running import gist
from support.wandb_server import KEY, wandb_server

from gist_train.config.tracking import WandbConfig
from gist_train.training.trackers import wandb_mode

pytestmark = [
    pytest.mark.usefixtures("on_cpu"),
    pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed"),
]
TRACKING = {"log_every": 1, "wandb": {"project": "project", "entity": "entity"}}


@pytest.fixture
def path(write_config, write_pairs, quickstart_texts):
    """The YAML of 12 steps, three of which are evaluated."""
    evaluation = {**write_pairs(quickstart_texts[:20]), "every": 4}
    return write_config(guide=None, tracking=TRACKING, evaluation=evaluation)


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    """No login of this machine's user, and no words of wandb's in colours."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    yield
    import wandb

    wandb.teardown()


def warnings_of(ended):
    return [line for line in ended.err.splitlines() if line.startswith("warning: Weights & Biases: ")]


def test_without_a_key_the_log_is_kept_for_later(path, tmp_path):
    """Training goes on, says so once, and the folder that it names is there."""
    ended = gist("train", path)
    assert ended.code == 0, ended.err
    (warning,) = warnings_of(ended)
    assert "nobody is logged in" in warning
    assert ended.err.index(warning) < ended.err.index(" steps of ")  # before any work
    kept = ended.err.partition("wandb sync ")[2].splitlines()[0]
    assert list(Path(kept).glob("*.wandb"))
    assert (tmp_path / "runs" / "run" / "wandb").samefile(Path(kept).parent)
    assert len((tmp_path / "runs" / "run" / "metrics.jsonl").read_text().splitlines()) == 12


@pytest.mark.parametrize(
    ("variables", "mode"),
    [
        ({}, "online"),
        ({"WANDB_MODE": "offline"}, "offline"),
        ({"WANDB_MODE": "dryrun"}, "offline"),
        ({"WANDB_MODE": "disabled"}, "disabled"),
        ({"WANDB_DISABLED": "true", "WANDB_MODE": "online"}, "disabled"),
    ],
)
def test_its_own_variables_are_obeyed(variables, mode, monkeypatch):
    """A batch job sets them where no YAML can be changed; what the YAML says rules over them."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert wandb_mode(WandbConfig()) == mode
    assert wandb_mode(WandbConfig(mode="offline")) == "offline"


def test_the_project_of_the_environment_is_taken(path, monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_PROJECT", "of-the-job")
    ended = gist("train", path, "--set", "tracking.wandb={}")
    assert ended.code == 0, ended.err
    assert warnings_of(ended) == []
    (log,) = (tmp_path / "runs" / "run" / "wandb").glob("offline-run-*/*.wandb")
    assert b"of-the-job" in log.read_bytes()


def test_a_resumed_run_is_the_same_run_and_has_no_step_twice(path, monkeypatch, tmp_path):
    """Stopped at step 6 and gone back to 4: what the page has after it is what metrics.jsonl has."""
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setattr("gist_train.training.trackers.SECONDS_TO_BEGIN", 60)  # on a machine that others use
    with wandb_server() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.address)
        assert gist("train", path, "--set", "training.stop_at_step=6").code == 0
        assert [row["_step"] for row in server.history] == [0, 1, 2, 3, 4, 5, 6]
        ended = gist("train", path, "--resume", "4")
        assert ended.code == 0, ended.err
    assert warnings_of(ended) == []
    assert len(server.runs) == 1
    rows = [json.loads(line) for line in (tmp_path / "runs" / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["_step"] for row in server.history] == list(range(13))
    assert [row["loss"] for row in server.history[1:]] == [row["loss"] for row in rows]
    scored = [row["_step"] for row in server.history if "evaluation/pairs/spearman" in row]
    assert scored == [0, 4, 6, 8, 12]
    assert KEY.encode() not in server.received


SLOW = [pytest.param(fault, marks=pytest.mark.slow) for fault in ("silent", 403, 500)]


@pytest.mark.parametrize("fault", ["closed", 401, *SLOW])
def test_a_server_that_does_not_answer_holds_nothing_up(path, monkeypatch, fault):
    """The start waits ten seconds and as long again while wandb asks what it may resume; then the log is kept for later."""
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setattr("gist_train.training.trackers.SECONDS_TO_BEGIN", 1)
    with wandb_server() as server:
        monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9" if fault == "closed" else server.address)
        if fault == "silent":
            server.silent.set()
        elif fault != "closed":
            server.status = fault
        began = time.monotonic()
        ended = gist("train", path)
        took = time.monotonic() - began
    assert ended.code == 0, ended.err
    (warning,) = warnings_of(ended)
    assert Path(warning.partition("wandb sync ")[2]).is_dir()
    assert took < 60


def test_a_server_that_falls_silent_does_not_keep_the_end(path, monkeypatch):
    """Its rows are on disk; the command that uploads them is named."""
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setattr("gist_train.training.trackers.SECONDS_TO_BEGIN", 60)
    monkeypatch.setattr("gist_train.training.trackers.SECONDS_TO_END", 2)
    with wandb_server() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.address)

        def fall_silent(*_, **__):
            server.silent.set()
            return original(*_, **__)

        from gist_train.training import trackers

        original = trackers._close
        monkeypatch.setattr(trackers, "_close", fall_silent)
        ended = gist("train", path)
    assert ended.code == 0, ended.err
    (warning,) = warnings_of(ended)
    assert "not all was taken within 2 s" in warning
    assert list(Path(warning.partition("wandb sync ")[2]).glob("*.wandb"))


def test_what_wandb_raises_ends_no_training(path, monkeypatch):
    """In the middle of it, and at its beginning both ways."""
    import wandb

    monkeypatch.setenv("WANDB_API_KEY", KEY)

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    failing = SimpleNamespace(log=fail, finish=lambda **_: None, settings=SimpleNamespace(sync_dir="somewhere"))
    monkeypatch.setattr(wandb, "init", lambda **_: failing)
    ended = gist("train", path, "--set", "name=logging")
    assert ended.code == 0, ended.err
    (warning,) = warnings_of(ended)
    assert "No space left on device. It gets no more rows; metrics.jsonl has all." in warning
    monkeypatch.setattr(wandb, "init", fail)
    ended = gist("train", path, "--set", "name=beginning")
    assert ended.code == 0, ended.err
    (warning,) = warnings_of(ended)
    assert "No space left on device. It gets nothing; metrics.jsonl has all rows." in warning
