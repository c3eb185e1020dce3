"""Passwords and tokens, which stand in paths and addresses and are neither shown nor kept."""

import ctypes
import os
import re
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, TextIO

HIDDEN = "***"

# Of an address all that is before the @ goes, the user's name too; a password may hold a slash, though it shouldn't.
_USER_INFO = re.compile(r"""([A-Za-z][A-Za-z0-9+.-]{0,20}:/{1,3})(?:[^\s/:@"'<>]*:(?!\d{1,5}(?:/|$))[^\s"'<>]*|[^\s/"'<>]+)@""")
# name=value and, for names that mean nothing else, name: value. The name stays: it says what was there.
_NAMED = re.compile(
    r"""((?:passw(?:or)?d|passphrase|\bpwd|secret|token|credentials?|signature|\bsig|\bauth|(?:api|access|account|private)[_-]?key)"""
    r"""(?:[_-]?id)?["']?\s*(?:=|%3D)\s*["']?|"""
    r"""(?:passw(?:or)?d|passphrase|secret|(?:api|access|account|private)[_-]?key|(?:access|auth|hf|api)[_-]?token)"""
    r"""["']?\s*:\s*["']?|\bauthorization["']?\s*[:=]\s*["']?(?:\w+\s+)?|\bbearer\s+(?=\S{16}))([^\s"'&;,<>]+)""",
    re.IGNORECASE,
)
# Values that say by their form what they are.
_FORMS = re.compile(
    r"(?<![A-Za-z0-9])(?:"
    r"hf_(?=[a-z]*[A-Z0-9])[A-Za-z0-9]{16,}|hf_[a-z]{30,}|wandb_v\d_\w{16,}|(?:AKIA|ASIA)[A-Z0-9]{16}|"
    r"gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}|xox[abeprs]-[\w-]{10,}|AIza[\w-]{35}|"
    r"sk-[\w-]*[A-Za-z0-9]{20,}|npm_[A-Za-z0-9]{30,}|pypi-[\w-]{30,}|eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]+"
    r")"
)
# Older keys of Weights & Biases look like commits: only where wandb is named are they taken for keys.
_WANDB = re.compile(r"(wandb.{0,60}?)(?<![0-9A-Za-z])[0-9a-f]{40}(?![0-9A-Za-z])", re.IGNORECASE | re.DOTALL)
_VARIABLES = (
    *("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN"),
    *("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"),
)
"""Variables of the environment whose values are secrets, whatever their form."""
_SHORTEST = 12
"""Characters of such a value: of a shorter one every mention of an ordinary word might be hidden."""


def hidden(text: str) -> str:
    """`text`, with *** in place of each password, token and user in an address."""
    for value in _of_environment(*map(os.environ.get, _VARIABLES)):
        text = text.replace(value, HIDDEN)
    if "@" in text:
        text = _USER_INFO.sub(rf"\1{HIDDEN}@", text)
    text = _FORMS.sub(HIDDEN, _NAMED.sub(rf"\1{HIDDEN}", text))
    return _WANDB.sub(rf"\1{HIDDEN}", text) if "wandb" in text.lower() else text


def without_secrets(value: Any) -> Any:
    """A value as JSON has them, with `hidden` done to all texts in it, keys too."""
    if isinstance(value, str):
        return hidden(value)
    if isinstance(value, Mapping):
        return {without_secrets(key): without_secrets(part) for key, part in value.items()}
    return [without_secrets(part) for part in value] if isinstance(value, list | tuple) else value


class HidingStream:
    """A stream of text that `hidden` is done to, whoever writes: other packages, warnings, the traceback of a fault of ours."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Writes `text` as it may be read by anybody."""
        self._stream.write(hidden(text))
        return len(text)


def hide_command_line() -> None:
    """Has no secret in `sys.argv`, which others keep, nor, on Linux, in what `ps` shows of this process."""
    sys.argv = [hidden(word) for word in sys.argv]
    if sys.platform != "linux":
        return
    # man 5 proc_pid_stat: the fields 48 and 49 are where the words begin and end in this process's memory.
    fields = Path("/proc/self/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    start, end = int(fields[45]), int(fields[46])
    if not 0 < start < end:
        return
    words = ctypes.string_at(start, end - start)
    shown = b"\0".join(os.fsencode(hidden(os.fsdecode(word))) for word in words.split(b"\0"))
    if shown != words:
        ctypes.memmove(start, shown[: len(words)].ljust(len(words), b"\0"), len(words))


@cache
def _of_environment(*values: str | None) -> list[str]:
    return [value for value in values if value is not None and len(value) >= _SHORTEST]
