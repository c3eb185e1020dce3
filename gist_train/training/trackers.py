"""Where a run's metrics and evaluation scores go besides its own files. None of them ends a training, or holds it up for long."""

import os
import secrets
from collections.abc import Callable, Mapping
from functools import partial
from netrc import NetrcParseError, netrc
from pathlib import Path
from threading import Thread
from typing import Any, Protocol
from urllib.parse import urlsplit

from gist_train.config.schema import Config
from gist_train.config.secrets import without_secrets
from gist_train.config.tracking import WandbConfig
from gist_train.data.files import write_text
from gist_train.run_folder import Run
from gist_train.training.tracker_stores import Mlflow, TensorBoard, Trackio
from gist_train.training.tracker_thread import SECONDS_WITH_MODEL, Past, Store, TrackedModel, TrackerThread, failure_reason

SECONDS_TO_BEGIN, SECONDS_TO_END = 10, 60
"""That W&B's server may take to begin a run, and to take what it has not got yet at the end."""
LONGEST_ARTIFACT = 128
"""Characters of an artifact's name at W&B."""


class Tracker(Protocol):
    """Takes what is measured. Steps never go down, and may come twice: metrics first, then scores."""

    def log(self, row: Mapping[str, float], step: int) -> None:
        """Takes numbers by name, of a step."""

    def log_model(self, model: TrackedModel) -> None:
        """Takes a model, whose folder must stay until `finish` is over."""

    def finish(self, code: int) -> None:
        """Ends, with the exit code of the run."""


def trackers_of(config: Config, run: Run, past: Past, notes: list[str]) -> list[Tracker]:
    """Those that the config asks for.

    Args:
        past: what there is of the run, and what trackers have that can't be asked.
        notes: what is to be said is added to it.
    """
    tracking, trackers, stores = config.tracking, list[Tracker](), dict[str, Callable[[], Store]]()
    if tracking.wandb is not None and wandb_mode(tracking.wandb) != "disabled":
        trackers.append(Wandb(tracking.wandb, config, run, past, notes))
    if tracking.tensorboard is not None:
        stores["TensorBoard"] = partial(TensorBoard, tracking.tensorboard, config, run)
    if tracking.mlflow is not None:
        stores["MLflow"] = partial(Mlflow, tracking.mlflow, config, run)
    if tracking.trackio is not None:
        stores["trackio"] = partial(Trackio, tracking.trackio, config, run)
    return [*trackers, *(TrackerThread(name, stores[name], config, run, past, notes) for name in stores)]


def wandb_mode(wandb: WandbConfig) -> str:
    """What the config says of uploading, else what W&B's own variables say."""
    if wandb.mode is not None:
        return wandb.mode
    if os.environ.get("WANDB_DISABLED", "").lower() in ("true", "1", "yes"):
        return "disabled"
    return {"dryrun": "offline", "": "online"}.get(mode := os.environ.get("WANDB_MODE", ""), mode)


def wandb_takes_model(wandb: WandbConfig) -> bool:
    """What the config says of logging the model, else what W&B's own variable says to transformers."""
    by_variable = os.environ.get("WANDB_LOG_MODEL", "").lower() in ("end", "checkpoint")
    wanted = by_variable if wandb.log_model is None else wandb.log_model
    return wanted and wandb_mode(wandb) != "disabled"


def missing_login(config: Config) -> str | None:
    """What is said before any work where a run is to be uploaded to W&B, and nobody is logged in; None where all is well."""
    wandb = config.tracking.wandb
    if wandb is None or wandb_mode(wandb) != "online" or os.environ.get("WANDB_API_KEY"):
        return None
    import wandb as package  # an extra, and slow to import

    settings = package.Settings()
    host = urlsplit(settings.base_url).netloc
    if settings.api_key or settings.identity_token_file or any(_names(file, host) for file in _netrc_files()):
        return None
    kept = "the log will be kept in the run folder, to be uploaded later"
    return f"warning: Weights & Biases: nobody is logged in to {host} (WANDB_API_KEY, or wandb login): {kept}"


def _netrc_files() -> list[Path]:
    given = os.environ.get("NETRC")
    return [Path(given)] if given else [Path.home() / name for name in (".netrc", "_netrc")]


