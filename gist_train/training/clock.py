"""Where the time of a step goes."""

import time

import torch

PARTS = ("data", "forward", "loss", "backward", "optimizer", "communication", "graph")
"""Waiting for the batch and handing it to the device; encoding the texts; masks and loss; the backward pass (with gradient
caching the second forward pass too, with several processes the sum of gradients that overlaps it); clipping and AdamW; gathering
embeddings and adding up figures over processes; with a CUDA graph all of these but the first, which then are 0."""


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
        found = dict.fromkeys(PARTS, 0.0)
        for (_, began), (part, ended) in zip(self._marks, self._marks[1:], strict=False):
            if isinstance(began, torch.cuda.Event) and isinstance(ended, torch.cuda.Event):
                ended.synchronize()
                found[part] += began.elapsed_time(ended) / 1000
            elif isinstance(began, float) and isinstance(ended, float):
                found[part] += ended - began
        return found
