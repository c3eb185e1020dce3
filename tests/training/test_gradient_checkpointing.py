"""Gradient checkpointing: the same bits in less memory, or a message where a family of models can't."""

import json
import warnings
from dataclasses import replace

import pytest
import torch
from support.families import PACKED_FAMILIES, texts_of, transformer_of
from support.running import assert_same_run, gist, kept_at_once, training_of

from gist_train.config.loading import load_config
from gist_train.model.encoder import Encoder, pack
from gist_train.run_folder import Run
from gist_train.training.loop import steps

pytestmark = pytest.mark.usefixtures("on_cpu")


def gradients_of(config, limit):
    """Loss and the gradients that the first step applies."""
    training, student, adamw = training_of(config)
    found = {}
    adamw.register_step_pre_hook(
        lambda *_: found.update({name: p.grad.clone() for name, p in student.encoder.named_parameters() if p.grad is not None})
    )
    record = next(steps(replace(training, max_tokens_per_forward=limit), 0, 1))
    return record.loss, found


@pytest.mark.parametrize(
    ("family", "precision", "limit", "dropout"),
    [
        ("bert", "float32", None, 0.0),
        ("bert", "float32", None, 0.3),
        ("bert", "bf16", None, 0.3),
        ("bert", "bf16", 100, 0.3),
        ("bert", "float32", 100, 0.0),
        ("xlm-roberta", "float32", None, 0.3),
    ],
)
def test_gradients_are_those_of_the_plain_step(write_config, make_model, family, precision, limit, dropout):
    """A layer that is computed again under another dropout, or without its texts' lengths, gives a gradient of another model."""
    model = {"name": str(make_model(family, dropout=dropout))}
    training = {"batch_size": 8, "max_steps": 2, "precision": precision}
    of = [load_config(write_config(model=model, training={**training, "gradient_checkpointing": on})) for on in (True, False)]
    (loss, found), (expected_loss, expected) = (gradients_of(config, limit) for config in of)
    assert loss == expected_loss
    assert found.keys() == expected.keys()
    assert len(found) > 35
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []
    assert any(gradient.abs().max() > 1e-3 for gradient in found.values())


def test_a_layer_keeps_its_input_alone(write_config, make_model):
    """A switch that is heeded nowhere would change no number, and save no memory."""

    def peak(layers, on):
        model = {"name": str(make_model(layers=layers))}
        training = {"batch_size": 16, "max_steps": 2, "precision": "float32", "gradient_checkpointing": on}
        opened, student, _ = training_of(load_config(write_config(model=model, training=training, loss={"block_size": 4})))
        return kept_at_once(student.encoder, lambda: next(steps(opened, 0, 1)))

    plain, saving = (peak(4, on) - peak(2, on) for on in (False, True))
    assert 0 < saving < plain / 8


def test_a_run_may_switch_on_its_way(write_config, tmp_path):
    """The bits are the same, so that who runs out of memory goes on; and the model that is saved knows nothing of it."""
    sections = {"cache_dir": str(tmp_path / "cache"), "training": {"batch_size": 8, "max_steps": 8, "precision": "float32"}}
    assert gist("train", write_config("whole", **sections)).code == 0
    path = write_config("switched", **sections)
    assert gist("train", path, "--set", "training.stop_at_step=4").code == 0
    ended = gist("train", path, "--set", "training.gradient_checkpointing=true")
    assert ended.code == 0, ended.err
    assert "resuming from step 4" in ended.err
    switched, whole = tmp_path / "runs" / "switched", tmp_path / "runs" / "whole"
    assert_same_run(switched, whole, 8)
    ours, theirs = (json.loads((Run(run).checkpoint(8) / "config.json").read_text()) for run in (switched, whole))
    assert ours == theirs


@pytest.mark.parametrize("command", ["train", "plan"])
def test_a_family_that_can_not_is_told(write_config, make_model, tmp_path, command):
    """Told by the key to fix, before the guide is put to work; transformers' own ValueError names its class only."""
    path = write_config(model={"name": str(make_model("mpnet"))})
    ended = gist(command, path, "--set", "training.gradient_checkpointing=true")
    assert ended.code == 2
    assert "training.gradient_checkpointing" in ended.err
    assert "mpnet" in ended.err
    assert not (tmp_path / "runs" / "run").exists()
    assert not list((tmp_path / "runs").glob(".cache/guides/*"))


@pytest.mark.parametrize("family", [name for name in PACKED_FAMILIES if name != "mpnet"])
def test_every_packed_family_can(family):
    """Each family passes what attention must know of the borders through its layers in a way of its own: computed again without
    it, a layer would see the texts as one, or fail only on the family that nobody tried."""
    texts = pack(texts_of([3, 9, 9, 1, 14]))
    gradients = []
    for checkpointed in (False, True):
        encoder = Encoder(transformer_of(family, layers=3), pooling="mean", normalized=True).train()
        if checkpointed:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)
                encoder.transformer.gradient_checkpointing_enable({"use_reentrant": False})
        (encoder(texts) ** 3).sum().backward()
        gradients.append({name: p.grad for name, p in encoder.named_parameters() if p.grad is not None})
    plain, again = gradients
    assert plain.keys() == again.keys()
    assert len(plain) > 10
    assert [name for name in plain if not torch.equal(plain[name], again[name])] == []
