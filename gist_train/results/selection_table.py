"""What `select` prints: the candidates, and every figure of the selected model against the base's, falls as well as rises."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from gist_train.results.leakage import Leak, leakage_table

SHOWN = 10
"""Checkpoints in the table of candidates; means of several are always in it."""


def selection_page(told: Mapping[str, Any], leaks: Sequence[Leak]) -> Group:
    """The page of a selected.json, and what the run's training rows share with its tasks."""
    parts: list[Table | Text] = [_candidates(told)]
    if told["figures"]:
        parts += [_against_base(told["base"], told["figures"]), Text(falls(told["base"], told["figures"]))]
    if leaks and any(leak.shared or leak.part is None for leak in leaks):
        parts.append(leakage_table(leaks))
    parts.append(Text(f"selected: {told['name']}, {told['checkpoint']}, by {chosen_by(told)}"))
    return Group(*parts)


def falls(base: Mapping[str, float], figures: Mapping[str, float]) -> str:
    """How many figures rose and fell, and which fell most."""
    differences = {key: value - base[key] for key, value in figures.items() if key in base}
    if not differences:
        return "The base model was not measured."
    rose, fell = sum(of > 0 for of in differences.values()), sum(of < 0 for of in differences.values())
    told = f"{rose} of {len(differences)} figures rose against the base, {fell} fell"
    worst = min(differences, key=lambda key: differences[key])
    return f"{told}; most of all {worst}, by {-100 * differences[worst]:.1f} points." if fell else f"{told}."


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
    table.add_column("candidate")
    metric = told["metric"] or {}
    if metric:
        table.add_column("score x 100", justify="right")
    for key in metric if len(metric) > 1 else ():
        table.add_column(key, justify="right")
    table.add_column("training loss", justify="right")
    if metric:
        table.add_column("behind", justify="right")
        table.add_column("95 % of resamples")
    single = 0
    for of in told["candidates"]:
        made = len(of["steps"]) > 1 or of["base_weight"] > 0
        single += not made
        if single > SHOWN and not made:
            continue
        figures = [f"{100 * of['figures'][key]:.2f}" for key in metric] if len(metric) > 1 else []
        loss = "" if of["loss"] is None else f"{of['loss']:.4f}"
        behind = [] if not metric else ["" if of["behind"] is None else f"{100 * of['behind']:.2f}", _interval(of)]
        table.add_row(of["name"], *([f"{100 * of['score']:.2f}"] if metric else []), *figures, loss, *behind)
    if single > SHOWN:
        table.caption = f"and {single - SHOWN} more in selected.json"
    return table


def _interval(of: Mapping[str, Any]) -> str:
    if of["interval"] is None:
        return ""
    low, high = (100 * end for end in of["interval"])
    return f"{low:.2f} to {high:.2f}{': within noise' if of['within_noise'] else ''}"


def _against_base(base: Mapping[str, float], figures: Mapping[str, float]) -> Table:
    table = Table(title="every figure x 100, base against selected")
    for column in ("figure", "base", "selected", "difference"):
        table.add_column(column, justify="left" if column == "figure" else "right")
    for key, value in figures.items():
        before = base.get(key)
        cells = ("not measured", "") if before is None else (f"{100 * before:.1f}", f"{100 * (value - before):+.1f}")
        table.add_row(key, cells[0], f"{100 * value:.1f}", cells[1])
    return table
