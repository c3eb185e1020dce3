"""Checkpoints beside the training: what is written is the step's own, whole before it counts, and an error in it ends the run."""

import json
import re
import time
from threading import Event
from unittest import mock

import pytest
import torch
from safetensors import SafetensorError
from support.running import PATIENCE, QUIET, gist, in_processes, metrics
from test_checkpoint import FACTS, FILES, files_in, updated

from gist_train.config.loading import load_config
from gist_train.data.manifests import verified_manifest
from gist_train.evaluation import measuring
from gist_train.pulse import RankFailedError
from gist_train.run_folder import Run
from gist_train.training import checkpoint as checkpoints
from gist_train.training.checkpoint import LogSums, moments_of, save_checkpoint
from gist_train.training.checkpoint_writer import CheckpointWriter
from gist_train.training.loop import NonFiniteError
from gist_train.training.runlog import RunLog
from gist_train.training.update import UpdateState
from gist_train.training_run import train

pytestmark = pytest.mark.usefixtures("on_cpu")

AT_4, AT_8 = (LogSums(step, 1.5, 3, 100, 120) for step in (4, 8))


def nothing():
    pass


def writer_of(run, student, adamw):
    return CheckpointWriter(Run(run), student, adamw, FACTS, UpdateState())


class Held:
    """Stands in for save_file: the thread waits in it until `let_go`, and then fails where it is given an error."""

    def __init__(self, step=4, error=None):
        self._let_go, self._step, self._error, self._save = Event(), step, error, checkpoints.save_file

    def __call__(self, moments, path):
        if path.parent.name == f".step-{self._step:09d}.partial":
            assert self._let_go.wait(PATIENCE), "the loop waits for the checkpoint"
            if self._error is not None:
                raise self._error
        self._save(moments, path)

    def let_go(self):
        self._let_go.set()


def held(**how):
    """Within: checkpoints are written only once they are let go."""
    return mock.patch.object(checkpoints, "save_file", Held(**how))


@torch.no_grad()
def train_further(student, adamw):
    for tensor in [*student.encoder.parameters(), *moments_of(student, adamw, UpdateState()).values()]:
        tensor.add_(1.0)


def bytes_of(folder):
    return {name: (folder / name).read_bytes() for name in files_in(folder)}


