"""The guide's store: each text's embedding once, on disk, addressed by the text's hash.

A store is two files that only grow, `embeddings.bin` (E, G) and `hashes.bin` (E, 16), beside `meta.json`. Embeddings are written
and synced before their hashes are: what has a hash is whole, so that an interrupted build goes on where it stood, and another
corpus adds only the texts that are new.

Legend: E embeddings in the store, N texts of a corpus, G the guide's width.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gist_train.config.errors import Fault, UserError, shown
from gist_train.config.models import GuideConfig
from gist_train.data.files import read_json, write_json
from gist_train.data.fingerprints import ContentHashes
from gist_train.model.encoder import embed
from gist_train.model.pretrained import Pretrained, identity

FORMAT = 1
TEXTS_PER_WRITE = 2048
"""Texts that are embedded between two writes, and lost at most when a build is interrupted."""
HASH_BYTES = 16


def store_folder(cache: Path, guide: GuideConfig, where: str) -> Path:
    """Where the store of this guide is: one folder for each model, revision, pooling, prompt, length and dtype.

    Args:
        where: the guide's key in the YAML.

    Raises:
        UserError: the guide is neither a folder nor a model of the hub.
    """
    hashes = ContentHashes(cache / "content-hashes.json")  # of a large guide, a second and a half each time
    known = identity(guide.name, guide.revision, where, hashes.of)
    hashes.save()
    told = [FORMAT, known, guide.pooling, guide.prompt, guide.max_length, guide.dtype]
    return cache / "guides" / hashlib.blake2b(json.dumps(told).encode(), digest_size=16).hexdigest()


class GuideStore:
    """A guide's embeddings, memory-mapped. They have length 1, and cosine similarity is all that is asked of them.

    Args:
        folder: from `store_folder`; it may not exist yet.

    Raises:
        UserError: the files do not fit together.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.fingerprint = folder.name
        self._hashes: NDArray[np.uint8] = np.empty((0, HASH_BYTES), np.uint8)
        self._embeddings: NDArray[Any] = np.empty((0, 0), np.float32)
        if (folder / "meta.json").exists():
            self._map(read_json(folder / "meta.json"))

    def __len__(self) -> int:
        return len(self._hashes)

    @property
    def width(self) -> int:
        """G; 0 in a store without embeddings."""
        return int(self._embeddings.shape[1])

    def _map(self, meta: dict[str, Any]) -> None:
        row = meta["width"] * np.dtype(meta["dtype"]).itemsize
        hashes, embeddings = (self.folder / name for name in ("hashes.bin", "embeddings.bin"))
        # A hash that was half written when the power went does not count.
        count = hashes.stat().st_size // HASH_BYTES if hashes.exists() else 0
        if count and embeddings.stat().st_size < count * row:
            raise UserError(
                Fault(
                    f"guide store {self.folder}",
                    f"{embeddings.stat().st_size:,} bytes in embeddings.bin",
                    f"at least {count * row:,}, for the {count:,} texts in hashes.bin",
                    "delete the folder: it is built again",
                )
            )
        if count:
            self._hashes = np.memmap(hashes, np.uint8, "r", shape=(count, HASH_BYTES))
            self._embeddings = np.memmap(embeddings, meta["dtype"], "r", shape=(count, meta["width"]))

    def positions(self, hashes: NDArray[np.uint8]) -> NDArray[np.int64]:
        """(N,) where each of the texts with these hashes (N, 16) stands in the store, -1 where it does not."""
        if not len(self):
            return np.full(len(hashes), -1)
        stored, wanted = (np.ascontiguousarray(x).view("<u8") for x in (self._hashes, hashes))
        order = np.argsort(stored[:, 0], kind="stable")
        at = order[np.minimum(np.searchsorted(stored[order, 0], wanted[:, 0]), len(order) - 1)]
        return np.where((stored[at] == wanted).all(axis=1), at, -1)

    def read(self, positions: NDArray[np.int64]) -> NDArray[np.float32]:
        """(n, G) float32 embeddings at `positions` (n,), which must all be there."""
        return self._embeddings[positions].astype(np.float32)

    def fill(
        self,
        guide: Pretrained,
        config: GuideConfig,
        hashes: NDArray[np.uint8],
        lengths: NDArray[np.int64],
        text: Callable[[int], str],
    ) -> Iterator[int]:
        """Embeds the texts that are not in the store yet, each once; yields how many of them are done. The caller holds the lock.

        Args:
            guide: in eval mode, on the device to run on. It reads the raw text after its own
                prompt, with its own tokenizer and length.
            config: its prompt, dtype and tokens at a time.
            hashes: (N, 16) of the corpus' texts.
            lengths: (N,) their bytes, by which they are sorted, the longest first: what does not fit in memory shows at once.
            text: text id -> text.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        meta = {"format": FORMAT, **config.model_dump(), "width": guide.width, "dtype": config.dtype}
        write_json(self.folder / "meta.json", meta)
        self._map(meta)
        missing = np.flatnonzero(self.positions(hashes) < 0)
        missing = missing[np.argsort(-lengths[missing], kind="stable")]
        with (self.folder / "embeddings.bin").open("ab") as embeddings, (self.folder / "hashes.bin").open("ab") as written:
            embeddings.truncate(len(self) * guide.width * np.dtype(config.dtype).itemsize)
            written.truncate(len(self) * HASH_BYTES)
            for first in range(0, len(missing), TEXTS_PER_WRITE):
                ids = missing[first : first + TEXTS_PER_WRITE]
                tokens = guide.tokens([(config.prompt or "") + text(i) for i in ids.tolist()])
                rows = np.empty((len(ids), guide.width), np.float32)
                done = 0
                for at, vectors in embed(guide.encoder, tokens, config.batch_tokens):
                    with np.errstate(invalid="ignore"):  # told below, with the text
                        rows[at] = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
                    done += len(at)
                    yield first + done
                finite = np.isfinite(rows).all(axis=1)
                if not finite.all():
                    told = shown(text(int(ids[int(np.argmin(finite))])))
                    raise FloatingPointError(f"the guide {config.name} gives no finite embedding of length 1 to the text {told}")
                _append(embeddings.fileno(), rows.astype(config.dtype).tobytes())
                _append(written.fileno(), np.ascontiguousarray(hashes[ids]).tobytes())
        self._map(meta)


def _append(descriptor: int, data: bytes) -> None:
    """Writes all of `data` and waits until it is on the disk."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
    os.fsync(descriptor)
