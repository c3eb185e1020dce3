"""The selected model, as `export` writes it, handed to the trackers that are to keep it."""

import shutil

from rich.console import Console

from gist_train.checks import check_trackers
from gist_train.config.schema import Config
from gist_train.data.leases import held
from gist_train.progress import say
from gist_train.results.criteria import Criteria
from gist_train.results.export import export_model
from gist_train.results.select import select
from gist_train.results.selected import Selected
from gist_train.run_folder import Run
from gist_train.training.tracker_thread import Past, TrackedModel
from gist_train.training.trackers import trackers_of, wandb_takes_model


def select_and_log(config: Config, run: Run, criteria: Criteria, console: Console) -> Selected:
    """Chooses the final model, and hands it to the trackers that are to keep it (`log_model`).

    Raises:
        UserError: a tracker's package is missing, which is told before any work; and as `select` does.
    """
    tracked = _with_model_trackers(config)
    selected = select(config, run, criteria, console)
    if tracked is not None:
        _log(tracked, run, selected, console)
    return selected


def _with_model_trackers(config: Config) -> Config | None:
    """The same config with those trackers alone that are to keep the model; None where there is none."""
    tracking = config.tracking
    kept = {
        "wandb": tracking.wandb if tracking.wandb and wandb_takes_model(tracking.wandb) else None,
        "tensorboard": None,
        "mlflow": tracking.mlflow if tracking.mlflow and tracking.mlflow.log_model else None,
        "trackio": tracking.trackio if tracking.trackio and tracking.trackio.log_model else None,
    }
    if not any(kept.values()):
        return None
    tracking = tracking.model_copy(update=kept)
    check_trackers(tracking)
    return config.model_copy(update={"tracking": tracking})


def _log(config: Config, run: Run, selected: Selected, console: Console) -> None:
    """Hands the selected model to the trackers of the config, in the run that they have of the training.

    Trackers that can be asked get the rows that they lack, too.
    """
    with held(run.writer_lock) as training:
        if training is not None:  # two processes in one run of a tracker would tear it
            say(console, f"the model is logged by gist-train select once the training is over: {training}")
            return
        names = ", ".join(name for name, section in config.tracking if section is not None)
        say(console, f"step {selected.step:,} is chosen; its model goes to {names}")
        notes, last = list[str](), max(run.saved_steps(), default=0)
        try:
            folder = export_model(run, None, run.tracked_model, console=console)
            trackers = trackers_of(config, run, Past(last, last, last), notes)
            for tracker in trackers:
                tracker.log_model(TrackedModel(folder, selected.step, selected.scores))
            for tracker in trackers:
                tracker.finish(0 if run.ended.exists() else 1)  # as the training left it
        finally:
            shutil.rmtree(run.tracked_model, ignore_errors=True)
        for note in notes:
            say(console, note)
