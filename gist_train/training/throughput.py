"""How much of the machine a step uses: where its time goes, model FLOP/s over a measured matrix-multiply rate, and memory."""

import resource
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from gist_train.model.encoder import Encoder
from gist_train.model.families import product_shapes

PARTS = ("data", "forward", "loss", "backward", "optimizer", "communication", "graph")
"""Waiting for the batch and handing it to the device; encoding the texts; masks and loss; the backward pass (with gradient
caching the second forward pass too, with several processes the sum of gradients that overlaps it); clipping and AdamW; gathering
embeddings and adding up numbers over processes; with a CUDA graph all of these but the first, which then are 0."""


class StepClock:
    """Adds up the parts of a step: on CUDA by events in the device's own stream, elsewhere by this process' wall clock."""

    def __init__(self, device: torch.device, *, running: bool = True):
        self._cuda, self._running = device.type == "cuda", running
        self._marks: list[tuple[str, torch.cuda.Event | float]] = []
        self.ends("")

    def ends(self, part: str) -> None:
        """Says that `part` ends here; it began where the one before ended."""
        if not self._running:
            return
        now: torch.cuda.Event | float = time.perf_counter()
        if self._cuda:
            now = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            now.record()
        self._marks.append((part, now))

    def seconds(self) -> dict[str, float]:
        """Seconds of each of `PARTS`. On CUDA it waits until the device has done them."""
        seconds = dict.fromkeys(PARTS, 0.0)
        for (_, began), (part, ended) in zip(self._marks, self._marks[1:], strict=False):
            if isinstance(began, torch.cuda.Event) and isinstance(ended, torch.cuda.Event):
                ended.synchronize()
                seconds[part] += began.elapsed_time(ended) / 1000
            elif isinstance(began, float) and isinstance(ended, float):
                seconds[part] += ended - began
        return seconds


@dataclass(frozen=True, slots=True)
class TrainingCost:
    """What an encoder multiplies in training, counted once: to go through its modules takes as long as to launch some kernels."""

    a_token: int
    """Weights that each token meets."""
    a_pair: int
    """Of attention, for each two tokens of a text: dimensions of a token's queries, over all layers."""

    @classmethod
    def of(cls, encoder: Encoder) -> "TrainingCost":
        """That of `encoder`."""
        weights = sum(out * width for out, width in product_shapes(encoder.transformer))
        return cls(weights, encoder.attention_width * encoder.transformer.config.num_hidden_layers)

    def flops(self, groups: Sequence[tuple[int, int]]) -> int:
        """Floating-point operations of forward and backward over real tokens, in matrix multiplications alone.

        A multiply-add counts as two, the backward pass as twice the forward pass (Kaplan et al. 2020, arXiv 2001.08361). Every
        pair of a text's tokens counts, also where a layer is causal or local.

        Args:
            groups: (number of texts, tokens in each), as in `PackedLengths`.
        """
        tokens = sum(count * length for count, length in groups)
        pairs = sum(count * length * length for count, length in groups)
        return 3 * (2 * self.a_token * tokens + 4 * self.a_pair * pairs)


def training_flops(encoder: Encoder, groups: Sequence[tuple[int, int]]) -> int:
    """`TrainingCost.flops` of an encoder that is asked once."""
    return TrainingCost.of(encoder).flops(groups)


def matmul_rate(encoder: Encoder, tokens: int, dtype: torch.dtype, seconds: float = 0.5) -> float:
    """FLOP/s of the products that the encoder asks for over `tokens` tokens, forward and backward, on its device.

    Each product is timed by itself, operands ready; the least of its times counts (what else the machine does is
    no part of its rate), as often as the encoder has its shape.
    """
    shapes, device = Counter(product_shapes(encoder.transformer)), encoder.device
    operands = []
    for out, width in shapes:
        x, w, g = (torch.randn(size, device=device, dtype=dtype) for size in ((tokens, width), (out, width), (tokens, out)))
        operands.append(((x, w.T), (g, w), (g.T, x)))  # the output, and the gradients of input and weight
    times: list[list[list[float]]] = [[[] for _ in products] for products in operands]
    # A GPU is given many at a time: to launch one and wait for it takes longer than the product itself.
    at_a_time = 1 if device.type == "cpu" else 100
    ends = time.perf_counter() + seconds
    while time.perf_counter() < ends or len(times[0][0]) < 4:
        for products, of_shape in zip(operands, times, strict=True):
            for (a, b), of_product in zip(products, of_shape, strict=True):
                began = time.perf_counter()
                for _ in range(at_a_time):
                    a @ b
                if device.type != "cpu":
                    torch.accelerator.synchronize(device)
                of_product.append((time.perf_counter() - began) / at_a_time)
    took = sum(
        count * sum(min(of_product) for of_product in of_shape) for count, of_shape in zip(shapes.values(), times, strict=True)
    )
    return sum(count * 6 * tokens * out * width for (out, width), count in shapes.items()) / took


def peak_memory(device: torch.device) -> int:
    """The most bytes held so far: on CUDA by this process' tensors there, elsewhere by the whole process in main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
