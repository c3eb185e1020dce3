"""Learning rate and totals as pure functions of the step: nothing here is state, so nothing has to be saved."""

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Schedule:
    """Warm-up and decay over a whole run, in optimizer steps."""

    type: Literal["linear", "cosine", "constant"]
    lr: float
    """Peak learning rate, reached after `warmup_steps` updates."""
    total_steps: int
    """Updates after which the rate is 0 (linear, cosine). A run that stops earlier follows the same curve."""
    warmup_steps: int
    """Updates over which the rate rises linearly from 0."""

    def learning_rate(self, step: int) -> float:
        """The rate after `step` updates, as transformers logs it. Update s uses `learning_rate(s - 1)`: the first is 0.

        Source: transformers' `get_linear_schedule_with_warmup`, `get_cosine_schedule_with_warmup` (half a wave) and
        `get_constant_schedule_with_warmup`.
        """
        if step < self.warmup_steps:
            return self.lr * step / max(1, self.warmup_steps)
        if self.type == "constant":
            return self.lr
        decay_steps = max(1, self.total_steps - self.warmup_steps)
        if self.type == "linear":
            return self.lr * max(0, self.total_steps - step) / decay_steps
        return self.lr * 0.5 * (1.0 + math.cos(math.pi * min(1.0, (step - self.warmup_steps) / decay_steps)))


def make_schedule(
    type: Literal["linear", "cosine", "constant"],
    lr: float,
    warmup_ratio: float,
    *,
    steps_per_epoch: int,
    epochs: int | None,
    max_steps: int | None,
) -> Schedule:
    """The schedule of a run of `max_steps` steps, or of `epochs` epochs. Warm-up steps are rounded up."""
    total = max_steps if max_steps is not None else steps_per_epoch * (epochs or 1)
    # The rounding to 9 digits keeps 100 * 0.07, which is 7.000000000000001 in floats, from becoming 8 steps.
    return Schedule(type, lr, total, math.ceil(round(total * warmup_ratio, 9)))
