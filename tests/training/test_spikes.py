"""Updates that are left out for the size of their gradient: which, what becomes of the others, and what is told."""

import json
import math

import numpy as np
import pytest
import torch
from support.running import assert_same_run, gist, training_of
from torch import nn

from gist_train.config.loading import load_config
from gist_train.config.training import SpikesConfig
from gist_train.training.loop import steps
from gist_train.training.update import RECENT, Spikes, UpdateState, update

CPU = torch.device("cpu")


def expected_spikes(norms, factor, at_most):
    """The obvious way: a list of norms, and the lower of their two medians."""
    before, spikes = [], []
    for norm in norms:
        median = sorted(before)[(len(before) - 1) // 2] if len(before) >= 20 else math.inf
        spikes.append(math.isfinite(norm) and norm > factor * median and sum(spikes) < at_most)
        before = [*before, norm][-RECENT:] if math.isfinite(norm) else before
    return spikes


@pytest.mark.parametrize("at_most", [1, 5, 1000])
@pytest.mark.parametrize("seed", range(3))
def test_spikes_are_those_of_the_obvious_way(seed, at_most):
    """400 norms, some of them ten times the others and some not finite; from the 200th on all are large, which is no spike."""
    draw = np.random.default_rng(seed)
    norms = np.exp(draw.normal(0, 0.3, 400)) * np.where(draw.random(400) < 0.06, 12, 1)
    norms[200:] *= 30
    norms[draw.random(400) < 0.03] = math.inf
    norms = norms.astype(np.float32)
    spikes = Spikes.first(SpikesConfig(factor=4.0, at_most=at_most), CPU)
    found = [bool(spikes.take(torch.tensor(norm))) for norm in norms]
    expected = expected_spikes(norms.tolist(), 4.0, at_most)
    assert found == expected
    assert spikes.skipped.item() == sum(expected)
    assert not any(found[:20])
    assert not any(found[280:]) or at_most > 5
    assert sum(found) >= min(at_most, 20)


def test_the_other_updates_are_as_if_there_had_been_no_spike():
    """AdamW's count of steps too: its bias correction depends on it."""

    def trained(leaving_out):
        torch.manual_seed(0)
        model = nn.Linear(4, 3)
        adamw = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
        state = UpdateState(spikes=Spikes.first(SpikesConfig(), CPU))
        left_out = []
        for step, x in enumerate(torch.randn(30, 5, 4)):
            if leaving_out and step == 25:
                continue
            (model(x).square().sum() * (1000 if step == 25 else 1)).backward()
            norm, spike = update(adamw, list(model.parameters()), torch.zeros(()), torch.zeros(()), limit=None, state=state)
            left_out.append(spike.item())
            assert norm.item() > 1000 or step != 25
        return model.weight.detach(), left_out, {entry["step"].item() for entry in adamw.state.values()}

    (weights, left_out, count), (expected, none, same_count) = trained(False), trained(True)
    assert torch.equal(weights, expected)
    assert [step for step, spike in enumerate(left_out) if spike] == [25]
    assert not any(none)
    assert count == same_count == {29.0}


@pytest.fixture
def spiky(write_config):
    """Writes a run whose gradients vary more than is allowed."""

    def write(name, **training):
        given = {"batch_size": 8, "max_steps": 60, "precision": "float32", "skip_spikes": {"factor": 1.3, "at_most": 6}}
        return write_config(name, training=given | training, checkpoint={"every": 10, "keep_last": 10})

    return write


@pytest.mark.usefixtures("on_cpu")
def test_a_run_counts_tells_and_resumes_them(spiky, tmp_path):
    """Cut after the third spike, the run ends in the bytes of the undisturbed one; so the norms before the cut are known."""
    ended = gist("train", spiky("whole"))
    assert ended.code == 0, ended.err
    rows = [json.loads(line) for line in (tmp_path / "runs" / "whole" / "metrics.jsonl").read_text().splitlines()]
    counts = [row["skipped_spikes"] for row in rows]
    assert counts[-1] == 6
    assert counts == sorted(counts)
    told = [line for line in ended.err.splitlines() if "the update is left out" in line]
    assert len(told) == 6
    first = counts.index(1) + 1
    assert told[0].startswith(f"step {first}: a gradient of norm ")
    assert told[0].endswith("over 1.3 times the median of the last steps: the update is left out, 1 of at most 6")
    assert told[-1].endswith("; from here on all are taken")
    assert "updates left out for the size of their gradient: 6 (training.skip_spikes)" in ended.err
    cut = counts.index(3) + 1
    assert gist("train", spiky("cut", stop_at_step=cut)).code == 0
    ended = gist("train", spiky("cut"))
    assert ended.code == 0, ended.err
    assert_same_run(tmp_path / "runs" / "cut", tmp_path / "runs" / "whole", 60)


@pytest.mark.usefixtures("on_cpu")
def test_it_is_off_unless_asked_for_and_no_resume_changes_it(spiky, tmp_path):
    """Rows of other runs have no column for it. What was trained without can't be gone on with otherwise."""
    assert gist("train", spiky("run", skip_spikes=None, stop_at_step=10)).code == 0
    assert "skipped_spikes" not in (tmp_path / "runs" / "run" / "metrics.jsonl").read_text()
    ended = gist("train", spiky("run", stop_at_step=20))
    assert ended.code == 2
    assert "training.skip_spikes" in ended.err


@pytest.mark.usefixtures("on_cpu")
def test_a_spike_in_a_step_leaves_the_weights_alone(spiky):
    """In the loop: a gradient made a thousand times larger at one step, by a hook."""
    training, student, _ = training_of(load_config(spiky("hooked", skip_spikes={"factor": 50})))
    assert training.state.spikes.factor == 50
    weight = student.encoder.transformer.encoder.layer[0].output.dense.weight
    running = steps(training, 0, 30)
    for _ in range(24):
        next(running)
    before = weight.detach().clone()
    hook = weight.register_hook(lambda gradient: gradient * 1e6)
    record = next(running)
    hook.remove()
    assert record.metric("spike") == 1
    assert torch.equal(weight, before)
    assert next(running).metric("spike") == 0
    assert not torch.equal(weight, before)
    assert record.metric("skipped_spikes") == 1
