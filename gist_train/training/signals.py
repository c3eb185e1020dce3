"""Being told to stop: SIGINT, SIGTERM and a launcher that has gone. Asked at a step's end, never acted on inside a handler."""

import os
import signal
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

_LAUNCHERS = (b"accelerate", b"torchrun", b"torch.distributed")


class StopSignal:
    """While open, remembers the first SIGINT or SIGTERM; the second one acts as ever, for those who can't wait."""

    def __init__(self) -> None:
        self._received = 0
        self._before: dict[int, Any] = {}
        self._parent = os.getppid()
        self._launched = _is_launcher(self._parent)

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._remember) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        self._received = number
        signal.signal(number, self._before[number])

    def received(self) -> int:
        """The signal's number, 0 for none. SIGTERM to a one-process `accelerate launch` ends the launcher alone: a process whose
        launcher has gone stops as if it had got the signal itself."""
        if not self._received and self._launched and os.getppid() != self._parent:
            return int(signal.SIGTERM)
        return self._received


def _is_launcher(process: int) -> bool:
    try:
        command = Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:  # no such file system: then only signals stop a run
        return False
    return any(name in command for name in _LAUNCHERS)
