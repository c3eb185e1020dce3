"""What may be wrong with a row: each kind has a score, the higher the worse, and a threshold from which on a row is suspect."""

from dataclasses import dataclass
from typing import Annotated

from pydantic import AfterValidator, Field


@dataclass(frozen=True, slots=True)
class Kind:
    """A way in which a row may be bad."""

    about: str
    """What it says of a row, in words."""
    score: str
    """What the number is."""
    threshold: float
    """From which on a row is suspect, where nobody says otherwise."""
    least: float | None = None
    """The lowest threshold there may be, where texts that are less alike are not compared."""


NEAR = 0.97
"""Cosine from which on two texts are nearly the same: only such ones are compared further."""
KINDS = {
    "unrelated": Kind(
        "the pair is less similar than is usual in its task, and other texts of the task are nearer to the anchor",
        "share of the task's positives that are nearer; 0 where the pair is usual for its task",
        0.02,
    ),
    "outranked": Kind("many texts of the task are nearer to the anchor than its own positive", "their share", 0.2),
    "negative_nearer": Kind("a negative of the row is nearer to the anchor than its positive", "by how much, cosine", 0.1),
    "disagreeing": Kind(
        "another row has nearly the same anchor and quite another positive", "cosine of the anchors less that of positives", 0.5
    ),
    "labels": Kind("another text is nearly the same and has another label", "cosine of the texts", NEAR, NEAR),
    "duplicate": Kind(
        "earlier rows have the same pairs, or one nearly the same",
        "1, or the cosine of anchors or positives, the smaller",
        NEAR,
        NEAR,
    ),
    "repeated": Kind(
        "the positive is that of many rows, and by the guide, if there is one, unlike most of their anchors",
        "rows that have it",
        20.0,
    ),
    "same_text": Kind("anchor and positive are one text", "1", 1.0),
    "empty": Kind("a text has no letter and no digit", "1", 1.0),
    "cut": Kind("a text is longer than the student reads", "share of its tokens that is cut off", 0.5),
    "guide_cut": Kind("a text is longer than a guide reads", "share of its tokens that is cut off", 0.5),
    "evaluation": Kind("a text is one that evaluation.tasks judge on", "1", 1.0),
}
"""By name, as `data.drop_suspects` and `--write-suspects` have it."""


def _known(thresholds: dict[str, float]) -> dict[str, float]:
    if unknown := sorted({*thresholds} - {*KINDS}):
        raise ValueError(f"no kind {unknown[0]}: there are {', '.join(KINDS)}")
    for kind, threshold in thresholds.items():
        if (least := KINDS[kind].least) is not None and threshold < least:
            raise ValueError(f"set {kind} to {least:g} or more: rows that are less alike are not compared")
    return thresholds


Suspects = Annotated[
    dict[str, float], Field(min_length=1), AfterValidator(_known), "kinds of `gist-train audit`, each with a number"
]
"""By kind, the score from which on a row is suspect."""
