"""What the Hugging Face hub is asked, with time limits of our own, and what it means when it does not answer."""

import time
from collections.abc import Callable
from threading import Event

from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

SECONDS_TO_ANSWER = 10.0
SECONDS_BETWEEN_TRIES = (1.0, 2.0)
"""Before the second and the third try."""
ANSWERS = {
    401: "does not know the token",
    403: "refuses it to this account",
    404: "has no such name or revision, or none that this account may see",
    429: "was asked too often",
}
"""HTTP status -> what it says of the hub."""
NOT_TRIED_AGAIN = (401, 403, 404)
_silent = Event()


class HubError(OSError):
    """The hub does not tell; the message says why."""

    def __init__(self, reason: str, *, as_wished: bool = False):
        super().__init__(reason)
        self.as_wished = as_wished
        """Whether the user wants it not to be asked."""


def silent() -> bool:
    """Whether the hub did not answer this process before: what has a copy in the cache does not wait for it again."""
    return _silent.is_set()


def asked(question: Callable[[], str | None], *, once: bool) -> str:
    """What the hub answers.

    Args:
        question: asks it, with `SECONDS_TO_ANSWER` as its time limit.
        once: whether it is asked once, since there is a copy in a cache; else three times, where that may help.

    Raises:
        HubError: it did not answer, could not be asked, or named nothing.
    """
    waits = () if once else SECONDS_BETWEEN_TRIES
    for wait in (*waits, None):
        try:
            answer = question()
        except OfflineModeIsEnabled:
            raise HubError("HF_HUB_OFFLINE is set", as_wished=True) from None
        except Exception as error:  # of the HTTP library of the day, whose classes share none with the hub's
            status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
            if status is None:
                _silent.set()
            if wait is None or status in NOT_TRIED_AGAIN:
                raise HubError(f"the hub {_in_words(error, status)}") from error
            time.sleep(wait)
        else:
            if answer is None:
                raise HubError("the hub names no commit of it")
            return answer
    raise AssertionError("the last try returns or raises")


def _in_words(error: Exception, status: int | None) -> str:
    if status is not None:
        return f"{ANSWERS.get(status, 'fails')} (HTTP {status})"
    kind = type(error).__name__
    if "Timeout" in kind:
        return f"did not answer within {SECONDS_TO_ANSWER:g} s"
    return "can't be reached" if "Connect" in kind else f"answers with what can't be read ({kind})"
