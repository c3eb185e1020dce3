"""selected.json: which model of a run was chosen, by what, and how far the others lay behind."""

import hashlib
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gist_train.config.errors import Fault, UserError
from gist_train.data.files import read_json, write_json
from gist_train.training.checkpoint import MANIFEST, checkpoint_folder

SELECTED = "selected.json"


class _Part(BaseModel):
    """A part of selected.json: what is read of it is checked, since people edit files."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)


class _Candidate(_Part):
    name: str
    steps: list[int]
    base_weight: float
    score: float | None
    loss: float | None
    behind: float | None
    interval: list[float] | None
    within_noise: bool | None
    figures: dict[str, float]


class _Leak(_Part):
    task: str
    part: str | None
    texts: int
    shared: int
    rows: int


class _File(_Part):
    step: int
    steps: list[int] = Field(min_length=1)
    base_weight: float
    name: str
    checkpoint: str
    rule: str
    metric: dict[str, float] | None
    around: int | None
    window: int | None
    figures: dict[str, float]
    base: dict[str, float]
    candidates: list[_Candidate]
    evaluation: dict[str, Any]
    leakage: list[_Leak]


@dataclass(frozen=True, slots=True)
class Selected:
    """What was chosen."""

    step: int
    """The checkpoint's step; of a mean, the newest of `steps`."""
    steps: tuple[int, ...]
    """Steps that its weights are the mean of; one for a checkpoint."""
    base_weight: float
    """Share of the base model in its weights."""
    folder: Path
    """Where the model is."""
    told: dict[str, Any]
    """All that selected.json says."""

    @property
    def averaged(self) -> bool:
        """Whether it is no checkpoint, but made of some."""
        return len(self.steps) > 1 or self.base_weight > 0


def read_selected(run: Path) -> Selected | None:
    """What `select` chose; None where nothing was.

    Raises:
        UserError: the file can't be read, or the model that it names is gone.
    """
    if not (run / SELECTED).exists():
        return None
    selected = _read(run)
    if not (selected.folder / MANIFEST).exists():
        found = f"{selected.told['checkpoint']}, which is not there"
        raise UserError(Fault(str(run / SELECTED), found, "a checkpoint of the run", f"select again: gist-train select {run}"))
    return selected


def selected_steps(run: Path) -> frozenset[int]:
    """Steps whose checkpoints the selected model is made of: retention leaves them, be they there or not.

    Raises:
        UserError: selected.json can't be read.
    """
    return frozenset(_read(run).steps) if (run / SELECTED).exists() else frozenset()


def averaged_folder(run: Path, steps: Sequence[int], base_weight: float) -> Path:
    """Where the mean of these steps belongs: each mean has a folder of its own, so that a new choice harms no earlier one."""
    return run / f"averaged-{hashlib.blake2b(repr((list(steps), base_weight)).encode(), digest_size=4).hexdigest()}"


def drop_other_means(run: Path, kept: Path) -> None:
    """Deletes the means that earlier choices left, once selected.json names another model."""
    for folder in run.glob("averaged-*"):
        if folder != kept:
            shutil.rmtree(folder)


def write_selected(run: Path, told: dict[str, Any]) -> None:
    """Keeps what was chosen. From now on no retention deletes its checkpoints."""
    write_json(run / SELECTED, told)


def _read(run: Path) -> Selected:
    path = run / SELECTED
    try:
        told = _File.model_validate(read_json(path))
        steps = tuple(told.steps)
        selected = Selected(steps[-1], steps, told.base_weight, run / told.checkpoint, told.model_dump())
        made = averaged_folder(run, steps, told.base_weight) if selected.averaged else checkpoint_folder(run, told.step)
        if selected.folder != made:
            raise ValueError(told.checkpoint)
    except (OSError, ValueError, RecursionError, ValidationError):
        found, fix = "a file that can't be read, or says one thing here and another there", "delete it, or select again"
        raise UserError(Fault(str(path), found, "what gist-train select writes", fix)) from None
    return selected
