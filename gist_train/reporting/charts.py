"""Charts of runs, as specifications of Vega-Lite."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gist_train.evaluation.metrics import task_of
from gist_train.model.loss import BLOCKS
from gist_train.reporting.figures import Figures
from gist_train.reporting.noise import interval

Spec = dict[str, Any]
INK = "currentColor"
"""Of axes and labels: the page's own, which follows the reader's light or dark."""
COLOURS = ["#3b82c4", "#e07b39", "#4aa564", "#b565a7", "#c9a227", "#6c8a9e", "#d0587e", "#3aa6a0", "#9a7b4f", "#7a6bd1"]
"""Of series, told apart by most of those who see few colours."""
CONFIG = {
    "background": "transparent",
    "view": {"stroke": None},
    "axis": {
        **dict.fromkeys(("labelColor", "titleColor", "gridColor", "domainColor", "tickColor"), INK),
        "gridOpacity": 0.2,
        "labelFontSize": 11,
        "titleFontSize": 12,
        "titleFontWeight": "normal",
    },
    "legend": {
        **dict.fromkeys(("labelColor", "titleColor"), INK),
        "orient": "bottom",
        "columns": 2,
        "offset": 8,
        "layout": {"bottom": {"direction": "vertical", "anchor": "start"}},
        "labelLimit": 150,
        "labelFontSize": 11,
        "titleFontWeight": "normal",
    },
    "range": {"category": COLOURS},
}
BARS_APART = 6
"""Pixels between the bars of scores that were measured at one step."""
MOST_STEPS = 200
"""Whose scores are in a chart. Of more, evenly spaced ones are."""
TOOLTIP_CHARACTERS = 80
"""Of a text."""
SCHEMA = "https://vega.github.io/schema/vega-lite/v6.json"
SECONDS = ("data", "forward", "loss", "backward", "optimizer", "communication")


def charts_of(runs: Sequence[Figures]) -> dict[str, Spec]:
    """Title -> specification; of what no run has there is none."""
    charts = {
        "Mean loss": _lines(runs, {"mean loss": "loss_mean"}, "mean loss since the row before"),
        _scores_title(runs): _scores(runs),
        "Masked candidates": _lines(runs, {block: f"masked_{block}" for block in BLOCKS}, "share of a block's candidates", "%"),
        "Learning rate": _learning_rate(runs),
        "Gradient norm": _lines(runs, {"norm": "grad_norm"}, "norm before clipping"),
        "Throughput": _lines(runs, {"tokens": "tokens_per_second"}, "tokens a second", ",.0f"),
        "Where a step's time goes": _lines(runs, {name: f"{name}_seconds" for name in SECONDS}, "seconds of a step"),
    }
    return {title: spec for title, spec in charts.items() if spec is not None}


def _lines(runs: Sequence[Figures], series: Mapping[str, str], axis: str, form: str = "") -> Spec | None:
    """A line for each run and series over steps, with the selected steps."""
    values = [
        {"step": row["step"], "value": _rounded(row[column])} | _line(run, name, runs, series)
        for run in runs
        for name, column in series.items()
        for row in run.rows
        if column in row
    ]
    return _over_steps(values, runs, axis, form) if values else None


def _learning_rate(runs: Sequence[Figures]) -> Spec | None:
    """The rate over steps, and where it is warmed up."""
    spec = _lines(runs, {"rate": "lr"}, "learning rate", "e")
    ends = [{"from": 0, "to": step} for step in sorted({run.warmup_steps for run in runs} - {0})]
    if spec is not None and ends:
        area = {"type": "rect", "color": INK, "opacity": 0.15, "tooltip": "warm-up"}
        x = {"x": {"field": "from", "type": "quantitative"}, "x2": {"field": "to"}}
        spec["layer"].insert(0, {"data": {"values": ends}, "mark": area, "encoding": x})
    return spec


def _scores(runs: Sequence[Figures]) -> Spec | None:
    """Of a few scores all, of more the first of each task, of many tasks some; at the selected step with its interval."""
    shown = _shown(runs)
    values = [
        {"step": step, "value": _rounded(100 * run.scores[step][key])} | _line(run, key, runs, shown)
        for run in runs
        for step in _some_steps(run)
        for key in run.scores[step]
        if key in shown
    ]
    if not values:
        return None
    spec = _over_steps(values, runs, "score, times 100", ".1f", zero=False)
    within = [
        {"step": run.chosen_step, "low": 100 * low, "high": 100 * high} | _line(run, key, runs, shown)
        for run in runs
        for key, samples in run.resampled_after.items()
        if key in shown
        for low, high in [interval(samples)]
    ]
    for place, one in enumerate(within):
        offset = BARS_APART * (place - (len(within) - 1) / 2)  # at one step they would hide each other
        spec["layer"].append(_interval(one, offset, _by_run(within)[1]))
    return spec


def _scores_title(runs: Sequence[Figures]) -> str:
    """It says how many tasks are left out."""
    tasks = {task_of(key) for run in runs for scores in run.scores.values() for key in scores}
    shown = {task_of(key) for key in _shown(runs)}
    return f"Scores by step, {len(shown)} of {len(tasks)} tasks" if len(shown) < len(tasks) else "Scores by step"


def _shown(runs: Sequence[Figures]) -> list[str]:
    """Scores that are in the chart, no more than there are colours: those that selected come first."""
    deciding = [key for run in runs if run.selected is not None for key in run.selected.metric or {}]
    there = dict.fromkeys(key for run in runs for scores in run.scores.values() for key in scores)
    keys = [*dict.fromkeys(key for key in deciding if key in there), *(key for key in there if key not in deciding)]
    first = {task_of(key): key for key in reversed(keys)}
    few = keys if len(keys) * len(runs) <= len(COLOURS) else [key for key in keys if first[task_of(key)] == key]
    return few[: len(COLOURS)]


def _some_steps(run: Figures) -> list[int]:
    """Steps that were measured, the first, the last and the selected one among them."""
    steps = sorted(run.scores)
    if len(steps) <= MOST_STEPS:
        return steps
    some = {steps[round(place * (len(steps) - 1) / (MOST_STEPS - 1))] for place in range(MOST_STEPS)}
    return sorted(some | {step for step in steps if step == run.chosen_step})


def _interval(within: dict[str, Any], offset: float, tooltip: list[Spec]) -> Spec:
    """Where 95 % of a score's resamples lie, at a step.

    Args:
        offset: pixels to the right of the step.
    """
    ends = [
        {"field": name, "type": "quantitative", "title": title, "format": ".1f"}
        for name, title in (("low", "95 % from"), ("high", "to"))
    ]
    return {
        "data": {"values": [within]},
        "mark": {"type": "errorbar", "rule": {"xOffset": offset}, "ticks": {"size": 8, "xOffset": offset}, "thickness": 2},
        "encoding": {
            "x": {"field": "step", "type": "quantitative"},
            "y": {"field": "low", "type": "quantitative", "title": "score, times 100"},
            "y2": {"field": "high"},
            "color": {"field": "series", "type": "nominal", "sort": None},
            "tooltip": [{"field": "series", "type": "nominal", "title": "what"}, *tooltip, *ends],
        },
    }


def heat_map(cosines: NDArray[np.float64], texts: Sequence[str], lowest: float, about: str) -> Spec:
    """A square for each pair of texts, coloured by their cosine similarity.

    Args:
        cosines: (N, N)
        texts: (N,)
        lowest: similarity of the first colour; 1 has the last.
        about: what is seen, in words.
    """
    names = [f"{number}: {text[:TOOLTIP_CHARACTERS]}" for number, text in enumerate(texts, start=1)]
    values = [
        {"row": i + 1, "column": j + 1, "text": names[i], "other": names[j], "cosine": round(float(cosines[i, j]), 3)}
        for i in range(len(texts))
        for j in range(len(texts))
    ]
    odd = [*range(1, len(texts) + 1, 2)]  # all of them run into each other on a narrow screen
    axis = {"labelAngle": 0, "values": odd, "grid": False, "domain": False, "ticks": False}
    return {
        "$schema": SCHEMA,
        "description": about,
        "width": "container",
        "height": 300,
        "data": {"values": values},
        "mark": "rect",
        "encoding": {
            "x": {"field": "column", "type": "ordinal", "title": "text", "axis": axis},
            "y": {"field": "row", "type": "ordinal", "title": "text", "axis": axis},
            "color": {
                "field": "cosine",
                "type": "quantitative",
                "title": "cosine",
                "scale": {"scheme": "viridis", "domain": [lowest, 1]},
                "legend": {"gradientLength": 200},
            },
            "tooltip": [
                {"field": "cosine", "type": "quantitative", "format": ".2f"},
                {"field": "text", "type": "nominal", "title": "between"},
                {"field": "other", "type": "nominal", "title": "and"},
            ],
        },
        "config": CONFIG,
    }


@dataclass(frozen=True, slots=True)
class Line:
    """What a line of a chart says, in words: for those who see no chart, or point at none."""

    name: str
    first: str
    lowest: str
    highest: str
    last: str
    within: str = ""
    """Where 95 % of a score's resamples lie; "" where that is not known."""


