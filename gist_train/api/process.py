"""A call from somebody's program leaves its process as it was: environment, flags of torch, random numbers, loggers, warnings.

The command line has a process of its own, and needs none of this.
"""

import gc
import importlib
import logging
import os
import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from threading import RLock
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

from gist_train.config.errors import Fault, UserError
from gist_train.environment import ALLOCATOR, KERNELS, keep_kernels, launched_together, let_segments_expand
from gist_train.training.interface import SETTING

_ONE_CALL = RLock()
"""Held while a call has the process to itself; a call within it is part of it."""
P = ParamSpec("P")
R = TypeVar("R")
BACKENDS: Any = torch.backends
"""Untyped in part."""
TELEMETRY = "HF_HUB_DISABLE_TELEMETRY"
VARIABLES = (
    *(TELEMETRY, ALLOCATOR, KERNELS, SETTING),
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT"),  # which accelerate sets anew
    *("MLFLOW_DISABLE_TELEMETRY", "MLFLOW_LOGGING_LEVEL"),
)
"""Of the environment, that a call sets."""


def by_one_process(call: Callable[P, R]) -> Callable[P, R]:
    """A call that leaves the process as it was, and that the processes of a launch may not all make.

    Raises:
        UserError: one of several processes makes it.
    """

    @wraps(call)
    def alone(*given: P.args, **named: P.kwargs) -> R:
        refuse_several(call.__name__)
        with process_as_it_was():
            return call(*given, **named)

    return alone


def refuse_several(call: str) -> None:
    """Refuses a call that every process of a launch would make, with the same files.

    Raises:
        UserError: this is one of several processes.
    """
    if launched_together():
        processes = f"one of {os.environ['WORLD_SIZE']} processes"
        fix = "make the call in a program of its own, once the training has ended"
        raise UserError(Fault(call, processes, "one process: train alone is the work of several", fix))


@contextmanager
def process_as_it_was(precision: str = "float32") -> Iterator[None]:
    """Within it the process is as a command's would be; after it, however it ends, as it was before.

    Args:
        precision: that a training computes in.
    """
    if not _ONE_CALL.acquire(blocking=False):
        found = "another call of gist_train, in another thread of this process"
        fix = "wait for it, or make each call in a process of its own: they share random numbers, settings and torch's flags"
        raise UserError(Fault("gist_train", found, "one call at a time", fix))
    with ExitStack() as stack:
        stack.callback(_ONE_CALL.release)
        stack.enter_context(_environment(precision))
        for part in (_torch_flags, _random_numbers, _accelerate, _voices, warnings.catch_warnings):
            stack.enter_context(part())
        yield


@contextmanager
def _environment(precision: str) -> Iterator[None]:
    """Without a word on what other packages set when they are imported: it is theirs, and some of it must stay."""
    before = {name: os.environ.get(name) for name in VARIABLES}
    os.environ.setdefault(TELEMETRY, "1")
    let_segments_expand()  # if torch has not asked for GPU memory yet
    keep_kernels(precision)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _torch_flags() -> Iterator[None]:
    """How torch multiplies, which attention it takes, how many threads and which GPU."""
    cuda, products = BACKENDS.cuda, (BACKENDS.cuda.matmul, BACKENDS.mkldnn.matmul)
    each = [product.fp32_precision for product in products]
    try:
        both = torch.get_float32_matmul_precision()
    except RuntimeError:  # it can't be read where each was set by itself
        both = None
    attention, threads = cuda.cudnn_sdp_enabled(), torch.get_num_threads()
    gpu = torch.cuda.current_device() if gpus_in_use() else None
    try:
        yield
    finally:
        if both is not None:
            torch.set_float32_matmul_precision(both)
        for product, precision in zip(products, each, strict=True):
            product.fp32_precision = precision
        cuda.enable_cudnn_sdp(attention)
        torch.set_num_threads(threads)
        if gpu is not None:
            torch.cuda.set_device(gpu)
        gc.collect()  # the model and what holds it: the next cell may need the memory
        if gpus_in_use():
            torch.cuda.empty_cache()


@contextmanager
def _random_numbers() -> Iterator[None]:
    ours, numpys = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=range(gpus_in_use())):
        try:
            yield
        finally:
            random.setstate(ours)
            np.random.set_state(numpys)


def gpus_in_use() -> int:
    """How many GPUs torch has begun to use: 0 before the first of them is asked for anything."""
    return torch.cuda.device_count() if torch.cuda.is_initialized() else 0  # type: ignore[no-untyped-call]


@contextmanager
def _accelerate() -> Iterator[None]:
    """A state of its own: accelerate keeps one a process, and refuses another precision than the first one's."""
    states = [kind._shared_state for kind in (PartialState, AcceleratorState, GradientState)]
    before = [dict(state) for state in states]
    for state in states:
        state.clear()
    try:
        yield
    finally:
        for state, was in zip(states, before, strict=True):
            state.clear()
            state.update(was)


@contextmanager
def _voices() -> Iterator[None]:
    """Others' notices and bars, for each folder that is read and each file that is written, would tear ours."""
    models: Any = importlib.import_module("transformers.utils.logging")
    hub: Any = importlib.import_module("huggingface_hub.utils")
    verbosity, bars, of_hub = models.get_verbosity(), models.is_progress_bar_enabled(), logging.getLogger("huggingface_hub")
    level, hub_bars = of_hub.level, not hub.are_progress_bars_disabled() and "HF_HUB_DISABLE_PROGRESS_BARS" not in os.environ
    bar: Any = importlib.import_module("tqdm").tqdm
    watched, bar.monitor_interval = bar.monitor_interval, 0  # else a thread that watches bars would stay
    models.set_verbosity_error()
    models.disable_progress_bar()
    of_hub.setLevel(logging.ERROR)  # each retry of each request, twice
    if hub_bars:
        hub.disable_progress_bars()
    try:
        yield
    finally:
        bar.monitor_interval = watched
        models.set_verbosity(verbosity)
        if bars:
            models.enable_progress_bar()
        of_hub.setLevel(level)
        if hub_bars:
            hub.enable_progress_bars()
