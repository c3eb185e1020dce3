"""A guide's store that is read and added to while a training runs: a text is embedded when it is first met, and never again.

What is new stays in memory until there is enough to write, or some seconds have passed, and is written at the latest when the
process ends: an append waits for the disk, which a step should not. Where nothing can be written, that is said once, and the
training goes on.

Legend: n texts of a step, G width of the guide.
"""

import logging
import math
import os
import time
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gist_train.config.models import StoredModelConfig
from gist_train.data.caches import use_while_alive
from gist_train.data.leases import locked
from gist_train.model.filling import HASH_BYTES, Filling
from gist_train.model.guide import GuideStore

logger = logging.getLogger(__name__)

MOST_UNWRITTEN = 2048
"""Embeddings that are in memory alone, at the most."""
SECONDS_UNWRITTEN = 10.0
"""For how long they are, while texts come."""
Vectors = NDArray[np.float32]


class _Unwritten:
    """Embeddings that are not on the disk yet."""

    def __init__(self, folder: Path, config: StoredModelConfig):
        self.vectors: dict[bytes, Vectors] = {}
        """By hash, (G,)."""
        self.known = 0
        """Embeddings of the store that this process has seen."""
        self._folder, self._config, self._process = folder, config, os.getpid()
        # The first are written at once. What can't be written is said early, and the thread that holds the lock is there before
        # the interpreter ends: then no thread can be started.
        self._written, self._failed = -math.inf, False

    @property
    def due(self) -> bool:
        """Whether it is time to write them."""
        waited = time.monotonic() - self._written
        return len(self.vectors) >= MOST_UNWRITTEN or (bool(self.vectors) and waited > SECONDS_UNWRITTEN)

    def write(self) -> None:
        """Appends them to the store. A process that was forked meanwhile leaves them to its parent."""
        if not self.vectors or os.getpid() != self._process:
            return
        hashes = np.frombuffer(b"".join(self.vectors), np.uint8).reshape(-1, HASH_BYTES)
        try:
            with locked(self._folder):
                filling = Filling(self._folder, self.known, self._config, hashes, np.zeros(len(hashes), np.int64))
                filling.append(np.arange(len(hashes)), np.stack(list(self.vectors.values())))
        except OSError as error:
            if not self._failed:
                logger.warning(
                    "the guide's embeddings can't be kept: a text is embedded again each time it is met, in this run too: %s",
                    error,
                )
            self._failed = True
        self.vectors.clear()
        self._written = time.monotonic()


class GrowingStore:
    """Embeddings of length 1 by the hash of their text. While it lives, `gist-train cache` does not clear its folder.

    Args:
        folder: of the store, in a cache; it may not exist yet.
        config: the model's, whose `dtype` is that of the store.

    Raises:
        UserError: the store's files do not fit together.
    """

    def __init__(self, folder: Path, config: StoredModelConfig):
        self.folder, self._config = folder, config
        self._new = _Unwritten(folder, config)
        self._open()
        weakref.finalize(self, self._new.write)  # at the latest when the interpreter ends
        use_while_alive(self, folder)

    def _open(self) -> None:
        self.store = GuideStore(self.folder)
        self._index = self.store.index()
        self._new.known = len(self.store)

    def write(self) -> None:
        """Puts on the disk what is in memory alone."""
        self._new.write()
        self._open()

    def vectors(self, hashes: NDArray[np.uint8], embed: Callable[[NDArray[np.int64]], Vectors]) -> Vectors:
        """(n, G) the embeddings of the texts with these hashes (n, 16).

        Args:
            embed: of some of the texts (k,), each of them once, the embeddings (k, G), of length 1. It is called for those that
                no process has embedded yet, as far as the disk says.
        """
        missing = self._missing(hashes)
        if len(missing) and self.store.has_grown:
            self._open()
            missing = self._missing(hashes)
        if len(missing):
            # As they will be read again: in the precision of the store.
            made = embed(missing).astype(self._config.dtype).astype(np.float32)
            self._new.vectors.update({hashes[i].tobytes(): vector for i, vector in zip(missing.tolist(), made, strict=True)})
        vectors = self._read(hashes)
        if self._new.due:
            self.write()
        return vectors

    def _missing(self, hashes: NDArray[np.uint8]) -> NDArray[np.int64]:
        """(k,) the first of the texts with each hash that is neither in the store nor in memory."""
        positions = self._index.positions(hashes)
        if (damaged := self.store.damaged(positions)).any():
            self.store.forget(positions[damaged])
            self._open()
            positions = self._index.positions(hashes)
        first: dict[bytes, int] = {}
        for i in np.flatnonzero(positions < 0).tolist():
            first.setdefault(hashes[i].tobytes(), i)
        return np.array([i for known, i in first.items() if known not in self._new.vectors], np.int64)

    def _read(self, hashes: NDArray[np.uint8]) -> Vectors:
        positions = self._index.positions(hashes)
        there = positions >= 0
        in_memory = {i: self._new.vectors[hashes[i].tobytes()] for i in np.flatnonzero(~there).tolist()}
        width = len(next(iter(in_memory.values()))) if in_memory else self.store.width
        out = np.empty((len(hashes), width), np.float32)
        if there.any():
            out[there] = self.store.read(positions[there])
        for i, vector in in_memory.items():
            out[i] = vector
        return out
