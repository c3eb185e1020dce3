"""A run that was cut in two is the run that was not: bit for bit, on one machine and with one thread."""

import json
import os
import random
import shutil
import signal
import socket
import time
from threading import Event
from unittest import mock

import pytest
from huggingface_hub import metadata_load
from support.running import PATIENCE, QUIET, assert_same_run, copied, exit_code_of, gist, metrics, tensors

from gist_train.config.errors import UserError
from gist_train.config.loading import load_config
from gist_train.data.leases import held
from gist_train.data.manifests import _own_hash, seal, verified_manifest
from gist_train.run_folder import MANIFEST, Run
from gist_train.training import checkpoint as checkpoints
from gist_train.training.runlog import RunLog
from gist_train.training_run import train

pytestmark = pytest.mark.usefixtures("on_cpu")


def killed(path, moment, step, found=None, resume="auto"):
    """Trains until `kill -9` at a moment of `step`: after its row of metrics (once the thread has written the checkpoint of step
    `found`), in the middle of its checkpoint, after it, or while the thread is stuck in the middle of the last one."""
    run = Run.of(load_config(path)).folder

    def kill(*_):
        ends = time.monotonic() + PATIENCE / 2
        while moment == "after its row" and found is not None and found not in Run(run).saved_steps() and time.monotonic() < ends:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)

    def then_kill(function, of_step):
        def call(*args, **options):
            result = function(*args, **options)
            if of_step(*args) == step:
                kill()
            return result

        return call

    def step_of_folder(_, path):
        return int(path.parent.name.removeprefix(".step-").removesuffix(".partial"))

    def stick(moments, path, save=checkpoints.save_file):
        if step_of_folder(moments, path) == 8:
            Event().wait()
        save(moments, path)

    if moment == "beside a checkpoint":
        moment = "after its row"
        mock.patch.object(checkpoints, "save_file", stick).start()  # this process has no later
    patches = {
        "after its row": (RunLog, "add", then_kill(RunLog.add, lambda _, record, *__: record.step)),
        "in its checkpoint": (
            checkpoints,
            "save_file",
            then_kill(checkpoints.save_file, step_of_folder),
        ),
        "after its checkpoint": (
            checkpoints,
            "save_checkpoint",
            then_kill(checkpoints.save_checkpoint, lambda *args: args[3].step),
        ),
    }
    with mock.patch.object(*patches[moment]):
        train(load_config(path), resume=resume, timeout=None, console=QUIET)


# The moment of the kill, its step, and the checkpoint that the next run finds.
MOMENTS = [
    ("after its row", 3, None),
    ("after its row", 6, 4),
    ("in its checkpoint", 8, 4),
    ("after its checkpoint", 8, 8),
    ("after its row", 11, 8),
    ("beside a checkpoint", 10, 4),
]


@pytest.mark.parametrize(("log_every", "moments"), [(1, MOMENTS[1:3]), pytest.param(3, MOMENTS, marks=pytest.mark.slow)])
def test_kill_minus_9_changes_nothing(write_config, tmp_path, log_every, moments):
    """Every weight, moment and row of metrics, dropout on: a loss_mean that forgets the steps before the checkpoint, a row that
    is written twice or a dropout seed that is drawn would show in the first digit. All runs share one cache and one text."""
    sections = {"tracking": {"log_every": log_every}, "cache_dir": str(tmp_path / "cache")}
    whole = tmp_path / "runs" / "whole"
    assert gist("train", write_config("whole", **sections)).code == 0
    assert [row["step"] for row in metrics(whole)] == list(range(log_every, 13, log_every))
    for index, (moment, step, found) in enumerate(moments):
        path = write_config(f"cut{index}", **sections)
        run = tmp_path / "runs" / f"cut{index}"
        assert exit_code_of(killed, path, moment, step, found) == -signal.SIGKILL, moment
        assert (Run(run).saved_steps() or [None])[-1] == found, moment
        ended = gist("train", path)
        assert ended.code == 0, ended.err
        assert ("resuming from step" in ended.err) == (found is not None)
        assert Run(run).saved_steps() == [4, 8, 12]
        assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
            f"step-{step:09d}" for step in (4, 8, 12)
        ]  # nothing half made
        assert_same_run(run, whole, 12)


def trained(path):
    """`gist-train train PATH`, whose words are for nobody."""
    return gist("train", path).code


PIPELINE = {"tracking": {"log_every": 3}}
WRITING = {"tracking": {"log_every": 1}, "guide": None, "checkpoint": {"every": 1, "keep_last": 3}}


