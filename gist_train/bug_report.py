"""What a report of a fault has to say: versions, machine and the environment's settings, without a secret."""

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Mapping
from importlib import metadata

from gist_train.config.secrets import hidden
from gist_train.version import __version__

SETTINGS = re.compile(
    r"(ACCELERATE|CUDA|DNNL|FORK|GIST_TRAIN|GLOO|HF|HIP|HUGGINGFACE|KMP|MKL|NCCL|NVIDIA|OMP|ONEDNN|PYTORCH|ROCR|SLURM|TOKENIZERS"
    r"|TORCH|TORCHELASTIC|TRANSFORMERS|TRITON|WANDB)_|(RANK|LOCAL_RANK|WORLD_SIZE|LOCAL_WORLD_SIZE|MASTER_ADDR|MASTER_PORT)$"
)
"""Names of variables that change how a training runs."""
BESIDE = ("tokenizers", "triton")
"""Packages that others bring along, and that computations go through."""
PATIENCE = 10.0
"""Seconds that nvidia-smi may take."""


def bug_report(environment: Mapping[str, str]) -> str:
    """A line for each package, device and setting.

    Args:
        environment: as the user's shell gave it, before this program and its libraries added to it.
    """
    lines = [
        f"gist-train {__version__}",
        f"Python {platform.python_version()}",
        f"{platform.platform()}, {platform.machine()}",
        *_hardware(),
        *(f"{name} {_version(name)}" for name in _packages()),
        *(f"{name}={value}" for name, value in sorted(environment.items()) if SETTINGS.match(name)),
    ]
    return "\n".join(map(hidden, lines))


def _packages() -> list[str]:
    """Those that pyproject.toml names, extras included, but for what only developers need."""
    required = [line for line in metadata.requires("gist-train") or [] if not re.search(r"extra == .dev\b", line)]
    return sorted({*(match[0] for line in required if (match := re.match(r"[\w.-]+", line))), *BESIDE})


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "(not installed)"


def _hardware() -> list[str]:
    import torch  # which takes seconds

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    cpu = f"{os.cpu_count()} processors, {memory:.1f} GiB of memory; torch uses {torch.get_num_threads()} threads"
    if not torch.cuda.is_available():
        other = "mps" if torch.backends.mps.is_available() else "no GPU that torch can use"
        return [cpu, other, *_driver()]
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
    devices = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return [
        cpu,
        f"{built}, cuDNN {torch.backends.cudnn.version()}",  # type: ignore[no-untyped-call]
        *(f"GPU {i}: {one.name}, {one.total_memory / 2**30:.1f} GiB, {one.major}.{one.minor}" for i, one in enumerate(devices)),
        *_driver(),
    ]


def _driver() -> list[str]:
    """NVIDIA's driver, also where torch sees no GPU: one that is too old for torch's CUDA is the usual reason."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    asked = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        ended = subprocess.run(asked, capture_output=True, text=True, errors="replace", timeout=PATIENCE, check=False)
    except (OSError, subprocess.TimeoutExpired):  # a driver that hangs is worth a line, and no more
        return ["NVIDIA driver: unknown; nvidia-smi does not answer"]
    said = (ended.stdout.strip() or ended.stderr.strip()).splitlines()  # a line for each GPU, or what is wrong
    return [f"NVIDIA driver: {said[0]}" if said and ended.returncode == 0 else f"NVIDIA driver: unknown; {' '.join(said)}"]
