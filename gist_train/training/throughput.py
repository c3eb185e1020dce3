"""How much of the machine a step uses: model FLOP/s of real tokens over a measured matrix-multiply rate, and memory."""

import resource
import sys
import time
from collections.abc import Sequence

import torch

from gist_train.model.encoder import Encoder


def training_flops(encoder: Encoder, groups: Sequence[tuple[int, int]]) -> int:
    """Floating-point operations of forward and backward over real tokens, in matrix multiplications alone.

    A multiply-add counts as two, the backward pass as twice the forward pass (Kaplan et al. 2020, arXiv 2001.08361). Every pair
    of a text's tokens counts, also where a layer is causal or local.

    Args:
        groups: (number of texts, tokens in each), as in `PackedLengths`.
    """
    named = encoder.transformer.named_modules()
    linear = sum(m.weight.numel() for name, m in named if isinstance(m, torch.nn.Linear) and not name.startswith("pooler."))
    config = encoder.transformer.config
    tokens = sum(count * length for count, length in groups)
    pairs = sum(count * length * length for count, length in groups)
    return 3 * int(2 * linear * tokens + 4 * encoder.attention_width * config.num_hidden_layers * pairs)


def matmul_rate(encoder: Encoder, tokens: int, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """FLOP/s of multiplying (tokens, hidden) by the encoder's largest linear layer, on its device."""
    layers = [module.weight for module in encoder.transformer.modules() if isinstance(module, torch.nn.Linear)]
    w = torch.randn_like(max(layers, key=torch.numel), dtype=dtype)
    x = torch.randn(tokens, w.shape[1], device=w.device, dtype=dtype)
    best = 0.0
    ends = time.perf_counter() + seconds
    while True:
        began = time.perf_counter()
        y = x @ w.T
        if w.device.type != "cpu":
            torch.accelerator.synchronize(w.device)
        took = time.perf_counter() - began
        best = max(best, 2.0 * x.numel() * y.shape[1] / took)
        if time.perf_counter() > ends:
            return best


def peak_memory(device: torch.device) -> int:
    """The most bytes held so far: on CUDA by this process' tensors there, elsewhere by the whole process in main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
