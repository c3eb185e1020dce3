"""What a process has besides its objects: what a call that leaves no trace must not change."""

import gc
import hashlib
import logging
import os
import random
import signal
import sys
import threading
import warnings
from typing import Any

import datasets
import huggingface_hub.utils as hub
import numpy as np
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from transformers.utils import logging as transformers_logging

from gist_train.training.signals import SIGNALS


def process_state() -> dict[str, Any]:
    """By name. Loggers that are made later are not in it, nor is the thread that renews leases, which ends by itself."""
    cuda, products = torch.backends.cuda, (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    wakeup = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(wakeup)
    loggers = {name: one for name, one in logging.root.manager.loggerDict.items() if isinstance(one, logging.Logger)}
    loggers["root"] = logging.root
    try:
        precision = torch.get_float32_matmul_precision()
    except RuntimeError as error:
        precision = str(error)
    return {
        **{f"environment {name}": value for name, value in os.environ.items()},
        **{f"logger {name}": (one.level, [*one.handlers], one.disabled, one.propagate) for name, one in loggers.items()},
        "logging": logging.root.manager.disable,
        "products": (precision, *(product.fp32_precision for product in products)),
        "attention": (
            cuda.cudnn_sdp_enabled(),
            cuda.flash_sdp_enabled(),
            cuda.mem_efficient_sdp_enabled(),
            cuda.math_sdp_enabled(),
        ),
        "deterministic": (torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark),
        "torch": (torch.get_num_threads(), torch.is_grad_enabled(), torch.get_default_dtype(), torch.is_inference_mode_enabled()),
        "random": (random.getstate(), repr(np.random.get_state())),
        "random of torch": hashlib.md5(torch.get_rng_state().numpy().tobytes()).hexdigest(),
        "accelerate": [dict(kind._shared_state) for kind in (PartialState, AcceleratorState, GradientState)],
        "warnings": [*warnings.filters],
        "signals": {number: signal.getsignal(number) for number in SIGNALS},
        "wakeup": wakeup,
        "notices": transformers_logging.get_verbosity(),
        "bars": (
            transformers_logging.is_progress_bar_enabled(),
            datasets.is_progress_bar_enabled(),
            hub.are_progress_bars_disabled(),
        ),
        "streams": (sys.stdout, sys.stderr, sys.excepthook, sys.argv, os.getcwd()),
        "threads": sorted(thread.name for thread in threading.enumerate() if thread.name != "leases"),
        "garbage": (gc.get_threshold(), gc.isenabled()),
    }


def changes(before: dict[str, Any], after: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What differs; loggers that were not there before don't count."""
    names = before.keys() | {name for name in after if not name.startswith("logger ")}
    return {name: (before.get(name), after.get(name)) for name in names if before.get(name) != after.get(name)}
