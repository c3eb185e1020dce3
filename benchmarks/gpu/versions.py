"""Stage 1 of `check_gpu.sh`: what this machine is, and which versions it has."""

import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version

import torch

from benchmarks.gpu.report import Report, Setup
from benchmarks.machine import ROOT, processor

PACKAGES = ("torch", "transformers", "sentence-transformers", "accelerate", "triton", "numpy", "tokenizers", "datasets", "pytest")


def run(setup: Setup, report: Report) -> None:
    """Notes versions, GPU, CPU and commit."""
    found: dict[str, object] = {
        "python": platform.python_version(),
        "system": platform.platform(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "cpu": processor(),
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "commit": _output("git", "-C", str(ROOT), "rev-parse", "HEAD"),
        "changed_files": _changed_files(),
    }
    if setup.device == "cuda":
        gpu = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": gpu.name,
            "gpu_memory_gib": round(gpu.total_memory / 2**30, 1),
            "capability": f"{gpu.major}.{gpu.minor}",
            "multiprocessors": gpu.multi_processor_count,
            "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
            "clocks": _output("nvidia-smi", "--query-gpu=clocks.max.sm,power.limit,temperature.gpu", "--format=csv,noheader"),
        }
    for key, value in found.items():
        report.say(f"{key}: {value}")
    report.note(
        **found, summary=f"{found.get('gpu', found['cpu'])}, torch {version('torch')}, commit {str(found['commit'])[:10]}"
    )


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _changed_files() -> int | None:
    changed = _output("git", "-C", str(ROOT), "status", "--porcelain")
    return None if changed is None else len(changed.splitlines())


def _output(*command: str) -> str | None:
    """What a command prints, or None where there is no such command or it fails."""
    if shutil.which(command[0]) is None:
        return None
    ended = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    return ended.stdout.strip() if ended.returncode == 0 else None
