"""One process' part in filling a guide's store: which texts it takes, and how their embeddings are appended.

Legend: M texts are missing in the store, n of them are taken, G the guide's width.
"""

import os
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from gist_train.config.models import StoredModelConfig
from gist_train.data.files import naming, write_json
from gist_train.data.leases import Claims
from gist_train.model.checksums import CHECK_BYTES, HEADER, checksums, header, read_header

FORMAT = 1
TEXTS_PER_WRITE = 2048
"""Texts that a process embeds between two writes, and loses at most when it is interrupted."""
FEWEST_TEXTS = 64
"""Texts that are worth a write of their own where several processes share the last ones."""
HASH_BYTES = 16
CHECKSUMS = "checksums.bin"
ROWS_LOOKED_AT = 4096
"""Embeddings that are held against their checksums at a time."""


class HashIndex:
    """Finds hashes among `hashes` (n, 16)."""

    def __init__(self, hashes: NDArray[np.uint8]):
        self._hashes = np.ascontiguousarray(hashes).view("<u8")
        self._order = np.argsort(self._hashes[:, 0], kind="stable")
        self._sorted = self._hashes[self._order, 0]

    def positions(self, hashes: NDArray[np.uint8]) -> NDArray[np.int64]:
        """(k,) the place of each of `hashes` (k, 16), the first of several; -1 where it is not there."""
        if not len(self._order):
            return np.full(len(hashes), -1)
        wanted = np.ascontiguousarray(hashes).view("<u8")
        last = len(self._order) - 1
        place = np.minimum(np.searchsorted(self._sorted, wanted[:, 0]), last)
        while True:
            nearest = self._order[place]
            equal = (self._hashes[nearest] == wanted).all(axis=1)
            # Of a hash that was damaged the first half may be whole: then the text stands again further on.
            further = np.flatnonzero(~equal & (self._sorted[place] == wanted[:, 0]) & (place < last))
            if not len(further):
                return np.where(equal, nearest, -1)
            place[further] += 1


class Filling:
    """One process' part in filling a store; `append` and `take` are called while the store is locked.

    Args:
        folder: of the store.
        seen: embeddings that it had when the missing ones were looked up.
        hashes: (M, 16) of the texts that were missing, in the order in which they are to be taken.
        lengths: (M,) their bytes.
    """

    def __init__(
        self,
        folder: Path,
        seen: int,
        config: StoredModelConfig,
        hashes: NDArray[np.uint8],
        lengths: NDArray[np.int64],
    ):
        self._folder, self._config, self._hashes, self._lengths = folder, config, hashes, lengths
        self._index = HashIndex(hashes)
        self._seen = seen
        # A text that is given twice counts at its first place.
        self._stored: NDArray[np.bool_] = self._index.positions(hashes) != np.arange(len(hashes))
        self.done = int(self._stored.sum())
        """How many of the M texts are in the store by now."""

    def refresh(self) -> None:
        """Reads what has been appended since."""
        path = self._folder / "hashes.bin"
        if not path.exists():
            return
        with path.open("rb") as stream:  # opened anew: over a network, another machine's writes show only then
            stream.seek(self._seen * HASH_BYTES)
            new = whole_hashes(stream.read())
        self._seen += len(new)
        if len(new):
            self._mark(self._stored, new)
            self.done = int(self._stored.sum())

    def _mark(self, marks: NDArray[np.bool_], hashes: NDArray[np.uint8]) -> None:
        places = self._index.positions(hashes)
        marks[places[places >= 0]] = True

    def take(self, claims: Claims, processes: int) -> NDArray[np.int64]:
        """(n,) of the M texts that this process is to embed next; none where the others have the rest.

        Of several processes each takes half of its share of the bytes that are left, so that all are done at about the same time:
        guided self-scheduling (Polychronopoulos and Kuck 1987). What is taken depends on what is left alone, not on who takes it,
        so that a store has the same bits whoever is faster.
        """
        self.refresh()
        away = self._stored.copy()
        for taken in claims.others():
            self._mark(away, whole_hashes(taken))
        left = np.flatnonzero(~away)
        up_to = np.cumsum(self._lengths[left])
        part = up_to[-1] // (2 * processes) if processes > 1 and len(left) else np.inf
        share = max(FEWEST_TEXTS, int(np.searchsorted(up_to, part)))
        own = left[: min(TEXTS_PER_WRITE, share)]
        claims.hold(self._hashes[own].tobytes())
        return own

    def append(self, taken: NDArray[np.int64], vectors: NDArray[np.float32]) -> None:
        """Appends the embeddings (n, G) of the texts `taken` (n,), and waits until they are on the disk."""
        self.refresh()
        # Another machine that did not see this one's claim, as can be over a network, may have been faster.
        new = ~self._stored[taken]
        rows = vectors[new].astype(self._config.dtype)
        meta = self._folder / "meta.json"
        if not meta.exists():
            write_json(meta, {"format": FORMAT, **self._config.model_dump(), "width": rows.shape[1], "dtype": self._config.dtype})
        with (
            naming(self._folder / "embeddings.bin"),
            (self._folder / "embeddings.bin").open("ab") as embeddings,
            (self._folder / CHECKSUMS).open("ab") as checks,
            (self._folder / "hashes.bin").open("ab") as written,
        ):
            # What a process that was killed while it wrote has left at the ends.
            embeddings.truncate(self._seen * rows.itemsize * rows.shape[1])
            written.truncate(self._seen * HASH_BYTES)
            if missing := self._older_checksums(checks, rows):
                _append(checks.fileno(), missing)
            _append(embeddings.fileno(), rows.tobytes())
            _append(checks.fileno(), checksums(rows).tobytes())
            _append(written.fileno(), self._hashes[taken[new]].tobytes())

    def _older_checksums(self, file: BinaryIO, rows: NDArray[Any]) -> bytes:
        """What is to be in checksums.bin before those of the new rows: of a store of before there were any, all of its own."""
        shape = rows.shape[1], rows.itemsize
        if read_header(self._folder / CHECKSUMS) != shape:
            file.truncate(0)
        size = file.seek(0, os.SEEK_END)
        known = max(0, (size - HEADER.size) // CHECK_BYTES) if size else 0
        file.truncate(min(size, HEADER.size + min(known, self._seen) * CHECK_BYTES))
        missing = header(*shape) if size < HEADER.size else b""
        if known < self._seen:
            old = np.memmap(self._folder / "embeddings.bin", rows.dtype, "r", shape=(self._seen, rows.shape[1]))
            parts = [old[first : first + ROWS_LOOKED_AT] for first in range(known, self._seen, ROWS_LOOKED_AT)]
            missing += b"".join(checksums(part).tobytes() for part in parts)
        return missing


def whole_hashes(content: bytes) -> NDArray[np.uint8]:
    """(n, 16) whole hashes of what a file holds: one that is half written does not count."""
    count = len(content) // HASH_BYTES
    return np.frombuffer(content, np.uint8, count * HASH_BYTES).reshape(count, HASH_BYTES)


def _append(descriptor: int, data: bytes) -> None:
    """Writes all of `data` and waits until it is on the disk."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
    os.fsync(descriptor)