@pytest.mark.slow
@pytest.mark.parametrize(("kills", "sections"), [(200, WRITING), (20, PIPELINE)], ids=["while it writes", "whole pipelines"])
def test_kills_at_random_moments_change_nothing(write_config, tmp_path, kills, sections):
    """A run is killed until it gets to its end, and then the next one: of a pipeline, corpus, tokens and store are made anew."""
    whole, draw, killed_so_far, ended = tmp_path / "runs" / "whole", random.Random(), 0, 0
    for name in ("whole", "timed"):  # the first process of all takes longer
        began = time.monotonic()
        assert exit_code_of(trained, write_config(name, **sections, cache_dir=str(tmp_path / name))) == 0
        seconds = time.monotonic() - began
    while killed_so_far < kills:
        cache = tmp_path / (f"cache{ended}" if sections is PIPELINE else "cache")
        path = write_config(f"cut{ended}", **sections, cache_dir=str(cache))
        while (code := exit_code_of(trained, path, within=draw.uniform(0, seconds))) is None:
            killed_so_far += 1
        assert code == 0
        assert_same_run(tmp_path / "runs" / f"cut{ended}", whole, 12)
        ended += 1


@pytest.fixture
def begun(write_config, tmp_path):
    """A function that writes the config of a run with checkpoints at 4 and 8, stopped at 8; and that run's folder."""
    first = write_config(training={"batch_size": 8, "max_steps": 12, "precision": "float32", "stop_at_step": 8})
    assert gist("train", first).code == 0
    run = tmp_path / "runs" / "run"
    assert Run(run).saved_steps() == [4, 8]

    def again(**sections):
        return write_config(**{"training": {"batch_size": 8, "max_steps": 12, "precision": "float32"}, **sections})

    return again, run


def test_stop_at_step_leaves_the_schedule_alone(begun, write_config, tmp_path):
    """The learning rate at a step must not know where the run will be stopped: step 102,000 of 4.5 million is in warm-up."""
    again, run = begun
    assert gist("train", write_config("whole")).code == 0
    whole = tmp_path / "runs" / "whole"
    assert metrics(run) == metrics(whole)[:8]
    ended = gist("train", again())
    assert ended.code == 0
    assert "12 steps of 8 rows, resuming from step 8" in ended.err
    assert_same_run(run, whole, 12)
    ended = gist("train", again(), "--set", "training.stop_at_step=9")
    assert "resuming from step 12; training.stop_at_step 9 is behind: no step is left to take" in ended.err


def test_a_run_that_is_done_does_nothing(begun):
    """Started again by a scheduler or by mistake it must neither fail, nor train on, nor touch a file of the model."""
    again, run = begun
    assert gist("train", again()).code == 0
    before = {path: path.stat().st_mtime_ns for path in (run / "checkpoints").rglob("*") if path.is_file()}
    rows = metrics(run)
    ended = gist("train", again())
    assert ended.code == 0
    assert "done: step 12 of 12" in ended.err
    assert {path: path.stat().st_mtime_ns for path in (run / "checkpoints").rglob("*") if path.is_file()} == before
    assert metrics(run) == rows


CHANGES = {
    "training.seed": {"training": {"batch_size": 8, "max_steps": 12, "precision": "float32", "seed": 1}},
    "optimizer.lr": {"optimizer": {"lr": 2e-3}},
    "training.batch_size": {"training": {"batch_size": 4, "max_steps": 12, "precision": "float32"}},
    "training.max_steps": {"training": {"batch_size": 8, "max_steps": 13, "precision": "float32"}},
    "loss.temperature": {"loss": {"temperature": 0.02}},
    "loss.margin": {"loss": {"margin": 0.1}},
    "loss.dimensions": {"loss": {"dimensions": [32, 8]}},
    "data.batching": {"data": "mixed"},
    "guide": {"guide": None},
    "data.train": {"data": "content"},
}


@pytest.mark.parametrize("field", CHANGES)
def test_other_mathematics_is_refused(begun, tmp_path, field):
    """A run that goes on with another rate or other data is no run of either config, and nobody will ever know."""
    again, run = begun
    sections = dict(CHANGES[field])
    rows = tmp_path / "rows.jsonl"
    if sections.get("data") == "mixed":
        sections["data"] = {"train": [{"source": "jsonl", "path": str(rows)}], "batching": "mixed"}
    elif sections.get("data") == "content":
        del sections["data"]
        text = rows.read_text().replace('"task": "c"', '"task": "d"')
        assert text != rows.read_text()
        rows.write_text(text)
    before = metrics(run)
    ended = gist("train", again(**sections))
    assert ended.code == 2
    assert field in ended.err
    assert "fix" in ended.err
    assert Run(run).saved_steps() == [4, 8]
    assert metrics(run) == before


