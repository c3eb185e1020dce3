"""Charts of runs, as specifications of Vega-Lite."""

from collections.abc import Mapping, Sequence
from typing import Any

from gist_train.model.loss import BLOCKS
from gist_train.reporting.figures import Figures

Spec = dict[str, Any]
GREY = "#888888"
"""Of axes and labels: to be read on a light and on a dark page."""
COLOURS = ["#3b82c4", "#e07b39", "#4aa564", "#b565a7", "#c9a227", "#6c8a9e", "#d0587e", "#3aa6a0", "#9a7b4f", "#7a6bd1"]
"""Of series, told apart by most of those who see few colours."""
CONFIG = {
    "background": "transparent",
    "view": {"stroke": None},
    "axis": {
        **dict.fromkeys(("labelColor", "titleColor", "gridColor", "domainColor", "tickColor"), GREY),
        "gridOpacity": 0.2,
    },
    "legend": {"labelColor": GREY, "titleColor": GREY, "orient": "bottom", "columns": 2, "labelLimit": 150},
    "range": {"category": COLOURS},
}
SECONDS = ("data", "forward", "loss", "backward", "optimizer", "communication")


def charts_of(runs: Sequence[Figures]) -> dict[str, Spec]:
    """Title -> specification; of what no run has there is none."""
    charts = {
        "Loss": _lines(runs, {"loss": "loss_mean"}, "loss, mean since the last row"),
        "Scores by step": _scores(runs),
        "Masked candidates": _lines(runs, {block: f"masked_{block}" for block in BLOCKS}, "share of a block's candidates", "%"),
        "Learning rate": _lines(runs, {"rate": "lr"}, "learning rate", "e"),
        "Gradient norm": _lines(runs, {"norm": "grad_norm"}, "norm before clipping"),
        "Throughput": _lines(runs, {"tokens": "tokens_per_second"}, "tokens a second", ",.0f"),
        "Where a step's time goes": _lines(runs, {name: f"{name}_seconds" for name in SECONDS}, "seconds of a step"),
    }
    return {title: spec for title, spec in charts.items() if spec is not None}


def _lines(runs: Sequence[Figures], series: Mapping[str, str], axis: str, form: str = "") -> Spec | None:
    """A line for each run and series over steps, with the selected steps."""
    values = [
        {"step": row["step"], "value": row[column], "series": _series(run, name, runs, series)}
        for run in runs
        for name, column in series.items()
        for row in run.rows
        if column in row
    ]
    return _over_steps(values, runs, axis, form) if values else None


def _scores(runs: Sequence[Figures]) -> Spec | None:
    """Of a few scores all, of more the first of each task."""
    keys = list(dict.fromkeys(key for run in runs for scores in run.scores.values() for key in scores))
    first = {key.split("/", 1)[0]: key for key in reversed(keys)}
    shown = keys if len(keys) * len(runs) <= len(COLOURS) else list(first.values())
    values = [
        {"step": step, "value": 100 * value, "series": _series(run, key, runs, scores)}
        for run in runs
        for step, scores in sorted(run.scores.items())
        for key, value in scores.items()
        if key in shown
    ]
    return _over_steps(values, runs, "score, times 100", ".1f", zero=False) if values else None


def _series(run: Figures, name: str, runs: Sequence[Figures], series: Mapping[str, object]) -> str:
    """What a line is called: by what differs."""
    if len(runs) == 1:
        return name
    return run.name if len(series) == 1 else f"{run.name}: {name}"


def _over_steps(values: list[dict[str, Any]], runs: Sequence[Figures], axis: str, form: str, *, zero: bool = True) -> Spec:
    form = {"%": ".1%", "e": ".2e"}.get(form, form or ".4~g")
    x = {"field": "step", "type": "quantitative", "title": "step", "axis": {"format": "~s", "tickCount": 6}}
    y = {"field": "value", "type": "quantitative", "title": axis, "scale": {"zero": zero}, "axis": {"format": form}}
    several = len({value["series"] for value in values}) > 1
    colour: Spec = {"field": "series", "type": "nominal", "title": None, "legend": {} if several else None}
    tooltip = [
        {"field": "series", "type": "nominal", "title": "what"},
        {"field": "step", "type": "quantitative", "format": ","},
        {"field": "value", "type": "quantitative", "title": axis, "format": form},
    ]
    near = {"name": "near", "select": {"type": "point", "on": "pointermove", "nearest": True, "clear": "pointerout"}}
    layers: list[Spec] = [
        {"mark": {"type": "line", "interpolate": "linear"}, "encoding": {"x": x, "y": y, "color": colour}},
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
    chosen = [{"step": run.selected.step} for run in runs if run.selected is not None]
    if chosen:
        rule = {"type": "rule", "strokeDash": [4, 4], "color": GREY, "tooltip": "the selected step"}
        layers.append({"data": {"values": chosen}, "mark": rule, "encoding": {"x": x}})
    return {
        "$schema": "https://vega.github.io/schema/vega-lite/v5.json",
        "description": f"{axis} over steps",
        "width": "container",
        "height": 220,
        "data": {"values": values},
        "layer": layers,
        "config": CONFIG,
    }
