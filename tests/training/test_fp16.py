"""fp16, in torch's own autocast on the CPU: the loop with a loss scale. A GPU adds accelerate's autocast around the model."""

from dataclasses import replace

import pytest
import torch
from support.running import gist, losses, training_of
from torch import nn

from gist_train.config.loading import load_config
from gist_train.run_folder import Run
from gist_train.training.checkpoint import Facts, LogSums, load_checkpoint, moments_of, save_checkpoint
from gist_train.training.loop import steps
from gist_train.training.update import LossScale, UpdateState

pytestmark = pytest.mark.usefixtures("on_cpu")
CPU = torch.device("cpu")


class Half(nn.Sequential):
    """A model under autocast, as accelerate makes one."""

    def forward(self, input):
        with torch.autocast("cpu", dtype=torch.float16):
            return super().forward(input).float()


def in_half(training):
    return replace(training, model=Half(*training.model), state=UpdateState(LossScale.first(CPU)))


@pytest.fixture
def config(write_config, make_model):
    path = write_config(
        model={"name": str(make_model()), "dropout": 0.1},
        training={"batch_size": 8, "max_steps": 6, "precision": "float32"},
        optimizer={"lr": 1e-3, "eps": 1e-3},
        loss={"temperature": 0.05},
    )
    return load_config(path)


def test_it_trains_as_float32_does(config):
    """A gradient that was not divided by the scale is 65,536 times too large, and clipping hides it."""
    whole, half = training_of(config)[0], in_half(training_of(config)[0])
    expected, found = list(steps(whole, 0, 4)), list(steps(half, 0, 4))
    assert losses(found, half.corpus) == pytest.approx(losses(expected, whole.corpus), rel=0.02)
    assert losses(found, half.corpus) != losses(expected, whole.corpus)
    assert [record.grad_norm for record in found] == pytest.approx([record.grad_norm for record in expected], rel=0.05)
    assert {record.loss_scale for record in found} == {2.0**16}
    assert {record.loss_scale for record in expected} == {None}


def test_a_run_that_is_cut_after_an_overflow_is_the_whole_one(config, tmp_path):
    """A scale that starts anew, or an AdamW that counts the skipped update, makes other weights of a resumed run."""

    def first_steps():
        training, student, adamw = training_of(config)
        training = in_half(training)
        running = steps(training, 0, 6)
        weight = student.encoder.transformer.encoder.layer[0].output.dense.weight
        hook = weight.register_hook(lambda gradient: gradient * torch.inf)
        next(running)
        hook.remove()
        next(running)
        return training, student, adamw, running

    training, student, adamw, running = first_steps()
    moments = moments_of(student, adamw, training.state)
    facts = Facts("0" * 64, {}, "c0ffee", None, "fp16", ("tokenizer", "mean", True), 1)
    folder = save_checkpoint(Run(tmp_path), student, moments, LogSums(2), facts)
    expected = list(running)
    assert [expected[0].loss_scale, training.state.loss_scale.skipped.item()] == [2.0**15, 1.0]

    again, other, other_adamw = training_of(config)
    again = in_half(again)
    load_checkpoint(folder, other, other_adamw, again.state)
    assert [value.item() for value in again.state.loss_scale.parts().values()] == [2.0**15, 1.0, 1.0]
    assert {state["step"].item() for state in other_adamw.state.values()} == {1.0}
    found = list(steps(again, 2, 6))
    assert losses(found, again.corpus) == losses(expected, training.corpus)
    for (name, a), b in zip(student.encoder.named_parameters(), other.encoder.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_it_is_refused_on_a_cpu(write_config, make_model):
    """Autocast in fp16 on a CPU is slower than float32: better told than found out. A plan for another machine may be made."""
    path = write_config("half", model={"name": str(make_model())}, training={"max_steps": 2, "precision": "fp16"})
    ended = gist("train", path)
    assert ended.code == 2
    assert "training.precision\n  found     fp16, on cpu\n" in ended.err
    assert gist("plan", path).code == 0
