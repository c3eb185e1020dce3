"""Where a run's metrics and evaluation scores go besides its own files."""

import secrets
from collections.abc import Mapping
from typing import Protocol

from gist_train.config.schema import Config, WandbConfig
from gist_train.config.secrets import without_secrets
from gist_train.data.files import write_text
from gist_train.run_folder import Run


class Tracker(Protocol):
    """Takes what is measured. Steps never go down but for a resume, and may come twice: metrics first, then scores."""

    def log(self, row: Mapping[str, float], step: int) -> None:
        """Takes numbers by name, of a step."""

    def finish(self, code: int) -> None:
        """Ends, with the exit code of the run."""


def trackers_of(config: Config, run: Run) -> list[Tracker]:
    """Those that the config asks for."""
    wandb = config.tracking.wandb
    return [] if wandb is None or wandb.mode == "disabled" else [Wandb(wandb, config, run)]


class Wandb:
    """Weights & Biases. A run that is resumed goes to the same page, under an id that outlives the process."""

    def __init__(self, wandb_config: WandbConfig, config: Config, run: Run):
        import wandb  # an extra, and slow to import

        self._run = wandb.init(
            project=wandb_config.project,
            entity=wandb_config.entity,
            mode=wandb_config.mode,
            name=config.name,
            id=_run_id(run),
            resume="allow",
            dir=str(run),
            config=without_secrets(config.model_dump(mode="json")),
        )

    def log(self, row: Mapping[str, float], step: int) -> None:
        """Takes numbers by name, of a step."""
        self._run.log(dict(row), step=step)

    def finish(self, code: int) -> None:
        """Ends, with the exit code of the run."""
        self._run.finish(exit_code=code)


def _run_id(run: Run) -> str:
    path = run.wandb_id
    if not path.exists():
        write_text(path, secrets.token_hex(4))
    return path.read_text(encoding="utf-8").strip()
