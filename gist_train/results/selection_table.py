"""What `select` prints: the candidates, and every figure of the selected model against the base's, falls as well as rises."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from gist_train.results.changes import Change, changes, counted
from gist_train.results.leakage import Leak, leakage_table

SHOWN = 10
"""Checkpoints in the table of candidates; means of several are always in it."""


def selection_page(told: Mapping[str, Any]) -> Group:
    """The page of a selected.json."""
    parts: list[Table | Text] = [_candidates(told)]
    changed = changes(told["base"], told["figures"])
    if changed:
        parts += [_against_base(changed), Text(falls(changed))]
    leaks = [Leak(**leak) for leak in told["leakage"]]
    if leaks and any(leak.shared or leak.part is None for leak in leaks):
        parts.append(leakage_table(leaks))
    parts.append(Text(f"selected: {told['name']}, {told['checkpoint']}, by {chosen_by(told)}"))
    return Group(*parts)


def falls(changed: Sequence[Change]) -> str:
    """How many figures rose and fell, and which fell most."""
    found = counted(changed)
    told = f"{found.rose} of {len(changed)} figures rose against the base, {found.fell} fell"
    if found.worst is None or found.worst.difference is None:
        return f"{told}."
    return f"{told}; most of all {found.worst.key}, by {-100 * found.worst.difference:.2f} points."


def chosen_by(told: Mapping[str, Any]) -> str:
    """What a selected.json was chosen by, in words."""
    if told["metric"] is None:
        return str(told["rule"])
    weights = told["metric"]
    alike = len(set(weights.values())) == 1
    names = ", ".join(key if alike else f"{key} (weight {weight:g})" for key, weight in weights.items())
    return names if len(weights) == 1 else f"the mean of {names}"


def _candidates(told: Mapping[str, Any]) -> Table:
    where = "" if told["around"] is None else f" within {told['window']:,} steps of {told['around']:,}"
    table = Table(title=f"candidates{where}")
    table.add_column("candidate", overflow="fold")
    metric = told["metric"] or {}
    if metric:
        table.add_column("score", justify="right")
    table.add_column("loss", justify="right")
    if metric:
        table.add_column("behind", justify="right")
        table.add_column("95 %", no_wrap=True)
    single = 0
    for of in told["candidates"]:
        made = len(of["steps"]) > 1 or of["base_weight"] > 0
        single += not made
        if single > SHOWN and not made:
            continue
        loss = "" if of["loss"] is None else f"{of['loss']:.4f}"
        behind = [] if not metric else ["" if of["behind"] is None else f"{100 * of['behind']:.2f}", _interval(of)]
        table.add_row(of["name"], *([f"{100 * of['score']:.2f}"] if metric else []), loss, *behind)
    captions = ["loss: as last logged"]
    if metric:
        captions = ["x 100; " + captions[0], "95 %: of resamples of the tasks' items; * within noise"]
    if single > SHOWN:
        captions.append(f"and {single - SHOWN} more in selected.json")
    table.caption = "\n".join(captions)
    return table


def _interval(of: Mapping[str, Any]) -> str:
    if of["interval"] is None:
        return ""
    low, high = (100 * end for end in of["interval"])
    return f"{low:.2f} to {high:.2f}{' *' if of['within_noise'] else ''}"


def _against_base(changed: Sequence[Change]) -> Table:
    table = Table(title="every figure x 100, base against selected")
    table.add_column("figure", no_wrap=True)
    for column in ("base", "selected", "difference"):
        table.add_column(column, justify="right")
    for change in changed:
        before = "not measured" if change.before is None else f"{100 * change.before:.2f}"
        difference = "" if change.difference is None else f"{100 * change.difference:+z.2f}"
        table.add_row(change.key, before, f"{100 * change.after:.2f}", difference)
    return table
