"""Several models on the same tasks, side by side."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from rich.console import Console, Group
from rich.table import Table

from gist_train.config.errors import Fault, UserError, shown
from gist_train.config.models import GuideConfig
from gist_train.config.schema import Config
from gist_train.model.pretrained import Pretrained, load_finished, load_guide, load_student
from gist_train.results.measuring import Figures, Measuring, on_this_device, values
from gist_train.results.selected import Selected, read_selected
from gist_train.training.checkpoint import no_such_step, saved_steps

BASE, TUNED, GUIDE = "base", "tuned", "guide"
SIDE_BY_SIDE = 5
"""Models that a table has room for as columns."""
Subject = tuple[str, Callable[[Measuring], Figures | None]]
"""A model's name, and its figures on tasks: None where it is gone."""


def compare(
    config: Config,
    run: Path,
    *,
    models: Sequence[str],
    steps: str | None,
    dimensions: Sequence[int],
    console: Console,
) -> Iterator[tuple[str, Figures]]:
    """Evaluates models on `config.evaluation.tasks` and yields (name, figures) of each.

    Args:
        models: folders or hub ids to evaluate.
        steps: checkpoints of the run to evaluate: "all", "selected" or "N,N". With neither: base, the selected or else the
            newest, and the guide.
        dimensions: besides the embeddings as the config has them, their first so many numbers.

    Raises:
        UserError: no tasks, or a model, checkpoint or file that is not there.
    """
    measuring = tasks_of(config)
    if dimensions:
        load_student(config.model).with_truncation(max(dimensions))  # refuses what it can't give before anything is measured
    subjects = _named(run, models, steps) if models or steps is not None else _side_by_side(config, run)
    for name, figures_on in subjects:
        for dimension in (None, *dimensions):
            console.print(
                f"measuring {name}" + (f", {dimension} dimensions" if dimension else ""), highlight=False, soft_wrap=True
            )
            figures = figures_on(measuring if dimension is None else measuring.cut_to(dimension))
            if figures is not None:
                yield name if dimension is None else f"{name}, {dimension} dimensions", figures


def tasks_of(config: Config) -> Measuring:
    """The tasks of a config, read.

    Raises:
        UserError: there is none, or their files have faults.
    """
    if not config.evaluation.tasks:
        fix = "add one, e.g. {type: sts, name: stsb, path: stsb_dev.tsv}"
        raise UserError(Fault("evaluation.tasks", "no task", "one task at least", fix))
    return Measuring.of(config)


def _named(run: Path, models: Sequence[str], steps: str | None) -> Iterator[Subject]:
    chosen = read_selected(run) if steps == "selected" else None
    if steps == "selected" and chosen is None:
        raise UserError(Fault("--steps", "selected, and nothing was", "a run with a selected.json", f"gist-train select {run}"))
    numbers = [] if steps is None or chosen is not None else _numbers(run, steps)
    for name in models:
        yield name, partial(_of_model, on_this_device(load_finished(name)))
    for step in numbers:
        yield f"step {step}", partial(_of_checkpoint, run, step)
    if chosen is not None:
        yield chosen.told["name"], _of_selected(run, chosen)


def _numbers(run: Path, steps: str) -> list[int]:
    """The steps that `--steps` names, each of which has a checkpoint."""
    saved = saved_steps(run)
    if steps != "all" and not all(part.strip().isdecimal() for part in steps.split(",")):
        raise UserError(Fault("--steps", shown(steps), "all, selected, or steps such as 500,1000", "name one of these"))
    if not saved:
        raise UserError(Fault(f"{run}/checkpoints", "no checkpoint", "one at least", "train first"))
    numbers = saved if steps == "all" else [int(part) for part in steps.split(",")]
    for step in numbers:
        if step not in saved:
            raise no_such_step(run, step, saved)
    return numbers


def _side_by_side(config: Config, run: Path) -> Iterator[Subject]:
    base = on_this_device(load_student(config.model))
    yield BASE, (lambda measuring: measuring.of_step(run, 0, base)) if run.exists() else partial(_of_model, base)
    selected, saved = read_selected(run), saved_steps(run)
    if selected is not None:
        yield TUNED, _of_selected(run, selected)
    elif saved:
        yield TUNED, partial(_of_checkpoint, run, saved[-1])
    if isinstance(config.guide, GuideConfig):
        yield GUIDE, partial(_of_model, on_this_device(load_guide(config.guide)))


def _of_model(model: Pretrained, measuring: Measuring) -> Figures:
    return values(measuring.of_model(model))


def _of_checkpoint(run: Path, step: int, measuring: Measuring) -> Figures | None:
    return measuring.of_checkpoint(run, step)


def _of_selected(run: Path, selected: Selected) -> Callable[[Measuring], Figures | None]:
    if selected.averaged:
        return partial(_of_model, on_this_device(load_finished(str(selected.folder))))
    return partial(_of_checkpoint, run, selected.step)


def comparison_table(figures: dict[str, Figures]) -> Group:
    """A row per figure, a column per model, in percent; the last column is tuned minus base where both are there.

    Of more models than have room, a table per task, with a row per model.
    """
    keys = next(iter(figures.values())).keys() if figures else []
    if len(figures) > SIDE_BY_SIDE:
        tasks = dict.fromkeys(key.split("/", 1)[0] for key in keys)
        return Group(*(_of_task(task, figures) for task in tasks))
    table = Table(title="figures x 100")
    table.add_column("figure", no_wrap=True)
    for name in figures:
        table.add_column(name, justify="right")
    both = {BASE, TUNED} <= figures.keys()
    if both:
        table.add_column("tuned - base", justify="right")
    for key in keys:
        cells = [f"{100 * of[key]:.1f}" for of in figures.values()]
        difference = [f"{100 * (figures[TUNED][key] - figures[BASE][key]):+z.1f}"] if both else []
        table.add_row(key, *cells, *difference)
    return Group(table)


def _of_task(task: str, figures: dict[str, Figures]) -> Table:
    table = Table(title=f"{task}, figures x 100")
    table.add_column("model", no_wrap=True)
    keys = [key for key in next(iter(figures.values())) if key.split("/", 1)[0] == task]
    for key in keys:
        table.add_column(key.split("/", 1)[1], justify="right")
    for name, of in figures.items():
        table.add_row(name, *(f"{100 * of[key]:.1f}" for key in keys))
    return table
