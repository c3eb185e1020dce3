"""Ctrl-C, SIGTERM and a launcher that has gone, sent to real processes: a checkpoint first, and nothing lost."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from support.running import PATIENCE, assert_same_run, gist, metrics

from gist_train.model.filling import HASH_BYTES
from gist_train.model.guide import GuideStore
from gist_train.run_folder import Run
from gist_train.training.signals import SIGNALS, Stopped, StopSignal

pytestmark = pytest.mark.usefixtures("on_cpu")

STEPS = 60
ENDLESS = 1_000_000


def rows_written(run):
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_until(condition, process=None):
    """Polls until `condition()` holds; False when the process ends first, or it takes too long."""
    ends = time.monotonic() + PATIENCE
    while time.monotonic() < ends:
        if condition():
            return True
        if process is not None and process.poll() is not None:
            return False
        time.sleep(0.01)
    return False


def start(*words, log):
    """A real process, its output in a file: nobody reads a pipe here."""
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    with log.open("w") as stream:
        # Under nohup, the suite hands on that SIGHUP is ignored.
        heeding = partial(signal.signal, signal.SIGHUP, signal.SIG_DFL)
        command = [sys.executable, *map(str, words)]
        return subprocess.Popen(command, env=environment, stdout=stream, stderr=stream, preexec_fn=heeding)


@pytest.fixture
def config_of(write_config, tmp_path):
    """Writes runs of one length with one cache, and few checkpoints."""

    def write(name, steps=STEPS, **sections):
        return write_config(
            name,
            cache_dir=str(tmp_path / "cache"),
            training={"batch_size": 4, "max_steps": steps, "precision": "float32"},
            checkpoint={"every": ENDLESS, "keep_last": 10},
            **sections,
        )

    return write


@pytest.mark.parametrize(("number", "code"), [pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow), (signal.SIGUSR1, 138)])
def test_a_signal_stops_a_run_that_goes_on_as_if_nothing_was(config_of, tmp_path, number, code):
    """A checkpoint of the very step is written first; the same command then gives the same weights, moments and metrics as the
    run that nobody stopped, dropout on."""
    path, run, log = config_of("run"), tmp_path / "runs" / "run", tmp_path / "run.log"
    process = start("-m", "gist_train", "train", path, log=log)
    try:
        assert wait_until(lambda: rows_written(run) >= 5, process), log.read_text()
        process.send_signal(number)
        assert process.wait(PATIENCE) == code, log.read_text()
    finally:
        process.kill()
    (step,) = Run(run).saved_steps()
    assert 5 <= step < STEPS
    assert metrics(run)[-1]["step"] == step
    assert "Run the same command to resume" in log.read_text()
    assert "Traceback" not in log.read_text()
    ended = gist("train", path)
    assert ended.code == 0, ended.err
    assert "resuming from step" in ended.err
    assert gist("train", config_of("whole")).code == 0
    assert_same_run(run, tmp_path / "runs" / "whole", STEPS)


def children_of(process):
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def has_ended(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="children are found through /proc")
def test_a_process_whose_launcher_has_gone_stops(config_of, tmp_path):
    """SIGTERM to a one-process `accelerate launch` ends the launcher alone; its child would train on, unseen, for days."""
    path = config_of("orphan", ENDLESS)
    run, log = tmp_path / "runs" / "orphan", tmp_path / "orphan.log"
    options = ["--cpu", "--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    launcher = start("-m", "accelerate.commands.launch", *options, "-m", "gist_train", "train", path, log=log)
    child = None
    try:
        assert wait_until(lambda: rows_written(run) >= 5, launcher), log.read_text()
        (child,) = children_of(launcher.pid)
        launcher.terminate()
        assert launcher.wait(PATIENCE) == -signal.SIGTERM
        began = time.monotonic()
        assert wait_until(lambda: has_ended(child)), log.read_text()
        assert time.monotonic() - began < 30
        (step,) = Run(run).saved_steps()
        assert metrics(run)[-1]["step"] == step
        assert "Traceback" not in log.read_text()
    finally:
        launcher.kill()
        if child is not None and not has_ended(child):
            os.kill(child, signal.SIGKILL)


SLOW_GUIDE = """
import sys, time
from gist_train.model import filling, pretrained
filling.TEXTS_PER_WRITE = 32
real = pretrained.Pretrained.embed
def embed(self, texts, tokens):
    for batch in real(self, texts, 512):
        yield batch
        print("embedded", len(batch[0]), flush=True)
        time.sleep(0.3)
pretrained.Pretrained.embed = embed
from gist_train.cli import main
sys.argv = ["gist-train", *sys.argv[1:]]
main()
"""
SLOW_TASK = """
import itertools, sys, time
from gist_train.evaluation import measuring
calls, before, whole = itertools.count(), int(sys.argv[1]), measuring.measure
def measure(*given):
    if next(calls) < before:
        return whole(*given)
    print("measuring begins", flush=True)
    time.sleep(600)
