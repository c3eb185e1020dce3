"""One optimizer step without waiting for the device: clipping, freezing after a value that is not finite, fp16's loss scale,
leaving out a spike.

Fused AdamW divides the gradients by a tensor and leaves everything alone where another one is 1. Both are made on the device:
nothing comes back to the host, and gradients are not written once more to be clipped.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from gist_train.config.training import SpikesConfig

FIRST_SCALE, CLEAN_STEPS = 2.0**16, 2000.0
RECENT, FEWEST = 100, 20
"""Steps that a median norm is taken over, and those that there must be of them before an update is left out."""


@dataclass(slots=True)
class LossScale:
    """What the loss is multiplied by under fp16, so that small gradients do not vanish (Micikevicius et al., arXiv 1710.03740).

    Halved at an update whose gradient overflows, which is skipped, and doubled after 2,000 without one. Scalars on the device.
    """

    value: Tensor
    clean: Tensor
    """Steps since it last changed."""
    skipped: Tensor
    """Updates that were skipped since the run began: AdamW counts these as no steps."""

    @classmethod
    def first(cls, device: torch.device) -> "LossScale":
        """Of a run that begins."""
        return cls(*(torch.tensor(value, device=device) for value in (FIRST_SCALE, 0.0, 0.0)))

    def parts(self) -> dict[str, Tensor]:
        """The scalars by name, as a checkpoint holds them."""
        return {"value": self.value, "clean": self.clean, "skipped": self.skipped}

    def take(self, overflow: Tensor) -> None:
        """Notes a step whose gradient overflowed, 1.0, or did not, 0.0."""
        grows = (self.clean + 1 >= CLEAN_STEPS) & (overflow == 0)
        self.value.mul_(torch.where(overflow > 0, 0.5, torch.where(grows, 2.0, 1.0)))
        self.clean.add_(1).masked_fill_((overflow > 0) | grows, 0.0)
        self.skipped.add_(overflow)


@dataclass(slots=True)
class Spikes:
    """Which gradients are spikes, by the median norm of those before. Norms of spikes count too: what lasts is no spike."""

    factor: float
    at_most: int
    norms: Tensor
    """(RECENT,) of the last steps whose gradient was finite, ascending in time; inf where there were none yet."""
    skipped: Tensor
    """Updates that were left out since the run began: AdamW counts these as no steps."""

    @classmethod
    def first(cls, config: SpikesConfig, device: torch.device) -> "Spikes":
        """Of a run that begins."""
        return cls(config.factor, config.at_most, torch.full((RECENT,), torch.inf, device=device), torch.zeros((), device=device))

    def parts(self) -> dict[str, Tensor]:
        """The tensors by name, as a checkpoint holds them."""
        return {"norms": self.norms, "skipped": self.skipped}

    def take(self, norm: Tensor) -> Tensor:
        """Notes the norm of a step's gradient. 1.0 where the update is to be left out, else 0.0."""
        known = self.norms.isfinite().sum()
        middle = (known - 1).clamp(min=0) // 2
        median = self.norms.sort().values.gather(0, middle[None])[0]
        spike = (known >= FEWEST) & norm.isfinite() & (norm > self.factor * median) & (self.skipped < self.at_most)
        self.norms.copy_(torch.where(norm.isfinite(), torch.cat([self.norms[1:], norm[None]]), self.norms))
        self.skipped.add_(spike)
        return spike.to(self.skipped.dtype)


@dataclass(frozen=True, slots=True)
class UpdateState:
    """What an update knows of those before it, besides AdamW's moments."""

    loss_scale: LossScale | None = None
    """Under fp16."""
    spikes: Spikes | None = None
    """Where `training.skip_spikes` is given."""

    def parts(self) -> dict[str, Tensor]:
        """Its tensors by name, as a checkpoint holds them: the live ones."""
        kinds = {"loss_scale": self.loss_scale, "spikes": self.spikes}
        return {f"{kind}.{name}": part for kind, state in kinds.items() if state for name, part in state.parts().items()}

    def skipped(self) -> int:
        """Updates of the run that AdamW counts as no steps. Waits for the device."""
        return sum(int(state.skipped) for state in (self.loss_scale, self.spikes) if state)


def set_learning_rate(optimizer: torch.optim.AdamW, rate: float) -> None:
    """Sets the rate of the next update, on the device where the optimizer keeps it there."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def for_graphs(optimizer: torch.optim.AdamW, device: torch.device) -> None:
    """Has the optimizer read its learning rate from the device at each update, as a CUDA graph of it must. In float32, where it
    would else be a double: the weights may differ in their last bits."""
    for group in optimizer.param_groups:
        group["lr"] = torch.zeros((), device=device)
        group["capturable"] = device.type == "cuda"


def update(
    optimizer: torch.optim.AdamW,
    parameters: Sequence[nn.Parameter],
    loss: Tensor,
    frozen: Tensor,
    *,
    limit: float | None,
    state: UpdateState,
) -> tuple[Tensor, Tensor]:
    """Clips the gradient to `limit`, takes one step of fused AdamW and drops the gradients.

    Once the loss or, without a loss scale, the gradient is not finite, this update and all later ones are left out. With a scale
    a gradient that overflows leaves out one update, until the scale falls below 1.

    Args:
        loss: scalar, the same on all ranks.
        frozen: scalar 0.0; set to 1.0 in place from the first value that is not finite on.
        state: its loss scale is what the loss was multiplied by before the backward pass.

    Returns:
        The norm of the whole gradient before clipping, and 1.0 where the update was left out as a spike, else 0.0; scalars.
    """
    scale = state.loss_scale
    norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
    divisor = torch.ones_like(norm)
    if scale is not None:
        divisor, norm = scale.value.clone(), norm / scale.value
    overflow = (~norm.isfinite()).to(frozen.dtype)
    if scale is None:
        stops = overflow
    else:
        scale.take(overflow)
        stops = (scale.value < 1).to(frozen.dtype)
    frozen.copy_(torch.stack([frozen, stops, (~loss.isfinite()).to(frozen.dtype)]).amax())
    spike = torch.zeros_like(frozen) if state.spikes is None else state.spikes.take(norm)
    if limit is not None:
        divisor = divisor * (norm / limit).clamp(min=1)
    if divisor.dtype == torch.float64:  # AdamW reads the divisor as float32, which would round it
        torch._foreach_div_([p.grad for p in parameters if p.grad is not None], divisor)
        divisor = torch.ones_like(frozen)
    # What torch's GradScaler sets on an optimizer that takes it.
    optimizer.grad_scale, optimizer.found_inf = divisor, torch.stack([frozen, overflow, spike]).amax()  # type: ignore[attr-defined]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm, spike
