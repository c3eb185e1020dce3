"""Checkpoints: whole or not there, opened by sentence-transformers, without pickle, and never deleted too early."""

import json
import shutil

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from support.running import QUIET, gist, metrics

from gist_train.config.errors import UserError
from gist_train.config.models import ModelConfig
from gist_train.config.schema import OptimizerConfig
from gist_train.data import manifests
from gist_train.data.manifests import verified_manifest
from gist_train.model.loading import load_finished, load_student
from gist_train.run_folder import Run
from gist_train.training import checkpoint as checkpoints
from gist_train.training.checkpoint import (
    Facts,
    LogSums,
    checkpoint_to_resume,
    load_checkpoint,
    moments_of,
    retire_checkpoints,
    save_checkpoint,
    set_aside_later,
    sweep,
)
from gist_train.training.setup import _optimizer
from gist_train.training.update import UpdateState

pytestmark = pytest.mark.usefixtures("on_cpu")

FACTS = Facts("0" * 64, {"training.seed": 42}, "c0ffee", None, "float32", ("tokenizer", "mean", True), 1)
FILES = 9
"""In a checkpoint of the tiny model, manifest and training state included: fewer would mean that the tests looked at nothing."""


def updated(model, seed=0, steps=2, **config):
    """A student after some updates with random gradients, and its optimizer."""
    student = load_student(ModelConfig(name=str(model), **config))
    adamw = _optimizer(student, OptimizerConfig(lr=1e-2))
    draws = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for parameter in (p for group in adamw.param_groups for p in group["params"]):
            parameter.grad = torch.randn(parameter.shape, generator=draws)
        adamw.step()
    return student, adamw


def saved(run, model, step=4, seed=0, **config):
    student, adamw = updated(model, seed, **config)
    folder = save_checkpoint(Run(run), student, moments_of(student, adamw, UpdateState()), LogSums(step, 1.5, 3, 100, 120), FACTS)
    return folder, student, adamw


@pytest.mark.parametrize(
    ("model", "config"),
    [
        ({"pooling": "mean"}, {}),
        ({"pooling": "cls", "normalize": False}, {"max_length": 12}),
        ({"pooling": "mean"}, {"pooling": "cls", "layers": [1]}),
        ({"family": "xlm-roberta"}, {}),
    ],
)
def test_a_checkpoint_is_a_model(make_model, quickstart_texts, tmp_path, model, config):
    """Everybody opens it with sentence-transformers: pooling, kept layers and length of the training must be in the folder."""
    folder, student, _ = saved(tmp_path, make_model(**model), **config)
    texts = [*quickstart_texts[:40], " ".join(quickstart_texts[:8])]
    ours = student.encode(texts)
    theirs = SentenceTransformer(str(folder), device="cpu").encode(texts)
    assert np.abs(ours - theirs).max() < 1e-6 * max(1.0, float(np.abs(ours).max()))
    assert np.abs(load_finished(str(folder)).encode(texts) - ours).max() < 1e-6 * max(1.0, float(np.abs(ours).max()))
    base = SentenceTransformer(str(make_model(**model)), device="cpu").encode(texts)
    assert np.abs(base - ours).max() > 1e-2


def test_nothing_is_pickled(make_model, tmp_path):
    """A checkpoint that is unpickled runs whatever code its sender put in."""
    folder, _, _ = saved(tmp_path, make_model())
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) >= FILES
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".txt"}


def test_moments_and_step_count_come_back_bit_for_bit(make_model, tmp_path):
    """Moments that are lost warm up anew; a step count that is lost corrects a bias that is not there any more."""
    folder, student, adamw = saved(tmp_path, make_model(), step=2)
    manifest = verified_manifest(folder)
    assert (manifest["step"], manifest["loss_sum"], manifest["loss_steps"]) == (2, 1.5, 3)
    assert manifest["corpus"] == "c0ffee"
    other, fresh = updated(make_model(), seed=1, steps=0)
    load_checkpoint(folder, other, fresh, UpdateState())
    ours, theirs = (dict(s.encoder.transformer.named_parameters()) for s in (other, student))
    assert len(ours) == 39
    for name, parameter in ours.items():
        assert torch.equal(parameter, theirs[name]), name
        if parameter.requires_grad:
            expected, found = adamw.state[theirs[name]], fresh.state[parameter]
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[key], expected[key]) for key in expected), name
    for optimizer, model in ((adamw, student), (fresh, other)):
        for parameter in (p for p in model.encoder.parameters() if p.requires_grad):
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    assert all(torch.equal(p, theirs[name]) for name, p in ours.items())


