"""Several models on the same tasks, side by side."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.table import Table

from gist_train.config.errors import Fault, UserError
from gist_train.config.models import GuideConfig
from gist_train.config.schema import Config
from gist_train.model.pretrained import load_finished, load_guide, load_student
from gist_train.results.measuring import Figures, Measuring, on_this_device, values
from gist_train.results.selected import Selected, read_selected
from gist_train.training.checkpoint import no_such_step, saved_steps

BASE, TUNED, GUIDE = "base", "tuned", "guide"


def compare(
    config: Config,
    run: Path,
    *,
    models: Sequence[str],
    steps: Sequence[int] | None,
    selected: bool,
    dimensions: Sequence[int],
) -> Iterator[tuple[str, Figures]]:
    """Evaluates models on `config.evaluation.tasks` and yields (name, figures) of each.

    Args:
        models: folders or hub ids to evaluate.
        steps: checkpoints of the run to evaluate.
        selected: whether to evaluate what `select` chose. With none of these: base, the selected or else the newest, guide.
        dimensions: besides the embeddings as they are, their first so many numbers.

    Raises:
        UserError: no tasks, or a model, checkpoint or file that is not there.
    """
    chosen = read_selected(run)
    if selected and chosen is None:
        raise UserError(Fault("--steps", "selected, and nothing was", "a run with a selected.json", f"gist-train select {run}"))
    plain = tasks_of(config)
    for dimension in (None, *dimensions):
        measuring, of_dimension = plain, ""
        if dimension is not None:
            measuring = plain.cut_to(dimension)
            of_dimension = f", {dimension} dimensions"
        if models or steps is not None or selected:
            compared = _named(run, measuring, models, steps or [], chosen if selected else None)
        else:
            compared = _side_by_side(config, run, measuring, chosen)
        for name, figures in compared:
            yield name + of_dimension, figures


def tasks_of(config: Config) -> Measuring:
    """The tasks of a config, read.

    Raises:
        UserError: there is none, or their files have faults.
    """
    if not config.evaluation.tasks:
        mend = "add one, e.g. {type: sts, name: stsb, path: stsb_dev.tsv}"
        raise UserError(Fault("evaluation.tasks", "no task", "one task at least", mend))
    return Measuring.of(config)


def _named(
    run: Path, measuring: Measuring, models: Sequence[str], steps: Sequence[int], selected: Selected | None
) -> Iterator[tuple[str, Figures]]:
    saved = saved_steps(run)
    for step in steps:
        if step not in saved:
            raise no_such_step(run, step, saved)
    for name in models:
        yield name, values(measuring.of_model(on_this_device(load_finished(name))))
    for step in steps:
        if figures := measuring.of_checkpoint(run, step):  # else deleted meanwhile
            yield f"step {step}", figures
    if selected is not None and (figures := _of_selected(run, measuring, selected)):
        yield selected.told["name"], figures


def _side_by_side(config: Config, run: Path, measuring: Measuring, selected: Selected | None) -> Iterator[tuple[str, Figures]]:
    if run.exists():
        yield BASE, measuring.of_base(run, config.model)
    else:
        yield BASE, values(measuring.of_model(on_this_device(load_student(config.model))))
    saved = saved_steps(run)
    tuned = None
    if selected is not None:
        tuned = _of_selected(run, measuring, selected)
    elif saved:
        tuned = measuring.of_checkpoint(run, saved[-1])
    if tuned:
        yield TUNED, tuned
    if isinstance(config.guide, GuideConfig):
        yield GUIDE, values(measuring.of_model(on_this_device(load_guide(config.guide))))


def _of_selected(run: Path, measuring: Measuring, selected: Selected) -> Figures | None:
    if selected.averaged:
        return values(measuring.of_model(on_this_device(load_finished(str(selected.folder)))))
    return measuring.of_checkpoint(run, selected.step)


def comparison_table(figures: dict[str, Figures]) -> Table:
    """A row per figure, a column per model, in percent; the last column is tuned minus base where both are there."""
    table = Table(title="figures x 100")
    table.add_column("figure")
    for name in figures:
        table.add_column(name, justify="right")
    both = {BASE, TUNED} <= figures.keys()
    if both:
        table.add_column("tuned - base", justify="right")
    for key in next(iter(figures.values())):
        cells = [f"{100 * values[key]:.1f}" for values in figures.values()]
        difference = [f"{100 * (figures[TUNED][key] - figures[BASE][key]):+.1f}"] if both else []
        table.add_row(key, *cells, *difference)
    return table
