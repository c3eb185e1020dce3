"""The corpus: every text once, rows of text ids, views with their token ids; memory-mapped and fingerprinted.

Legend: N unique texts, R rows, V views. A view is what the student reads, (prompt, text); a text without prompts is a view of
its own. Everything downstream is a look-up by text id or by view.
"""

import hashlib
import json
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gist_train.config.errors import Fault, UserError
from gist_train.config.schema import DataConfig
from gist_train.data.files import read_json, whole_folder, write_json
from gist_train.data.sources import Row, content_hash, files_of, read_rows

FORMAT = 1
SHOWN_FAULTS = 10
"""Bad rows that an error message names; the others are counted."""
Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]
Tokenize = Callable[[Sequence[str]], Sequence[NDArray[np.integer[Any]]]]
"""Texts -> token ids of each, special tokens included."""


def text_hash(text: str) -> bytes:
    """16 bytes that stand for a text in corpora and guide stores (BLAKE2b-128 of its UTF-8 bytes)."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def corpus_fingerprint(data: DataConfig) -> str:
    """32 hex digits over the content of all sources and the settings that shape the rows.

    Raises:
        UserError: a source names no file.
    """
    told: list[object] = [FORMAT, data.keep_instructions, data.on_bad_row]
    for index, source in enumerate(data.train):
        # Not the path: a file that was moved is the same corpus. Its name counts, as the task of rows that name none.
        files = [(path.name, content_hash(path)) for path in files_of(source, f"data.train[{index}]")]
        told.append([source.model_dump(exclude={"path"}), files])
    return hashlib.blake2b(json.dumps(told, sort_keys=True).encode(), digest_size=16).hexdigest()


class Batch(NamedTuple):
    """Rows of a step as ids: B rows with one positive each, and the flat pool of their M negatives in row order."""

    rows: Int64
    """(B,) rows of the corpus."""
    anchor: Int32
    """(B,) text ids."""
    positive: Int32
    """(B,) text ids."""
    negative: Int32
    """(M,) text ids."""
    negative_offsets: Int64
    """(B + 1,): row i's negatives are negative[negative_offsets[i] : negative_offsets[i + 1]]."""
    anchor_views: Int64
    """(B,) views."""
    positive_views: Int64
    """(B,) views."""
    negative_views: Int64
    """(M,) views."""


@dataclass(frozen=True, slots=True)
class TokenTable:
    """Token ids of every view under one tokenizer, memory-mapped."""

    ids: NDArray[np.integer[Any]]
    """Flat token ids of all views, uint16 or int32."""
    offsets: Int64
    """(V + 1,): view v's tokens are ids[offsets[v] : offsets[v + 1]]."""

    def of(self, views: Int64) -> list[NDArray[np.integer[Any]]]:
        """Token ids of each of `views`, special tokens included."""
        first, last = self.offsets[views].tolist(), self.offsets[views + 1].tolist()
        return [self.ids[a:b] for a, b in zip(first, last, strict=True)]

    def lengths(self, views: Int64) -> Int64:
        """Tokens of each of `views`."""
        lengths: Int64 = self.offsets[views + 1] - self.offsets[views]
        return lengths