def test_another_models_checkpoint_is_refused(make_model, tmp_path):
    """A student of other layers would be half loaded."""
    folder, _, _ = saved(tmp_path, make_model())
    other, adamw = updated(make_model(), layers=[0])
    with pytest.raises(UserError, match="weights of another shape"):
        load_checkpoint(folder, other, adamw, UpdateState())


def files_in(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def zero_tail(path):
    path.write_bytes(path.read_bytes()[:-1] + (b"\0" if path.read_bytes()[-1:] != b"\0" else b"\1"))


DAMAGES = {
    "a flipped bit": flip,
    "a zeroed tail": zero_tail,
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-2]),
    "empty": lambda path: path.write_bytes(b""),
    "a byte more": lambda path: path.write_bytes(path.read_bytes() + b" "),
    "missing": lambda path: path.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_any_damage_to_any_file_is_found(make_model, tmp_path, damage):
    """safetensors loads a flipped bit and a zeroed tail without a word, and a run would go on from there."""
    folder, _, _ = saved(tmp_path, make_model())
    names = files_in(folder)
    assert len(names) >= FILES
    assert {"manifest.json", "model.safetensors", "training_state.safetensors", "modules.json"} <= set(names)
    if damage == "a byte more":
        names.remove("manifest.json")  # white space behind JSON says nothing
    for name in names:
        copy = tmp_path / "copy"
        shutil.copytree(folder, copy)
        assert verified_manifest(copy)["step"] == 4
        DAMAGES[damage](copy / name)
        with pytest.raises(UserError) as raised:
            verified_manifest(copy)
        message = str(raised.value)
        assert str(copy) in message
        assert name in message
        assert "the newest whole checkpoint is taken" in message
        shutil.rmtree(copy)


def test_an_altered_manifest_is_found(make_model, tmp_path):
    """A step or a config hash that was edited would pass for the real one."""
    folder, _, _ = saved(tmp_path, make_model())
    manifest = json.loads((folder / "manifest.json").read_text())
    for change in ({"step": 5}, {"loss_sum": 0.0}, {"mathematics": {"training.seed": 43}}, {"files": {}}):
        (folder / "manifest.json").write_text(json.dumps({**manifest, **change}))
        with pytest.raises(UserError, match=r"manifest\.json that was altered"):
            verified_manifest(folder)
    (folder / "manifest.json").write_text("[]")
    with pytest.raises(UserError, match="can't be read"):
        verified_manifest(folder)


