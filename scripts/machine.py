"""What a benchmark ran on, for its header."""

import os
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import torch


def processor() -> str:
    """The CPU's name."""
    described = Path("/proc/cpuinfo")
    lines = described.read_text(encoding="utf-8").splitlines() if described.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def told(device: torch.device, packages: Sequence[str]) -> dict[str, object]:
    """Device, cores, threads and versions."""
    return {
        "system": platform.platform(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
    }
