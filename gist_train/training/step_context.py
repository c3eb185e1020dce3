"""All that a step of training reads besides its batch: model, data, guide, what a source's rows contrast with.

Legend: B rows of the whole batch, M negatives, S sources.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor, nn

from gist_train.config.losses import DistillationConfig, LossConfig
from gist_train.config.sources import ClassificationSource, Source, TableSource
from gist_train.data.batches import BatchPlan
from gist_train.data.corpus import Batch, Corpus, TokenTable
from gist_train.training.guides import Guide
from gist_train.training.schedule import Schedule
from gist_train.training.update import UpdateState


@dataclass(frozen=True, slots=True)
class SourceRules:
    """By source, (S,) bool: what its rows contrast with."""

    own_negatives_only: NDArray[np.bool_]
    """With their own negatives alone: `in_batch_negatives: false`, and pairs with a score, which have none."""
    mask_same_label: NDArray[np.bool_]
    """With no candidate that is known to carry the anchor's label."""

    @classmethod
    def of(cls, sources: Sequence[Source]) -> "SourceRules":
        """Those of the config's sources."""
        # A pair with a score may be none that belongs together: it is no pair of the contrastive loss.
        graded = [isinstance(source, TableSource) and source.scores == "pairs" for source in sources]
        alone = [not source.in_batch_negatives or by_score for source, by_score in zip(sources, graded, strict=True)]
        masked = [isinstance(source, ClassificationSource) and source.mask_same_label for source in sources]
        return cls(np.array(alone), np.array(masked))


def labels_of(rules: SourceRules, batch: Batch) -> tuple[NDArray[np.int32] | None, NDArray[np.int32] | None]:
    """(B,) and (M,) labels, -1 for rows of sources that mask none; or twice None where no row of the batch is masked so."""
    masked = rules.mask_same_label[batch.source]
    if not masked.any():
        return None, None
    of_negatives = np.repeat(masked, np.diff(batch.negative_offsets))
    return np.where(masked, batch.label, -1), np.where(of_negatives, batch.negative_label, -1)


def own_negatives_of(rules: SourceRules, batch: Batch) -> tuple[NDArray[np.bool_] | None, NDArray[np.int64] | None]:
    """(B,) which rows keep to their own negatives and (M,) whose each negative is; or twice None where none does."""
    alone = rules.own_negatives_only[batch.source]
    if not alone.any():
        return None, None
    return alone, np.repeat(np.arange(len(alone)), np.diff(batch.negative_offsets))


@dataclass(frozen=True, slots=True)
class Training:
    """Nothing in here but weights, moments and `state` changes from step to step."""

    accelerator: Accelerator
    model: nn.Module
    """The student's encoder as accelerate prepared it: Pack -> (N, D)."""
    optimizer: torch.optim.AdamW
    """Fused: it takes the scale of the gradients and whether to leave the weights alone as tensors."""
    schedule: Schedule
    plan: BatchPlan
    corpus: Corpus
    tokens: TokenTable
    guide: Guide
    loss: LossConfig
    distillation: DistillationConfig
    guide_map: Tensor | None
    """(G, D) that takes the guide's embeddings into the student's dimensions, for regression; None where they are the same."""
    sources: SourceRules
    grad_clip: float | None
    seed: int
    state: UpdateState
    max_tokens_per_forward: int | None = None
    """Where a rank's texts have more tokens, they are encoded in chunks and the gradient is cached."""
    longest_in_graphs: int | None = None
    """Tokens of the longest text, where steps are replayed from CUDA graphs; None where they are not."""

    @property
    def packed(self) -> bool:
        """Whether the student encodes without padding."""
        return bool(self.accelerator.unwrap_model(self.model)[0].packed)