def lines_of(spec: Spec) -> list[Line]:
    """Of each line of a chart over steps, its ends, its extremes and its bar, each with its step."""
    drawn = next(layer for layer in spec["layer"] if layer["mark"]["type"] == "line")
    form = drawn["encoding"]["y"]["axis"]["format"].replace("~", "")
    bars = [value for layer in spec["layer"] if layer["mark"]["type"] == "errorbar" for value in layer["data"]["values"]]

    def name_of(value: Mapping[str, Any]) -> str:
        return f"{value['run']}: {value['series']}" if "run" in value else str(value["series"])

    by_series: dict[str, list[dict[str, Any]]] = {}
    for value in spec["data"]["values"]:
        by_series.setdefault(name_of(value), []).append(value)
    within = {name_of(bar): f"{bar['low']:{form}} to {bar['high']:{form}} at {bar['step']:,.0f}" for bar in bars}

    def words(point: Mapping[str, Any]) -> str:
        return f"{point['value']:{form}} at {point['step']:,.0f}"

    def height(point: Mapping[str, Any]) -> float:
        number: float = point["value"]
        return number

    return [
        Line(
            name,
            first=words(points[0]),
            lowest=words(min(points, key=height)),
            highest=words(max(points, key=height)),
            last=words(points[-1]),
            within=within.get(name, ""),
        )
        for name, points in by_series.items()
    ]


