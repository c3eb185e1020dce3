"""selected.json: which model of a run was chosen, by what, and how far the others lay behind."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gist_train.config.errors import Fault, UserError
from gist_train.data.files import read_json, write_json
from gist_train.training.checkpoint import MANIFEST

SELECTED = "selected.json"
AVERAGED = "averaged"
"""Folder of the run that holds the mean of several checkpoints, where one was chosen."""


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
    path = run / SELECTED
    if not path.exists():
        return None
    selected = _read(path)
    if not (selected.folder / MANIFEST).exists():
        found = f"{selected.told['checkpoint']}, which is not there"
        raise UserError(Fault(str(path), found, "a checkpoint of the run", f"select again: gist-train select {run}"))
    return selected


def selected_steps(run: Path) -> frozenset[int]:
    """Steps whose checkpoints the selected model is made of: retention leaves them, be they there or not.

    Raises:
        UserError: selected.json can't be read.
    """
    return frozenset(_read(run / SELECTED).steps) if (run / SELECTED).exists() else frozenset()


def write_selected(run: Path, told: dict[str, Any]) -> None:
    """Keeps what was chosen. From now on no retention deletes its checkpoints."""
    write_json(run / SELECTED, told)


def _read(path: Path) -> Selected:
    try:
        told = read_json(path)
        steps = tuple(int(step) for step in told["steps"])
        return Selected(int(told["step"]), steps, float(told["base_weight"]), path.parent / told["checkpoint"], told)
    except (ValueError, KeyError, TypeError):
        raise UserError(Fault(str(path), "a file that can't be read", "what gist-train select writes", "select again")) from None
