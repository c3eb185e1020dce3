"""What `prepare`, `plan` and `train` refuse before any work is done: what one of them refuses, all do, in the same words."""

from importlib.util import find_spec

import torch

from gist_train.config.errors import Fault, UserError
from gist_train.config.schema import Config
from gist_train.model.pretrained import Pretrained
from gist_train.prepare import check_folders
from gist_train.results.measuring import Measuring
from gist_train.training.opening import check_compile, check_dimensions, checkpoint_gradients


def check(config: Config) -> Measuring:
    """Checks what can be checked before a model is loaded, and returns the evaluation tasks, read.

    Raises:
        UserError: a folder can't be written to, a tracker's package is missing, a task can't be read, or `selection.metric` is
            none of their metrics.
    """
    check_folders(config)
    _check_tracker(config)
    measuring = Measuring.of(config)
    measuring.require(config.selection.metric or {})
    return measuring


def check_student(config: Config, student: Pretrained, device: torch.device, precision: str, processes: int = 1) -> None:
    """Checks that the student can be trained and evaluated as the config asks, on this device.

    Args:
        precision: float32, bf16 or fp16, as `training.precision` turns out on the device.
        processes: of the run.

    Raises:
        UserError: it can't.
    """
    check_dimensions(config.loss, student)
    checkpoint_gradients(config.training, student)
    check_compile(config.training, student, device, precision, processes)
    student.with_max_length(config.evaluation.max_length).with_truncation(config.evaluation.truncate_dim)


def _check_tracker(config: Config) -> None:
    wandb = config.tracking.wandb
    if wandb is not None and wandb.mode != "disabled" and find_spec("wandb") is None:
        fix = 'pip install "gist-train[wandb]", or take tracking.wandb out'
        raise UserError(Fault("tracking.wandb", "no package wandb", "the package, which is an extra", fix))
