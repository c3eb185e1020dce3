"""Who works on what: processes that share work say what they have taken on, and what the dead had taken is free again."""

import fcntl
import os
from pathlib import Path
from types import TracebackType
from typing import Self
from uuid import uuid4


class Claims:
    """What this process has taken on, in a file of its own that it holds locked: the system lets go of it when the process dies.

    Every process of any run, on any machine that shares the disk, sees what all others have taken. Claims are opened, and `hold`
    and `others` called, while the folder is locked (`data.files.locked`).

    Args:
        folder: where all that share the work have their claims; it exists.
    """

    def __init__(self, folder: Path):
        self._own = folder / f".claim-{uuid4().hex}"
        self._stream = self._own.open("x+b")
        fcntl.flock(self._stream, fcntl.LOCK_EX)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._own.unlink(missing_ok=True)
        self._stream.close()

    def hold(self, content: bytes) -> None:
        """Says that this process has taken `content` on, in place of what it had before."""
        self._stream.seek(0)
        self._stream.truncate()
        self._stream.write(content)
        self._stream.flush()
        os.fsync(self._stream.fileno())  # other machines see what is on the disk

    def others(self) -> list[bytes]:
        """What each other living process has taken on; the claims of dead ones are removed."""
        taken = []
        for path in self._own.parent.glob(".claim-*"):
            if path == self._own:
                continue
            try:
                stream = path.open("rb")
            except FileNotFoundError:  # its owner is done, which takes no lock
                continue
            with stream:
                try:
                    fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except BlockingIOError:
                    taken.append(stream.read())
                else:
                    path.unlink(missing_ok=True)
        return taken