def test_a_run_from_before_a_field_goes_on(begun):
    """Its checkpoints say nothing of a switch that was not there: that is no change, unless the switch is turned now."""
    again, run = begun
    for step in (4, 8):
        folder = Run(run).checkpoint(step)
        manifest = verified_manifest(folder)
        assert manifest["mathematics"].pop("training.cuda_graph") is False
        (folder / MANIFEST).unlink()
        seal(folder, manifest)
    options = {"batch_size": 8, "max_steps": 12, "precision": "float32"}
    turned = gist("train", again(training={**options, "cuda_graph": True}))
    assert (turned.code, "training.cuda_graph" in turned.err) == (2, True)
    assert gist("train", again()).code == 0
    assert Run(run).saved_steps() == [4, 8, 12]


def test_all_changed_fields_are_named_at_once(begun):
    """One at a time, a user would start the run five times."""
    again, _ = begun
    path = again(
        training={"batch_size": 4, "max_steps": 12, "precision": "float32", "seed": 1, "grad_clip": 2.0},
        optimizer={"lr": 2e-3},
    )
    with pytest.raises(UserError) as raised:
        train(load_config(path), resume="auto", timeout=None, console=QUIET)
    named = {fault.where for fault in raised.value.faults}
    assert named == {"training.batch_size", "training.seed", "training.grad_clip", "optimizer.lr"}
    ended = gist("train", path)
    assert ended.code == 2
    assert all(name in ended.err for name in named)


def test_another_guide_of_the_same_name_is_refused(begun, make_model, tmp_path):
    """A guide folder whose weights were replaced masks other negatives under the same config."""
    again, run = begun
    guide = tmp_path / "guide"
    shutil.copytree(make_model(width=48, layers=1, cased=True, vocabulary=300, seed=2), guide)
    ended = gist("train", again(guide={"name": str(guide), "dtype": "float32"}))
    assert ended.code == 2
    assert "guide.name" in ended.err
    assert Run(run).saved_steps() == [4, 8]


def test_what_changes_no_number_may_change(begun, write_config, tmp_path):
    """Logging, retention, evaluation, speed and where files lie: who needs another row of metrics must not lose the run."""
    again, run = begun
    rows = tmp_path / "rows.jsonl"
    moved = tmp_path / "elsewhere" / "rows.jsonl"
    moved.parent.mkdir()
    shutil.copy(rows, moved)
    assert gist("train", write_config("whole")).code == 0
    path = again(
        tracking={"log_every": 2},
        checkpoint={"every": 3, "keep_last": 2},
        selection={"around": 4, "window": 0},
        loss={"block_size": 4},
        data={"train": [{"source": "jsonl", "path": str(moved)}]},
    )
    ended = gist("train", path)
    assert ended.code == 0, ended.err
    assert Run(run).saved_steps() == [4, 9, 12]  # 4 for the selection, the newest two
    assert [row["step"] for row in metrics(run)] == [*range(1, 9), 10, 12]
    ours, theirs = tensors(run, 12), tensors(tmp_path / "runs" / "whole", 12)
    assert max(float((ours[name] - theirs[name]).abs().max()) for name in theirs) < 1e-3  # blocks round otherwise
    last = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][-1]
    assert last["loss_mean"] != last["loss"]


def test_a_named_step_goes_back(begun, write_config, tmp_path):
    """--resume 4 trains steps 5 to 12 again. Killed under way and started anew it goes on from there, and not from the 8 of the
    first time, which would leave rows 7 and 8 out of the metrics."""
    again, run = begun
    assert gist("train", write_config("whole")).code == 0
    assert exit_code_of(killed, again(), "after its row", 6, 4, "4") == -signal.SIGKILL
    assert Run(run).saved_steps() == [4]
    (aside,) = (run / "checkpoints").glob("set-aside-*")
    assert [path.name for path in aside.iterdir()] == ["step-000000008"]
    ended = gist("train", again())
    assert ended.code == 0
    assert "resuming from step 4" in ended.err
    assert Run(run).saved_steps() == [4, 8, 12]
    assert_same_run(run, tmp_path / "runs" / "whole", 12)


def test_a_step_without_a_checkpoint_names_the_nearest(begun):
    """ "No such checkpoint" alone sends the user to `ls`."""
    again, _ = begun
    ended = gist("train", again(), "--resume", 7)
    assert ended.code == 2
    assert "step 7" in ended.err
    assert "4, 8" in ended.err
    ended = gist("train", again(), "--resume", "last")
    assert ended.code == 2
    assert "auto, never or a step" in ended.err


def test_resume_never_refuses_a_folder_with_a_run_in_it(begun, write_config):
    """Who asks for a fresh start must not go on by mistake, and must not lose the old run either."""
    again, run = begun
    ended = gist("train", again(), "--resume", "never")
    assert ended.code == 2
    assert "--resume never" in ended.err
    assert Run(run).saved_steps() == [4, 8]
    assert gist("train", write_config("fresh"), "--resume", "never", "--set", "training.max_steps=2").code == 0


def flipped(path):
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def nested(path):
    path.write_text("[" * 100_000)


