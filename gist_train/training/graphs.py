"""A step of training replayed from a CUDA graph: forward, loss, backward and update without Python between their kernels.

At 16 triplets it takes longer to launch a GPU's work than to do it. A graph is launched at once. It holds sizes and addresses, so
there is one for each size of batch, and what a step reads is copied to where its graph looks for it. Sizes are few: one more
text, which no loss sees, fills the packed sequence up to the next of some totals of tokens (`gradient_cache.filled_tokens`).

The first step of a size runs without a graph, and shows every library what it will be asked for. The second is recorded, which
computes nothing, and replayed. So every step trains once, and the same kernels run in the same order under the same seed of
dropout, with a graph or without.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gist_train.training.inputs import Inputs

MOST = 64
"""Graphs that are kept: batches of further sizes run without."""
Step = Callable[[Inputs, int], Tensor]
"""Inputs on the device and the seed of dropout -> (14,) what the device computed of the step; weights change in place."""
Work = Callable[[], Tensor]
"""Work on the device that gives a tensor; done again it gives the same one, overwritten."""


@dataclass(slots=True)
class _Size:
    """What belongs to one size of batch."""

    inputs: Inputs
    """Where its graph reads."""
    replay: Work | None = None


class Graphs:
    """Runs steps by graphs, one for each size of batch.

    Args:
        step: the step without a graph. It must ask nothing of the device, and leave no gradient behind.
        device: where it runs.
        record: work -> its graph; None for a CUDA graph.
    """

    def __init__(self, step: Step, device: torch.device, record: Callable[[Work], Work] | None = None):
        self._step, self._device = step, device
        self._record = CudaRecorder() if record is None else record
        self._sizes: dict[tuple[Any, ...], _Size] = {}

    def take(self, inputs: Inputs) -> bool:
        """Whether `run` takes such inputs: they were filled up, and there is a graph of their size or room for one more."""
        return inputs.texts.filled and (len(self._sizes) < MOST or _size(inputs) in self._sizes)

    def run(self, inputs: Inputs, seed: int) -> Tensor:
        """(14,) what the device computed of the step.

        Args:
            inputs: in host memory.
            seed: of dropout.
        """
        key = _size(inputs)
        size = self._sizes.get(key)
        if size is None:
            # Not what `to` gives, which on a CPU are the batch's own tensors.
            size = self._sizes[key] = _Size(inputs.each(lambda x: torch.empty_like(x, device=self._device)))
            _copy(inputs, size.inputs)
            return self._step(size.inputs, seed)
        _copy(inputs, size.inputs)
        torch.manual_seed(seed)  # a graph takes the seed that is set when it is replayed, and is recorded under no other
        if size.replay is None:
            size.replay = self._record(partial(self._step, size.inputs, seed))
        return size.replay().clone()


class CudaRecorder:
    """Records work on the device as CUDA graphs. They share the memory that they need in between: no two run at once."""

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Work) -> Work:
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        # The step before left as much memory unused as this one takes, and while a graph is recorded none can be given back.
        torch.cuda.empty_cache()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            # Other threads make batches ready and write checkpoints meanwhile: what they ask of CUDA is no part of this.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                out = work()
            finally:
                graph.capture_end()
        current.wait_stream(self._stream)

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay


def _size(inputs: Inputs) -> tuple[Any, ...]:
    """All that a graph of these inputs fixes: which tensors there are and their shapes, and what Python counts with."""
    shapes = tuple((tuple(x.shape), x.dtype) for x in inputs.tensors())
    given = tuple(name for name, x in inputs.loss.by_name().items() if x is not None)
    return shapes, given, inputs.here, tuple(map(tuple, inputs.parts))


def _copy(inputs: Inputs, to: Inputs) -> None:
    for there, here in zip(to.tensors(), inputs.tensors(), strict=True):
        there.copy_(here, non_blocking=True)
