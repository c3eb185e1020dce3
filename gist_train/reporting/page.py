"""One HTML file of one run or several: no request leaves it, and texts from data stay texts."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from math import floor
from pathlib import Path
from typing import Any

from gist_train.config.errors import Fault, UserError
from gist_train.evaluation.metrics import task_of
from gist_train.model.loss import BLOCKS
from gist_train.pages.rendering import check_page, rendered, script_json, write_page
from gist_train.reporting.charts import charts_of, heat_map, lines_of
from gist_train.reporting.figures import MOST_ROWS, Figures, figures_of, thinned, told_apart
from gist_train.reporting.noise import Resampled
from gist_train.reporting.similarity import NoMap, SimilarityMap, similarity_map
from gist_train.results.ranking import Distance, distance
from gist_train.results.selection_table import Change, changes, chosen_by, counted
from gist_train.run_folder import Run

LIBRARY = "Vega, Vega-Lite, Vega-Embed (BSD 3-Clause, University of Washington Interactive Data Lab and contributors), d3 (ISC)"
VEGA_LITE = "6.1"
"""Of 6.4 a tooltip of the nearest point says undefined for a name (vega-lite, pull request 9707)."""
MOST_TASKS = 200
"""Of the table of masked candidates."""
FOLLOWED = NoMap("left out of a page that is made again every few seconds; gist-train report without --follow draws it")


@dataclass(frozen=True, slots=True)
class Difference:
    """A key of the configs that differs between runs."""

    key: str
    values: list[str]
    """Of each run."""


@dataclass(frozen=True, slots=True)
class Scored:
    """A model's score beside another model's."""

    change: Change
    distance: Distance
    """By how much it is more, and the interval of that."""
    comparable: bool = True
    """Whether both were measured on the same texts under the same terms."""


def page_of(runs: Sequence[Figures], maps: Sequence[SimilarityMap | NoMap] = (), *, refresh: int | None = None) -> str:
    """The page.

    Args:
        maps: of each run; () where they are left out.
        refresh: seconds after which a browser loads it again; None for never.

    Raises:
        UserError: the chart library is not installed.
    """
    runs = [replace(run, rows=thinned(iter(run.rows), MOST_ROWS // len(runs))) for run in told_apart(runs)]
    maps = maps or [FOLLOWED] * len(runs)
    changed = [list(_against_base(run)) for run in runs]
    charts = {f"chart-{number}": one for number, one in enumerate(charts_of(runs).items())}
    specs = {element: spec for element, (_, spec) in charts.items()}
    for number, one in enumerate(maps):
        if isinstance(one, SimilarityMap):
            specs |= _heat_maps(f"map-{number}", one)
    return rendered(
        "reporting/page.html.jinja",
        title=" and ".join(run.name for run in runs),
        runs=runs,
        maps=maps,
        facts=[list(_facts(run)) for run in runs],
        differences=list(_differences(runs)),
        changes=changed,
        counted=[counted([one.change for one in of_run]) for of_run in changed],
        side_by_side=_side_by_side(runs) if len(runs) > 1 else [],
        charts=[(title, element, lines_of(spec)) for element, (title, spec) in charts.items()],
        specs=script_json(specs),
        blocks=BLOCKS,
        most_tasks=MOST_TASKS,
        library=LIBRARY,
        bundle=_bundle(),
        refresh=refresh,
    )


def write_report(runs: Sequence[Run], to: Path | None) -> Path:
    """Writes the page, or nothing, and returns where it is.

    Args:
        to: the file; None: of one run its own, of several there is none.

    Raises:
        UserError: `to` is no file that can be written, or is not given where it must be; a folder is no run's; the chart
            library is not installed.
    """
    if to is None and len(runs) > 1:
        fix = f"--to both.html, say: {runs[0].report} is the first run's own"
        raise UserError(Fault("--to", "no file named for a page of several runs", "the .html file to write", fix))
    to = runs[0].report if to is None else to
    check_library()
    figures = [figures_of(run) for run in runs]
    check_page("--to", to)  # before models are loaded
    write_page(page_of(figures, [similarity_map(run) for run in runs]), to, "--to")
    return to


def check_library() -> None:
    """Raises UserError where the chart library, which is an extra, is not installed."""
    if find_spec("vl_convert") is None:
        found, fix = "no package vl-convert-python", 'pip install "gist-train[report]"'
        raise UserError(Fault("gist-train report", found, "the package, which is an extra", fix))


def _bundle() -> str:
    check_library()
    import vl_convert

    bundle: str = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", vl_version=VEGA_LITE)
    return bundle.replace("</script", "<\\/script")


def _heat_maps(element: str, one: SimilarityMap) -> dict[str, dict[str, Any]]:
    """By element, the map before and the map after, on one scale of colours."""
    lowest = floor(10 * min(one.before.min(), one.after.min())) / 10
    sides = {"before": (one.before, "the base model"), "after": (one.after, one.name)}
    return {
        f"{element}-{side}": heat_map(cosines, one.texts, lowest, f"cosine similarities of texts of {one.task} under {name}")
        for side, (cosines, name) in sides.items()
    }


def _facts(run: Figures) -> Iterator[tuple[str, str]]:
    """What was trained on what, in words."""
    described, config = run.described, run.config
    yield "model", str(config["model.name"])
    names = [str(value) for key, value in config.items() if key.startswith("guide") and key.endswith((".name", ".vectors"))]
    yield "guide", ", ".join(names) or str(config.get("guide") or "none")
    for source in described.data:
        yield "data", source.name if source.rows is None else f"{source.name}, {source.rows:,} rows"
    step = int(run.rows[-1]["step"]) if run.rows else 0
    of_all = "" if described.total_steps is None else f" of {described.total_steps:,}"
    yield "steps", f"{step:,}{of_all}, {config['training.batch_size']} rows each"
    yield "learning rate", f"{config['optimizer.lr']:g}, {config['schedule.type']}, warm-up {config['schedule.warmup_ratio']:g}"
    yield "loss", f"temperature {config['loss.temperature']:g}, margin {config['loss.margin']:g}, mask {config['loss.mask']}"
    if run.selected is not None:
        yield "selected", f"{run.selected.name}, by {chosen_by(run.selected)}"
    processes = "1 process" if described.processes == 1 else f"{described.processes} processes"
    yield "device", f"{processes} on {described.device}, {described.precision}"
    packages = ", ".join(f"{name} {version}" for name, version in described.packages.items())
    yield "software", f"gist-train {described.gist_train}, Python {described.python}, {packages}"


def _differences(runs: Sequence[Figures]) -> Iterator[Difference]:
    """Keys of the configs that differ, each at the depth to which all of them have it."""
    for key, values in _unlike("", [run.sections for run in runs]):
        if key != "name":
            yield Difference(key, [json.dumps(_without_nulls(value), ensure_ascii=False) for value in values])


def _unlike(key: str, values: Sequence[Any]) -> Iterator[tuple[str, Sequence[Any]]]:
    """Dotted key and the values of all runs, where these differ; what one does not have is null."""
    if all(isinstance(value, Mapping) for value in values):
        for name in dict.fromkeys(name for value in values for name in value):
            yield from _unlike(f"{key}.{name}" if key else name, [value.get(name) for value in values])
    elif all(isinstance(value, list) and all(isinstance(part, Mapping) for part in value) for value in values):
        for index in range(max(map(len, values))):
            yield from _unlike(f"{key}[{index}]", [value[index] if index < len(value) else None for value in values])
    elif any(value != values[0] for value in values):
        yield key, values


def _without_nulls(value: Any) -> Any:
    """A value as it is shown: of a section, what is set."""
    if isinstance(value, Mapping):
        return {name: _without_nulls(part) for name, part in value.items() if part is not None}
    return value


def _against_base(run: Figures) -> Iterator[Scored]:
    """Each score of the selected model, or of the newest step, beside the base model's."""
    for change in changes(run.before, run.after):
        yield Scored(change, _distance(change, run.resampled_after, run.resampled_before))


def _distance(change: Change, after: Mapping[str, Resampled], before: Mapping[str, Resampled]) -> Distance:
    return distance(change.difference or 0.0, after.get(change.key), before.get(change.key))


def _side_by_side(runs: Sequence[Figures]) -> list[tuple[str, list[Scored | None]]]:
    """Of each score that two runs have: each run's against the first's, None where it has none."""
    keys = dict.fromkeys(key for run in runs for key in run.after)
    both = [key for key in keys if sum(key in run.after for run in runs) > 1]
    return [(key, [_against(runs[0], run, key) if key in run.after else None for run in runs]) for key in both]


def _against(first: Figures, run: Figures, key: str) -> Scored:
    change, task = Change(key, first.after.get(key), run.after[key]), task_of(key)
    alike = first.terms == run.terms and first.contents.get(task) == run.contents.get(task)
    compared = _distance(change, run.resampled_after, first.resampled_after) if alike else Distance(0.0, None, None)
    return Scored(change, compared, comparable=alike or change.before is None)
