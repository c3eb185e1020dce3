"""What texts say of rows without a guide: nothing, the same twice, more than the student reads, what evaluation judges on.

Legend: R rows of a corpus, N texts.
"""

from collections.abc import Collection, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from gist_train.data.corpus import Corpus, TokenTable
from gist_train.data.overlap import normalized_hashes
from gist_train.model.pair_scores import Scores
from gist_train.model.pretrained import Pretrained
from gist_train.model.whole import TextModel

AT_A_TIME = 4096
ROLES = (0, 1, 2)
"""Anchors, positives and negatives."""


def share_cut(model: TextModel, texts: Sequence[str]) -> Scores:
    """(n,) of each text's tokens, special ones included, the share that is more than the model reads."""
    share = 1 - model.max_length / np.maximum(model.lengths_uncut(texts), model.max_length)
    return share.astype(np.float32)


def largest_of_rows(
    corpus: Corpus, scores: Scores, roles: Collection[int] = ROLES, *, of_views: bool = False, in_files: bool = False
) -> Scores:
    """(R,) the largest of what a row's texts in these roles have.

    Args:
        scores: (N,) of texts, or (V,) of views.
        of_views: which of these.
        in_files: whether a labelled text counts alone, as it stands in its file, and not what was mined for it.
    """
    alone = np.asarray(corpus.label) >= 0 if in_files else np.zeros(corpus.row_count, bool)
    rows, largest = np.arange(corpus.row_count), np.zeros(corpus.row_count, np.float32)
    columns = {
        0: (rows, corpus.anchor),
        1: (np.repeat(rows, np.diff(corpus.positive_offsets)), corpus.positive),
        2: (np.repeat(rows, np.diff(corpus.negative_offsets)), corpus.negative),
    }
    for role in roles:
        row, texts = columns[role]
        own = scores[corpus.views(corpus.row_prompts[row, role], texts) if of_views else texts]
        np.maximum.at(largest, row, np.where(alone[row], np.float32(0), own) if role else own)
    return largest


class TextScores:
    """What is found of each row, filled by `look`.

    Args:
        judged: `overlap.normalized_hash` of each text that evaluation judges on.
        in_files: as `largest_of_rows` has it.
    """

    def __init__(
        self, corpus: Corpus, tokens: TokenTable, student: Pretrained, judged: Collection[bytes], *, in_files: bool = False
    ):
        self._in_files = in_files
        self._corpus, self._tokens, self._student = corpus, tokens, student
        self._judged = frozenset(judged)
        self.scores: dict[str, Scores] = {}
        """(R,) by kind."""

    def look(self) -> Iterator[int]:
        """Looks at all texts; yields how many are done."""
        corpus, full_views = self._corpus, self._full_views()
        full_texts = len(np.unique(corpus.texts_of_views(full_views)))  # they are done when they are counted, which takes longer
        empty, cut = np.zeros(corpus.text_count, np.float32), np.zeros(corpus.view_count, np.float32)
        for number, text in enumerate(corpus.texts()):
            empty[number] = not any(character.isalnum() for character in text)
            if number % AT_A_TIME == 0:
                yield number * (corpus.text_count - full_texts) // corpus.text_count
        for begin in range(0, len(full_views), AT_A_TIME):
            yield corpus.text_count - full_texts + full_texts * begin // len(full_views)
            some = full_views[begin : begin + AT_A_TIME]
            cut[some] = share_cut(self._student, [text for view in some.tolist() for text in corpus.view_texts(view, view + 1)])
        hashes = [row.tobytes() for row in normalized_hashes(corpus)] if self._judged else []
        judged = np.array([one in self._judged for one in hashes], np.float32) if hashes else np.zeros_like(empty)
        self.scores = {
            "empty": largest_of_rows(corpus, empty, in_files=self._in_files),
            "cut": largest_of_rows(corpus, cut, of_views=True, in_files=self._in_files),
            "evaluation": largest_of_rows(corpus, judged, in_files=self._in_files),
        }
        self.scores["same_text"] = self._same_text()
        yield corpus.text_count

    def _full_views(self) -> NDArray[np.int64]:
        """The views that are as long as the student reads, ascending."""
        views = np.arange(self._corpus.view_count)
        full: NDArray[np.int64] = views[self._tokens.lengths(views) >= self._student.max_length]
        return full

    def _same_text(self) -> Scores:
        corpus = self._corpus
        hashes = np.ascontiguousarray(normalized_hashes(corpus)).view("<u8")
        row = np.repeat(np.arange(corpus.row_count), np.diff(corpus.positive_offsets))
        same = (hashes[corpus.anchor[row]] == hashes[corpus.positive]).all(axis=1)
        scores = np.zeros(corpus.row_count, np.float32)
        np.maximum.at(scores, row, same.astype(np.float32))
        return scores