measuring.measure = measure
from gist_train.cli import main
sys.argv = ["gist-train", *sys.argv[2:]]
main()
"""


def first_part_is_written(stores):
    return any(path.stat().st_size >= 32 * HASH_BYTES for path in stores.glob("*/hashes.bin"))


@pytest.mark.parametrize(
    ("command", "number", "code"),
    [("prepare", signal.SIGTERM, 143), pytest.param("train", signal.SIGHUP, 129, marks=pytest.mark.slow)],
)
def test_what_the_guide_has_embedded_is_kept(write_config, tmp_path, quickstart_texts, write_rows, command, number, code):
    """A pass of hours that a scheduler's limit ends goes on from the last part that was written."""
    rows = [{"anchor": a, "positive": b} for a, b in zip(quickstart_texts[:200:2], quickstart_texts[1:200:2], strict=True)]
    data = {"train": [{"source": "jsonl", "path": str(write_rows("many.jsonl", rows))}]}
    path, log = write_config(data=data), tmp_path / "run.log"
    process = start("-c", SLOW_GUIDE, command, path, log=log)
    try:
        stores = tmp_path / "runs" / ".cache" / "guides"
        assert wait_until(lambda: first_part_is_written(stores), process), log.read_text()
        process.send_signal(number)
        assert process.wait(PATIENCE) == code, log.read_text()
    finally:
        process.kill()
    assert "Traceback" not in log.read_text()
    assert log.read_text().count("What was read and embedded is kept") == 1
    (folder,) = stores.iterdir()
    kept = len(GuideStore(folder))
    assert kept >= 32
    ended = gist("prepare", path)
    assert (ended.code, f"embedding with the guide: {len(set(quickstart_texts[:200])) - kept:,} to do" in ended.err) == (0, True)


@pytest.mark.slow
@pytest.mark.parametrize(("step", "measured"), [(0, 0), (3, 1)])
def test_a_signal_ends_an_evaluation_that_takes_long(config_of, tmp_path, write_pairs, step, measured):
    """A scheduler grants half a minute between its signal and the kill; the step's checkpoint is whole by then. The run goes on
    with that evaluation: after a step more, nothing would have measured it again."""
    evaluation = {**write_pairs(["one", "two"]), "every": 3}
    path, log = config_of("run", 5, evaluation=evaluation), tmp_path / "run.log"
    process = start("-c", SLOW_TASK, str(measured), "train", path, log=log)
    try:
        assert wait_until(lambda: "measuring begins" in log.read_text(), process), log.read_text()
        process.send_signal(signal.SIGUSR1)
        assert process.wait(PATIENCE) == 138, log.read_text()
    finally:
        process.kill()
    assert Run(tmp_path / "runs" / "run").saved_steps() == ([step] if step else [])
    assert f"evaluation of step {step} left: it is done when the run goes on" in log.read_text()
    assert ("Stopped at step 3; checkpoint saved" if step else "Stopped before the first step") in log.read_text()
    ended = gist("train", path)
    assert ended.code == 0, ended.err
    assert "step 3: " in ended.err
    rows = map(json.loads, Run(tmp_path / "runs" / "run").evaluations.read_text().splitlines())
    assert sorted({row["step"] for row in rows}) == [0, 3, 5]


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_raises_where_nobody_asks_for_it(number):
    """Reading and embedding take hours too; within the loop it is noted, and acts where the loop lets it."""
    before = signal.signal(number, lambda *_: None)
    try:
        kind = KeyboardInterrupt if number == signal.SIGINT else Stopped
        with StopSignal(), pytest.raises(kind):
            signal.raise_signal(number)
        with StopSignal() as signals, signals.noted():
            signal.raise_signal(number)
            assert signals.received() == number
        with StopSignal() as signals, signals.noted(), pytest.raises(kind), signals.noted(False):
            signal.raise_signal(number)
        assert Stopped(number).number == number
    finally:
        signal.signal(number, before)


def test_under_nohup_a_closed_terminal_is_nothing():
    """The user said so: the training is to live on."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignal() as signals:
            signal.raise_signal(signal.SIGHUP)
            assert signals.received() == 0
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_second_signal_acts_as_ever(number):
    """Who can't wait for the checkpoint presses Ctrl-C twice; and what was there before comes back at the end."""
    got = []
    before = signal.signal(number, lambda *_: got.append("outside"))
    try:
        with StopSignal() as signals, signals.noted():
            assert signals.received() == 0
            signal.raise_signal(number)
            assert signals.received() == number
            assert got == []
            signal.raise_signal(number)
            assert got == ["outside"]
        signal.raise_signal(number)
        assert got == ["outside", "outside"]
    finally:
        signal.signal(number, before)


def test_ctrl_c_before_the_loop_ends_with_130(config_of, monkeypatch):
    """While models load there is nothing to save: the exit code is that of Ctrl-C all the same, without a traceback."""

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("gist_train.training_run.train_on", interrupted)
    ended = gist("train", config_of("run"))
    assert ended.code == 130
    assert "Traceback" not in ended.err
