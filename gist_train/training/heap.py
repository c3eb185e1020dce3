"""Main memory that the C library holds but nothing uses: given back to the system before it piles up over days.

Batches of ever new sizes leave holes in the heap of glibc: each fits some later batch less well, and what is resident rises for
as long as a run lasts, though nothing is lost. Elsewhere (macOS, musl, another allocator put in its place) nothing is done.
"""

import ctypes
import resource
from collections.abc import Callable
from pathlib import Path

SETTLED = 100
"""Steps of a process after which its memory is as large as its work takes, holes included."""
SLACK = 1.1
"""How many times what was resident until then may be, before the holes are given back."""
_STATM = Path("/proc/self/statm")


class Heap:
    """Of this process, over the steps that it takes.

    Giving back takes some milliseconds, and the steps after it fetch anew what they need: a few in a hundred of their time
    where it happens every twenty steps.
    """

    def __init__(self) -> None:
        self.steps = 0
        self.limit = 0.0
        """Bytes resident above which holes are given back."""
        self._trim = _malloc_trim()

    def after_step(self) -> None:
        """Gives back what is not used, where the process has grown beyond what its first `SETTLED` steps took."""
        if self._trim is None:
            return
        self.steps += 1
        held = resident()
        if self.steps <= SETTLED:
            self.limit = max(self.limit, held * SLACK)
        elif held > self.limit:
            self._trim(0)
            # What is left is in use: a process that holds more than it did is not trimmed at every step for it.
            self.limit = max(self.limit, resident() * SLACK)


def resident() -> int:
    """Bytes of main memory that this process has now (Linux)."""
    return int(_STATM.read_text().split()[1]) * resource.getpagesize()


def _malloc_trim() -> Callable[[int], int] | None:
    """Glibc's, which gives back whole pages that are free anywhere in the heap; None where there is none."""
    if not _STATM.exists():
        return None
    try:
        trim: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except AttributeError:
        return None
    return trim
