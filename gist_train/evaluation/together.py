"""Embedding a task's texts while somebody waits: by one process or by several, each with its share, and all have all vectors.

Legend: N texts, n of them, D dimensions of an embedding.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from gist_train.model.pretrained import Pretrained
from gist_train.progress import counting

BATCHES = 8
"""That each process embeds between two exchanges: these stay small, and nobody waits long to be stopped."""


class Team(Protocol):
    """Processes that evaluate one model together, each of which does the same in the same order."""

    rank: int
    size: int

    def agreed(self, names: Sequence[str]) -> list[str]:
        """What the first process says here."""
        ...

    def exchanged(
        self, places: NDArray[np.int64], vectors: NDArray[np.float32]
    ) -> list[tuple[NDArray[np.int64], NDArray[np.float32]]]:
        """(n,) and (n, D) of each process.

        Raises:
            Stopped, KeyboardInterrupt: one of them was told to stop; the same on all.
        """
        ...

    def stoppable(self) -> AbstractContextManager[None]:
        """Within it the first process, which is alone at work, stops at once where it is told to."""
        ...


@dataclass(frozen=True, slots=True)
class TaskEncoder:
    """A model whose texts are embedded by all of a team: the vectors of one process, to the bit, whatever their number."""

    model: Pretrained
    team: Team | None
    """None for this process alone."""
    what: str
    """The work, in words, to be shown with how far it is."""
    console: Console

    @property
    def prompts(self) -> Mapping[str, str]:
        """Those of the model's folder, by name."""
        return self.model.prompts

    def encode(self, texts: Sequence[str], prompt: str | None = None) -> NDArray[np.float32]:
        """(N, D) embeddings, as `Pretrained.encode` gives them. All of the team call it, with the same texts."""
        out = np.empty((len(texts), self.model.dimensions), np.float32)
        rank, size = (0, 1) if self.team is None else (self.team.rank, self.team.size)
        with self.model.evaluating(), counting(self.what, len(texts), self.console, passing=True) as count:
            tokens, batches = self.model.batches(texts, prompt)
            for first in range(0, len(batches), BATCHES * size):
                own = list(self.model.embed_batches(tokens, batches[first + rank : first + BATCHES * size : size]))
                places = np.concatenate([np.empty(0, np.int64), *(places for places, _ in own)])
                vectors = np.concatenate([out[:0], *(vectors for _, vectors in own)])
                parts = [(places, vectors)] if self.team is None else self.team.exchanged(places, vectors)
                for theirs, embedded in parts:
                    out[theirs] = embedded
                count.reach(count.done + sum(len(theirs) for theirs, _ in parts))
        return out
