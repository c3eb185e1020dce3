"""Texts -> the guide's store: what is not there is embedded, by all processes of a run together, and said how long it takes."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console

from gist_train.config.errors import shown
from gist_train.config.fields import FEWEST_TOKENS, SHORTEST
from gist_train.config.models import GuideConfig, GuideVectorsConfig, StoredModelConfig
from gist_train.config.schema import Config, cache_folder
from gist_train.data.caches import mark_used
from gist_train.data.corpus import Corpus
from gist_train.memory import lowered, naming_work
from gist_train.model.encoder import tokens_at_a_time
from gist_train.model.folders import identity
from gist_train.model.guide import GuideStore, seconds_to_embed
from gist_train.model.loading import load_guide
from gist_train.model.vectors import refuse_missing, vector_files, vector_store
from gist_train.model.whole import TextModel
from gist_train.progress import duration, follow, say
from gist_train.pulse import waiting
from gist_train.training.guides import Guide, GuidePart, SelfGuide, StoredGuide, TextsOfStore, guide_parts


@dataclass(frozen=True, slots=True)
class Processes:
    """The processes of one run, which embed together."""

    count: int = 1
    shown: bool = True
    """Whether this one shows how far all of them are: one on each machine does."""


ALONE = Processes()
TIMED_FROM = 1000
"""Texts to embed from which on it is said how long that will take."""
SHOWN_DAMAGED = 3
"""Texts that are named of those whose embeddings are damaged."""


@dataclass(frozen=True, slots=True)
class Embedder:
    """A model and the store of what it has embedded: the guide, or what triplets of labelled texts are mined with."""

    model: StoredModelConfig
    where: str
    """The model's key in the YAML."""
    folder: Path
    """Of its store."""

    def embed(
        self,
        hashes: NDArray[np.uint8],
        lengths: NDArray[np.int64],
        text: Callable[[int], str],
        device: torch.device,
        console: Console,
        processes: Processes,
    ) -> tuple[GuideStore, NDArray[np.int64]]:
        """The store, and (N,) where it has each of N texts; those that no run has embedded yet are embedded."""

        @cache
        def load() -> TextModel:
            with waiting():  # for another rank, where both fetch it from the hub
                model = load_guide(self.model, self.where)
            named = {name: prompt for name, prompt in model.prompts.items() if prompt}
            if self.model.prompt is None and named and not model.default_prompt:
                several = ", ".join(f"{name}: {shown(prompt)}" for name, prompt in named.items())
                unset = f"{self.where}.prompt is not set: {self.model.name} reads texts without the prompts of its folder"
                line = f"{unset} ({several})"
                say(console, line)
            return model.to(device)

        store = GuideStore(self.folder)
        positions = store.positions(hashes)
        if len(damaged := np.flatnonzero(store.damaged(positions))):
            texts = ", ".join(shown(text(int(index))) for index in damaged[:SHOWN_DAMAGED])
            found = f"{self.folder / 'embeddings.bin'}: {len(damaged):,} damaged embeddings, of {texts}"
            say(console, f"{found}{', ...' if len(damaged) > SHOWN_DAMAGED else ''}: made anew")
            store.forget(positions[damaged])
            positions = store.positions(hashes)
        if missing := int((positions < 0).sum()):
            what = "embedding with the guide" if self.where == "guide" else f"embedding with {self.model.name}"
            with naming_work(lambda: (what, self._lowering(load(), device))):
                if missing >= TIMED_FROM and processes.shown:
                    seconds = seconds_to_embed(load(), self.model, np.flatnonzero(positions < 0), lengths, text) / processes.count
                    say(console, f"{missing:,} texts to embed with {self.model.name}: about {duration(seconds)}")
                counts = store.fill_together(load, self.model, hashes, lengths, text, processes.count, missing)
                follow(counts, what, missing, console, shown=processes.shown)
            positions = store.positions(hashes)
        mark_used(self.folder)
        return store, positions

    def _lowering(self, model: TextModel, device: torch.device) -> list[str]:
        """Settings that lower what embedding takes, in the order in which to try them."""
        at_a_time = tokens_at_a_time(self.model.batch_tokens, device)
        lowering = [
            lowered(f"{self.where}.batch_tokens", at_a_time, None, FEWEST_TOKENS),
            lowered(f"{self.where}.max_length", model.max_length, None, SHORTEST),
        ]
        return [setting for setting in lowering if setting is not None]


def check_guide(config: Config) -> None:
    """Raises UserError where there is no such guide: millions of rows need not be read before."""
    for where, guide in config.guides.items():
        match guide:
            case GuideConfig():
                identity(guide.name, guide.revision, where, lambda _: "")  # is it there: its content is read later
            case GuideVectorsConfig():
                vector_files(guide, where)


def prepare_guide(config: Config, corpus: Corpus, device: torch.device, console: Console, processes: Processes = ALONE) -> Guide:
    """The guide's embeddings of the corpus' texts; those that no run has embedded yet are embedded on `device`.

    Args:
        processes: of this run. All of them call this, each with a device of its own, and each embeds its share.

    Raises:
        UserError: the guide can't be loaded, or its store is damaged.
    """

    def embedded(part: GuidePart, where: str) -> TextsOfStore:
        embedder = Embedder(part.model, where, part.folder)
        return part.stored(*embedder.embed(part.hashes, part.lengths, part.text, device, console, processes))

    return _guide_of(config, corpus, embedded)


def guide_as_stored(config: Config, corpus: Corpus) -> Guide:
    """The guide where nothing is left to embed; None where its store lacks a text."""

    def as_stored(part: GuidePart, _: str) -> TextsOfStore | None:
        store = GuideStore(part.folder)
        places = store.positions(part.hashes)
        return None if (places < 0).any() else part.stored(store, places)

    return _guide_of(config, corpus, as_stored)


def _guide_of(config: Config, corpus: Corpus, stored: Callable[[GuidePart, str], TextsOfStore | None]) -> Guide:
    """The guides whose embeddings are stored in one, else the student itself, or none; None where one lacks a text."""
    guides = []
    for where, guide in config.guides.items():
        if isinstance(guide, GuideVectorsConfig):
            guides.append(_guide_of_vectors(config, guide, corpus, where))
            continue
        parts = guide_parts(config, guide, corpus, where)
        texts = [one for part in parts if (one := stored(part, where)) is not None]
        if len(texts) < len(parts):
            return None
        guides.append(StoredGuide.of_parts(parts, texts))
    if guides:
        return StoredGuide.of_all(guides, corpus)
    return None if config.guide is None else SelfGuide()


def _guide_of_vectors(config: Config, guide: GuideVectorsConfig, corpus: Corpus, where: str) -> StoredGuide:
    """Vectors that were computed elsewhere; UserError where these lack a text."""
    store = vector_store(cache_folder(config), guide, where)
    positions = store.positions(corpus.hashes)
    refuse_missing(store, [corpus.text(int(i)) for i in np.flatnonzero(positions < 0)], corpus.text_count, where)
    return StoredGuide.alike(store, positions)
