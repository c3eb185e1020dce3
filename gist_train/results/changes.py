"""Figures before training and after: which rose, which fell, and by how much."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Change:
    """A figure before training and after, as fractions."""

    key: str
    """<task>/<metric>"""
    before: float | None
    """None where it was not measured."""
    after: float

    @property
    def difference(self) -> float | None:
        """after - before, to the four decimals that tables show, so that what is counted is what is seen."""
        return None if self.before is None else round(self.after, 4) - round(self.before, 4)


@dataclass(frozen=True, slots=True)
class Counted:
    """How many figures rose and fell."""

    rose: int
    fell: int
    same: int
    new: int
    """Not measured before."""
    worst: Change | None
    """The one that fell most; None where none did."""


def changes(before: Mapping[str, float], after: Mapping[str, float]) -> list[Change]:
    """A change for each figure of `after`, in its order."""
    return [Change(key, before.get(key), value) for key, value in after.items()]


def counted(of: Sequence[Change]) -> Counted:
    """How many of the figures rose and fell, and which fell most."""
    known = [(change.difference, change) for change in of if change.difference is not None]
    worst = min(known, key=lambda pair: pair[0], default=None)
    return Counted(
        rose=sum(difference > 0 for difference, _ in known),
        fell=sum(difference < 0 for difference, _ in known),
        same=sum(difference == 0 for difference, _ in known),
        new=len(of) - len(known),
        worst=worst[1] if worst is not None and worst[0] < 0 else None,
    )
