"""The update that does not wait for the device, against torch's own clipping, GradScaler and plain AdamW."""

import itertools
import math

import pytest
import torch
from torch import nn

from gist_train.training.update import CLEAN_STEPS, LossScale, UpdateState, update

CPU = torch.device("cpu")


def model_and_adamw(fused):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1, fused=fused, foreach=False)


def batches(count):
    draw = torch.Generator().manual_seed(1)
    return [torch.randn(4, 6, generator=draw) for _ in range(count)]


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("limit", [None, 0.05, 1e6])
def test_it_is_clipping_and_a_step(limit):
    """A gradient that is divided where it should be multiplied, or clipped by the square of its norm, still trains."""
    (ours, adamw), (twin, plain) = model_and_adamw(True), model_and_adamw(False)
    for x in batches(5):
        loss = ours(x).square().sum()
        loss.backward()
        norm, _ = update(adamw, list(ours.parameters()), loss.detach(), torch.zeros(()), limit=limit, state=UpdateState())
        twin(x).square().sum().backward()
        expected = nn.utils.clip_grad_norm_(twin.parameters(), math.inf if limit is None else limit)
        plain.step()
        plain.zero_grad()
        assert norm.item() == pytest.approx(expected.item(), rel=1e-6)
        assert all(p.grad is None for p in ours.parameters())
        for a, b in zip(weights(ours), weights(twin), strict=True):
            assert torch.allclose(a, b, rtol=0, atol=1e-6)


def test_an_overflow_under_fp16_is_skipped_as_gradscaler_does():
    """Four steps of which the second overflows: weights, scale and AdamW's own count of steps are those of torch's GradScaler."""
    (ours, adamw), (twin, plain) = model_and_adamw(True), model_and_adamw(True)
    scale, scaler = LossScale.first(CPU), torch.amp.GradScaler("cpu", init_scale=2.0**16)
    frozen = torch.zeros(())
    for step, x in enumerate(batches(4)):
        for model in (ours, twin):
            loss = model(x).square().sum()
            (loss * scale.value if model is ours else scaler.scale(loss)).backward()
            if step == 1:
                model[0].weight.grad[0, 0] = math.inf
        norm, _ = update(adamw, list(ours.parameters()), loss.detach(), frozen, limit=0.05, state=UpdateState(scale))
        scaler.unscale_(plain)
        expected = nn.utils.clip_grad_norm_(twin.parameters(), 0.05)
        scaler.step(plain)
        scaler.update()
        plain.zero_grad()
        assert norm.item() == pytest.approx(expected.item(), rel=1e-6)
        assert scale.value.item() == scaler.get_scale() == (2.0**16 if step == 0 else 2.0**15)
        assert scale.skipped.item() == (step >= 1)
        for a, b in zip(weights(ours), weights(twin), strict=True):
            assert torch.allclose(a, b, rtol=0, atol=1e-6)
    assert frozen.item() == 0
    assert {state["step"].item() for state in adamw.state.values()} == {3.0}


def test_the_scale_rises_after_many_clean_steps():
    """Once halved and never raised again, small gradients would vanish for the rest of the run."""
    scale = LossScale.first(CPU)
    for _ in range(int(CLEAN_STEPS) - 1):
        scale.take(torch.tensor(0.0))
    assert (scale.value.item(), scale.clean.item()) == (2.0**16, CLEAN_STEPS - 1)
    scale.take(torch.tensor(0.0))
    assert (scale.value.item(), scale.clean.item()) == (2.0**17, 0.0)


@pytest.mark.parametrize("spoilt", ["loss", "gradient", "every gradient"])
@pytest.mark.parametrize("scaled", [False, True])
def test_it_freezes(spoilt, scaled):
    """From a value on that is not finite nothing changes; with a loss scale a gradient that overflows is no such value, unless no
    scale helps."""
    model, adamw = model_and_adamw(True)
    scale, frozen = LossScale.first(CPU) if scaled else None, torch.zeros(())
    seen = []
    for step, x in enumerate(batches(24)):
        loss = model(x).square().sum()
        loss.backward()
        if spoilt == "every gradient" or (spoilt == "gradient" and step == 2):
            model[2].bias.grad[0] = math.nan
        given = torch.tensor(math.nan) if spoilt == "loss" and step == 2 else loss.detach()
        update(adamw, list(model.parameters()), given, frozen, limit=1.0, state=UpdateState(scale))
        seen.append((frozen.item(), weights(model)))
    moved = [any(not torch.equal(a, b) for a, b in zip(x[1], y[1], strict=True)) for x, y in itertools.pairwise(seen)]
    if spoilt == "loss" or (spoilt == "gradient" and not scaled):
        assert [is_frozen for is_frozen, _ in seen] == [0, 0] + [1] * 22
        assert moved == [True] + [False] * 22
    elif spoilt == "gradient":
        assert not any(is_frozen for is_frozen, _ in seen)
        assert moved == [True, False] + [True] * 21
    else:
        # 2 ** 16 is halved 17 times before it is below 1.
        assert [is_frozen for is_frozen, _ in seen] == ([0] * 16 + [1] * 8 if scaled else [1] * 24)
        assert not any(moved)
