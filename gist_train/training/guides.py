"""The guide of a training: stored embeddings of what it reads of a corpus, the student itself, or none.

Legend: N texts of a corpus, n of them, G width of the guide.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gist_train.config.models import GuideConfig, StoredModelConfig
from gist_train.config.schema import Config, cache_folder
from gist_train.data.corpus import Corpus
from gist_train.model.guide import GuideStore, store_folder


@dataclass(frozen=True, slots=True)
class StoredTexts:
    """What a guide's store holds of a corpus."""

    store: GuideStore
    positions: NDArray[np.int64]
    """(texts of the corpus,) where the store has each text; -1 for those that it is not asked for."""

    def embeddings(self, text_ids: NDArray[np.int32]) -> Tensor:
        """(n, G) float32 of n texts."""
        return torch.from_numpy(self.store.read(self.positions[text_ids]))


@dataclass(frozen=True, slots=True)
class StoredGuide:
    """A guide whose embeddings are stored: the same store for all columns, unless it reads them after prompts of their own."""

    anchor: StoredTexts
    positive: StoredTexts
    negative: StoredTexts

    @classmethod
    def alike(cls, store: GuideStore, positions: NDArray[np.int64]) -> "StoredGuide":
        """One that reads all columns alike, and has each text of the corpus at `positions` (N,)."""
        texts = StoredTexts(store, positions)
        return cls(texts, texts, texts)

    @classmethod
    def of_parts(cls, parts: "Sequence[GuidePart]", stored: Sequence[StoredTexts]) -> "StoredGuide":
        """One that reads the columns in parts, each after its prompt."""
        by_role = {role: texts for part, texts in zip(parts, stored, strict=True) for role in part.roles}
        return cls(*[by_role[role] for role in range(3)])

    @property
    def fingerprint(self) -> str:
        """Of its model and prompts."""
        return "+".join(dict.fromkeys(part.store.fingerprint for part in (self.anchor, self.positive, self.negative)))


@dataclass(frozen=True, slots=True)
class SelfGuide:
    """The student's own similarities guide."""


Guide: TypeAlias = StoredGuide | SelfGuide | None
"""None: no guide, and no candidate is masked by one."""


@dataclass(frozen=True, slots=True)
class GuidePart:
    """What the guide reads of a corpus after one of its prompts. Where it has one prompt there is one part."""

    corpus: Corpus
    model: StoredModelConfig
    folder: Path
    """Of its store."""
    texts: NDArray[np.int64]
    """(n,) text ids."""
    roles: tuple[int, ...]
    """Of whom the texts are: 0 anchors, 1 positives, 2 negatives."""

    @property
    def hashes(self) -> NDArray[np.uint8]:
        """(n, 16)."""
        return self.corpus.hashes[self.texts]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """(n,) bytes."""
        return self.corpus.text_lengths()[self.texts]

    def text(self, index: int) -> str:
        """The text `texts[index]`, without the prompt."""
        return self.corpus.text(int(self.texts[index]))

    def stored(self, store: GuideStore, places: NDArray[np.int64]) -> StoredTexts:
        """The texts, of which the store has each at one of `places` (n,)."""
        positions = np.full(self.corpus.text_count, -1)
        positions[self.texts] = places
        return StoredTexts(store, positions)


def guide_parts(config: Config, guide: GuideConfig, corpus: Corpus) -> list[GuidePart]:
    """All that the guide reads of the corpus."""
    parts, by_role = [], guide.of_roles
    for model in dict.fromkeys(by_role):
        roles = tuple(role for role, other in enumerate(by_role) if other == model)
        texts = np.arange(corpus.text_count)
        if len(roles) < 3:
            columns = (corpus.anchor, corpus.positive, corpus.negative)
            texts = np.unique(np.concatenate([columns[role] for role in roles])).astype(np.int64)
        parts.append(GuidePart(corpus, model, store_folder(cache_folder(config), model, "guide"), texts, roles))
    return parts
