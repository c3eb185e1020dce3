"""Token ids of a corpus' views, made by all processes that ask for them: each takes parts, one puts them together.

Legend: V views.
"""

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gist_train.data.corpus import Corpus
from gist_train.data.files import read_checked, whole_folder, write_checked, write_json
from gist_train.data.manifests import seal
from gist_train.data.sharing import shared_out

FEWEST_VIEWS = 8192
"""In a part: what a process has in memory, and loses when it is interrupted."""
MOST_PARTS = 4096

Tokenize = Callable[[Sequence[str]], Sequence[NDArray[np.integer[Any]]]]
"""Texts -> token ids of each, special tokens included."""


def tokenise_together(
    corpus: Corpus, tokenize: Tokenize, vocabulary_size: int, fingerprint: str, part_views: int | None = None
) -> Iterator[int]:
    """Stores the token ids of every view, reading no source again, together with all processes that call this too.

    Yields how many views are done, by whomever; ends when `corpus.tokens(fingerprint)` finds them. What is done when all of the
    processes are interrupted is kept for the next call. Memory is bounded by the views of a part.

    Args:
        tokenize: the tokenizer of `fingerprint`.
        part_views: in a part; None for what suits V.
    """
    size = part_views or max(FEWEST_VIEWS, -(-corpus.view_count // MOST_PARTS))
    dtype = np.dtype(np.uint16 if vocabulary_size <= 1 << 16 else np.int32)
    parts = _Parts(corpus.tokens_folder(fingerprint).with_name(f".{fingerprint}-{size}.parts"), size, corpus.view_count, dtype)
    target = corpus.tokens_folder(fingerprint)

    def missing() -> list[int]:
        return [] if target.is_dir() else parts.missing()

    def finish() -> bool:
        return target.is_dir() or parts.put_together(target)

    done = 0
    for number in shared_out(corpus.folder, parts.folder.name, missing, finish):
        done = max(done, corpus.view_count - sum(map(parts.views_of, missing())))
        yield done
        if number is not None:
            parts.write(number, tokenize(corpus.view_texts(*parts.bounds(number))))
    yield corpus.view_count


@dataclass(frozen=True, slots=True)
class _Parts:
    """Files of token ids: a digest of all that follows, (n,) int32 lengths of the part's n views, their flat ids."""

    folder: Path
    size: int
    """Views in a part; the last one may have fewer."""
    views: int
    """V."""
    dtype: np.dtype[Any]
    """Of an id."""

    @property
    def _numbers(self) -> range:
        return range(-(-self.views // self.size))

    def bounds(self, number: int) -> tuple[int, int]:
        """The part's first view, and the one after its last."""
        return number * self.size, min((number + 1) * self.size, self.views)

    def views_of(self, number: int) -> int:
        """n."""
        first, last = self.bounds(number)
        return last - first

    def missing(self) -> list[int]:
        """Parts that nobody has written yet."""
        there = {path.name for path in self.folder.iterdir()} if self.folder.is_dir() else set()
        return [number for number in self._numbers if str(number) not in there]

    def write(self, number: int, tokens: Sequence[NDArray[np.integer[Any]]]) -> None:
        """The token ids of each of the part's views."""
        lengths, ids = np.array([len(ids) for ids in tokens], np.int32), np.concatenate(tokens).astype(self.dtype)
        content = lengths.tobytes() + ids.tobytes()
        self.folder.mkdir(parents=True, exist_ok=True)
        write_checked(self.folder / str(number), content)

    def put_together(self, target: Path) -> bool:
        """Writes all ids to the new folder `target`, and removes the parts; if some are damaged, only removes these: False."""
        damaged = [number for number in self._numbers if read_checked(self.folder / str(number)) is None]
        for number in damaged:
            (self.folder / str(number)).unlink()
        if damaged:
            return False
        with whole_folder(target) as beside:
            offsets = np.zeros(self.views + 1, np.int64)
            with (beside / "ids.bin").open("wb") as stream:
                for number in self._numbers:
                    content, (first, last) = read_checked(self.folder / str(number)) or b"", self.bounds(number)
                    lengths = np.frombuffer(content, np.int32, last - first)
                    offsets[first + 1 : last + 1] = lengths
                    stream.write(content[lengths.nbytes :])
            np.save(beside / "offsets.npy", np.cumsum(offsets))
            write_json(beside / "meta.json", {"dtype": self.dtype.name, "tokens": int(offsets.sum())})
            seal(beside, {})
        shutil.rmtree(self.folder)
        return True
