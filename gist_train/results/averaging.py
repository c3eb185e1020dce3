"""Means of weights: of several checkpoints, and with the base model (model soups, Wortsman et al. 2022, arXiv 2203.05482)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gist_train.config.errors import Fault, UserError
from gist_train.config.models import ModelConfig
from gist_train.data.files import whole_folder
from gist_train.data.manifests import seal, verified_manifest
from gist_train.model.loading import load_student, load_trained
from gist_train.model.pretrained import Pretrained
from gist_train.run_folder import Run


def averaged(run: Run, steps: Sequence[int], base: ModelConfig, base_weight: float) -> Pretrained:
    """A model whose weights are (1 - base_weight) times the mean of the steps' checkpoints plus base_weight times the base's.

    Sums are float64, so that the order of the steps does not matter; one checkpoint at a time is in memory beside them.

    Raises:
        UserError: a checkpoint is damaged, or the base model's weights are of another shape.
    """
    models = (_verified(run, step, base) for step in steps)
    model = next(models)
    sums = {name: weight.to(torch.float64) for name, weight in _weights(model).items()}
    for other in models:
        for name, weight in _weights(other).items():
            sums[name] += weight
    for weight in sums.values():
        weight *= (1 - base_weight) / len(steps)
    if base_weight:
        of_base = _weights(load_student(base.model_copy(update={"lora": None})))  # of checkpoints adapters are merged
        if {name: weight.shape for name, weight in of_base.items()} != {name: weight.shape for name, weight in sums.items()}:
            expected = "the model that the run was trained from"
            raise UserError(Fault("model.name", f"{base.name}, whose weights are of another shape", expected, "name that one"))
        for name, weight in of_base.items():
            sums[name].add_(weight, alpha=base_weight)
    with torch.no_grad():
        for name, weight in _weights(model).items():
            weight.copy_(sums[name])
    return model


def save_averaged(model: Pretrained, folder: Path, facts: dict[str, Any]) -> None:
    """Writes a mean as a model folder with a manifest that holds `facts`; one that is there gives way once it is whole."""
    with whole_folder(folder, replace=True) as partial:
        model.save(partial)
        seal(partial, facts)


def _verified(run: Run, step: int, base: ModelConfig) -> Pretrained:
    folder = run.checkpoint(step)
    verified_manifest(folder)
    return load_trained(folder, base)


def _weights(model: Pretrained) -> dict[str, Tensor]:
    """The weights by name, as they are in memory. Buffers are the architecture's, not learnt: all models have the same."""
    return {name: weight.detach() for name, weight in model.encoder.transformer.named_parameters()}
