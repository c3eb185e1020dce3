"""Work in parts that all processes share which ask for it, of one launch or of several, on one machine or on several."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

from gist_train.data.leases import Claims, locked
from gist_train.pulse import PULSE

POLL_SECONDS = 0.1
"""Between two looks at what the others have done."""


def shared_out(folder: Path, kind: str, missing: Callable[[], list[int]], finish: Callable[[], bool]) -> Iterator[int | None]:
    """Yields the number of a part that this process is to do before it asks for the next; None while others do the rest.

    Ends when no part is missing and `finish` has said that all is well. A part whose process died is given to another.

    Args:
        folder: where all that share the work see each other; made where it is not there.
        kind: of the work: of others in the same folder nothing is known.
        missing: the parts that nobody has done yet; called by one process at a time.
        finish: called by one process at a time when none is missing: whether that is the end, or parts were found wanting.
    """
    with locked(folder):
        claims = Claims(folder)
    with claims:
        while True:
            with locked(folder):
                left = missing()
                if not left:
                    if finish():
                        return
                    continue
                taken = claims.others()
                mine = next((number for number in left if f"{kind} {number}".encode() not in taken), None)
                claims.hold(b"" if mine is None else f"{kind} {mine}".encode())
            yield mine
            if mine is None:  # whether the others get on with it, their own run watches
                PULSE.beat()
                time.sleep(POLL_SECONDS)
