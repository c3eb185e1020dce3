"""Token ids of a corpus' views, made by all processes that ask for them: each takes parts, one puts them together.

Legend: V views, n of them in a part.
"""

import shutil
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gist_train.data.corpus import Corpus
from gist_train.data.files import read_checked, whole_folder, write_checked, write_json
from gist_train.data.manifests import seal
from gist_train.data.sharing import all_whole, missing_parts, shared_out

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
    bounds = [*range(0, corpus.view_count, size), corpus.view_count]
    count, dtype = len(bounds) - 1, np.dtype(np.uint16 if vocabulary_size <= 1 << 16 else np.int32)
    target = corpus.tokens_folder(fingerprint)
    parts = target.with_name(f".{fingerprint}-{size}.parts")

    def finish() -> bool:
        if whole := all_whole(parts, count):
            _put_together(parts, bounds, dtype, target)
        return whole

    for number in shared_out(target, parts, count, finish):
        yield corpus.view_count - sum(bounds[other + 1] - bounds[other] for other in missing_parts(target, parts, count))
        if number is not None:
            tokens = tokenize(corpus.view_texts(bounds[number], bounds[number + 1]))
            lengths, ids = np.array([len(ids) for ids in tokens], np.int32), np.concatenate(tokens).astype(dtype)
            parts.mkdir(parents=True, exist_ok=True)
            write_checked(parts / str(number), lengths.tobytes() + ids.tobytes())
    yield corpus.view_count


def _put_together(parts: Path, bounds: Sequence[int], dtype: np.dtype[Any], target: Path) -> None:
    """Writes all ids to the new folder `target`, and removes the parts: files of (n,) int32 lengths, then flat ids."""
    with whole_folder(target) as beside:
        offsets = np.zeros(bounds[-1] + 1, np.int64)
        with (beside / "ids.bin").open("wb") as stream:
            for number, (first, last) in enumerate(pairwise(bounds)):
                content = read_checked(parts / str(number)) or b""
                lengths = np.frombuffer(content, np.int32, last - first)
                offsets[first + 1 : last + 1] = lengths
                stream.write(content[lengths.nbytes :])
        np.save(beside / "offsets.npy", np.cumsum(offsets))
        write_json(beside / "meta.json", {"dtype": dtype.name, "tokens": int(offsets.sum())})
        seal(beside, {})
    shutil.rmtree(parts)
