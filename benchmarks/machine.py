"""What a benchmark ran on, for its header."""

import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
"""The checkout."""


def environment_of_children() -> dict[str, str]:
    """That of a program of this package which another one starts, wherever that was started."""
    others = os.environ.get("PYTHONPATH")
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *([others] if others else [])])}


def processor() -> str:
    """The CPU's name."""
    described = Path("/proc/cpuinfo")
    lines = described.read_text(encoding="utf-8").splitlines() if described.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def told(device: torch.device, packages: Sequence[str]) -> dict[str, Any]:
    """Device, cores, threads and versions."""
    return {
        "system": platform.platform(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
    }


def header(machine: Mapping[str, Any], precision: str = "float32") -> str:
    """The lines that a benchmark's tables begin with."""
    where = f"{machine['device']}, {machine['cores']} cores, {machine['threads']} threads, {precision}"
    return f"{where}\n{', '.join(f'{name} {number}' for name, number in machine['versions'].items())}"