def _names(file: Path, host: str) -> bool:
    try:
        return netrc(file).authenticators(host) is not None
    except (OSError, NetrcParseError):
        return False


class Wandb:
    """Weights & Biases. A run that is resumed goes to the same page, under an id that outlives the process.

    Where its server can't be reached, or knows no key, the log is kept in the run folder, from where it can be uploaded later.
    """

    def __init__(self, wandb_config: WandbConfig, config: Config, run: Run, past: Past, notes: list[str]):
        self._past, self._notes, self._patience = past, notes, SECONDS_TO_END
        self._name = config.name
        self._run = _begun(wandb_config, config, run, notes)

    def log(self, row: Mapping[str, float], step: int) -> None:
        """Takes numbers by name, of a step."""
        if self._run is None or self._past.has(row, step):
            return
        try:
            self._run.log(dict(row), step=step)
        except Exception as error:  # whatever it is, a figure on a page ends no training
            self._notes.append(
                f"warning: Weights & Biases: {failure_reason(error)}. It gets no more rows; metrics.jsonl has all."
            )
            self._run = None

    def log_model(self, model: TrackedModel) -> None:
        """Takes a model, as a version of an artifact that is called by the run's name."""
        import wandb  # an extra, and slow to import

        if self._run is None:
            return
        self._patience = SECONDS_WITH_MODEL
        try:
            artifact = wandb.Artifact(f"model-{self._name}"[:LONGEST_ARTIFACT], "model", metadata=model.metadata)
            artifact.add_dir(str(model.folder))
            self._run.log_artifact(artifact, aliases=model.aliases)
        except Exception as error:  # no room for its copy, and whatever else
            self._notes.append(f"warning: Weights & Biases: {failure_reason(error)}. It gets no model.")

    def finish(self, code: int) -> None:
        """Ends, with the exit code of the run."""
        if self._run is None:
            return
        failures: list[Exception] = []
        closing = Thread(target=_close, args=(self._run, code, failures), name="wandb", daemon=True)
        closing.start()
        closing.join(self._patience)
        if closing.is_alive() or failures:
            reason = failure_reason(failures[0]) if failures else f"not all was taken within {self._patience} s"
            self._notes.append(f"warning: Weights & Biases: {reason}. {_upload(self._run)}")


def _begun(wandb_config: WandbConfig, config: Config, run: Run, notes: list[str]) -> Any:
    """W&B's run, kept offline where it can't be begun as the config asks; None where that fails too."""
    import wandb  # an extra, and slow to import

    reason = None
    for mode in dict.fromkeys((wandb_mode(wandb_config), "offline")):
        try:
            begun = wandb.init(
                project=wandb_config.project or os.environ.get("WANDB_PROJECT") or "gist-train",
                entity=wandb_config.entity,
                mode=mode,  # type: ignore[arg-type]  # whatever $WANDB_MODE says
                name=config.name,
                id=_run_id(run),
                resume="allow",
                dir=str(run),
                config=without_secrets(config.model_dump(mode="json")),
                reinit="create_new",  # a program may have a run of its own
                settings=wandb.Settings(init_timeout=SECONDS_TO_BEGIN, login_timeout=SECONDS_TO_BEGIN),
            )
        except Exception as error:  # no key, no network, no permission, no room: none of them ends a training
            reason = reason or failure_reason(error)
            if wandb.run is None:
                wandb.teardown()  # its service would refuse the same id
        else:
            if reason is not None and missing_login(config) is None:  # else it was said in the beginning
                notes.append(f"warning: Weights & Biases: {reason}. {_upload(begun)}")
            elif mode == "offline":
                notes.append(f"Weights & Biases: {_upload(begun)}")
            return begun
    notes.append(f"warning: Weights & Biases: {reason}. It gets nothing; metrics.jsonl has all rows.")
    return None


def _close(run: Any, code: int, failures: list[Exception]) -> None:
    try:
        run.finish(exit_code=code)
    except Exception as error:  # what W&B raises here has no class in common
        failures.append(error)


def _upload(run: Any) -> str:
    return f"The log is kept; this uploads it: wandb sync {run.settings.sync_dir}"


def _run_id(run: Run) -> str:
    path = run.tracker_id("wandb")
    if not path.exists():
        write_text(path, secrets.token_hex(4))
    return path.read_text(encoding="utf-8").strip()
