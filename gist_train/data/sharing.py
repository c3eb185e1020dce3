"""Work in parts that all processes share which ask for it, of one launch or of several, on one machine or on several."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

from gist_train.data.files import read_checked
from gist_train.data.leases import Claims, locked
from gist_train.pulse import PULSE

POLL_SECONDS = 0.1
"""Between two looks at what the others have done."""


def shared_out(target: Path, parts: Path, count: int, finish: Callable[[], bool] = lambda: True) -> Iterator[int | None]:
    """Yields the number of a part that this process is to make before it asks for the next; None while others make the rest.

    Ends when `target` is there, or all parts are and `finish` says that all is well. A part whose process died another one makes.

    Args:
        target: the folder that the parts are for.
        parts: a folder of a name that is its work's alone, in which part `number` is the file or folder `str(number)`.
        count: of all parts.
        finish: called by one process at a time when all parts are there: whether that is the end. If not, it has removed some.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with locked(target.parent):
        claims = Claims(target.parent)
    with claims:
        while True:
            with locked(target.parent):
                missing = missing_parts(target, parts, count)
                if not missing:
                    if target.exists() or finish():
                        return
                    continue
                taken = claims.others()
                mine = next((number for number in missing if f"{parts.name} {number}".encode() not in taken), None)
                claims.hold(b"" if mine is None else f"{parts.name} {mine}".encode())
            yield mine
            if mine is None:  # whether the others get on with it, their own run watches
                PULSE.beat()
                time.sleep(POLL_SECONDS)


def missing_parts(target: Path, parts: Path, count: int) -> list[int]:
    """The parts that nobody has made yet; none where `target` is there, for which they were made."""
    if target.exists():
        return []
    there = {path.name for path in parts.iterdir()} if parts.is_dir() else set()
    return [number for number in range(count) if str(number) not in there]


def all_whole(parts: Path, count: int) -> bool:
    """Whether all parts, files of `write_checked`, are as they were written; those that are not are removed."""
    damaged = [number for number in range(count) if read_checked(parts / str(number)) is None]
    for number in damaged:
        (parts / str(number)).unlink()
    return not damaged
