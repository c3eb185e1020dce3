"""What is said where memory runs out, on the host or the GPU: what was being done, how much was asked for, what lowers it."""

import errno
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

_SIZE = re.compile(r"(?:[Tt]ried to allocate|Unable to allocate) ([\d.]+) ?(bytes|[KMGTP]iB)")
_WORDS = re.compile(
    "out of memory|can't allocate memory|not enough memory|std::bad_alloc|CUBLAS_STATUS_ALLOC_FAILED"
    "|could not create a primitive(?! descriptor)"  # oneDNN, where there is no room for the code of a kernel
)
"""Of errors that have no class of their own."""
AT_HALF = 2
"""What a setting is divided by where nothing is known of what would fit."""


class MemoryShortageError(MemoryError):
    """Memory ran out; the message is for the user.

    Args:
        what: was being done, as "training, step 12".
        asked: how much could not be had, in words.
        lowering: settings that lower it, in the order in which to try them.
    """

    def __init__(self, what: str, asked: str, lowering: Sequence[str]):
        super().__init__(what, asked, lowering)
        self.what, self.asked, self.lowering = what, asked, lowering
        self.safe = "what was whole before is whole now: the same command goes on from there"
        """What is not lost."""

    def __str__(self) -> str:
        fix = "; ".join(self.lowering) or "free memory that other programs use, or take a machine that has more"
        return f"out of memory: {self.what}\n  asked for {self.asked}\n  fix       {fix}\n  safe      {self.safe}"


def asked_for(error: BaseException) -> str | None:
    """How much memory could not be had, in words; None for an error of another kind. Torch, numpy and Python each say it anew."""
    text = str(error)
    of_system = isinstance(error, OSError) and error.errno == errno.ENOMEM
    of_torch = isinstance(error, RuntimeError) and _WORDS.search(text) is not None
    if not (isinstance(error, MemoryError) or of_system or of_torch):
        return None
    size = _SIZE.search(text)
    amount = "an amount that was not said" if size is None else f"{size[1]} {size[2]}"
    if size is not None and size[2] == "bytes":
        count = float(size[1])
        amount = f"{count / 2**30:,.1f} GiB" if count >= 2**30 else f"{count / 2**20:,.1f} MiB"
    return f"{amount}, on the GPU" if "CUDA" in text or "CUBLAS" in text else amount


@contextmanager
def naming_work(work: Callable[[], tuple[str, Sequence[str]]]) -> Iterator[None]:
    """Has what fails within the block for want of memory say what was being done.

    Args:
        work: what was being done, and the settings that lower what it takes; asked only then.

    Raises:
        MemoryShortageError: memory ran out.
    """
    try:
        yield
    except MemoryShortageError:
        raise
    except Exception as error:
        asked = asked_for(error)
        if asked is None:
            raise
        what, lowering = work()
        # Without its traceback, whose frames hold what the work had: what follows needs some memory, too.
        raise MemoryShortageError(what, asked, lowering) from error.with_traceback(None)


def lowered(key: str, now: int, fitted: int | None, least: int) -> str | None:
    """A setting and the value to try: what is known to have fitted, else half of what it is now; None where it can't be lower."""
    value = max(least, now // AT_HALF if fitted is None or fitted >= now else fitted)
    if value >= now:
        return None
    why = f"which fitted before, and {now:,} did not" if value == fitted else f"in place of {now:,}"
    return f"{key}: {value} ({why})"
