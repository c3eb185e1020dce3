"""What torchrun shows of a process that failed: it reads a file, which a process that is killed can't write any more."""

import contextlib
import json
import os
import time
from pathlib import Path
from threading import Lock

from gist_train.config.secrets import hidden
from gist_train.data.files import write_text


class ErrorFile:
    """Of this process, where torchrun started it; else nothing is written."""

    def __init__(self) -> None:
        name = os.environ.get("TORCHELASTIC_ERROR_FILE")
        self.path = None if name is None else Path(name)
        self._final, self._lock = False, Lock()

    def write(self, message: str, *, final: bool) -> None:
        """Has `message` shown if the process ends now; one that is final stays."""
        with self._lock, contextlib.suppress(OSError):
            if self.path is None or self._final:
                return
            self._final = final
            shown = {"message": hidden(message), "extraInfo": {"timestamp": str(int(time.time()))}}
            write_text(self.path, json.dumps({"message": shown}))

    def remove(self) -> None:
        """The process ends well."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)
