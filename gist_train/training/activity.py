"""Whether this process gets on though it says nothing: it computes, or reads and writes files."""

import time
from pathlib import Path

import torch

WORKS = 0.05
"""Share of a processor's time from which on a process counts as at work: rows are sorted for an hour without a word."""
MOVES = 1_000_000
"""Bytes a second, read and written in files, from which on it does so too: a checkpoint, a model that comes from the hub."""


class Activity:
    """Of this process, between two looks."""

    def __init__(self) -> None:
        self._looked, self._spent, self._moved = time.monotonic(), time.process_time(), bytes_moved()

    def got_on(self, *, waits: bool) -> bool:
        """Whether it did since the last look.

        Args:
            waits: for other ranks: who waits for a GPU takes all of a core.
        """
        before = self._looked, self._spent, self._moved
        self._looked, self._spent, self._moved = time.monotonic(), time.process_time(), bytes_moved()
        seconds, spent, moved = (now - then for now, then in zip((self._looked, self._spent, self._moved), before, strict=True))
        computes = spent > WORKS * seconds and not (waits and torch.accelerator.is_available())
        return computes or moved > MOVES * seconds


def bytes_moved() -> int:
    """That this process has read and written in files so far; 0 where the system does not say."""
    try:
        rows = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    except OSError:
        return 0
    return int(rows["rchar"]) + int(rows["wchar"])
