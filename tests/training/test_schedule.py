"""The schedule against transformers' own schedulers, and against the figures of the recipe."""

import pytest
import torch
import transformers

from gist_train.training.schedule import Schedule, make_schedule

RECIPE = {"steps_per_epoch": 113_668, "epochs": 40, "max_steps": None}
WARM_UPS = [(40, 0), (40, 1), (40, 4), (41, 5), (40, 39), (1, 0)]


def logged_rates(type: str, lr: float, total: int, warmup: int) -> list[float]:
    """What transformers logs after 0, 1, ..., `total` updates."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)
    scheduler = {
        "linear": lambda: transformers.get_linear_schedule_with_warmup(optimizer, warmup, total),
        "cosine": lambda: transformers.get_cosine_schedule_with_warmup(optimizer, warmup, total),
        "constant": lambda: transformers.get_constant_schedule_with_warmup(optimizer, warmup),
    }[type]()
    rates = [scheduler.get_last_lr()[0]]
    for _ in range(total):
        optimizer.step()
        scheduler.step()
        rates.append(scheduler.get_last_lr()[0])
    return rates


@pytest.mark.parametrize(("total", "warmup"), WARM_UPS)
@pytest.mark.parametrize("type", ["linear", "cosine", "constant"])
def test_every_step_has_the_rate_that_transformers_logs(type, total, warmup):
    """A rate that is one step off still trains, and makes every logged rate of a published run unreachable."""
    schedule = Schedule(type, 5e-6, total, warmup)
    found = [schedule.learning_rate(step) for step in range(total + 1)]
    assert len(found) == total + 1
    assert found == pytest.approx(logged_rates(type, 5e-6, total, warmup), rel=1e-12, abs=1e-20)


@pytest.mark.parametrize("total", [1, 40])
@pytest.mark.parametrize("type", ["linear", "cosine", "constant"])
def test_a_run_of_all_warm_up_has_transformers_rate(type, total):
    """A run of one step with the recipe's ratio is all warm-up: 0.1 of it, rounded up, is 1."""
    schedule = Schedule(type, 5e-6, total, total)
    found = [schedule.learning_rate(step) for step in range(total + 1)]
    assert found == pytest.approx(logged_rates(type, 5e-6, total, total), rel=1e-12, abs=1e-20)


@pytest.mark.parametrize("type", ["linear", "cosine", "constant"])
def test_warm_up_starts_at_zero_and_ends_at_the_peak(type):
    """Update 1 uses learning_rate(0): a rise that starts above 0, or peaks a step early, is another recipe."""
    schedule = Schedule(type, 2.0, 100, 10)
    assert [schedule.learning_rate(step) for step in (0, 1, 5, 9, 10)] == pytest.approx([0.0, 0.2, 1.0, 1.8, 2.0])


@pytest.mark.parametrize(("type", "last"), [("linear", 0.0), ("cosine", 0.0), ("constant", 2.0)])
def test_the_last_step_and_those_after_it(type, last):
    """The rate must neither turn negative nor, as half a cosine wave would, rise again after the last step."""
    schedule = Schedule(type, 2.0, 100, 10)
    assert [schedule.learning_rate(step) for step in (100, 101, 150, 1000)] == [last] * 4


@pytest.mark.parametrize("type", ["linear", "cosine", "constant"])
def test_without_warm_up_the_first_update_has_the_peak(type):
    """A division by the warm-up's length, or a first update of rate 0 that is thrown away."""
    schedule = make_schedule(type, 5e-6, 0.0, steps_per_epoch=10, epochs=2, max_steps=None)
    assert schedule.warmup_steps == 0
    assert schedule.learning_rate(0) == 5e-6


def test_the_recipe_has_the_published_totals():
    """`plan` prints these: a total that counts dropped windows, or a ratio of one epoch, would move every rate."""
    schedule = make_schedule("linear", 5e-6, 0.1, **RECIPE)
    assert (schedule.total_steps, schedule.warmup_steps) == (4_546_720, 454_672)


@pytest.mark.parametrize(
    ("step", "rate", "digits"),
    [
        pytest.param(102_000, 1.1217e-6, 5, id="the card's step"),
        pytest.param(302_500, 3.3266e-6, 5, id="the step stored beside the weights"),
        pytest.param(454_672, 5e-6, 12, id="peak"),
        pytest.param(4_546_720, 0.0, 12, id="end"),
    ],
)
def test_the_recipe_has_the_published_rates(step, rate, digits):
    """The rates that the published checkpoints say of themselves: both lie inside the warm-up."""
    found = make_schedule("linear", 5e-6, 0.1, **RECIPE).learning_rate(step)
    assert float(f"{found:.{digits - 1}e}") == rate


@pytest.mark.parametrize(
    ("total", "ratio", "warmup"),
    [(30, 0.1, 3), (31, 0.1, 4), (1, 0.1, 1), (10, 0.0, 0), (10, 1.0, 10), (100, 0.29, 29), (100, 0.07, 7), (3, 0.5, 2)],
)
def test_warm_up_steps_are_rounded_up_but_not_by_float_noise(total, ratio, warmup):
    """100 * 0.07 is 7.000000000000001 in floats: a bare ceil makes 8 of it, a floor loses the step of 31 * 0.1."""
    assert make_schedule("linear", 1.0, ratio, steps_per_epoch=total, epochs=1, max_steps=None).warmup_steps == warmup


@pytest.mark.parametrize("epochs", [None, 3])
def test_max_steps_sets_the_schedule(epochs):
    """Totals from epochs would stretch the warm-up of a short run over steps that never come."""
    schedule = make_schedule("linear", 1.0, 0.1, steps_per_epoch=1000, epochs=epochs, max_steps=50)
    assert (schedule.total_steps, schedule.warmup_steps) == (50, 5)
    assert schedule.learning_rate(50) == 0.0


def test_epochs_multiply_the_steps_of_one_epoch():
    """The schedule spans all epochs, not each."""
    schedule = make_schedule("cosine", 1.0, 0.1, steps_per_epoch=7, epochs=10, max_steps=None)
    assert (schedule.type, schedule.lr, schedule.total_steps, schedule.warmup_steps) == ("cosine", 1.0, 70, 7)
