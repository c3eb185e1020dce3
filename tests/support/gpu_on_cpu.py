"""A pytest plugin (`-p support.gpu_on_cpu`) that runs the tests of a GPU on the CPU, as far as they come.

What is put on "cuda" lies on the CPU. A test that asks for what a GPU alone has fails there, which says nothing; one that calls
what is no longer called so fails too, and that is what the rehearsal is for: without a GPU nobody would see it.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

has_gpu = torch.cuda.is_available


def on_cpu(given: Any) -> Any:
    """A device or its name, and the CPU in the place of a GPU."""
    named = isinstance(given, str | torch.device) and str(given).partition(":")[0] == "cuda"
    return "cpu" if named else given


class OnCpu(TorchFunctionMode):
    """Every call of torch that names a GPU is made on the CPU."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = {name: on_cpu(value) for name, value in (kwargs or {}).items()}
        return function(*[on_cpu(value) for value in args], **named)


class autocast(torch.autocast):  # noqa: N801
    """Of the CPU."""

    def __init__(self, device_type: str, *args: Any, **kwargs: Any):
        super().__init__(on_cpu(device_type), *args, **kwargs)


def pytest_load_initial_conftests() -> None:
    """Tests are skipped by this when they are read."""
    torch.cuda.is_available = lambda: True


def pytest_collection_finish() -> None:
    """What runs then is told the truth: this machine trains on its CPU."""
    torch.cuda.is_available = has_gpu


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Iterator[None]:
    """A test, on the CPU."""
    with pytest.MonkeyPatch.context() as patch, OnCpu():
        patch.setattr(torch, "autocast", autocast)
        patch.setattr(torch.Tensor, "cuda", lambda tensor: tensor.clone())
        patch.setattr(torch.cuda, "synchronize", lambda: None)
        patch.setattr(torch.cuda, "set_sync_debug_mode", lambda _: None)
        return (yield)
