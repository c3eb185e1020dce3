"""Models, rows and gradients for tests of what runs inside sentence-transformers' trainer."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.base.sampler import DefaultBatchSampler
from sentence_transformers.sentence_transformer.losses import CachedGISTEmbedLoss
from torch import Tensor, nn
from torch.utils.data import SequentialSampler

from gist_train.inside.trainer_loss import WAITS_ONCE

QUICKSTART = Path(__file__).resolve().parents[2] / "gist_train" / "quickstart" / "intents.train.jsonl"
Gradients = dict[str, Tensor]


def columns_of(rows: int, columns: int) -> list[list[str]]:
    """Anchors, positives and `columns - 2` columns of negatives, all different texts, of real utterances."""
    texts = list(dict.fromkeys(json.loads(line)["text"] for line in QUICKSTART.open(encoding="utf-8")))
    return [texts[number::columns][:rows] for number in range(columns)]


def dataset_of(columns: Sequence[list[str]]) -> Dataset:
    """A data set of the columns, called as the trainer expects them."""
    names = ["anchor", "positive", *[f"negative_{k}" for k in range(len(columns) - 2)]]
    return Dataset.from_dict(dict(zip(names, columns, strict=True)))


def opened(folder: Path, *, training: bool = True) -> SentenceTransformer:
    """A model on the CPU, its matrices made larger: with those drawn at random all texts are alike, and rounding masks."""
    model = SentenceTransformer(str(folder), device="cpu")
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(10.0 if weight.ndim == 2 else 1.0)
    model.model_card_data.widget = [{}]  # examples that it would otherwise compute for the card
    return model.train(training)


def their_cached_loss(model, guide, mini_batch_size=32):
    """CachedGISTEmbedLoss, where it works."""
    loss = CachedGISTEmbedLoss(model, guide, mini_batch_size=mini_batch_size)
    if loss.must_retokenize and not WAITS_ONCE:
        pytest.skip("before sentence-transformers 6.2 it fails with a guide that tokenizes differently")
    return loss


def loss_and_gradients(
    loss: nn.Module, model: SentenceTransformer, columns: Sequence[list[str]], preprocess: Any = None
) -> tuple[float, Gradients]:
    """Of one batch."""
    model.zero_grad()
    value = loss([(preprocess or model.preprocess)(texts) for texts in columns], None)
    value.backward()
    return value.item(), {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def assert_same(found: tuple[float, Gradients], expected: tuple[float, Gradients], tolerance: float = 1e-5) -> None:
    """The same loss and gradients, which are there and not all 0."""
    assert abs(found[0] - expected[0]) <= tolerance * max(1.0, abs(expected[0]))
    assert found[1].keys() == expected[1].keys()
    assert len(expected[1]) > 10
    largest = max(float(gradient.abs().max()) for gradient in expected[1].values())
    assert largest > 1e-3
    for name, gradient in expected[1].items():
        assert float((found[1][name] - gradient).abs().max()) <= tolerance * max(1.0, largest), name


class InOrder(DefaultBatchSampler):
    """A data set's rows as they stand."""

    def __init__(self, dataset: Dataset, **options: Any):
        super().__init__(SequentialSampler(dataset), **options)


def arguments(folder: Path, **given: Any) -> SentenceTransformerTrainingArguments:
    """Of a short training on the CPU that reads rows in their order. Gradients that are 0 but for rounding move no weight."""
    options: dict[str, Any] = {
        "max_steps": 3,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "adam_epsilon": 1e-3,
        "max_grad_norm": 0.0,
        "batch_sampler": InOrder,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return SentenceTransformerTrainingArguments(str(folder), **options | given)


def trained(model: SentenceTransformer, loss: Any, data: Any, args: Any, **options: Any) -> dict[str, Tensor]:
    """The weights after a training."""
    trainer = SentenceTransformerTrainer(model, args, train_dataset=data, loss=loss, **options)
    trainer.train()
    return {name: weight.detach().clone() for name, weight in model.state_dict().items()}
