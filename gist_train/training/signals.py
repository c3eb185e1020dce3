"""Being told to stop: Ctrl-C, a scheduler's signal, a closed terminal and a launcher that has gone."""

import os
import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread, current_thread, main_thread
from types import FrameType, TracebackType
from typing import Any, Self

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
"""Ctrl-C; kill, Slurm, Kubernetes; Slurm's warning (--signal=USR1@120); a closed ssh session."""
WATCH_SECONDS = 1.0
"""Between two looks at whether the launcher is there."""
PATIENCE = 2.0
"""Seconds that the main thread has to act on a second signal."""
_LAUNCHERS = (b"accelerate", b"torchrun", b"torch.distributed")


class Stopped(BaseException):
    """Work was left by a signal: what is half written is cleaned up on the way out, and what is whole is kept.

    Args:
        number: the signal's.
    """

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


@contextmanager
def ignored() -> Iterator[None]:
    """Within it no signal that asks to stop does anything."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class StopSignal:
    """While open, a signal raises `Stopped` (Ctrl-C: KeyboardInterrupt), or is noted and asked for. The second acts as ever: also
    where the main thread waits in C code for another rank, and Python can't call it.

    A signal that is ignored, as nohup has it of a closed terminal, stays so. SIGTERM to a one-process `accelerate launch` ends
    the launcher alone: a process whose launcher has gone is stopped as if it had got the signal itself. In another thread than
    the main one, to which signals go, nothing is done.

    Args:
        ends_process: whether a second signal ends the process where the main thread can't act on it. Not in a program that has
            called us: it may have more to lose than a training.
    """

    _launcher_watched = False

    def __init__(self, *, ends_process: bool = True) -> None:
        self._ends_process = ends_process
        self._received = 0
        self._noting = self._acted = False
        self._before: dict[int, Any] = {}
        self._parent = os.getppid()
        self._over = Event()

    def __enter__(self) -> Self:
        self._open = current_thread() is main_thread()
        if not self._open:
            return self
        # None: of another language's, which Python could not put back.
        handled = [number for number in SIGNALS if signal.getsignal(number) not in (signal.SIG_IGN, None)]
        self._before = {number: signal.signal(number, self._handle) for number in handled}
        if self._ends_process:
            reading, self._writing = os.pipe()
            os.set_blocking(self._writing, False)
            self._wakeup = signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
            Thread(target=self._count, args=(reading,), name="signals", daemon=True).start()
        self._watches = _is_launcher(self._parent) and not StopSignal._launcher_watched
        if self._watches:  # one of those that are open is enough: a second signal would mean another thing
            StopSignal._launcher_watched = True
            Thread(target=self._watch, name="launcher", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if not self._open:
            return
        self._over.set()
        if self._watches:
            StopSignal._launcher_watched = False
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._ends_process:
            signal.set_wakeup_fd(self._wakeup)
            os.close(self._writing)  # ends the thread

    @contextmanager
    def noted(self, noting: bool = True) -> Iterator[None]:
        """Within it a signal is noted for `received`, and acts nowhere; or, within that again, acts at once all the same."""
        before, self._noting = self._noting, noting
        try:
            yield
        finally:
            self._noting = before

    def received(self) -> int:
        """The signal's number, 0 for none."""
        return self._received

    def _handle(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        self._received = number
        signal.signal(number, self._handle_second)
        if not self._noting:
            raise KeyboardInterrupt if number == signal.SIGINT else Stopped(number)

    def _handle_second(self, number: int, frame: FrameType | None) -> None:
        self._acted = True
        before = self._before[number]
        signal.signal(number, before)
        if callable(before):
            before(number, frame)
        else:
            os.kill(os.getpid(), number)

    def _count(self, reading: int) -> None:
        """Ends the process at the second signal of a kind if the main thread does not come to it. What is whole stays whole."""
        came: Counter[int] = Counter()
        while numbers := os.read(reading, 64):
            came.update(number for number in numbers if number in self._before)
            if max(came.values(), default=0) > 1 and not self._over.wait(PATIENCE) and not self._acted:
                os._exit(128 + came.most_common(1)[0][0])
        os.close(reading)

    def _watch(self) -> None:
        while not self._over.wait(WATCH_SECONDS):
            if os.getppid() != self._parent:
                os.kill(os.getpid(), signal.SIGTERM)
                return


def _is_launcher(process: int) -> bool:
    try:
        command = Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:  # no such file system: then only signals stop a run
        return False
    return any(name in command for name in _LAUNCHERS)
