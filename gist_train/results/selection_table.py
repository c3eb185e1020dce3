"""What `select` prints: the candidates, and every score of the selected model against the base's, falls as well as rises."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.console import Group
from rich.table import Table
from rich.text import Text

from gist_train.evaluation.leakage import leakage_table
from gist_train.progress import in_points, points_apart
from gist_train.results.ranking import weighted_score
from gist_train.results.selected import Selected, SelectedCandidate

SHOWN = 10
"""Checkpoints in the table of candidates; means of several are always in it."""


@dataclass(frozen=True, slots=True)
class Change:
    """A score before training and after, as fractions."""

    key: str
    """<task>/<metric>"""
    before: float | None
    """None where it was not measured."""
    after: float

    @property
    def difference(self) -> float | None:
        """after - before, to the two decimals of a point that tables show, so that what is counted is what is seen."""
        return None if self.before is None else points_apart(self.after, self.before, 2) / 100


@dataclass(frozen=True, slots=True)
class Counted:
    """How many scores rose and fell."""

    rose: int
    fell: int
    same: int
    new: int
    """Not measured before."""
    worst: Change | None
    """The one that fell most; None where none did."""


def changes(before: Mapping[str, float], after: Mapping[str, float]) -> list[Change]:
    """A change for each score of `after`, in its order."""
    return [Change(key, before.get(key), value) for key, value in after.items()]


def counted(changed: Sequence[Change]) -> Counted:
    """How many of the scores rose and fell, and which fell most."""
    known = [(change.difference, change) for change in changed if change.difference is not None]
    worst = min(known, key=lambda pair: pair[0], default=None)
    return Counted(
        rose=sum(difference > 0 for difference, _ in known),
        fell=sum(difference < 0 for difference, _ in known),
        same=sum(difference == 0 for difference, _ in known),
        new=len(changed) - len(known),
        worst=worst[1] if worst is not None and worst[0] < 0 else None,
    )


def selection_page(selected: Selected) -> Group:
    """The page of a selected.json."""
    parts: list[Table | Text] = [_candidates(selected)]
    changed = changes(selected.base, selected.scores)
    if changed:
        parts += [_against_base(changed), Text(falls(changed))]
    if any(leak.shared or leak.part is None for leak in selected.leakage):
        parts.append(leakage_table(selected.leakage))
    parts.append(Text(f"selected: {selected.name}, {selected.checkpoint}, by {chosen_by(selected)}"))
    if (warning := below_base(selected)) is not None:
        parts.append(Text(warning, style="bold yellow"))
    return Group(*parts)


def falls(changed: Sequence[Change]) -> str:
    """How many scores rose and fell, and which fell most."""
    counts = counted(changed)
    line = f"{counts.rose} of {len(changed)} scores rose against the base, {counts.fell} fell"
    if counts.worst is None or counts.worst.difference is None:
        return f"{line}."
    return f"{line}; most of all {counts.worst.key}, by {-100 * counts.worst.difference:.2f} points."


def below_base(selected: Selected) -> str | None:
    """A line where what was chosen is no better than the base model: by the metric that decided, or in any score where none did.

    None where it is better, or where that is not known.
    """
    keep = "Keep it, or train anew: with a lower optimizer.lr, with more or cleaner rows (gist-train audit), with another guide."
    if selected.metric is None:
        counts = counted(changes(selected.base, selected.scores))
        if counts.rose or not counts.fell:
            return None
        return f"The selected model is better than the base model in no score. {keep}"
    score = selected.candidates[0].score
    if score is None or not selected.base.keys() >= selected.metric.keys():
        return None
    base = weighted_score(selected.base, selected.metric)
    if score > base:
        return None
    return f"No checkpoint{_where(selected)} is better than the base model: {100 * score:.2f} against {100 * base:.2f}. {keep}"


def chosen_by(selected: Selected) -> str:
    """What a model was chosen by, in words."""
    weights = selected.metric
    if weights is None:
        return selected.rule
    alike = len(set(weights.values())) == 1
    names = ", ".join(key if alike else f"{key} (weight {weight:g})" for key, weight in weights.items())
    return names if len(weights) == 1 else f"the mean of {names}"


def _where(selected: Selected) -> str:
    """Where the candidates are from, if that is no whole run."""
    return "" if selected.around is None else f" within {selected.window:,} steps of {selected.around:,}"


def _candidates(selected: Selected) -> Table:
    by_metric = selected.metric is not None
    table = Table(title=f"candidates{_where(selected)}")
    table.add_column("candidate", overflow="fold")
    if by_metric:
        table.add_column("score", justify="right")
    table.add_column("mean loss", justify="right")
    if by_metric:
        table.add_column("behind", justify="right")
        table.add_column("95 % interval", no_wrap=True)
    single = 0
    for candidate in selected.candidates:
        single += not candidate.averaged
        if single > SHOWN and not candidate.averaged:
            continue
        loss = "" if candidate.loss is None else f"{candidate.loss:.4f}"
        if by_metric:
            table.add_row(candidate.name, _percent(candidate.score), loss, _percent(candidate.behind), _interval(candidate))
        else:
            table.add_row(candidate.name, loss)
    captions = ["mean loss: as it was last logged before, over tracking.log_every steps"]
    if by_metric:
        captions = ["scores x 100", *captions, "95 % interval: how far behind it may be, on other texts of the same kind"]
        captions.append("* too close to call: the interval holds 0")
    if single > SHOWN:
        captions.append(f"and {single - SHOWN} more in selected.json")
    table.caption = "\n".join(captions)
    return table


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.2f}"


def _interval(candidate: SelectedCandidate) -> str:
    if candidate.interval is None:
        return ""
    low, high = candidate.interval
    return f"{100 * low:.2f} to {100 * high:.2f}{' *' if candidate.within_noise else ''}"


def _against_base(changed: Sequence[Change]) -> Table:
    table = Table(title="every score x 100, base against selected")
    table.add_column("metric", no_wrap=True)
    for column in ("base", "selected", "difference"):
        table.add_column(column, justify="right")
    for change in changed:
        before = "not measured" if change.before is None else f"{100 * change.before:.2f}"
        difference = "" if change.before is None else in_points(change.after, change.before, decimals=2)
        table.add_row(change.key, before, f"{100 * change.after:.2f}", difference)
    return table
