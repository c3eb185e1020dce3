"""A disk that is full, for real: a row of metrics ends no training, and what can't be written names its file and what is safe."""

import json
import os
import signal
import subprocess

import pytest
from support.running import PATIENCE, gist, metrics
from test_signals import ENDLESS, rows_written, start, wait_until

from gist_train.data.files import append_text
from gist_train.run_folder import Run
from gist_train.training import checkpoint_writer

pytestmark = pytest.mark.usefixtures("on_cpu")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 8 MiB, and a function that fills it."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)], check=False, capture_output=True)
    if mounted.returncode:
        pytest.skip("no file system can be mounted here")

    def fill():
        with (disk / "ballast").open("wb", buffering=0) as stream:
            try:
                while True:
                    stream.write(bytes(4096))
            except OSError:
                return

    yield disk, fill
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_row_that_can_not_be_written_ends_no_training(write_config, tmp_path, small_disk):
    """An hour of a full disk cost all steps since the last checkpoint, for a line of a log."""
    disk, fill = small_disk
    training = {"batch_size": 4, "max_steps": ENDLESS, "precision": "float32"}
    path = write_config(output_dir=str(disk), training=training, checkpoint={"every": ENDLESS})
    run, log = disk / "run", tmp_path / "run.log"
    process = start("-m", "gist_train", "train", path, log=log)
    try:
        assert wait_until(lambda: rows_written(run) >= 5, process), log.read_text()
        fill()
        assert wait_until(lambda: "rows are kept in memory" in log.read_text(), process), log.read_text()
        assert "metrics.jsonl" in log.read_text()
        (disk / "ballast").unlink()
        assert wait_until(lambda: "that were kept in memory are written" in log.read_text(), process), log.read_text()
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 143, log.read_text()
    finally:
        process.kill()
    (step,) = Run(run).saved_steps()
    assert [row["step"] for row in metrics(run)] == list(range(1, step + 1))


def test_a_checkpoint_is_tried_again_and_then_ends_the_run(write_config, tmp_path, small_disk, monkeypatch):
    """The message names the checkpoint, what is safe and what to do; the partial one is gone."""
    disk, fill = small_disk
    monkeypatch.setattr(checkpoint_writer, "SECONDS_BETWEEN_TRIES", 0.1)
    real, tried = checkpoint_writer.checkpoints.save_checkpoint, []

    def save(run, *given):
        tried.append(1)
        if len(tried) == 2:
            fill()
        return real(run, *given)

    monkeypatch.setattr(checkpoint_writer.checkpoints, "save_checkpoint", save)
    path = write_config(output_dir=str(disk), cache_dir=str(tmp_path / "cache"))
    ended = gist("train", path)
    assert ended.code == 1
    assert len(tried) == 1 + checkpoint_writer.TRIES
    for part in (
        "step-000000008",
        "No space left on device",
        "Make room",
        "run the same command",
        "Earlier checkpoints are whole",
    ):
        assert part in ended.err, part
    assert "Traceback" not in ended.err
    assert Run(disk / "run").saved_steps() == [4]
    assert not list((disk / "run" / "checkpoints").glob(".*"))
    (disk / "ballast").unlink()
    assert gist("train", path).code == 0
    assert [row["step"] for row in metrics(disk / "run")] == list(range(1, 13))


def test_an_export_and_an_evaluation_say_what_is_safe(write_config, write_pairs, tmp_path, small_disk):
    """A number of the operating system, or a list of tuples, tells nobody what to do."""
    disk, fill = small_disk
    path = write_config(output_dir=str(disk), cache_dir=str(tmp_path / "cache"), evaluation=write_pairs(["one", "two"]))
    assert gist("train", path).code == 0
    fill()
    for command, name in (("evaluate", "run/.lock"), ("export", "run/.export")):
        ended = gist(command, path)
        assert (ended.code, "Traceback" in ended.err) == (1, False), ended.err
        assert name in ended.err
        assert "What was whole before is whole now" in ended.err
    assert not (disk / "run" / ".export.partial").exists()


def test_a_disk_too_small_for_the_checkpoints_is_told_early(write_config, monkeypatch):
    """The twentieth checkpoint fails in the third night."""
    monkeypatch.setattr("gist_train.training_run.shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    assert "lower checkpoint.keep_last" in gist("train", write_config(), "--set", "training.max_steps=2").err


def test_appending_leaves_no_part(tmp_path, small_disk):
    """Half a row would be taken for a garbled one, and the next one be glued to it."""
    disk, fill = small_disk
    path = disk / "rows.jsonl"
    append_text(path, json.dumps({"a": 1}) + "\n")
    fill()
    with pytest.raises(OSError, match=r"rows\.jsonl"):
        append_text(path, "x" * 100_000)
    assert path.read_text() == '{"a": 1}\n'
    os.unlink(disk / "ballast")
    append_text(path, "b\n")
    assert path.read_text() == '{"a": 1}\nb\n'
    assert tmp_path.exists()
