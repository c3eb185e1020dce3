"""Training texts that are in an evaluation set too: what makes two texts the same, how many rows hold one, how to leave them out.

Legend: N unique texts of the corpus, E different evaluation texts.
"""

import unicodedata
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from gist_train.data.corpus import Corpus, Int64, text_hash
from gist_train.data.files import whole_folder
from gist_train.data.leases import locked
from gist_train.data.rows import Row

NORMALIZATION = 1
"""Version of `normalized`: hashes that were stored under another one are not read."""
Value = TypeVar("Value", str, float)


class _Separators(dict[int, str | None]):
    """Code point -> a space for white space and punctuation, None for what has no shape; each looked up once."""

    def __missing__(self, code: int) -> str | None:
        kind = unicodedata.category(chr(code))
        shape = None if kind == "Cf" else " " if kind[0] in "PZ" or kind in ("Cc", "Sk") else chr(code)
        self[code] = shape
        return shape


_SEPARATORS = _Separators()


def normalized(text: str) -> str:
    """What is left of a text when two copies of it are compared: no case, no punctuation, one space between words.

    Copies of a data set differ in what carries no meaning: upper case, a question mark at the end or none, typographic quotes,
    double spaces, line breaks, full-width letters. So: Unicode's NFKC, case folded; characters without a shape (category Cf: soft
    hyphens, zero-width spaces, byte-order marks) left out; every run of white space, control characters and punctuation
    (categories Z, Cc, P, and Sk, which has the backquote that tokenised text quotes with) is one space, none at the ends.
    Punctuation parts words and does not vanish, so that "well-known" is "well known" and not "wellknown".

    Symbols (+ = < $, emoji), digits and accents stay: "C++" is not "C", and "2 + 2" not "2 2". But the hyphen and "#" are
    punctuation to Unicode: "-5" is "5". A text of nothing but punctuation stays as it is; else all of these were the same.
    """
    folded = unicodedata.normalize("NFKC", text).casefold().translate(_SEPARATORS)
    return " ".join(folded.split()) or text


def normalized_hash(text: str) -> bytes:
    """16 bytes for all texts that are the same when normalised."""
    return text_hash(normalized(text))


def normalized_hashes(corpus: Corpus) -> NDArray[np.uint8]:
    """(N, 16) `normalized_hash` of each text, stored in the corpus' folder by whoever asks first: the texts are read once."""
    folder = corpus.folder / f"normalized-{NORMALIZATION}"
    if not folder.is_dir():
        with locked(corpus.folder):
            if not folder.is_dir():
                hashes = bytearray()
                for text in corpus.texts():
                    hashes += normalized_hash(text)
                with whole_folder(folder) as beside:
                    np.save(beside / "hashes.npy", np.frombuffer(hashes, np.uint8).reshape(-1, 16))
    hashes_on_disk: NDArray[np.uint8] = np.load(folder / "hashes.npy", mmap_mode="r", allow_pickle=False)
    return hashes_on_disk


class Overlap(NamedTuple):
    """What a corpus and a list of evaluation texts have in common."""

    texts: int
    """Different evaluation texts."""
    shared: int
    """Of these, how many are in the corpus."""
    rows: int
    """Rows of the corpus that hold one of them, as anchor, positive or negative."""


def count_overlaps(corpus: Corpus, parts: Sequence[Iterable[str]]) -> list[Overlap]:
    """The overlap of each part of the evaluation texts with the corpus; texts are the same where they are so normalised."""
    number: dict[bytes, int] = {}
    members = [
        np.array(sorted({number.setdefault(normalized_hash(text), len(number)) for text in part}), np.int64) for part in parts
    ]
    rows, held = _held(corpus, number)
    overlaps = []
    for member in members:
        wanted = np.zeros(len(number), bool)
        wanted[member] = True
        hits = wanted[held]
        overlaps.append(Overlap(len(member), len(np.unique(held[hits])), len(np.unique(rows[hits]))))
    return overlaps


def _held(corpus: Corpus, number: dict[bytes, int]) -> tuple[Int64, Int64]:
    """Every place of the corpus where one of these E texts is: (places,) the row, and (places,) the text's number."""
    if not number:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    wanted = np.frombuffer(b"".join(number), "<u8").reshape(-1, 2)
    have = np.ascontiguousarray(normalized_hashes(corpus)).view("<u8")
    order = np.argsort(wanted[:, 0])
    nearest = order[np.minimum(np.searchsorted(wanted[order, 0], have[:, 0]), len(order) - 1)]
    number_of_text = np.where((wanted[nearest] == have).all(axis=1), nearest, -1)

    rows, held = [], []
    one_a_row = np.arange(corpus.row_count + 1)
    for flat, bounds in (
        (corpus.anchor, one_a_row),
        (corpus.positive, corpus.positive_offsets),
        (corpus.negative, corpus.negative_offsets),
    ):
        numbers = number_of_text[flat]
        places = np.flatnonzero(numbers >= 0)
        rows.append(np.searchsorted(bounds, places, side="right") - 1)
        held.append(numbers[places])
    return np.concatenate(rows), np.concatenate(held)


class Exclusion:
    """Texts that no row may hold.

    Args:
        hashes: `normalized_hash` of each; none of them: nothing is left out.
    """

    def __init__(self, hashes: Collection[bytes]):
        self._hashes = frozenset(hashes)
        self.met: set[str] = set()
        """The different texts that were found to be one."""

    def __bool__(self) -> bool:
        return bool(self._hashes)

    def __contains__(self, text: str) -> bool:
        held = text in self.met or normalized_hash(text) in self._hashes
        if held:
            self.met.add(text)
        return held

    def rest_of(self, row: Row, *, in_batch_negatives: bool) -> Row | None:
        """The row without these texts; None where it can teach nothing without them.

        That is a row whose anchor is one, or all of its positives; or all of its negatives, where it has no others to contrast
        with (`in_batch_negatives` false). A row that came without negatives is left as it is.
        """
        texts = (row.anchor, *row.positives, *row.negatives)
        bad = [text in self for text in texts]
        if not any(bad):
            return row
        bad_positives, bad_negatives = bad[1 : 1 + len(row.positives)], bad[1 + len(row.positives) :]
        if bad[0] or all(bad_positives) or (bad_negatives and all(bad_negatives) and not in_batch_negatives):
            return None
        return replace(
            row,
            positives=_kept(row.positives, bad_positives),
            negatives=_kept(row.negatives, bad_negatives),
            negative_labels=_kept(row.negative_labels, bad_negatives) if row.negative_labels else (),
            positive_scores=_kept(row.positive_scores, bad_positives) if row.positive_scores else (),
            negative_scores=_kept(row.negative_scores, bad_negatives) if row.negative_scores else (),
        )


def _kept(values: tuple[Value, ...], bad: list[bool]) -> tuple[Value, ...]:
    return tuple(value for value, out in zip(values, bad, strict=True) if not out)
