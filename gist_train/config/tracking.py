"""The section `tracking`: where metrics go besides the run folder."""

from typing import Literal

from gist_train.config.fields import Count, PathText, Section, Title, WandbName


class WandbConfig(Section):
    """Weights & Biases."""

    project: WandbName | None = None
    """Project that the run is logged to; null = $WANDB_PROJECT, else gist-train."""
    mode: Literal["online", "offline", "disabled"] | None = None
    """Whether the run is uploaded; null = as $WANDB_DISABLED or $WANDB_MODE says, else online."""
    entity: WandbName | None = None
    """User or team; null = the account's default."""
    log_model: bool | None = None
    """Whether gist-train select logs the model as an artifact; null = where $WANDB_LOG_MODEL is end or checkpoint."""


class TensorboardConfig(Section):
    """TensorBoard: event files on this machine."""

    folder: PathText | None = None
    """Folder in which the run has one by its name; null = $TENSORBOARD_LOGGING_DIR, else tensorboard in the run folder."""


class MlflowConfig(Section):
    """MLflow: a server, or a database on this machine."""

    tracking_uri: PathText | None = None
    """Address of the server or database; null = $MLFLOW_TRACKING_URI, else the file mlflow.db in output_dir."""
    experiment: Title | None = None
    """Experiment that the run is in; null = $MLFLOW_EXPERIMENT_NAME, else gist-train."""
    log_model: bool = False
    """Whether gist-train select logs the model as the run's artifacts."""


class TrackioConfig(Section):
    """Trackio: a database on this machine, in the folder $TRACKIO_DIR."""

    project: Title = "gist-train"
    """Project that the run is in."""
    log_model: bool = False
    """Whether gist-train select logs the model as an artifact."""


class TrackingConfig(Section):
    """Where metrics go besides metrics.jsonl."""

    log_every: Count = 50
    """Optimizer steps between two rows of metrics."""
    log_rows: bool = False
    """Whether the rows of the corpus that each step reads are written to step-rows.jsonl, {"step": 1, "rows": [4, 17, ...]}."""
    wandb: WandbConfig | None = None
    """Weights & Biases; null = not used."""
    tensorboard: TensorboardConfig | None = None
    """TensorBoard; {} = used, null = not used."""
    mlflow: MlflowConfig | None = None
    """MLflow; {} = used, null = not used."""
    trackio: TrackioConfig | None = None
    """Trackio; {} = used, null = not used."""
