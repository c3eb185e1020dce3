"""All that a step of training reads."""

from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import nn

from gist_train.config.schema import LossConfig
from gist_train.data.batches import BatchPlan
from gist_train.data.corpus import Corpus, TokenTable
from gist_train.training.lookups import GuideLookup, SourceRules
from gist_train.training.schedule import Schedule
from gist_train.training.update import LossScale


@dataclass(frozen=True, slots=True)
class Training:
    """Nothing in here but weights, moments and the loss scale changes from step to step."""

    accelerator: Accelerator
    model: nn.Module
    """The student's encoder as accelerate prepared it: Pack -> (N, D)."""
    optimizer: torch.optim.AdamW
    """Fused: it takes the scale of the gradients and whether to leave the weights alone as tensors."""
    schedule: Schedule
    plan: BatchPlan
    corpus: Corpus
    tokens: TokenTable
    guide: GuideLookup | str | None
    """A store's embeddings, "self" for the student's own similarities, or None."""
    loss: LossConfig
    sources: SourceRules
    grad_clip: float | None
    seed: int
    max_tokens_per_forward: int | None = None
    """Where a rank's texts have more tokens, they are encoded in chunks and the gradient is cached."""
    loss_scale: LossScale | None = None
    """Under fp16."""
    longest_in_graphs: int | None = None
    """Tokens of the longest text, where steps are replayed from CUDA graphs; None where they are not."""

    @property
    def packed(self) -> bool:
        """Whether the student encodes without padding."""
        return bool(self.accelerator.unwrap_model(self.model)[0].packed)
