"""What a user did wrong, said so that they can fix it: where, found, expected, fix."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from gist_train.config.secrets import hidden

OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters but tab and line feed, Unicode's that order text from right to left, halves of surrogate pairs."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that is wrong with the user's input."""

    where: str
    """File, row and field, or the path of the key: `data.train[2]: tickets.jsonl, row 1,204: "positive" is empty`."""
    found: str
    """What is there now."""
    expected: str
    """What may be there."""
    fix: str
    """What to do about it."""

    def __str__(self) -> str:
        return visible(hidden(f"{self.where}\n  found     {self.found}\n  expected  {self.expected}\n  fix       {self.fix}"))


class UserError(Exception):
    """The user's input is wrong: the command line ends with exit code 2, these faults and no traceback."""

    def __init__(self, *faults: Fault):
        super().__init__(*faults)
        self.faults = faults

    def __str__(self) -> str:
        return "\n".join(str(fault) for fault in self.faults)


def listed(names: Iterable[str], most: int = 20) -> str:
    """The first `most` names, and how many more there are; "(none)" for none."""
    names = list(names)
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return f"{', '.join(names[:most])}{more}" or "(none)"


def visible(text: str) -> str:
    """The text with what a terminal would obey, and not show, written out: escape sequences, and signs that turn text around."""
    return OBEYED.sub(lambda sign: ascii(sign[0])[1:-1], text)


def shown(value: object, limit: int = 80) -> str:
    """`value` as it may follow "found": quoted, on one line, cut to `limit` characters; a path is whole, its end says most."""
    if isinstance(value, Path):
        return '"' + "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in str(value)) + '"'
    text = repr(value) if not isinstance(value, str) else f'"{value}"'
    text = visible(" ".join(text.split()))
    return text if len(text) <= limit else text[: limit - 1] + "…"