class Corpus:
    """A corpus on disk, opened memory-mapped: nothing is read before it is asked for.

    Args:
        folder: made by `build_corpus`.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.meta: dict[str, Any] = read_json(folder / "meta.json")
        self.fingerprint: str = self.meta["fingerprint"]
        self.tasks: list[str] = self.meta["tasks"]
        self.prompts: list[str] = self.meta["prompts"]
        self.row_count: int = self.meta["rows"]
        self.text_count: int = self.meta["texts"]
        self.anchor, self.task = self._array("anchor"), self._array("task")
        self.positive, self.positive_offsets = self._array("positive"), self._array("positive_offsets")
        self.negative, self.negative_offsets = self._array("negative"), self._array("negative_offsets")
        self.row_prompts = self._array("row_prompts")
        """(R, 3) prompt ids of anchor, positives and negatives."""
        self.hashes = self._array("text_hashes")
        """(N, 16) uint8, `text_hash` of each text."""
        self._text_offsets = self._array("text_offsets")
        self._views = self._array("views")

    def _array(self, name: str) -> NDArray[Any]:
        path = self.folder / f"{name}.npy"
        # An array without elements can't be mapped.
        return np.load(path, mmap_mode="r" if self.meta["sizes"][name] else None, allow_pickle=False)  # type: ignore[no-any-return]

    @cached_property
    def _text_bytes(self) -> NDArray[np.uint8]:
        return np.memmap(self.folder / "texts.utf8", dtype=np.uint8, mode="r")

    @property
    def view_count(self) -> int:
        """V, different pairs of prompt and text."""
        return len(self._views)

    def text(self, text_id: int) -> str:
        """One text."""
        return self._text_bytes[self._text_offsets[text_id] : self._text_offsets[text_id + 1]].tobytes().decode()

    def text_lengths(self) -> Int64:
        """(N,) bytes of each text: a cheap stand-in for its tokens when texts are sorted."""
        return np.diff(self._text_offsets)

    def batch(self, rows: Int64, positives: Int32) -> Batch:
        """The ids of `rows` (B,), each with the positive (B,) that was drawn for it."""
        first, count = self.negative_offsets[rows], self.negative_offsets[rows + 1] - self.negative_offsets[rows]
        offsets = np.concatenate([[0], np.cumsum(count)])
        negative = self.negative[np.arange(offsets[-1]) - np.repeat(offsets[:-1] - first, count)]
        prompts = self.row_prompts[rows]
        return Batch(
            rows,
            self.anchor[rows],
            positives,
            negative,
            offsets,
            self._view(prompts[:, 0], self.anchor[rows]),
            self._view(prompts[:, 1], positives),
            self._view(np.repeat(prompts[:, 2], count), negative),
        )

    def _view(self, prompts: Int32, texts: Int32) -> Int64:
        return np.searchsorted(self._views, _view_key(prompts, texts))

    def view_texts(self, first: int, last: int) -> list[str]:
        """What the student reads in views first to last: prompt and text."""
        keys = self._views[first:last].tolist()
        return [self.prompts[key >> 32] + self.text(key & 0xFFFFFFFF) for key in keys]

    def tokens(self, tokenizer_fingerprint: str) -> TokenTable:
        """The token ids that `add_tokens` stored for this tokenizer."""
        folder = self._tokens_folder(tokenizer_fingerprint)
        meta = read_json(folder / "meta.json")
        ids = np.memmap(folder / "ids.bin", dtype=meta["dtype"], mode="r")
        return TokenTable(ids, np.load(folder / "offsets.npy", mmap_mode="r", allow_pickle=False))

    def has_tokens(self, tokenizer_fingerprint: str) -> bool:
        """Whether `tokens` would find this tokenizer's."""
        return self._tokens_folder(tokenizer_fingerprint).is_dir()

    def _tokens_folder(self, tokenizer_fingerprint: str) -> Path:
        return self.folder / "tokens" / tokenizer_fingerprint

    def add_tokens(
        self, tokenize: Tokenize, vocabulary_size: int, tokenizer_fingerprint: str, chunk: int = 16_384
    ) -> Iterator[int]:
        """Stores the token ids of every view, reading no source again; yields the number of views done so far.

        Memory is bounded by `chunk` views. Nothing is left behind when it is interrupted.
        """
        with whole_folder(self._tokens_folder(tokenizer_fingerprint)) as folder:
            dtype = np.dtype(np.uint16 if vocabulary_size <= 1 << 16 else np.int32)
            offsets = np.zeros(self.view_count + 1, np.int64)
            with (folder / "ids.bin").open("wb") as stream:
                for first in range(0, self.view_count, chunk):
                    last = min(first + chunk, self.view_count)
                    tokens = tokenize(self.view_texts(first, last))
                    stream.write(np.concatenate(tokens).astype(dtype).tobytes())
                    offsets[first + 1 : last + 1] = [len(ids) for ids in tokens]
                    yield last
            np.save(folder / "offsets.npy", np.cumsum(offsets))
            write_json(folder / "meta.json", {"dtype": dtype.name, "tokens": int(offsets.sum())})


def _view_key(prompts: NDArray[Any], texts: NDArray[Any]) -> Int64:
    keys: Int64 = (prompts.astype(np.int64) << 32) | texts
    return keys


