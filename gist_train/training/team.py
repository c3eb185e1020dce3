"""The ranks of a training, which evaluate together: `evaluation.together.Team`."""

import json
import signal
from collections.abc import Sequence
from contextlib import AbstractContextManager

import numpy as np
import torch
from numpy.typing import NDArray

from gist_train.training.distributed import gathered_on_hosts, largest_over_ranks
from gist_train.training.ranks import Ranks
from gist_train.training.signals import Stopped, StopSignal


class RankTeam:
    """All ranks, while they note signals and act on them together: one that left alone would leave the others waiting."""

    def __init__(self, ranks: Ranks, signals: StopSignal):
        self.rank, self.size = ranks.rank, ranks.size
        self._ranks, self._signals = ranks, signals

    def agreed(self, names: Sequence[str]) -> list[str]:
        """What the first rank says here."""
        agreed: list[str] = json.loads(self._ranks.first_says(json.dumps(list(names))))
        return agreed

    def exchanged(
        self, places: NDArray[np.int64], vectors: NDArray[np.float32]
    ) -> list[tuple[NDArray[np.int64], NDArray[np.float32]]]:
        """(n,) and (n, D) of each rank.

        Raises:
            Stopped, KeyboardInterrupt: one of them was told to stop; the same on all.
        """
        if number := largest_over_ranks(self._signals.received()):
            raise KeyboardInterrupt if number == signal.SIGINT else Stopped(number)
        parts = (gathered_on_hosts(torch.from_numpy(part)) for part in (places, vectors))
        return [(theirs.numpy(), embedded.numpy()) for theirs, embedded in zip(*parts, strict=True)]

    def stoppable(self) -> AbstractContextManager[None]:
        """Within it the first rank, which is alone at work, stops at once where it is told to."""
        return self._signals.noted(False)
