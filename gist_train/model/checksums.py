"""A checksum for each embedding of a store: a disk that rots, or a file that was swapped, must not change a training in silence.

Legend: E embeddings in the store, G numbers of one.
"""

import hashlib
import struct
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

CHECK_BYTES = 8
HEADER = struct.Struct("<II8s")
"""What checksums.bin begins with: G, bytes of a number, and a hash of both. After it 8 bytes for each embedding."""
_WEIGHTS_SEED = 20240229
_OFFSET = np.uint64(0x9E3779B97F4A7C15)
"""The checksum of an embedding of zeros: a file of zeros is none of ours."""


def checksums(rows: NDArray[Any]) -> NDArray[np.uint64]:
    """(n,) a checksum of each row of (n, G): its 8-byte words times odd numbers, summed modulo 2**64.

    Any one word that differs gives another sum, since odd numbers have an inverse; of more, all but one in 2**64 do. It is read
    as fast as memory is, which a hash for each row is not (multilinear hashing, Carter and Wegman 1979).
    """
    if not len(rows):
        return np.empty(0, np.uint64)
    row_bytes = np.ascontiguousarray(rows).view(np.uint8).reshape(len(rows), -1)
    padded = np.pad(row_bytes, ((0, 0), (0, -row_bytes.shape[1] % 8))) if row_bytes.shape[1] % 8 else row_bytes
    words = padded.view("<u8")
    weights = np.random.default_rng(_WEIGHTS_SEED).integers(0, 2**64, words.shape[1], np.uint64) | np.uint64(1)
    sums: NDArray[np.uint64] = (words * weights).sum(axis=1, dtype=np.uint64) + _OFFSET
    return sums


def header(width: int, itemsize: int) -> bytes:
    """How checksums.bin of embeddings of `width` numbers begins."""
    return HEADER.pack(width, itemsize, _own_hash(width, itemsize))


def read_header(path: Path) -> tuple[int, int] | None:
    """G and the bytes of a number, as checksums.bin says; None where there is no such file, or it is damaged."""
    try:
        with path.open("rb") as stream:
            width, itemsize, own = HEADER.unpack(stream.read(HEADER.size))
    except (OSError, struct.error):
        return None
    return (width, itemsize) if own == _own_hash(width, itemsize) else None


def _own_hash(width: int, itemsize: int) -> bytes:
    return hashlib.blake2b(struct.pack("<II", width, itemsize), digest_size=8).digest()
