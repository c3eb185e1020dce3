"""The device that this process computes on, and how it multiplies there."""

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env


def on_cpu() -> bool:
    """Whether the user wants the CPU, or has nothing else."""
    return parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()


def whole_float32() -> bool:
    """Has float32 multiplied as float32, on Ampere and later too, and returns whether that was not so.

    TF32 keeps 10 bits behind the point: at a temperature of 0.01 a similarity is then right to a tenth of a logit.
    """
    # The newer of torch's two settings: the older one, under which it is set, can't be read where someone used both.
    changed: bool = torch.backends.cuda.matmul.fp32_precision == "tf32"
    # cuDNN's own settings stay: no encoder here has a convolution, and torch.export can't read them once they differ.
    torch.set_float32_matmul_precision("highest")
    return changed


def steady_attention() -> None:
    """Keeps cuDNN's attention out, which torch takes only where no gradient of a bias is asked for.

    Gradient caching's two passes would draw their dropout in two ways. It also makes a plan for each new shape, and texts of all
    lengths have thousands.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)


def this_device() -> torch.device:
    """Where this process would train, without an Accelerator. From here on it multiplies as `whole_float32` says."""
    steady_attention()
    whole_float32()
    device: torch.device = PartialState(on_cpu()).device
    return device
