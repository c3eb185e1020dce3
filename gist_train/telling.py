"""What ended a command, told to a person: in a screen, and without what is nobody's business."""

import os
import socket
from tempfile import NamedTemporaryFile

from gist_train.config.secrets import HIDDEN, hidden
from gist_train.progress import say, terminal
from gist_train.pulse import RankFailedError

LINES, SIGNS = 40, 2000
"""Of a message, and of a line of it, that are shown."""
EXPLAINED = f"{HIDDEN} stands for a password or token, which is shown and kept nowhere: a run's config.yaml has it not either."


def tell(error: Exception) -> None:
    """Says what went wrong. Of several processes, the first that failed says so, with its rank unless that is 0."""
    rank, message = os.environ.get("RANK", "0"), str(error)
    if rank != "0" and not isinstance(error, RankFailedError):
        message = f"rank {rank} (host {socket.gethostname()}, process {os.getpid()}):\n{message or type(error).__name__}"
    err = terminal()
    say(err, _at_most_a_screen(message))
    if HIDDEN in message:
        say(err, EXPLAINED)


def _at_most_a_screen(message: str) -> str:
    """The message, or its beginning and the file that has the whole of it: nobody reads more, and no terminal keeps it."""
    lines = message.splitlines()
    if len(lines) <= LINES and max(map(len, lines), default=0) <= SIGNS:
        return message
    shown = [line if len(line) <= SIGNS else f"{line[:SIGNS]}…" for line in lines[: LINES - 1]]
    try:
        with NamedTemporaryFile("w", encoding="utf-8", prefix="gist-train-", suffix=".txt", delete=False) as file:
            file.write(hidden(message) + "\n")
        rest = f"The whole message, {len(lines):,} lines: {file.name}"
    except OSError:  # a full disk may be what it speaks of
        rest = f"... and {len(lines) - len(shown):,} lines more"
    return "\n".join([*shown, rest])
