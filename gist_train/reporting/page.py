"""One HTML file of one run or several: no request leaves it, and texts from data stay texts."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from gist_train.config.errors import Fault, UserError
from gist_train.pages.rendering import rendered, script_json, write_page
from gist_train.reporting.charts import charts_of
from gist_train.reporting.figures import Figures, told_apart
from gist_train.results.selection_table import Change, changes, counted

LIBRARY = "Vega, Vega-Lite and Vega-Embed (BSD 3-Clause, University of Washington Interactive Data Lab and contributors)"
VEGA_LITE = "5.21"


@dataclass(frozen=True, slots=True)
class Difference:
    """A key of the configs that differs between runs."""

    key: str
    values: list[str]
    """Of each run."""


def page_of(runs: Sequence[Figures], *, refresh: int | None = None) -> str:
    """The page.

    Args:
        refresh: seconds after which a browser loads it again; None for never.

    Raises:
        UserError: the chart library is not installed.
    """
    runs = told_apart(runs)
    changed = [changes(run.before, run.after) for run in runs]
    charts = {f"chart-{number}": one for number, one in enumerate(charts_of(runs).items())}
    return rendered(
        "reporting/page.html.jinja",
        title=" and ".join(run.name for run in runs),
        runs=runs,
        facts=[list(_facts(run)) for run in runs],
        differences=list(_differences(runs)),
        changes=changed,
        counted=[counted(one) for one in changed],
        side_by_side=_side_by_side(runs) if len(runs) > 1 else [],
        charts=[(title, element) for element, (title, _) in charts.items()],
        specs=script_json({element: spec for element, (_, spec) in charts.items()}),
        library=LIBRARY,
        bundle=_bundle(),
        refresh=refresh,
    )


def write_report(runs: Sequence[Figures], to: Path) -> None:
    """Writes the page, or nothing; UserError where `to` is in no folder, or is one."""
    write_page(page_of(runs), to, "--to")


def _bundle() -> str:
    try:
        import vl_convert  # an extra
    except ImportError:
        found, fix = "no package vl-convert-python", 'pip install "gist-train[report]"'
        raise UserError(Fault("gist-train report", found, "the package, which is an extra", fix)) from None
    bundle: str = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", vl_version=VEGA_LITE)
    return bundle.replace("</script", "<\\/script")


def _facts(run: Figures) -> Iterator[tuple[str, str]]:
    """What was trained on what, in words."""
    described, config = run.described, run.config
    yield "model", str(config["model.name"])
    names = [str(value) for key, value in config.items() if key.startswith("guide") and key.endswith((".name", ".vectors"))]
    yield "guide", ", ".join(names) or str(config.get("guide") or "none")
    for source in described["data"]:
        rows = f", {source['rows']:,} rows" if "rows" in source else ""
        yield "data", f"{source['name']}{rows}"
    step = int(run.rows[-1]["step"]) if run.rows else 0
    of_all = f" of {described['total_steps']:,}" if "total_steps" in described else ""  # early versions did not say
    yield "steps", f"{step:,}{of_all}, {config['training.batch_size']} rows each"
    yield "learning rate", f"{config['optimizer.lr']:g}, {config['schedule.type']}, warm-up {config['schedule.warmup_ratio']:g}"
    yield "loss", f"temperature {config['loss.temperature']:g}, margin {config['loss.margin']:g}, mask {config['loss.mask']}"
    if run.selected is not None:
        yield "selected", f"{run.selected.name}, by {run.selected.rule}"
    yield "device", f"{described['processes']} process(es) on {described['device']}, {described['precision']}"
    packages = ", ".join(f"{name} {version}" for name, version in described["packages"].items())
    yield "software", f"gist-train {described['gist_train']}, Python {described['python']}, {packages}"


def _differences(runs: Sequence[Figures]) -> Iterator[Difference]:
    for key in dict.fromkeys(key for run in runs for key in run.config):
        values = [json.dumps(run.config[key], ensure_ascii=False) if key in run.config else "-" for run in runs]
        if len(set(values)) > 1 and key != "name":
            yield Difference(key, values)


def _side_by_side(runs: Sequence[Figures]) -> list[tuple[str, list[Change | None]]]:
    """Of each score that two runs have: each run's against the first's, None where it has none."""
    keys = dict.fromkeys(key for run in runs for key in run.after)
    both = [key for key in keys if sum(key in run.after for run in runs) > 1]
    first = runs[0].after
    return [(key, [Change(key, first.get(key), run.after[key]) if key in run.after else None for run in runs]) for key in both]
