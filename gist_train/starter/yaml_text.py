"""Values as they stand in a YAML file and in its comments."""

import math
import re

import yaml

from gist_train.starter.guessing import GuessedFile

NOT_IN_YAML = yaml.reader.Reader.NON_PRINTABLE


def written(text: str) -> str:
    """`text` as a YAML scalar for any place: bare where that is safe, else in double quotes with escapes."""
    bare = re.fullmatch(r"(?:\.{0,2}/)?[A-Za-z_][A-Za-z0-9_./-]*", text)
    if bare and text.lower() not in ("true", "false", "null", "yes", "no", "on", "off", "y", "n", "self"):
        return text
    return yaml.safe_dump(text, default_style='"', allow_unicode=True, width=math.inf).rstrip("\n")


def comment(value: object, characters: int = 60) -> str:
    """A cell's text, or the first of its texts, as it may be in a YAML comment."""
    first, more = (value[0], len(value) - 1) if isinstance(value, list) else (value, 0)
    line = " ".join(str(first).split())
    line = line if len(line) <= characters else line[: characters - 1] + "…"
    return NOT_IN_YAML.sub("\ufffd", line) + (f" (and {more} more)" if more else "")


def as_written(one: GuessedFile) -> list[str]:
    """The keys that say how the file is written, each as in the YAML; none of them where it is as usual."""
    columns = ", ".join(f"{role}: {written(column)}" for role, column in one.columns.items())
    keys = [f"columns: {{{columns}}}"] if columns else []
    if one.sample.delimiter is not None:
        keys.append(f"delimiter: {written(one.sample.delimiter)}")
    return keys if one.sample.header else [*keys, "header: false"]
