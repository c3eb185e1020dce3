"""What `prepare`, `plan` and `train` refuse before any work is done: what one of them refuses, all do, in the same words.

What only this machine can't do, `train` refuses and the others report.
"""

import os
from importlib.util import find_spec
from pathlib import Path

import torch
from rich.console import Console

from gist_train.config.errors import Fault, UserError
from gist_train.config.schema import Config, cache_folder
from gist_train.config.tracking import TrackingConfig
from gist_train.evaluation.measuring import Measuring
from gist_train.model.pretrained import Pretrained
from gist_train.run_folder import Run
from gist_train.training.distributed import check_precision, precision_on
from gist_train.training.setup import check_dimensions, check_family, check_graphs, checkpoint_gradients
from gist_train.training.trackers import wandb_mode


def check(config: Config, console: Console) -> Measuring:
    """Checks what can be checked before a model is loaded, and returns the evaluation tasks, read.

    Raises:
        UserError: a folder can't be written to, a tracker's package is missing, a task can't be read, or `selection.metric` is
            none of their metrics.
    """
    check_folders(config)
    check_trackers(config.tracking)
    measuring = Measuring.of(config, console)
    measuring.require(config.selection.metric or {})
    return measuring


def check_folders(config: Config) -> None:
    """Makes the folders that a run writes to.

    Raises:
        UserError: they can't be made or written to, or something else is in their place.
    """
    for key, folder in (("output_dir", Path(config.output_dir)), ("cache_dir", cache_folder(config))):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            writable = os.access(folder, os.W_OK)
        except OSError as error:
            fault = f'"{folder}": {error.strerror}'
        else:
            fault = f'"{folder}", which can\'t be written to'
            if writable:
                continue
        raise UserError(Fault(key, fault, "a folder that can be made and written to", f"name another folder in {key}"))
    run = Run.of(config)
    for folder in (run.folder, run.checkpoints):
        if os.path.lexists(folder) and not folder.is_dir():
            found = "a link to nothing" if folder.is_symlink() else "a file"
            fix = "move it away, or give this training a name of its own"
            raise UserError(Fault(f"run folder {folder}", found, "a folder, or nothing", fix))


def check_student(config: Config, student: Pretrained) -> None:
    """Checks that the student can be trained and evaluated as the config asks.

    Raises:
        UserError: it can't, on any machine.
    """
    _check_weights(config, student)
    check_dimensions(config.loss, student)
    checkpoint_gradients(config.training, student)
    check_family(config.training, student)
    student.with_max_length(config.evaluation.max_length).with_truncation(config.evaluation.truncate_dim)


def _check_weights(config: Config, student: Pretrained) -> None:
    """Raises UserError where a weight of the student is not finite: the first loss would not be either."""
    for name, weight in student.encoder.transformer.named_parameters():
        if not torch.isfinite(weight).all():
            found = f"{name} with {int((~torch.isfinite(weight)).sum()):,} of {weight.numel():,} numbers that are not finite"
            raise UserError(Fault(f"model.name: {config.model.name}", found, "finite weights", "get the model again"))


def check_device(config: Config, student: Pretrained, device: torch.device, processes: int = 1) -> None:
    """Checks that this device can do what the config asks.

    Raises:
        UserError: another one could.
    """
    check_precision(config.training.precision, device)
    check_graphs(config.training, student, device, precision_on(config.training.precision, device), processes)


def report_device(config: Config, student: Pretrained, device: torch.device, console: Console) -> None:
    """Says what training would refuse on this device: who plans or prepares often does so on another machine."""
    try:
        check_device(config, student, device)
    except UserError as error:
        message = f"On this machine (device: {device.type}) gist-train train would refuse:\n{error}"
        console.print(message, markup=False, highlight=False, soft_wrap=True)


def check_trackers(tracking: TrackingConfig) -> None:
    """Raises UserError where a tracker is asked for whose package is missing."""
    asked = {
        "wandb": tracking.wandb is not None and wandb_mode(tracking.wandb) != "disabled",
        "tensorboard": tracking.tensorboard is not None,
        "mlflow": tracking.mlflow is not None,
        "trackio": tracking.trackio is not None,
    }
    faults = [
        Fault(
            f"tracking.{name}",
            f"no package {name}",
            "the package, which is an extra",
            f'pip install "gist-train[{name}]", or take tracking.{name} out',
        )
        for name in asked
        if asked[name] and find_spec(name) is None
    ]
    if faults:
        raise UserError(*faults)
