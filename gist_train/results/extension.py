"""More epochs for a run that has ended: a run of its own, that begins with the first one's model.

The first run stays as it is. Its learning rate has come to an end, and with another schedule its steps would have been others: to
train on in the same folder would be no run that anybody could repeat.
"""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from gist_train.config.errors import Fault, UserError
from gist_train.config.loading import load_config
from gist_train.config.schema import Config
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
        step: of the checkpoint to begin with; None for the selected one, or else the newest.
        overrides: key.sub=value, of what else is to be otherwise.

    Raises:
        UserError: no such checkpoint, a damaged one, the first run's own name, or faults of the overrides.
    """
    name = name or f"{config.name}-more"
    if name == config.name:
        raise UserError(Fault("--name", name, "another name than the first run's", "leave it out, or choose one"))
    selected = read_selected(run) if step is None else None
    newest = checkpoint_to_resume(run, step, console) if selected is None else None
    if selected is None and newest is None:
        raise no_checkpoint(run)
    origin = selected.folder(run) if selected is not None else newest.folder  # type: ignore[union-attr]
    start = Run(Path(config.output_dir) / name).start(origin.name)
    values = config.model_dump()
    values["name"] = name
    values["model"] |= {"name": str(start), "revision": None, "layers": None}
    seed = (config.training.seed + 1) % SEEDS
    values["training"] |= {"epochs": epochs, "max_steps": None, "stop_at_step": None, "seed": seed}
    values["selection"] |= {"around": None}
    more = load_config(values, overrides)
    if not start.exists():
        export_model(run, step, start, console=console)
    return more
