"""Several models on the same tasks, side by side."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.table import Table

from gist_train.config.errors import Fault, UserError
from gist_train.config.models import GuideConfig
from gist_train.config.schema import Config
from gist_train.model.pretrained import Pretrained, load_finished, load_guide, load_student
from gist_train.results.evaluation import evaluate, load_tasks
from gist_train.results.figures import append_figures, read_figures
from gist_train.training.checkpoint import checkpoint_folder, no_such_step, saved_steps, verified_manifest

Figures = dict[str, float]
"""<task>/<metric> -> value, a fraction."""


def compare(config: Config, run: Path, *, models: Sequence[str], steps: Sequence[int] | None) -> Iterator[tuple[str, Figures]]:
    """Evaluates models on `config.evaluation.tasks` and yields (name, figures) of each.

    Args:
        models: folders or hub ids to evaluate.
        steps: checkpoints of the run to evaluate. With neither, base, the newest checkpoint and the guide.

    Raises:
        UserError: no tasks, or a model, checkpoint or file that is not there.
    """
    if not config.evaluation.tasks:
        mend = "add one, e.g. {type: sts, name: stsb, path: stsb_dev.tsv}"
        raise UserError(Fault("evaluation.tasks", "no task", "one task at least", mend))
    tasks = load_tasks(config.evaluation.tasks)
    saved = saved_steps(run)
    for step in steps or []:
        if step not in saved:
            raise no_such_step(run, step, saved)

    def figures_of(model: Pretrained) -> Figures:
        return evaluate(model.with_max_length(config.evaluation.max_length), tasks)

    def figures_of_step(step: int) -> Figures:
        folder = checkpoint_folder(run, step)
        verified_manifest(folder)
        figures = figures_of(load_finished(str(folder)))
        append_figures(run, step, figures)
        return figures

    if models or steps is not None:
        for name in models:
            yield name, figures_of(load_finished(name))
        for step in steps or []:
            yield f"step {step}", figures_of_step(step)
        return
    base = figures_of(load_student(config.model))
    if run.exists() and 0 not in read_figures(run):
        append_figures(run, 0, base)
    yield "base", base
    if saved:
        yield "tuned", figures_of_step(saved[-1])
    if isinstance(config.guide, GuideConfig):
        yield "guide", figures_of(load_guide(config.guide))


def comparison_table(figures: dict[str, Figures]) -> Table:
    """A row per figure, a column per model, in percent; the last column is tuned minus base where both are there."""
    table = Table(title="figures x 100")
    table.add_column("figure")
    for name in figures:
        table.add_column(name, justify="right")
    both = "base" in figures and "tuned" in figures
    if both:
        table.add_column("tuned - base", justify="right")
    for key in next(iter(figures.values())):
        cells = [f"{100 * values[key]:.1f}" for values in figures.values()]
        difference = [f"{100 * (figures['tuned'][key] - figures['base'][key]):+.1f}"] if both else []
        table.add_row(key, *cells, *difference)
    return table