def build_corpus(folder: Path, data: DataConfig, fingerprint: str) -> Iterator[int]:
    """Reads all sources into a new corpus at `folder`; yields the number of rows read so far, now and then.

    Memory grows with the ids (some 150 bytes a unique text), not with the texts.

    Raises:
        UserError: a file can't be read, no row is left, or a row is bad and data.on_bad_row is "fail"; nothing is left behind.
    """
    with whole_folder(folder) as partial:
        with (partial / "texts.utf8").open("wb") as texts, (partial / "skipped.jsonl").open("w", encoding="utf-8") as skipped:
            builder = _Builder(texts)
            bad = read = 0
            faults: list[Fault] = []
            for index, source in enumerate(data.train):
                for row in read_rows(source, f"data.train[{index}]", keep_instructions=data.keep_instructions):
                    read += 1
                    if isinstance(row, Fault):
                        bad += 1
                        faults += [row] if len(faults) < SHOWN_FAULTS else []
                        skipped.write(json.dumps({"where": row.where, "found": row.found}, ensure_ascii=False) + "\n")
                    else:
                        builder.add(row)
                    if read % 4096 == 0:
                        yield read
        if not builder.anchor:
            mend = "look at source: and columns: of data.train: are the files what they say?"
            raise UserError(
                *faults[:1], Fault("data.train", f"{read:,} rows, none of them usable", "at least one usable row", mend)
            )
        if bad and data.on_bad_row == "fail":
            told = f"{bad:,} of {read:,} rows"
            more = Fault(
                "data.on_bad_row",
                f"fail, and {told} can't be used",
                "fail or skip",
                f"mend them, or set skip: {told} are left out",
            )
            raise UserError(*faults, more)
        if not bad:
            (partial / "skipped.jsonl").unlink()
        builder.save(
            partial, {"format": FORMAT, "fingerprint": fingerprint, "skipped_rows": bad, "data": data.model_dump(mode="json")}
        )
        yield read


class _Builder:
    """Rows -> ids. Arrays of ids grow in memory, texts go straight to the disk."""

    def __init__(self, texts: IO[bytes]):
        self._texts = texts
        self._ids: dict[bytes, int] = {}
        self._tasks: dict[str, int] = {}
        self._prompts: dict[str, int] = {"": 0}
        self._hashes = bytearray()
        self._text_offsets = array("q", [0])
        self.anchor, self._task, self._row_prompts = array("i"), array("i"), array("i")
        self._positive, self._positive_offsets = array("i"), array("q", [0])
        self._negative, self._negative_offsets = array("i"), array("q", [0])

    def add(self, row: Row) -> None:
        self.anchor.append(self._text_id(row.anchor))
        self._positive.extend(self._text_id(text) for text in row.positives)
        self._positive_offsets.append(len(self._positive))
        self._negative.extend(self._text_id(text) for text in row.negatives)
        self._negative_offsets.append(len(self._negative))
        self._task.append(self._tasks.setdefault(row.task, len(self._tasks)))
        self._row_prompts.extend(self._prompts.setdefault(prompt, len(self._prompts)) for prompt in row.prompts)

    def _text_id(self, text: str) -> int:
        key = text_hash(text)
        known = self._ids.get(key)
        if known is not None:
            return known
        self._ids[key] = new = len(self._ids)
        encoded = text.encode()
        self._texts.write(encoded)
        self._text_offsets.append(self._text_offsets[-1] + len(encoded))
        self._hashes += key
        return new

    def save(self, folder: Path, meta: dict[str, Any]) -> None:
        positive, negative = np.asarray(self._positive, np.int32), np.asarray(self._negative, np.int32)
        prompts = np.asarray(self._row_prompts, np.int32).reshape(-1, 3)
        anchor = np.asarray(self.anchor, np.int32)
        offsets = [np.asarray(x, np.int64) for x in (self._positive_offsets, self._negative_offsets)]
        views = np.unique(
            np.concatenate(
                [
                    _view_key(prompts[:, 0], anchor),
                    _view_key(np.repeat(prompts[:, 1], np.diff(offsets[0])), positive),
                    _view_key(np.repeat(prompts[:, 2], np.diff(offsets[1])), negative),
                ]
            )
        )
        arrays: dict[str, NDArray[Any]] = {
            "anchor": anchor,
            "task": np.asarray(self._task, np.int32),
            "row_prompts": prompts,
            "positive": positive,
            "positive_offsets": offsets[0],
            "negative": negative,
            "negative_offsets": offsets[1],
            "text_offsets": np.asarray(self._text_offsets, np.int64),
            "text_hashes": np.frombuffer(bytes(self._hashes), np.uint8).reshape(-1, 16),
            "views": views,
        }
        for name, values in arrays.items():
            np.save(folder / f"{name}.npy", values)
        counts = {"rows": len(anchor), "texts": len(self._ids), "views": len(views)}
        sizes = {name: values.size for name, values in arrays.items()}
        write_json(
            folder / "meta.json", {**meta, **counts, "tasks": list(self._tasks), "prompts": list(self._prompts), "sizes": sizes}
        )
