"""Which models a first config names, and how many tokens they read of a text."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from gist_train.data.files import read_json
from gist_train.starter.guessing import GuessedFile


class Pair(NamedTuple):
    """A student and its guide, ids on the hub."""

    model: str
    guide: str


LARGE = Pair("BAAI/bge-small-en-v1.5", "WhereIsAI/UAE-Large-V1")
"""Those of GIST-small-Embedding-v0: 12 layers of 384 dimensions under 24 layers of 1,024."""
SMALL = Pair("sentence-transformers/all-MiniLM-L6-v2", "BAAI/bge-small-en-v1.5")
"""What two CPU cores train in an evening: 6 layers of 384 dimensions under 12, the guide the better of the two (MTEB's table)."""
COST_OF_LARGE = Pair("2", "14")
"""Matrix products a token (12 x layers x dimensions**2) of LARGE over those of SMALL."""
LENGTHS = (64, 128, 256, 512)
"""Tokens that texts may be cut to."""
HELD = 0.95
"""Share of the texts that are to be read whole."""


def pair_for(model: str | None, guide: str | None, *, on_cpu: bool) -> Pair:
    """What is named, and for what is not a model that the machine can train, or guide with."""
    usual = SMALL if on_cpu else LARGE
    student = model or usual.model
    if guide is None:  # a model that guides itself from its own start says little
        guide = LARGE.guide if student == usual.guide else usual.guide
    return Pair(student, guide)


def length_for(files: Iterable[GuessedFile]) -> int:
    """The smallest of LENGTHS that reads nearly all of the texts looked at as a whole, by a guess at their tokens."""
    values = (row[column] for one in files for column in one.text_columns for row in one.sample.rows if column in row)
    texts = (str(text) for value in values for text in (value if isinstance(value, list) else [value]))
    tokens = sorted(map(_guessed_tokens, texts))
    most = tokens[math.ceil(HELD * len(tokens)) - 1] if tokens else 0
    return next((length for length in LENGTHS if length >= most), LENGTHS[-1])


def read_by(model: str, length: int) -> int:
    """`length`, or the positions of a model that is a local folder, where it has fewer."""
    try:
        positions = read_json(Path(model) / "config.json")["max_position_embeddings"]
    except (OSError, ValueError, KeyError, TypeError):  # of the hub, or unlimited; plan will say what is wrong with it
        return length
    return min(length, positions) if isinstance(positions, int) else length


def _guessed_tokens(text: str) -> int:
    """Word pieces of a text, rather too many: a third more than words, one for each 4 letters, and for each sign beyond Latin."""
    return 2 + max(4 * len(text.split()) // 3, len(text) // 4, sum(character > "\u024f" for character in text))
