"""Several processes as one: who computes which rows, embeddings gathered with their gradient, agreement between ranks.

Every rank knows the whole batch (the plan is a pure function), so that ids and guide embeddings need no communication. What
travels is the student's embeddings, once forward and once backward.
"""

import atexit
import os
import warnings
from datetime import timedelta
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    DynamoBackend,
    GradientAccumulationPlugin,
    parse_flag_from_env,
)
from torch import Tensor

from gist_train.config.errors import Fault, UserError
from gist_train.model.device import on_cpu, steady_attention, whole_float32
from gist_train.pulse import waiting
from gist_train.training.interface import SETTING, interface_to_others

PATIENCE = timedelta(days=30)
"""That a collective waits, where backends would give up after 10 or 30 minutes: a rank that hangs is found by `Ranks`, and one
that evaluates or writes a checkpoint gets on. No end, and it fits into what counts milliseconds."""
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bf16": torch.bfloat16, "fp16": torch.float16}
"""What `training.precision` names."""
PLAIN = (
    "one process, or plain data parallelism: an encoder of up to a billion parameters fits one GPU, whole and with its moments"
)
_SHARDING = {
    "FSDP": "ACCELERATE_USE_FSDP",
    "DeepSpeed": "ACCELERATE_USE_DEEPSPEED",
    "Megatron-LM": "ACCELERATE_USE_MEGATRON_LM",
    "a parallelism config": "ACCELERATE_USE_PARALLELISM_CONFIG",
}
"""What accelerate's launcher sets for trainings whose model is in parts."""
_ACCELERATE = {"float32": "no", "float64": "no", "bf16": "bf16", "fp16": "fp16"}


def make_accelerator(precision: str) -> tuple[Accelerator, str | None]:
    """The Accelerator of this process, and what to tell the user where our precision rules over other settings.

    Args:
        precision: "auto" (bf16 on a GPU that has it, else float32), "float32", "float64", "bf16" or "fp16".

    Raises:
        UserError: accelerate was set up to shard or compile the model, or the precision is not one of this device's.
    """
    sharding = [name for name, flag in _SHARDING.items() if parse_flag_from_env(flag)]
    if sharding:  # before accelerate acts on it: without its package in a traceback, on a CPU not at all
        raise _unlike_accelerate(sharding[0], PLAIN)
    if (interface := interface_to_others(os.environ)) is not None:
        os.environ[SETTING] = interface
    # accelerate starts gloo only where it is set that this is for CPUs: else each of torchrun's processes would train alone.
    cpu = on_cpu()
    device = PartialState(cpu, timeout=PATIENCE).device  # sets this process' GPU, before anything else asks for one
    check_precision(precision, device)
    mixed = _ACCELERATE[precision_on(precision, device)]
    set_up = os.environ.get("ACCELERATE_MIXED_PRECISION", mixed)
    notes = [f"training.precision is {precision}: {mixed} is used, not accelerate's {set_up}"] if set_up != mixed else []
    steady_attention()
    if whole_float32():
        notes.append("TF32 is off: float32 products run in full precision, overriding the environment")
    # The name that accelerate and all versions of torch know.
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision=mixed,
        # Given here, it rules over the environment: backward would divide the loss by a number that no step accumulates.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        # A transformer's buffers are constants: nothing is gained by sending them round at every step.
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False)],
    )
    kind = accelerator.distributed_type
    if kind not in (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU):
        raise _unlike_accelerate(str(kind.value), PLAIN)
    if (backend := accelerator.state.dynamo_plugin.backend) != DynamoBackend.NO:
        raise _unlike_accelerate(f"dynamo backend {backend.value}", "none: training.compile compiles what gains by it")
    return accelerator, "\n".join(notes) or None


def _unlike_accelerate(setting: str, expected: str) -> UserError:
    fix = "run `accelerate config` anew and choose none of these, or launch with torchrun"
    return UserError(Fault("accelerate's configuration", setting, expected, fix))


def check_precision(precision: str, device: torch.device) -> None:
    """Raises UserError where `training.precision` is none of this device's."""
    if precision == "fp16" and device.type != "cuda":
        expected = "float32, bf16 or auto: fp16 is for CUDA devices without bf16"
        raise UserError(Fault("training.precision", f"fp16, on {device.type}", expected, "set it to auto"))
    if precision == "float64" and device.type == "mps":
        raise UserError(Fault("training.precision", "float64, on mps", "float32 or auto: mps has no float64", "set it to auto"))


def precision_on(precision: str, device: torch.device) -> str:
    """float32, float64, bf16 or fp16: what the encoder runs in under `training.precision` on this device."""
    if precision == "auto":
        # Not in emulation, as a T4 has it: that is slower than float32.
        has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return "bf16" if has_bf16 else "float32"
    return precision


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
        with waiting():
            dist.all_gather(received, padded)
        return tuple(part[:size] for part, size in zip(received, sizes, strict=True))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        summed = torch.cat([g.contiguous() for g in gradients])
        with waiting():
            dist.all_reduce(summed)
        return torch.split(summed, ctx.sizes)[ctx.rank], None


def sum_over_ranks(values: Tensor) -> Tensor:
    """The elementwise sum of `values` over all ranks."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        with waiting():
            dist.all_reduce(values)
    return values


def largest_over_ranks(value: int) -> int:
    """The largest `value` that any rank has: all ranks get the same answer, at the same step's end.

    It goes from host to host: no GPU is waited for.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    agreed = torch.tensor([value])
    with waiting():
        dist.all_reduce(agreed, op=dist.ReduceOp.MAX, group=_hosts())
    return int(agreed.item())


def gathered_on_hosts(x: Tensor) -> list[Tensor]:
    """(n_r, ...) of each rank in rank order, from host to host: of other lengths, which need not be known."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [x]
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size())]
    with waiting():
        dist.all_gather(lengths, torch.tensor([len(x)]), group=_hosts())
        padded = x.new_zeros(max(1, *(int(n) for n in lengths)), *x.shape[1:])
        padded[: len(x)] = x
        received = [torch.empty_like(padded) for _ in lengths]
        dist.all_gather(received, padded, group=_hosts())
    return [part[: int(n)] for part, n in zip(received, lengths, strict=True)]


def send_from_first(x: Tensor) -> None:
    """Has `x` on all ranks be what it is on the first, from host to host."""
    sent = x.detach().cpu().contiguous()
    with waiting():
        dist.broadcast(sent, 0, group=_hosts())
    x.detach().copy_(sent)


@cache
def end_group_at_exit() -> None:
    """Has the process group ended when this process does: another training in the same launch uses the same one."""
    atexit.register(lambda: dist.destroy_process_group() if dist.is_initialized() else None)


@cache
def _hosts() -> dist.ProcessGroup | None:
    """A group that speaks from host to host; None, which is the one that all use, where that does so itself."""
    return None if dist.get_backend() == "gloo" else dist.new_group(backend="gloo", timeout=PATIENCE)
