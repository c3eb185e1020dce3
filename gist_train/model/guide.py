"""The guide's store: each text's embedding once, on disk, addressed by the text's hash.

A store is three files that only grow: `embeddings.bin` (E, G), `checksums.bin` (E, 8) and `hashes.bin` (E, 16), beside meta.json.
Embeddings are written and synced before their hashes are: what has a hash is whole, so that an interrupted build resumes where
it was, and another corpus adds only the texts that are new. What is read is held against its checksum; a text whose embedding is
damaged loses its hash, and is embedded again.

Any number of processes build a store together, ranks of one run or several runs: each takes the longest texts that are neither
in the store nor taken by a living process, embeds them, and appends them. The store is locked only to append and to take, never
while texts are embedded. Nobody waits in a collective operation; what a process that died had taken, the others take.

Legend: E embeddings in the store, N texts of a corpus, M of them missing in the store, G the guide's width.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gist_train.config.errors import Fault, UserError, shown
from gist_train.config.models import StoredModelConfig
from gist_train.data.files import read_json
from gist_train.data.fingerprints import ContentHashes
from gist_train.data.leases import Claims, locked
from gist_train.model.checksums import CHECK_BYTES, HEADER, checksums, read_header
from gist_train.model.filling import CHECKSUMS, FORMAT, HASH_BYTES, ROWS_LOOKED_AT, Filling, HashIndex
from gist_train.model.folders import folder_prompt, identity
from gist_train.model.whole import TextModel
from gist_train.pulse import PULSE

TIMED_TEXTS = 32
"""That are embedded to say how long all of them will take."""
POLL_SECONDS = 0.25
"""Between two checks of whether the others are done."""
LOOKED_AT = 1 << 30
"""Bytes of embeddings that are held against their checksums before a training: a second's work."""


