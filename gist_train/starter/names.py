"""What the name of a file says: what it is called in the YAML, whether it is a test file, and of which set it is a part."""

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import chain, count
from pathlib import Path

from gist_train.data.tables import encodable
from gist_train.starter.guessing import GuessedFile

TEST_NAME = re.compile(r"(?:^|[._ -])(test|dev|eval|val|valid|validation)$", re.IGNORECASE)
"""Names of files that a model is likely to be judged by."""
SPLIT = re.compile(rf"{TEST_NAME.pattern}|(?:^|[._ -])train(?:ing)?$", re.IGNORECASE)
SHARD = re.compile(r"[._ -]?\d{4,}(?:-of-\d+)?$")
SAYS_NOTHING = {"", "data", "dataset", "default", "part"}
"""Names, beside those of splits, that files of any content have."""


def shards_together(guessed: Sequence[GuessedFile]) -> list[GuessedFile]:
    """Files that are parts of one, named by their numbers, as one file whose path is a pattern of them."""
    groups: dict[tuple[object, ...], list[GuessedFile]] = {}
    for one in guessed:
        path = Path(one.sample.path)
        name = path.name[: len(path.name) - len("".join(path.suffixes))]
        stem = SHARD.sub("", name)
        key = (path.parent, stem, path.suffixes, one.use, tuple(one.roles.items())) if stem != name else (path,)
        groups.setdefault(tuple(map(str, key)), []).append(one)
    together = []
    for parts in groups.values():
        first = Path(parts[0].sample.path)
        name = first.name[: len(first.name) - len("".join(first.suffixes))]
        pattern = first.with_name(SHARD.sub("", name) + "*" + "".join(first.suffixes))
        matched = {*map(str, Path(os.path.expanduser(pattern.parent)).glob(pattern.name))}
        if len(parts) > 1 and matched == {os.path.expanduser(part.sample.path) for part in parts}:
            sample = replace(parts[0].sample, path=str(pattern), whole=False)
            together.append(replace(parts[0], sample=sample))
        else:
            together += parts
    return together


def run_name(to: Path) -> str:
    """The name of the run that the YAML `to` describes: a plain folder name."""
    return folder_name(to.stem) or "my-model"


def folder_name(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")


def folders(one: GuessedFile) -> list[Path]:
    """The folders that the file is in, the nearest first."""
    return list(Path(os.path.expanduser(one.sample.path)).absolute().parents)


def _stem(one: GuessedFile) -> str:
    """The file's name without endings and the number of a part; of a file that is called by its number, its folder's."""
    return SHARD.sub("", one.sample.name) or folders(one)[0].name


def test_word(one: GuessedFile) -> str:
    """The word in the file's name that says so: test, dev, ...; "" where none does."""
    split = TEST_NAME.search(_stem(one))
    return split[1].lower() if split else ""


def set_of(one: GuessedFile) -> str:
    """What a training file and its test file are both called: banking77 of banking77_test.jsonl and of banking77/test.jsonl."""
    names = [SPLIT.sub("", name) for name in (_stem(one), *(folder.name for folder in folders(one))) if encodable(name)]
    return next((name for name in names if name.lower() not in SAYS_NOTHING), one.sample.name)


def says_nothing(one: GuessedFile) -> bool:
    """Whether files of any content have that name."""
    return SPLIT.sub("", SHARD.sub("", one.sample.name)).lower() in SAYS_NOTHING


def task_of(one: GuessedFile) -> str:
    """The file's own name, or that of a folder above it, where its own says nothing."""
    return set_of(one) if says_nothing(one) else one.sample.name


def free_name(name: str, taken: Iterable[str]) -> str:
    """A plain folder name that is not taken yet."""
    plain = folder_name(name) or "texts"
    return next(free for free in chain([plain], (f"{plain}-{number}" for number in count(2))) if free not in taken)