@pytest.mark.parametrize(
    ("model", "config"),
    [({}, {}), ({"pooling": "cls", "normalize": False}, {"layers": [1]}), ({"family": "mpnet"}, {}), ({"family": "qwen3"}, {})],
)
def test_what_is_written_later_is_what_was_there(make_model, tmp_path, model, config):
    """The slow twin writes the live weights at once. Ours are trained further before a byte of the copy is written: a checkpoint
    that shares memory with them would hold another step's weights or moments, or a mixture, and its hashes would be right.
    The second copy goes to the same memory."""
    student, adamw = updated(make_model(**model), **config)
    for progress in (AT_4, AT_8):
        save_checkpoint(Run(tmp_path / "twin"), student, moments_of(student, adamw, UpdateState()), progress, FACTS)
        train_further(student, adamw)
    student, adamw = updated(make_model(**model), **config)
    with writer_of(tmp_path / "ours", student, adamw) as writer:
        for progress in (AT_4, AT_8):
            with held(step=progress.step) as save:
                writer.save(progress, before=nothing, after=nothing)
                train_further(student, adamw)
                assert Run(tmp_path / "ours").saved_steps() == [4, 8][: progress.step // 4 - 1]
                save.let_go()
                assert writer.wait() is None
    for step in (4, 8):
        ours, twin = (bytes_of(Run(tmp_path / name).checkpoint(step)) for name in ("ours", "twin"))
        assert len(ours) >= FILES
        assert ours == twin
    assert bytes_of(Run(tmp_path / "ours").checkpoint(4))["model.safetensors"] != ours["model.safetensors"]
    assert writer.count == 2


def test_weights_that_no_step_has_reached_are_copied_too(make_model, tmp_path):
    """A run that is stopped before its first step has no moments yet."""
    student, adamw = updated(make_model(), steps=0)
    with writer_of(tmp_path, student, adamw) as writer:
        writer.save(AT_4, before=nothing, after=nothing)
    assert verified_manifest(Run(tmp_path).checkpoint(4))["step"] == 4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_copy_from_a_gpu_is_the_one_that_is_saved_at_once(make_model, tmp_path):
    """Copies that the device makes by itself must have arrived before the next step changes what they are made of."""
    student, adamw = updated(make_model())
    student.encoder.to("cuda")
    for state in adamw.state.values():
        state.update({name: value.cuda() for name, value in state.items()})
    save_checkpoint(Run(tmp_path / "twin"), student, moments_of(student, adamw, UpdateState()), AT_4, FACTS)
    with writer_of(tmp_path / "ours", student, adamw) as writer:
        writer.save(AT_4, before=nothing, after=nothing)
        train_further(student, adamw)
    ours, twin = (bytes_of(Run(tmp_path / name).checkpoint(4)) for name in ("ours", "twin"))
    assert ours == twin


def test_the_next_save_waits_and_so_does_closing(make_model, tmp_path):
    """Two threads in one memory would tear both; a process that ends first would leave none."""
    student, adamw = updated(make_model())
    order = []
    with writer_of(tmp_path, student, adamw) as writer:
        for progress in (AT_4, AT_8):
            writer.save(
                progress,
                before=lambda at=progress.step: (time.sleep(0.2), order.append(("begins", at, Run(tmp_path).saved_steps()))),
                after=lambda at=progress.step: order.append(("ends", at, Run(tmp_path).saved_steps())),
            )
            order.append(("goes on", progress.step, None))
    assert [(what, step) for what, step, _ in order] == [
        *(("goes on", 4), ("begins", 4), ("ends", 4)),
        *(("goes on", 8), ("begins", 8), ("ends", 8)),
    ]
    assert [found for _, _, found in order if found is not None] == [[], [4], [4], [4, 8]]


def test_an_error_is_raised_by_the_next_and_by_closing(make_model, tmp_path):
    """An error that stays in the thread lets a run train for days on a full disk."""
    student, adamw = updated(make_model())

    def fill_the_disk():
        raise OSError("no space left on device")

    def save(writer, progress):
        writer.save(progress, before=fill_the_disk, after=nothing)

    with writer_of(tmp_path, student, adamw) as writer:
        save(writer, AT_4)
        with pytest.raises(OSError, match="no space left"):
            save(writer, AT_8)
        assert writer.wait() is None  # told once
    with pytest.raises(OSError, match="no space left"), writer_of(tmp_path, student, adamw) as writer:
        save(writer, AT_4)
    error = NonFiniteError("loss nan")
    raises_beside(tmp_path, student, adamw, error, fill_the_disk)
    assert error.__notes__ == ["the checkpoint that was being written failed too: no space left on device"]
    assert not (tmp_path / "checkpoints").exists()


def test_a_checkpoint_that_fails_says_which_and_how_to_go_on(tmp_path, make_model, monkeypatch):
    """The system's word for a full disk names no file."""
    student, adamw = updated(make_model())
    full = SafetensorError("I/O error: No space left on device")
    monkeypatch.setattr("gist_train.training.checkpoint.save_checkpoint", mock.Mock(side_effect=full))
    with (
        pytest.raises(OSError, match=r"step-0+4: I/O error: No space left .* to resume"),
        writer_of(tmp_path, student, adamw) as writer,
    ):
        writer.save(AT_4, before=nothing, after=nothing)


def raises_beside(run, student, adamw, error, before):
    """What the loop raises while a checkpoint is written comes through."""

    def go_on():
        with writer_of(run, student, adamw) as writer:
            writer.save(AT_4, before=before, after=nothing)
            raise error

    with pytest.raises(type(error)) as raised:
        go_on()
    assert raised.value is error


def test_an_exception_lets_the_one_under_way_end(make_model, tmp_path):
    """Loss that is no number any more, or a second Ctrl-C: the last good checkpoint is worth the second that it takes."""
    student, adamw = updated(make_model())
    for error in (NonFiniteError("loss nan"), KeyboardInterrupt()):
        run = tmp_path / type(error).__name__
        raises_beside(run, student, adamw, error, lambda: time.sleep(0.2))
        verified_manifest(Run(run).checkpoint(4))


def test_rows_come_before_their_checkpoint_and_retention_after(write_config, tmp_path):
    """A checkpoint that outlives its rows leaves a gap in the metrics; one that is retired before the next is whole may be the
    last. The loop takes steps 5 and 6 meanwhile, or it would wait for ever."""
    run, order = tmp_path / "runs" / "run", []
    sync, save, retire, add = RunLog.sync, checkpoints.save_checkpoint, checkpoints.retire_checkpoints, RunLog.add

    def synced(log):
        order.append("rows")
        sync(log)

    def saved(*args):
        order.append(f"checkpoint {args[3].step}")
        return save(*args)

    def retired(*args, **rules):
        order.append(f"retention beside {Run(run).saved_steps()}")
        return retire(*args, **rules)

    def added(log, record, *args):
        if record.step == 6:
            saving.let_go()
        return add(log, record, *args)

    with (
        held() as saving,
        mock.patch.object(RunLog, "sync", synced),
        mock.patch.object(RunLog, "add", added),
        mock.patch.object(checkpoints, "save_checkpoint", saved),
        mock.patch.object(checkpoints, "retire_checkpoints", retired),
    ):
        ended = gist("train", write_config(checkpoint={"every": 4, "keep_last": 1}))
    assert ended.code == 0, ended.err
    assert order == [
        *("rows", "checkpoint 4", "retention beside [4]"),
        *("rows", "checkpoint 8", "retention beside [4, 8]"),
        *("rows", "checkpoint 12", "retention beside [8, 12]"),
    ]
    assert Run(run).saved_steps() == [12]
    assert re.search(r"checkpoints: 3, \d+\.\d% of the time", ended.err)
    shares = [json.loads(line)["checkpoint_share"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    # Row 5 is the first after the copy of step 4; the loop has not stood still for any other before step 8.
    assert [step for step, share in enumerate(shares, 1) if share > 0] == [5, 9]
    assert all(0 <= share < 1 for share in shares)


def test_a_step_is_judged_when_its_checkpoint_is_whole(write_config, write_pairs, tmp_path, triplets):
    """A figure of a step without a checkpoint can't be selected."""
    run, found, evaluate = tmp_path / "runs" / "run", [], measuring.measure

    def evaluated(*args):
        found.append(Run(run).saved_steps())
        return evaluate(*args)

    sections = {**write_pairs([row["anchor"] for row in triplets[:8]]), "every": 6}
    slow = mock.patch.object(RunLog, "sync", side_effect=lambda: time.sleep(0.2))
    with slow, mock.patch.object(measuring, "measure", evaluated):
        assert gist("train", write_config(evaluation=sections, checkpoint={"every": 5, "keep_last": 10})).code == 0
    assert found == [[], [5, 6], [5, 6, 10, 12]]


def test_a_full_disk_stops_the_run_at_once(write_config, tmp_path):
    """Told at the next checkpoint alone, hours of steps would be lost to a disk that nobody looks at."""
    run, add = tmp_path / "runs" / "run", RunLog.add
    path = write_config(training={"batch_size": 8, "max_steps": 90, "precision": "float32"}, checkpoint={"every": 40})
    with held(step=40, error=OSError("no space left on device")) as saving:

        def added(log, record, *args):
            if record.step == 42:
                saving.let_go()
                while any((run / "checkpoints").iterdir()):
                    time.sleep(0.01)
            return add(log, record, *args)

        with mock.patch.object(RunLog, "add", added):
            ended = gist("train", path)
    assert ended.code == 1
    assert "no space left on device" in ended.err
    assert "Traceback" not in ended.err
    assert Run(run).saved_steps() == []
    assert 42 <= metrics(run)[-1]["step"] < 80
    assert list((run / "checkpoints").iterdir()) == []


def full_disk(path):
    """Trains until the first process can't write the checkpoint of step 4, which it learns at 6; returns what each is told."""
    add = RunLog.add
    with held(error=OSError("no space left on device")) as saving:

        def added(log, record, *args):
            if record.step == 6:
                saving.let_go()
            return add(log, record, *args)

        with mock.patch.object(RunLog, "add", added):
            try:
                train(load_config(path), resume="auto", timeout=60, console=QUIET)
            except (OSError, RankFailedError) as error:
                return str(error)
    return None


def test_no_rank_waits_for_the_write_and_all_hear_of_its_error(write_config, tmp_path):
    """Ranks that wait stand still for every checkpoint, and those that never hear of the error wait in a collective for ever.
    The checkpoint is stuck until both have taken two steps more."""
    found = in_processes(2, full_disk, write_config(training={"batch_size": 8, "max_steps": 12, "precision": "float32"}))
    first, second = [told for _, told in found]
    assert "no space left on device" in first
    assert second.startswith("rank 0 (host ")
    assert second.endswith(first)
    assert Run(tmp_path / "runs" / "run").saved_steps() == []
