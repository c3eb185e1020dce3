"""More epochs for a run that has ended: a run of its own, that begins with the first one's model.

The first run stays as it is. Its learning rate has come to an end, and with another schedule its steps would have been others: to
train on in the same folder would be no run that anybody could repeat.
"""

from collections.abc import Sequence
from pathlib import Path

import yaml
from rich.console import Console

from gist_train.config.errors import Fault, UserError
from gist_train.config.loading import load_config
from gist_train.config.schema import Config
from gist_train.data.leases import held
from gist_train.results.export import export_model
from gist_train.results.selected import read_selected
from gist_train.run_folder import Run
from gist_train.training.checkpoint import checkpoint_to_resume, no_checkpoint

SEEDS = 2**32
"""From 0 on."""


def extended(
    config: Config,
    run: Run,
    *,
    epochs: int,
    name: str | None,
    step: int | None,
    overrides: Sequence[str],
    console: Console,
) -> Config:
    """The config of a run that gives the model of `run` more epochs. That model is copied into its folder, if it is not there.

    Warm-up, schedule and the optimizer's moments begin anew; rows come in other orders, by the next seed.

    Args:
        epochs: passes over the data.
        name: of the new run; None for the first one's and "-more".
        step: of the checkpoint to begin with; None for what the new run has begun with, else the selected one, else the newest.
        overrides: key.sub=value, of what else is to be otherwise.

    Raises:
        UserError: no such checkpoint, a damaged one, the first run's own name, faults of the overrides, or the first run trains.
    """
    values = config.model_dump()
    values["name"] = name or f"{config.name}-more"
    values["model"] |= {"revision": None, "layers": None}
    seed = (config.training.seed + 1) % SEEDS
    values["training"] |= {"epochs": epochs, "max_steps": None, "stop_at_step": None, "seed": seed}
    values["selection"] |= {"around": None}
    more = load_config(values, overrides)
    if (more.model.name, more.training.epochs) != (config.model.name, epochs):
        other = "another model.name or training.epochs"
        raise UserError(Fault("--set", other, f"the model of {run}, and epochs by --epochs", "leave it out"))
    there = Run.of(more)
    if there.folder.resolve() == run.folder.resolve():
        raise UserError(Fault("--name", more.name, "another name than the first run's", "leave it out, or choose one"))
    with held(run.writer_lock) as training:
        if training is not None:
            raise UserError(Fault(str(run), f"in training: {training}", "a run that has ended", "wait for it, or stop it"))
        start = _start_of(there) or _made_start(run, there, step, console)
    if step is not None and start.name != there.start(run.checkpoint(step).name).name:
        raise UserError(Fault("--step", str(step), f"what {there} has begun with: {start.name}", "leave it out, or give --name"))
    return more.model_copy(update={"model": more.model.model_copy(update={"name": str(start)})})


def _start_of(run: Run) -> Path | None:
    """What a run that has begun began with, if that is in its folder: the first run may have another selection by now."""
    if not run.config.exists():
        return None
    start = Path(yaml.safe_load(run.config.read_text(encoding="utf-8"))["model"]["name"])
    return start if start.parent == run.folder and start.is_dir() else None


def _made_start(run: Run, more: Run, step: int | None, console: Console) -> Path:
    """A copy, in the folder of the run `more`, of the model of `run` that it begins with."""
    if step is None and (selected := read_selected(run)) is not None:
        origin, chosen = selected.folder(run), None
    else:
        newest = checkpoint_to_resume(run, step, console)
        if newest is None:
            raise no_checkpoint(run)
        origin, chosen = newest.folder, newest.manifest["step"]
    start = more.start(origin.name)
    if not start.exists():
        export_model(run, chosen, start, console=console)
    return start
