"""Evaluation texts that stay out of a corpus."""

from collections.abc import Collection
from dataclasses import replace

from gist_train.data.overlap import normalized_hash
from gist_train.data.sources import Row


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
        found = text in self.met or normalized_hash(text) in self._hashes
        if found:
            self.met.add(text)
        return found

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
        )


def _kept(texts: tuple[str, ...], bad: list[bool]) -> tuple[str, ...]:
    return tuple(text for text, out in zip(texts, bad, strict=True) if not out)