def store_folder(cache: Path, guide: StoredModelConfig, where: str) -> Path:
    """Where the store of this guide is: one folder for each model, revision, pooling, prompt, length and dtype.

    Args:
        where: the guide's key in the YAML.

    Raises:
        UserError: the guide is neither a folder nor a model of the hub.
    """
    hashes = ContentHashes(cache / "content-hashes.json")  # of a large guide, a second and a half each time
    known = identity(guide.name, guide.revision, where, hashes.of)
    hashes.save()
    parts = [FORMAT, known, guide.pooling, guide.prompt, guide.max_length, guide.dtype]
    # Stores of before a folder's default prompt counted are of texts without it.
    if guide.prompt is None and (default := folder_prompt(guide.name, guide.revision)):
        parts.append(default)
    return cache / "guides" / hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


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
        self._checksums: NDArray[np.uint64] = np.empty(0, np.uint64)
        self._map()

    def __len__(self) -> int:
        return len(self._hashes)

    @property
    def width(self) -> int:
        """G; 0 in a store without embeddings."""
        return int(self._embeddings.shape[1])

    def _map(self) -> None:
        hashes, embeddings = (self.folder / name for name in ("hashes.bin", "embeddings.bin"))
        # A hash that was half written when the power went does not count.
        count = hashes.stat().st_size // HASH_BYTES if hashes.exists() else 0
        if not count:
            return
        width, dtype = self._shape()
        self._hashes = np.memmap(hashes, np.uint8, "r", shape=(count, HASH_BYTES))
        # Fewer where the file was cut: those that are gone are damaged.
        there = min(count, embeddings.stat().st_size // (width * dtype.itemsize)) if embeddings.exists() else 0
        self._embeddings = np.memmap(embeddings, dtype, "r", shape=(there, width)) if there else np.empty((0, width), dtype)
        checks = self.folder / CHECKSUMS  # fewer, or none, in a store of before there were any
        known = max(0, checks.stat().st_size - HEADER.size) // CHECK_BYTES if checks.exists() else 0
        self._checksums = np.memmap(checks, "<u8", "r", HEADER.size, (known,)) if known else np.empty(0, np.uint64)

    def _shape(self) -> tuple[int, np.dtype[Any]]:
        """G and the kind of its numbers: by checksums.bin, else, as of stores of before there was one, by meta.json."""
        if (known := read_header(self.folder / CHECKSUMS)) is not None:
            return known[0], np.dtype(f"f{known[1]}")
        try:
            meta = read_json(self.folder / "meta.json")
            return int(meta["width"]), np.dtype(str(meta["dtype"]))
        except (OSError, ValueError, KeyError, TypeError):
            found = f"{CHECKSUMS} and meta.json that both can't be read"
            fix = "delete the folder: its texts are embedded again"
            raise UserError(Fault(f"guide store {self.folder}", found, "what gist-train wrote", fix)) from None

    def positions(self, hashes: NDArray[np.uint8]) -> NDArray[np.int64]:
        """(N,) the place in the store of each of the texts with these hashes (N, 16), -1 where it is not there."""
        return self.index().positions(hashes)

    def index(self) -> HashIndex:
        """What finds texts in the store as it is now: for whoever asks often, since making it sorts all hashes."""
        return HashIndex(self._hashes)

    @property
    def has_grown(self) -> bool:
        """Whether any process has appended since this one looked: open the store anew to see it."""
        file = self.folder / "hashes.bin"
        return file.exists() and file.stat().st_size // HASH_BYTES > len(self)

    def read(self, positions: NDArray[np.int64]) -> NDArray[np.float32]:
        """(n, G) float32 embeddings at `positions` (n,), which must all be there.

        Raises:
            OSError: one is damaged.
        """
        whole = self._whole(positions)
        if not whole.all():
            self.forget(positions[~whole])
            damaged = f"{self.folder / 'embeddings.bin'}: {(~whole).sum():,} damaged embeddings, at {positions[~whole][0]:,}"
            raise OSError(f"{damaged}. Run the same command again: their texts are embedded anew, and the others stay.")
        return self._embeddings[positions].astype(np.float32)

    def damaged(self, positions: NDArray[np.int64]) -> NDArray[np.bool_]:
        """(n,) which of the embeddings at `positions` (n,) are damaged; -1, where a text has none, is not.

        Of more than LOOKED_AT bytes none are: `read` looks at each when it is asked for.
        """
        damaged = np.zeros(len(positions), bool)
        there = np.flatnonzero(positions >= 0)
        if len(there) * self._embeddings.dtype.itemsize * self.width <= LOOKED_AT:
            for first in range(0, len(there), ROWS_LOOKED_AT):
                some = there[first : first + ROWS_LOOKED_AT]
                damaged[some] = ~self._whole(positions[some])
        return damaged

    def content(self, positions: NDArray[np.int64]) -> str:
        """A digest of the embeddings at `positions` (n,), in this order and wherever the store has them; -1 is none."""
        digest = hashlib.blake2b(digest_size=16)
        for first in range(0, len(positions), ROWS_LOOKED_AT):
            some = positions[first : first + ROWS_LOOKED_AT]
            sums = np.zeros(len(some), np.uint64)
            known = (some >= 0) & (some < len(self._checksums))
            sums[known] = self._checksums[some[known]]
            old = some >= len(self._checksums)  # of before there were checksums
            sums[old] = checksums(self._embeddings[some[old]])
            digest.update(sums.tobytes())
        return digest.hexdigest()

    def forget(self, positions: NDArray[np.int64]) -> None:
        """Takes the hashes of these embeddings away, so that their texts are embedded again."""
        with locked(self.folder), (self.folder / "hashes.bin").open("r+b") as hashes:
            for position in positions.tolist():
                os.pwrite(hashes.fileno(), bytes(HASH_BYTES), position * HASH_BYTES)
            os.fsync(hashes.fileno())
        self._map()

    def _whole(self, positions: NDArray[np.int64]) -> NDArray[np.bool_]:
        """(n,) whether the embeddings at `positions` (n,) are as they were written; those without a checksum are taken to be."""
        if not len(positions):
            return np.ones(0, bool)
        whole = positions < len(self._embeddings)
        checked = np.flatnonzero(whole & (positions < len(self._checksums)))
        whole[checked] = checksums(self._embeddings[positions[checked]]) == self._checksums[positions[checked]]
        return whole

    def fill(
        self,
        guide: TextModel,
        config: StoredModelConfig,
        hashes: NDArray[np.uint8],
        lengths: NDArray[np.int64],
        text: Callable[[int], str],
    ) -> Iterator[int]:
        """`fill_together` with a guide that is loaded, by this process alone."""
        return self.fill_together(lambda: guide, config, hashes, lengths, text)

    def fill_together(
        self,
        load: Callable[[], TextModel],
        config: StoredModelConfig,
        hashes: NDArray[np.uint8],
        lengths: NDArray[np.int64],
        text: Callable[[int], str],
        processes: int = 1,
        asked: int = 0,
    ) -> Iterator[int]:
        """Has the texts embedded that are not in the store yet, each once, together with all processes that call this too.

        Yields how many of these texts are done, by whomever; ends when all are.

        Args:
            load: gives the guide in eval mode, on the device to run on. It is called where there is something to embed. The guide
                reads the raw text after its own prompt, with its own tokenizer and length.
            config: its prompt, dtype and tokens at a time.
            hashes: (N, 16) of the corpus' texts.
            lengths: (N,) their bytes, by which they are sorted, the longest first: what does not fit in memory shows at once.
            text: text id -> text.
            processes: that are expected to share the work: how many texts each takes at a time, when few are left, goes by it.
            asked: texts that were missing when the caller looked: what others have embedded since counts as done.
        """
        self._map()
        missing = np.flatnonzero(self.positions(hashes) < 0)
        before = max(0, asked - len(missing))
        if not len(missing):
            if before:
                yield before
            return
        missing = missing[np.argsort(-lengths[missing], kind="stable")]
        build = Filling(self.folder, len(self), config, hashes[missing], lengths[missing])
        guide, vectors, taken = None, None, np.empty(0, np.int64)
        with locked(self.folder):
            claims = Claims(self.folder)
        with claims:
            while True:
                with locked(self.folder):
                    if vectors is not None:
                        build.append(taken, vectors)
                    taken = build.take(claims, processes)
                vectors = None
                if build.done == len(missing):
                    break
                if len(taken):
                    guide = guide or load()
                    vectors = np.empty((len(taken), guide.dimensions), np.float32)
                    for done in _embed_into(vectors, guide, config, missing[taken], text):
                        build.refresh()
                        yield before + build.done + done
                else:  # the others have the rest; whether they get on with it, their own run watches
                    PULSE.beat()
                    yield before + build.done
                    time.sleep(POLL_SECONDS)
        yield before + len(missing)
        self._map()


def seconds_to_embed(
    guide: TextModel, config: StoredModelConfig, ids: NDArray[np.int64], lengths: NDArray[np.int64], text: Callable[[int], str]
) -> float:
    """How long the guide takes for the texts `ids` (n,) of `lengths` (N,) bytes, by a few of all lengths."""
    by_length = ids[np.argsort(lengths[ids], kind="stable")]
    timed = by_length[np.linspace(0, len(ids) - 1, min(TIMED_TEXTS, len(ids))).astype(np.int64)]
    texts = prompted(guide, config, [text(i) for i in timed.tolist()])
    for some in (texts[:1], texts):  # the first one also sets up what the others use
        began = time.perf_counter()
        for _ in guide.embed(some, config.batch_tokens):  # brings each batch back from the device
            pass
    return (time.perf_counter() - began) * float(lengths[ids].sum()) / float(lengths[timed].sum())


def prompted(guide: TextModel, config: StoredModelConfig, texts: Sequence[str]) -> list[str]:
    """The texts as the guide reads them: after `guide.prompt`, or the default prompt of its folder."""
    prompt = guide.default_prompt if config.prompt is None else config.prompt
    return [prompt + text for text in texts]


def _embed_into(
    vectors: NDArray[np.float32], guide: TextModel, config: StoredModelConfig, ids: NDArray[np.int64], text: Callable[[int], str]
) -> Iterator[int]:
    """Puts the embeddings of the texts `ids` (n,), of length 1, into `vectors` (n, G); yields how many of them are done.

    Raises:
        FloatingPointError: one is not finite, or has no direction.
    """
    done = 0
    for places, embeddings in guide.embed(prompted(guide, config, [text(i) for i in ids.tolist()]), config.batch_tokens):
        with np.errstate(invalid="ignore"):  # raised below, with the text
            vectors[places] = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
        done += len(places)
        yield done
    finite = np.isfinite(vectors).all(axis=1)
    if not finite.all():
        broken = shown(text(int(ids[int(np.argmin(finite))])))
        raise FloatingPointError(f"the guide {config.name} gives no finite embedding of length 1 to the text {broken}")