@pytest.mark.parametrize(("module", "broken"), [(checkpoints, "save_file"), (manifests, "write_json")])
def test_a_save_that_fails_leaves_the_older_ones(make_model, tmp_path, monkeypatch, module, broken):
    """A full disk in the middle of a save: what was whole stays, and nothing half made looks like a checkpoint."""
    folder, _, _ = saved(tmp_path, make_model(), step=4)

    def fail(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(module, broken, fail)
    student, adamw = updated(make_model(), seed=1)
    with pytest.raises(OSError, match="no space left"):
        save_checkpoint(Run(tmp_path), student, moments_of(student, adamw, UpdateState()), LogSums(8), FACTS)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [folder.name]
    assert Run(tmp_path).saved_steps() == [4]
    assert verified_manifest(folder)["loss_sum"] == 1.5
    assert checkpoint_to_resume(Run(tmp_path), None, QUIET).folder == folder


def test_what_a_killed_process_left_is_swept_away(make_model, tmp_path):
    """A save or a retention that was killed leaves gigabytes that no later step touches."""
    folder, _, _ = saved(tmp_path, make_model(), step=4)
    for name in (".step-000000005.partial", ".step-000000003.going"):
        shutil.copytree(folder, folder.with_name(name))
    sweep(Run(tmp_path))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [folder.name]


def test_a_checkpoint_of_another_format_is_refused(make_model, tmp_path):
    """An old reader would meet a KeyError, or read a field that means something else."""
    folder, _, _ = saved(tmp_path, make_model())
    manifest = json.loads((folder / "manifest.json").read_text())
    other = {**manifest, "format": 99}
    (folder / "manifest.json").write_text(json.dumps({**other, "sha256": manifests._own_hash(other)}))
    with pytest.raises(UserError, match="format 99"):
        verified_manifest(folder)


def test_going_back_sets_the_later_ones_aside(make_model, tmp_path):
    """Left in place, they would be taken for the newest of a run that has parted from them; deleted, hours would be lost."""
    for step in (4, 8, 12):
        saved(tmp_path, make_model(), step=step)
    aside = set_aside_later(Run(tmp_path), 4)
    assert Run(tmp_path).saved_steps() == [4]
    assert sorted(path.name for path in aside.iterdir()) == ["step-000000008", "step-000000012"]
    verified_manifest(aside / "step-000000012")
    assert set_aside_later(Run(tmp_path), 4) is None


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "kept", "stay"),
    [
        (1, None, [], [60]),
        (3, None, [], [40, 50, 60]),
        (1, 20, [], [20, 40, 60]),
        (2, 30, [10], [10, 30, 50, 60]),
        (1, None, [20, 30, 40], [20, 30, 40, 60]),
        (9, None, [], [10, 20, 30, 40, 50, 60]),
    ],
)
def test_retention_keeps_what_the_config_names(tmp_path, keep_last, keep_every, kept, stay):
    """The newest, every n-th, the window and what was selected: a checkpoint that is deleted can't be had again."""
    steps = [10, 20, 30, 40, 50, 60]
    for step in steps:
        Run(tmp_path).checkpoint(step).mkdir(parents=True)
        (Run(tmp_path).checkpoint(step) / "manifest.json").write_text("{}")
    (tmp_path / "checkpoints" / ".step-000000070.partial").mkdir()
    (tmp_path / "checkpoints" / "step-notes").mkdir()
    retired = retire_checkpoints(Run(tmp_path), keep_last=keep_last, keep_every=keep_every, kept=lambda step: step in kept)
    assert Run(tmp_path).saved_steps() == stay
    assert retired == [step for step in steps if step not in stay]
    assert (tmp_path / "checkpoints" / "step-notes").exists()


def test_a_run_keeps_newest_nth_window_and_selected(write_config, tmp_path):
    """The rules together, as `train` applies them after each save."""
    run = tmp_path / "runs" / "run"
    run.mkdir(parents=True)
    selected = {"step": 2, "steps": [2], "base_weight": 0.0, "checkpoint": "checkpoints/step-000000002"}
    selected |= {"name": "step 2", "rule": "step", "metric": None, "around": 2, "window": 0, "candidates": []}
    selected |= {"figures": {}, "base": {}, "evaluation": {}, "leakage": []}
    (run / "selected.json").write_text(json.dumps(selected))
    path = write_config(
        checkpoint={"every": 1, "keep_last": 2, "keep_every": 5},
        selection={"around": 8, "window": 1},
        training={"batch_size": 8, "max_steps": 12, "precision": "float32"},
    )
    assert gist("train", path).code == 0
    assert Run(run).saved_steps() == [2, 5, 7, 8, 9, 10, 11, 12]
    for step in Run(run).saved_steps():
        verified_manifest(Run(run).checkpoint(step))


def test_old_checkpoints_go_only_after_the_new_one_is_whole(write_config, tmp_path, monkeypatch):
    """Deleted first, a save that fails takes the last checkpoint with it (accelerate's total_limit does that)."""
    run = tmp_path / "runs" / "run"
    save = checkpoints.save_file

    def fail_at_step_8(moments, path):
        assert Run(run).saved_steps() == ([] if "000000004" in str(path) else [4])
        if "000000008" in str(path):
            raise OSError("no space left on device")
        save(moments, path)

    monkeypatch.setattr(checkpoints, "save_file", fail_at_step_8)
    path = write_config(checkpoint={"every": 4, "keep_last": 1})
    ended = gist("train", path)
    assert ended.code == 1
    assert "no space left on device" in ended.err
    assert Run(run).saved_steps() == [4]
    verified_manifest(Run(run).checkpoint(4))
    monkeypatch.setattr(checkpoints, "save_file", save)
    assert gist("train", path).code == 0
    assert Run(run).saved_steps() == [12]
    assert [row["step"] for row in metrics(run)] == list(range(1, 13))


def test_a_run_without_a_checkpoint_has_none_to_resume(tmp_path):
    """A fresh run starts at step 0; a named step that is not there is an error."""
    assert checkpoint_to_resume(Run(tmp_path), None, QUIET) is None
    with pytest.raises(UserError, match="the run has no checkpoint"):
        checkpoint_to_resume(Run(tmp_path), 5, QUIET)
