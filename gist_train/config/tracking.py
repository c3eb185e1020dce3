"""The section `tracking`: where metrics go besides the run folder."""

from typing import Literal

from gist_train.config.fields import Count, Section, WandbName


class WandbConfig(Section):
    """Weights & Biases."""

    project: WandbName | None = None
    """Project that the run is logged to; null = $WANDB_PROJECT, else gist-train."""
    mode: Literal["online", "offline", "disabled"] | None = None
    """Whether the run is uploaded; null = as $WANDB_DISABLED or $WANDB_MODE says, else online."""
    entity: WandbName | None = None
    """User or team; null = the account's default."""


class TrackingConfig(Section):
    """Where metrics go besides metrics.jsonl."""

    log_every: Count = 50
    """Optimizer steps between two rows of metrics."""
    log_rows: bool = False
    """Whether the rows of the corpus that each step reads are written to step-rows.jsonl, {"step": 1, "rows": [4, 17, ...]}."""
    wandb: WandbConfig | None = None
    """Weights & Biases; null = not used."""
