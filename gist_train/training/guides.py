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

DRAWN_PAIRS = 8192
"""Of which a guide's similarities say how far apart they lie."""
SMALLEST_DEVIATION = 1e-6
WEIGHT_DIGITS = 6


@dataclass(frozen=True, slots=True, eq=False)
class TextsOfStore:
    """What a store holds of a corpus."""

    store: GuideStore
    positions: NDArray[np.int64]
    """(texts of the corpus,) where the store has each text; -1 for those that it is not asked for."""

    def read(self, text_ids: NDArray[np.int32]) -> NDArray[np.float32]:
        """(n, G) of n texts."""
        return self.store.read(self.positions[text_ids])


@dataclass(frozen=True, slots=True)
class StoredTexts:
    """What the stores of one guide, or of several, hold of a corpus."""

    parts: tuple[TextsOfStore, ...]
    weights: tuple[float, ...]
    """Of each guide in the mean of their similarities; they add up to 1."""

    @property
    def widths(self) -> tuple[int, ...]:
        """Of each guide."""
        return tuple(part.store.width for part in self.parts)

    def embeddings(self, text_ids: NDArray[np.int32]) -> Tensor:
        """(n, G) float32 of n texts. Of several guides side by side, each times the root of its weight: the similarity of two
        of these is the weighted mean of the guides' similarities."""
        if len(self.parts) == 1:
            return torch.from_numpy(self.parts[0].read(text_ids))
        scaled = [np.float32(weight**0.5) * part.read(text_ids) for part, weight in zip(self.parts, self.weights, strict=True)]
        return torch.from_numpy(np.concatenate(scaled, axis=1))

    def hold(self, text_ids: NDArray[np.int32]) -> NDArray[np.bool_]:
        """(n,) which of n texts all of them hold."""
        held: NDArray[np.bool_] = np.logical_and.reduce([part.positions[text_ids] >= 0 for part in self.parts])
        return held


@dataclass(frozen=True, slots=True)
class StoredGuide:
    """A guide whose embeddings are stored, or several in one; they may read each column after a prompt of its own."""

    anchor: StoredTexts
    positive: StoredTexts
    negative: StoredTexts

    @classmethod
    def alike(cls, store: GuideStore, positions: NDArray[np.int64]) -> "StoredGuide":
        """One that reads all columns alike, and has each text of the corpus at `positions` (N,)."""
        texts = StoredTexts((TextsOfStore(store, positions),), (1.0,))
        return cls(texts, texts, texts)

    @classmethod
    def of_parts(cls, parts: "Sequence[GuidePart]", stored: Sequence[TextsOfStore]) -> "StoredGuide":
        """One that reads the columns in parts, each after its prompt."""
        by_role = {role: texts for part, texts in zip(parts, stored, strict=True) for role in part.roles}
        return cls(*[StoredTexts((by_role[role],), (1.0,)) for role in range(3)])

    @classmethod
    def of_all(cls, guides: "Sequence[StoredGuide]", corpus: Corpus) -> "StoredGuide":
        """Several guides in one, which find two texts as similar as they do in the mean, on one scale.

        Guides differ in how far apart their similarities lie: those of one may be from 0.6 to 0.9, those of another from 0 to
        0.8, and a plain mean would go by the second alone. So each is divided by the deviation of its similarities of pairs that
        are drawn at random. (To take off their mean would change nothing that is compared: it is the same for all candidates.)
        """
        if len(guides) == 1:
            return guides[0]
        inverse = 1 / np.maximum([guide.deviation(corpus) for guide in guides], SMALLEST_DEVIATION)
        # Rounded: hosts whose sums differ in the last bit agree.
        weights = tuple(round(weight, WEIGHT_DIGITS) for weight in (inverse / inverse.sum()).tolist())
        columns = ([guide.anchor for guide in guides], [guide.positive for guide in guides], [guide.negative for guide in guides])
        return cls(*[StoredTexts(tuple(part for texts in column for part in texts.parts), weights) for column in columns])

    @property
    def columns(self) -> tuple[StoredTexts, StoredTexts, StoredTexts]:
        """Of anchors, positives and negatives."""
        return self.anchor, self.positive, self.negative

    @property
    def fingerprint(self) -> str:
        """Of its models and prompts."""
        guides = zip(*[texts.parts for texts in self.columns], strict=True)
        return ",".join("+".join(dict.fromkeys(part.store.fingerprint for part in parts)) for parts in guides)

    @property
    def by_column(self) -> list[list[str]]:
        """Of each column, the fingerprint of each guide's store: what tells other prompts of the same columns apart."""
        return [[part.store.fingerprint for part in texts.parts] for texts in self.columns]

    def folders(self) -> list[Path]:
        """Of its stores."""
        return list(dict.fromkeys(part.store.folder for texts in self.columns for part in texts.parts))

    def deviation(self, corpus: Corpus) -> float:
        """The standard deviation of its similarities of anchors and positives that are drawn at random."""
        random = np.random.default_rng(0)
        pairs = [column[random.integers(len(column), size=DRAWN_PAIRS)] for column in (corpus.anchor, corpus.positive)]
        anchors, positives = (texts.embeddings(ids).double() for texts, ids in zip(self.columns[:2], pairs, strict=True))
        return float((anchors * positives).sum(dim=1).std())


@dataclass(frozen=True, slots=True)
class SelfGuide:
    """The student's own similarities guide."""


Guide: TypeAlias = StoredGuide | SelfGuide | None
"""None: no guide, and no candidate is masked by one."""


@dataclass(frozen=True, slots=True)
class GuidePart:
    """What the guide reads of a corpus after one of its prompts. Where it has one prompt there is one part."""

    corpus: Corpus
    where: str
    """The guide's key in the YAML."""
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

    def stored(self, store: GuideStore, places: NDArray[np.int64]) -> TextsOfStore:
        """The texts, of which the store has each at one of `places` (n,)."""
        positions = np.full(self.corpus.text_count, -1)
        positions[self.texts] = places
        return TextsOfStore(store, positions)


def guide_parts(config: Config, guide: GuideConfig, corpus: Corpus, where: str) -> list[GuidePart]:
    """All that the guide reads of the corpus.

    Args:
        where: the guide's key in the YAML.
    """
    parts, by_role = [], guide.of_roles
    for model in dict.fromkeys(by_role):
        roles = tuple(role for role, other in enumerate(by_role) if other == model)
        texts = np.arange(corpus.text_count)
        if len(roles) < 3:
            columns = (corpus.anchor, corpus.positive, np.concatenate([corpus.negative, corpus.documents]))
            texts = np.unique(np.concatenate([columns[role] for role in roles])).astype(np.int64)
        parts.append(GuidePart(corpus, where, model, store_folder(cache_folder(config), model, where), texts, roles))
    return parts


def parts_of_all(config: Config, corpus: Corpus) -> list[GuidePart]:
    """What each guide that is a model reads of the corpus."""
    guides = [(where, guide) for where, guide in config.guides.items() if isinstance(guide, GuideConfig)]
    return [part for where, guide in guides for part in guide_parts(config, guide, corpus, where)]


def named_guide(config: Config, guide: Guide) -> str:
    """What guides, in words; of several guides each with its weight."""
    names = [one.name if isinstance(one, GuideConfig) else one.vectors for one in config.guides.values()]
    if not isinstance(guide, StoredGuide):
        return "none" if guide is None else "self"
    if len(names) == 1:
        return names[0]
    return ", ".join(f"{name} ({weight:.0%})" for name, weight in zip(names, guide.anchor.weights, strict=True))
