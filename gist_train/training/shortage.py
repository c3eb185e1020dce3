"""What a training that runs out of memory can be told: the settings that lower what a step takes, and values that fitted."""

from gist_train.config.fields import FEWEST_TOKENS, SHORTEST
from gist_train.config.schema import Config
from gist_train.memory import lowered
from gist_train.training.inputs import inputs_of
from gist_train.training.step_context import Training

LARGE_BATCH = 128
"""Rows from which on the similarities of a batch are worth cutting into blocks."""


def training_work(config: Config, training: Training, max_length: int, step: int, fitted: int) -> tuple[str, list[str]]:
    """What was being done at `step`, and the settings to lower, in the order in which to try them.

    Args:
        max_length: tokens a text is cut to.
        fitted: the most tokens that a process has computed in a step that fitted; 0 for none.
    """
    limit, rows = config.training.max_tokens_per_forward, config.training.batch_size
    tokens = inputs_of(training, step).computed_tokens // training.accelerator.num_processes
    if limit is not None:
        tokens, fitted = min(tokens, limit), min(fitted, limit)
    fixed = config.training.compile or config.training.cuda_graph or config.training.gradient_checkpointing
    block = rows if config.loss.block_size is None else config.loss.block_size
    length = lowered("model.max_length", max_length, None, SHORTEST)
    lowering = [
        lowered("training.max_tokens_per_forward", tokens, fitted or None, FEWEST_TOKENS),
        None if fixed else "training.gradient_checkpointing: true",
        lowered("loss.block_size", block, None, 1) if rows >= LARGE_BATCH else None,
        None if length is None else f"{length}, which makes it another training",
    ]
    return f"training, step {step:,}", [setting for setting in lowering if setting is not None]
