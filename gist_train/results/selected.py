"""selected.json: which model of a run was chosen, by what, and how far the others are behind."""

import shutil
from pathlib import Path

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError
from rich.console import RenderableType

from gist_train.config.errors import Fault, UserError
from gist_train.config.evaluation import EvaluationConfig
from gist_train.data.files import read_json, write_json
from gist_train.evaluation.leakage import Leak
from gist_train.progress import PagedResult
from gist_train.run_folder import MANIFEST, Run


class _Part(BaseModel):
    """A part of selected.json: what is read of it is checked, since people edit files."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)


class SelectedCandidate(_Part):
    """One of the models that could have been chosen."""

    name: str
    """As tables call it."""
    steps: tuple[int, ...]
    """The checkpoint's step, or those of a mean of several, ascending."""
    base_weight: float
    """Share of the base model in its weights."""
    score: float | None
    """The weighted mean of its metrics, a fraction; None where no metric decided."""
    loss: float | None
    """Training loss as last logged; None for a mean, or where none was logged."""
    behind: float | None
    """The chosen one's score minus its own; None for the chosen one, or where no metric decided."""
    interval: tuple[float, float] | None
    """95 % of `behind` over resampled items; None where it was not taken."""
    within_noise: bool | None
    """Whether the interval holds 0."""
    scores: dict[str, float] = Field(validation_alias=AliasChoices("figures", "scores"), serialization_alias="figures")
    """<task>/<metric> -> fraction, of the metrics that decided."""

    @property
    def averaged(self) -> bool:
        """Whether it is no checkpoint, but made of some."""
        return len(self.steps) > 1 or self.base_weight > 0


class Selected(_Part, PagedResult):
    """What was chosen. In the file, scores are called figures."""

    step: int
    """The checkpoint's step; of a mean, the newest of `steps`."""
    steps: tuple[int, ...] = Field(min_length=1)
    """Steps that its weights are the mean of; one for a checkpoint."""
    base_weight: float
    """Share of the base model in its weights."""
    name: str
    """As tables call it."""
    checkpoint: str
    """Where the model is, from the run folder."""
    rule: str
    """What it was chosen by: metric, step, or loss-percentile and a share."""
    metric: dict[str, float] | None
    """<task>/<metric> -> weight; None where no metric decided."""
    around: int | None
    """Step that it was chosen around."""
    window: int | None
    """Steps to either side."""
    scores: dict[str, float] = Field(validation_alias=AliasChoices("figures", "scores"), serialization_alias="figures")
    """<task>/<metric> -> fraction, of all tasks."""
    base: dict[str, float]
    """The same of the model before training."""
    candidates: list[SelectedCandidate]
    """The best first."""
    evaluation: EvaluationConfig
    """The tasks and terms of the scores."""
    leakage: list[Leak]
    """What training rows share with the tasks."""

    @property
    def averaged(self) -> bool:
        """Whether it is no checkpoint, but made of some."""
        return len(self.steps) > 1 or self.base_weight > 0

    def page(self) -> RenderableType:
        """What `gist-train select` prints."""
        from gist_train.results.selection_table import selection_page

        return selection_page(self)

    def folder(self, run: Run) -> Path:
        """Where the model is."""
        return run.folder / self.checkpoint

    def located(self, run: Run) -> "Selected":
        """The same with the model's path from the working folder, and not from the run's, as `checkpoint`."""
        return self.model_copy(update={"checkpoint": str(self.folder(run))})


def read_selected(run: Run) -> Selected | None:
    """What `select` chose; None where nothing was.

    Raises:
        UserError: the file can't be read, or the model that it names is gone.
    """
    if not run.selected.exists():
        return None
    selected = _read(run)
    if not (selected.folder(run) / MANIFEST).exists():
        gone = f"{selected.checkpoint}, which is not there"
        raise UserError(Fault(str(run.selected), gone, "a checkpoint of the run", f"select again: gist-train select {run}"))
    return selected


def selected_steps(run: Run) -> frozenset[int]:
    """Steps whose checkpoints the selected model is made of, on disk or not: retention keeps them.

    Raises:
        UserError: selected.json can't be read.
    """
    return frozenset(_read(run).steps) if run.selected.exists() else frozenset()


def write_selected(run: Run, selected: Selected) -> None:
    """Keeps what was chosen. From now on no retention deletes its checkpoints."""
    write_json(run.selected, selected.model_dump(mode="json", by_alias=True))


def drop_other_means(run: Run, kept: Path) -> None:
    """Deletes the means that earlier choices left, once selected.json names another model."""
    for folder in run.all_averaged():
        if folder != kept:
            shutil.rmtree(folder)


def _read(run: Run) -> Selected:
    try:
        selected = Selected.model_validate(read_json(run.selected))
        made = run.averaged(selected.steps, selected.base_weight) if selected.averaged else run.checkpoint(selected.step)
        if selected.step != selected.steps[-1] or selected.folder(run) != made:
            raise ValueError(selected.checkpoint)
    except (OSError, ValueError, RecursionError, ValidationError):
        content, fix = "a file that can't be read, or says one thing here and another there", "delete it, or select again"
        raise UserError(Fault(str(run.selected), content, "what gist-train select writes", fix)) from None
    return selected