def _rounded(value: float) -> float:
    """To six digits, which a chart can't tell from more and a page carries thousands of."""
    return float(f"{value:.6g}")


def _line(run: Figures, name: str, runs: Sequence[Figures], series: Collection[str]) -> dict[str, str]:
    """Which line a value is of: its colour is by series, its dashes are by run, where there are several of both."""
    if len(runs) == 1:
        return {"series": name}
    return {"series": run.name} if len(series) == 1 else {"series": name, "run": run.name}


def _by_run(values: Sequence[Mapping[str, Any]]) -> tuple[Spec, list[Spec]]:
    """How the runs are told apart in a chart of several of several lines each: by dashes, and in the tooltip."""
    if not values or "run" not in values[0]:
        return {}, []
    run = {"field": "run", "type": "nominal"}
    return {"strokeDash": {**run, "title": None, "sort": None}}, [run]


def _selected_steps(runs: Sequence[Figures], x: Spec, colour: Spec, dash: Spec) -> list[Spec]:
    """An upright line at each run's selected step; of several runs each as that run's lines are told: by dashes or by colour."""
    chosen = [
        {"step": run.selected.step, "series": run.name, "run": run.name, "what": f"{run.selected.name} of {run.name}"}
        for run in runs
        if run.selected is not None
    ]
    if not chosen:
        return []
    if len(runs) == 1:
        mark, own = {"type": "rule", "strokeDash": [4, 4], "color": INK}, {}
    elif dash:
        mark, own = {"type": "rule", "color": INK}, dash
    else:
        mark, own = {"type": "rule", "strokeDash": [4, 4]}, {"color": colour}
    tooltip = [{"field": "what", "type": "nominal", "title": "selected"}]
    return [{"data": {"values": chosen}, "mark": mark, "encoding": {"x": x, **own, "tooltip": tooltip}}]


def _over_steps(values: list[dict[str, Any]], runs: Sequence[Figures], axis: str, form: str, *, zero: bool = True) -> Spec:
    form = {"%": ".1%", "e": ".2e"}.get(form, form or ".4~g")
    x = {"field": "step", "type": "quantitative", "title": "step", "axis": {"format": "~s", "tickCount": 6}}
    y = {"field": "value", "type": "quantitative", "title": axis, "scale": {"zero": zero}, "axis": {"format": form}}
    several = len({value["series"] for value in values}) > 1
    colour: Spec = {"field": "series", "type": "nominal", "title": None, "sort": None, "legend": {} if several else None}
    dash, of_run = _by_run(values)
    tooltip = [
        {"field": "series", "type": "nominal", "title": "what"},
        *of_run,
        {"field": "step", "type": "quantitative", "format": ","},
        {"field": "value", "type": "quantitative", "title": axis, "format": form},
    ]
    near = {"name": "near", "select": {"type": "point", "on": "pointermove", "nearest": True, "clear": "pointerout"}}
    layers: list[Spec] = [
        {"mark": {"type": "line", "interpolate": "linear"}, "encoding": {"x": x, "y": y, "color": colour, **dash}},
        {
            "params": [near],
            "mark": {"type": "point", "filled": True, "size": 70},
            "encoding": {
                "x": x,
                "y": y,
                "color": colour,
                "opacity": {"condition": {"param": "near", "empty": False, "value": 1}, "value": 0},
                "tooltip": tooltip,
            },
        },
    ]
    layers += _selected_steps(runs, x, colour, dash)
    return {
        "$schema": SCHEMA,
        "description": f"{axis} over steps",
        "width": "container",
        "height": 220,
        "data": {"values": values},
        "layer": layers,
        "config": CONFIG,
    }