DAMAGES = {
    "a flipped bit": lambda folder: flipped(folder / "training_state.safetensors"),
    "a manifest nested deep": lambda folder: nested(folder / "manifest.json"),
    "a cut manifest": lambda folder: (folder / "manifest.json").write_text('{"sha256": 3'),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "no manifest": lambda folder: (folder / "manifest.json").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_newest_whole_checkpoint_is_taken(begun, write_config, tmp_path, damage):
    """safetensors loads a flipped bit without a word; and nothing started until a person had moved the folder away."""
    again, run = begun
    spared = copied(run, "spared")
    DAMAGES[damage](Run(run).checkpoint(8))
    named = gist("train", again(), "--resume", "8")
    assert (named.code, "Traceback" in named.err) == (2, False)
    ended = gist("train", again())
    assert ended.code == 0, ended.err
    (line,) = [line for line in ended.err.splitlines() if line.startswith("passed over: ")]
    assert "step-000000008" in line
    assert "resuming from step 4" in ended.err
    assert gist("train", write_config("spared")).code == 0
    assert_same_run(run, tmp_path / "runs" / "spared", 12)
    assert spared.exists()
    (aside,) = (run / "checkpoints").glob("set-aside-*/step-000000008")  # nothing that was written is deleted
    assert any(aside.iterdir())


def test_a_whole_one_is_exported_and_evaluated(begun, write_pairs):
    """What reads the newest checkpoint takes the one before it, too; where none is whole it says so of each."""
    again, run = begun
    flipped(Run(run).checkpoint(8) / "model.safetensors")
    ended = gist("export", again())
    assert (ended.code, "passed over: checkpoint" in ended.err) == (0, True)
    assert metadata_load(run / "export" / "README.md")["gist_train"]["step"] == 4
    ended = gist("evaluate", again(evaluation=write_pairs(["one"])))
    assert (ended.code, "passed over: checkpoint" in ended.err) == (0, True)
    flipped(Run(run).checkpoint(4) / "model.safetensors")
    ended = gist("train", again())
    assert ended.code == 2
    assert ended.err.count("with another SHA-256") == 2


def test_a_checkpoint_does_not_know_what_came_before(begun, write_config, tmp_path):
    """tokenizer.json had the padding of whoever tokenised last: the same config gave other bytes with a warm cache."""
    _, run = begun
    for name in ("cold", "warm"):
        stopped = {"batch_size": 8, "max_steps": 12, "precision": "float32", "stop_at_step": 8}
        assert gist("train", write_config(name, cache_dir=str(tmp_path / "own"), training=stopped)).code == 0
    own, cold, warm = (Run(folder).checkpoint(8) for folder in (run, tmp_path / "runs" / "cold", tmp_path / "runs" / "warm"))
    files = sorted(str(path.relative_to(own)) for path in own.rglob("*") if path.is_file() and path.name != "manifest.json")
    assert "tokenizer.json" in files
    for name in files:
        assert (own / name).read_bytes() == (cold / name).read_bytes() == (warm / name).read_bytes(), name


def test_strays_in_the_folder_of_checkpoints_are_passed_over(begun):
    """A file, a link or an empty folder that is named like a checkpoint is none, and is out of the way of the one to come."""
    again, run = begun
    folder = run / "checkpoints"
    (folder / "step-000000099").mkdir()
    (folder / "step-000000012").write_text("a note")
    (folder / "step-000000010").symlink_to(folder / "step-000000004")
    assert Run(run).saved_steps() == [4, 8]
    ended = gist("train", again())
    assert ended.code == 0, ended.err
    assert ended.err.count("passed over: ") == 3
    assert Run(run).saved_steps()[-1] == 12
    assert (folder / "step-000000004" / "manifest.json").is_file()


def test_a_run_has_one_writer(write_config, tmp_path):
    """The command typed twice, or a restart beside an orphan: two writers would tear each other's checkpoints."""
    path = write_config()
    with held(tmp_path / "runs" / ".run.lock") as other:
        assert other is None
        ended = gist("train", path)
    assert ended.code == 2
    assert f"another training in it: process {os.getpid()} on {socket.gethostname()}, since 20" in ended.err
    assert not (tmp_path / "runs" / "run").exists()
    assert gist("train", path).code == 0


def test_another_tokenizer_under_the_same_name_is_refused(begun):
    """The checkpoint's weights were trained on other token ids; the config's fields alone would not show it."""
    again, run = begun
    manifest = Run(run).checkpoint(8) / "manifest.json"
    facts = json.loads(manifest.read_text())
    facts["student"][0] = "0" * 32
    facts["sha256"] = _own_hash(facts)
    manifest.write_text(json.dumps(facts))
    ended = gist("train", again())
    assert ended.code == 2
    assert "model.name" in ended.err
