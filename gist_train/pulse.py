"""How far this process is, for the other processes of its run: they wait for it as long as it gets on (`training/ranks.py`)."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(slots=True)
class Pulse:
    """What a process is at. The main thread writes it; another reads it."""

    work: str = "start"
    """In words, as "training" or "embedding with the guide"."""
    step: int = 0
    """Updates so far, of the training."""
    count: int = 0
    """Rises whenever the work gets on."""
    waits: bool = False
    """For other ranks, in a collective: it may stand still as long as one of them gets on."""

    def beat(self, work: str | None = None, step: int | None = None) -> None:
        """The work got on."""
        self.work, self.step, self.count = work or self.work, self.step if step is None else step, self.count + 1


PULSE = Pulse()
"""Of this process."""


@contextmanager
def waiting() -> Iterator[None]:
    """Within it this process may be waiting for the others."""
    before, PULSE.waits = PULSE.waits, True
    try:
        yield
    finally:
        PULSE.beat()  # before it counts as at work again: what it waited for took as long as it took
        PULSE.waits = before


class RankFailedError(Exception):
    """Another rank failed, died or hangs.

    Args:
        message: which, and how.
        code: that all ranks exit with.
        said: whether another process on this machine says so.
    """

    def __init__(self, message: str, code: int, *, said: bool):
        super().__init__(message)
        self.code, self.said = code, said
