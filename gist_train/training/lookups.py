"""What the loss asks of a batch besides the student: the guide's embeddings, labels, whose negatives are whose.

Legend: B rows of the whole batch, M negatives, G width of the guide, S sources.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gist_train.config.sources import ClassificationSource, Source
from gist_train.data.corpus import Batch
from gist_train.model.guide import GuideStore


@dataclass(frozen=True, slots=True)
class GuideLookup:
    """The guide's embeddings of a corpus' texts."""

    store: GuideStore
    positions: NDArray[np.int64]
    """(texts of the corpus,) where each text stands in the store."""

    def of(self, text_ids: NDArray[np.int32]) -> Tensor:
        """(n, G) float32."""
        return torch.from_numpy(self.store.read(self.positions[text_ids]))


@dataclass(frozen=True, slots=True)
class SourceRules:
    """By source, (S,) bool: what its rows contrast with."""

    own_negatives_only: NDArray[np.bool_]
    """With their own negatives alone: `in_batch_negatives: false`."""
    mask_same_label: NDArray[np.bool_]
    """With no candidate that is known to carry the anchor's label."""

    @classmethod
    def of(cls, sources: Sequence[Source]) -> "SourceRules":
        """Those of the config's sources."""
        alone = [not source.in_batch_negatives for source in sources]
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
