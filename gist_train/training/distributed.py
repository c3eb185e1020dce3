"""Several processes as one: who computes which rows, embeddings gathered with their gradient, agreement between ranks.

Every rank knows the whole batch (the plan is a pure function), so that ids and guide embeddings need no communication. What
travels is the student's embeddings, once forward and once backward.
"""

import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, GradientAccumulationPlugin, parse_flag_from_env
from torch import Tensor

from gist_train.config.errors import Fault, UserError


def make_accelerator(precision: str, timeout: float | None) -> tuple[Accelerator, str | None]:
    """The Accelerator of this process, and a line to tell the user where our precision rules over accelerate's setting.

    Args:
        precision: "auto" (bf16 on a GPU that has it, else float32), "float32" or "bf16".
        timeout: seconds that a rank waits for the others; None for the backend's own.

    Raises:
        UserError: accelerate was set up to shard or compile the model.
    """
    waits = {} if timeout is None else {"timeout": timedelta(seconds=timeout)}
    # accelerate starts gloo only where it is told that this is for CPUs: else each of torchrun's processes would train alone.
    cpu = _on_cpu()
    device = PartialState(cpu, **waits).device  # sets this process' GPU, before anything else asks for one
    mixed = "bf16" if uses_bf16(precision, device) else "no"
    told = os.environ.get("ACCELERATE_MIXED_PRECISION", mixed)
    note = f"training.precision is {precision}: {mixed} is used, not accelerate's {told}" if told != mixed else None
    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision=mixed,
        # Given here, it rules over the environment: backward would divide the loss by a number that no step accumulates.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
    )
    kind = accelerator.distributed_type
    if kind not in (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU):
        mend = "run `accelerate config` anew, or launch with torchrun"
        raise UserError(Fault("accelerate's configuration", str(kind.value), "one process, or plain data parallelism", mend))
    return accelerator, note


def _on_cpu() -> bool:
    """Whether the user wants the CPU, or has nothing else."""
    return parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()


def this_device() -> torch.device:
    """Where this process would train, without an Accelerator."""
    device: torch.device = PartialState(_on_cpu()).device
    return device


def uses_bf16(precision: str, device: torch.device) -> bool:
    """Whether the encoder runs in bf16 under `training.precision` on this device."""
    if precision == "auto":
        # Not in emulation, as a T4 has it: that is slower than float32.
        return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return precision == "bf16"


def precision_of(accelerator: Accelerator) -> str:
    """bf16 or float32: accelerate calls the latter "no"."""
    return "bf16" if accelerator.mixed_precision == "bf16" else "float32"


def share(count: int, rank: int, processes: int) -> tuple[int, int]:
    """(start, stop) of the `count` rows that `rank` computes: contiguous, in rank order, as even as can be."""
    return count * rank // processes, count * (rank + 1) // processes


def gather_with_gradient(x: Tensor, sizes: list[int]) -> list[Tensor]:
    """The tensors of all ranks, (sizes[r], D) from rank r, in rank order, and differentiable.

    The gradient of this rank's tensor is the sum of what all ranks' losses give it. DistributedDataParallel then averages the
    gradients of weights over ranks: a loss that is to be summed over ranks must be multiplied by their number before backward.
    """
    if len(sizes) == 1:
        return [x]
    return list(_Gather.apply(x, sizes))  # type: ignore[no-untyped-call]


class _Gather(torch.autograd.Function):
    """Gather whose backward sums over ranks. torch.distributed.nn.functional.all_gather is deprecated and wants equal sizes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: list[int]) -> tuple[Tensor, ...]:
        ctx.sizes, ctx.rank = sizes, dist.get_rank()
        # Equal sizes on the wire: gloo and NCCL gather nothing else.
        padded = x.new_zeros(max(sizes), x.shape[1])
        padded[: len(x)] = x
        received = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(received, padded)
        return tuple(part[:size] for part, size in zip(received, sizes, strict=True))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        summed = torch.cat([g.contiguous() for g in gradients])
        dist.all_reduce(summed)
        return torch.split(summed, ctx.sizes)[ctx.rank], None


def sum_over_ranks(values: Tensor) -> Tensor:
    """The elementwise sum of `values` over all ranks."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(values)
    return values


def largest_over_ranks(value: int, device: torch.device) -> int:
    """The largest `value` that any rank has: all ranks get the same answer, at the same step's end."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    agreed = torch.tensor([value], device=device)
    dist.all_reduce(agreed, op=dist.ReduceOp.MAX)
    return int(agreed.item())


def same_on_all_ranks(value: int, device: torch.device) -> bool:
    """Whether all ranks have the same `value`."""
    largest, smallest = largest_over_ranks(value, device), -largest_over_ranks(-value, device)
    return largest == smallest
