"""The corpus: every text once, rows of text ids, views with their token ids; memory-mapped and fingerprinted.

Legend: N unique texts, R rows, V views. A view is what the student reads, (prompt, text); a text without prompts is a view of
its own. Everything downstream is a look-up by text id or by view.
"""

import hashlib
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gist_train.data.files import read_json
from gist_train.data.manifests import damage_in

FORMAT = 3
Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]


def text_hash(text: str) -> bytes:
    """16 bytes for a text in corpora and guide stores (BLAKE2b-128 of its UTF-8 bytes)."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def text_hashes(texts: Sequence[str]) -> NDArray[np.uint8]:
    """(N, 16) `text_hash` of each text."""
    return np.frombuffer(b"".join(map(text_hash, texts)), np.uint8).reshape(-1, 16)


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
    source: Int32
    """(B,) which of `data.train` a row is of."""
    label: Int32
    """(B,) label of anchor and positive, -1 for none; labels of two sources differ."""
    negative_label: Int32
    """(M,)"""


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

    def starts(self, views: Int64) -> Int64:
        """Where the tokens of each of `views` begin in `ids`."""
        starts: Int64 = self.offsets[views]
        return starts

    def lengths(self, views: Int64) -> Int64:
        """Tokens of each of `views`."""
        lengths: Int64 = self.offsets[views + 1] - self.offsets[views]
        return lengths


class Corpus:
    """A corpus on disk, opened memory-mapped: nothing is read before it is asked for.

    Args:
        folder: made by `building.build_corpus`.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.meta: dict[str, Any] = read_json(folder / "meta.json")
        self.fingerprint: str = self.meta["fingerprint"]
        """Of the sources: what the corpus is looked up by."""
        self.content: str = self.meta["content"]
        """Of the rows and texts themselves: mining on another machine may round a draw to another row."""
        self.tasks: list[str] = self.meta["tasks"]
        self.prompts: list[str] = self.meta["prompts"]
        self.excluded_rows: int = self.meta.get("excluded_rows", 0)
        """Rows of the sources that were left out for their evaluation texts; old corpora, which don't say, left none out."""
        self.excluded_texts: int = self.meta.get("excluded_texts", 0)
        """Different texts of the sources that were left out as evaluation texts."""
        self.row_count: int = self.meta["rows"]
        self.text_count: int = self.meta["texts"]
        self.anchor, self.task = self.array("anchor"), self.array("task")
        self.positive, self.positive_offsets = self.array("positive"), self.array("positive_offsets")
        self.negative, self.negative_offsets = self.array("negative"), self.array("negative_offsets")
        self.source, self.label = self.array("source"), self.array("label")
        self.negative_label = self.array("negative_label")
        self.row_prompts = self.array("row_prompts")
        """(R, 3) prompt ids of anchor, positives and negatives."""
        self.scored = "positive_score" in self.meta["sizes"]
        """Whether some rows came with scores of their texts."""
        there = "documents" in self.meta["sizes"]
        self.documents: Int32 = self.array("documents") if there else np.empty(0, np.int32)
        """Ascending ids of the further texts that negatives are taken from."""
        self.hashes = self.array("text_hashes")
        """(N, 16) uint8, `text_hash` of each text."""
        self._text_offsets = self.array("text_offsets")
        self._views = self.array("views")

    def array(self, name: str) -> NDArray[Any]:
        """One of the corpus' arrays, by its file's name."""
        path = self.folder / f"{name}.npy"
        # An array without elements can't be mapped.
        return np.load(path, mmap_mode="r" if self.meta["sizes"][name] else None, allow_pickle=False)  # type: ignore[no-any-return]

    @cached_property
    def drawn(self) -> NDArray[np.bool_]:
        """(R,) which rows have a positive that nobody put beside their anchor: those of labelled and of bare texts."""
        of_texts = [source["source"] in ("classification", "texts") for source in self.meta["data"]["train"]]
        drawn: NDArray[np.bool_] = np.array(of_texts)[self.source]
        return drawn

    @property
    def graded(self) -> NDArray[np.bool_]:
        """(R,) which rows are pairs with a score that says how related they are, if at all."""
        of_pairs = [source.get("scores") == "pairs" for source in self.meta["data"]["train"]]
        graded: NDArray[np.bool_] = np.array(of_pairs)[self.source]
        return graded

    @cached_property
    def file(self) -> Int32:
        """(R,) which of its source's files each row is of, counted from 0 in their order."""
        return self.array("row_file")

    @cached_property
    def number(self) -> Int64:
        """(R,) each row's number in its file, as messages have it."""
        return self.array("row_number")

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

    def texts(self, chunk: int = 65_536) -> Iterator[str]:
        """Every text in the order of ids, read from the disk `chunk` at a time."""
        for first in range(0, self.text_count, chunk):
            bounds = self._text_offsets[first : first + chunk + 1]
            content = self._text_bytes[bounds[0] : bounds[-1]].tobytes()
            for begin, end in pairwise((bounds - bounds[0]).tolist()):
                yield content[begin:end].decode()

    def text_lengths(self) -> Int64:
        """(N,) bytes of each text: a cheap stand-in for its tokens when texts are sorted."""
        return np.diff(self._text_offsets)

    def batch(self, rows: Int64, positives: Int32) -> Batch:
        """The ids of `rows` (B,), each with the positive (B,) that was drawn for it."""
        first, count = self.negative_offsets[rows], self.negative_offsets[rows + 1] - self.negative_offsets[rows]
        offsets = np.concatenate([[0], np.cumsum(count)])
        places = np.arange(offsets[-1]) - np.repeat(offsets[:-1] - first, count)
        negative = self.negative[places]
        prompts = self.row_prompts[rows]
        return Batch(
            rows,
            self.anchor[rows],
            positives,
            negative,
            offsets,
            self.views(prompts[:, 0], self.anchor[rows]),
            self.views(prompts[:, 1], positives),
            self.views(np.repeat(prompts[:, 2], count), negative),
            self.source[rows],
            self.label[rows],
            self.negative_label[places],
        )

    def scores(self, rows: Int64, positives: Int32) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """(B,) of the positive that was drawn for each of `rows`, and (M,) of their negatives; NaN for none."""
        first, count = self.positive_offsets[rows], self.positive_offsets[rows + 1] - self.positive_offsets[rows]
        owner = np.repeat(np.arange(len(rows)), count)
        places = np.arange(len(owner)) - np.repeat(np.cumsum(count) - count - first, count)
        drawn = np.flatnonzero(self.positive[places] == positives[owner])
        chosen = drawn[np.unique(owner[drawn], return_index=True)[1]]  # a text that is there twice has its first score
        first, count = self.negative_offsets[rows], self.negative_offsets[rows + 1] - self.negative_offsets[rows]
        negatives = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count - first, count)
        if not self.scored:  # no row of a source with scores was usable
            return np.full(len(rows), np.nan, np.float32), np.full(len(negatives), np.nan, np.float32)
        return self.array("positive_score")[places[chosen]], self.array("negative_score")[negatives]

    def views(self, prompts: Int32, texts: Int32) -> Int64:
        """(n,) the view of each of `texts` (n,) after its prompt (n,)."""
        # No prompt but "", and no document that no row has: every text is one view, under its own number.
        if len(self.prompts) == 1 and len(self._views) == self.text_count:
            return texts.astype(np.int64)
        return np.searchsorted(self._views, view_key(prompts, texts))

    def texts_of_views(self, views: Int64) -> Int64:
        """Text ids of `views`."""
        ids: Int64 = self._views[views] & 0xFFFFFFFF
        return ids

    def view_texts(self, first: int, last: int) -> list[str]:
        """What the student reads in views first to last: prompt and text."""
        keys = self._views[first:last].tolist()
        return [self.prompts[key >> 32] + self.text(key & 0xFFFFFFFF) for key in keys]

    def tokens(self, tokenizer_fingerprint: str) -> TokenTable:
        """The token ids that `tokenise_together` stored for this tokenizer."""
        folder = self.tokens_folder(tokenizer_fingerprint)
        meta = read_json(folder / "meta.json")
        ids = np.memmap(folder / "ids.bin", dtype=meta["dtype"], mode="r")
        return TokenTable(ids, np.load(folder / "offsets.npy", mmap_mode="r", allow_pickle=False))

    def has_tokens(self, tokenizer_fingerprint: str) -> bool:
        """Whether `tokens` would find this tokenizer's."""
        return self.tokens_folder(tokenizer_fingerprint).is_dir()

    def damage_in_tokens(self, tokenizer_fingerprint: str) -> str | None:
        """What is wrong with this tokenizer's, in words; None where they are whole or not there."""
        return damage_in(self.tokens_folder(tokenizer_fingerprint))

    def drop_tokens(self, tokenizer_fingerprint: str) -> None:
        """Deletes this tokenizer's."""
        shutil.rmtree(self.tokens_folder(tokenizer_fingerprint))

    def tokens_folder(self, tokenizer_fingerprint: str) -> Path:
        """Where this tokenizer's are."""
        return self.folder / "tokens" / tokenizer_fingerprint


def view_key(prompts: NDArray[Any], texts: NDArray[Any]) -> Int64:
    """What identifies a view of a prompt and a text, in whose order views are numbered."""
    keys: Int64 = (prompts.astype(np.int64) << 32) | texts
    return keys
