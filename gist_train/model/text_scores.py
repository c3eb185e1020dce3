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


def largest_of_rows(corpus: Corpus, of_text: Scores, roles: Collection[int] = ROLES, *, in_files: bool = False) -> Scores:
    """(R,) the largest of what a row's texts in these roles have.

    Args:
        of_text: (N,)
        in_files: whether a labelled text counts alone, as it stands in its file, and not what was mined for it.
    """
    alone = np.asarray(corpus.label) >= 0 if in_files else np.zeros(corpus.row_count, bool)
    scores = of_text[corpus.anchor] if 0 in roles else np.zeros(corpus.row_count, np.float32)
    columns = {1: (corpus.positive, corpus.positive_offsets), 2: (corpus.negative, corpus.negative_offsets)}
    for role, (flat, bounds) in columns.items():
        if role in roles:
            row = np.repeat(np.arange(corpus.row_count), np.diff(bounds))
            np.maximum.at(scores, row, np.where(alone[row], np.float32(0), of_text[flat]))
    return scores


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
        corpus, full = self._corpus, self._cut_texts()
        empty, cut = np.zeros(corpus.text_count, np.float32), np.zeros(corpus.text_count, np.float32)
        for number, text in enumerate(corpus.texts()):
            empty[number] = not any(character.isalnum() for character in text)
            if number % AT_A_TIME == 0:
                yield number - int(np.searchsorted(full, number))  # long ones are done when they are counted, which takes longer
        for begin in range(0, len(full), AT_A_TIME):
            yield corpus.text_count - len(full) + begin
            some = full[begin : begin + AT_A_TIME]
            cut[some] = share_cut(self._student, [corpus.text(int(i)) for i in some])
        hashes = [row.tobytes() for row in normalized_hashes(corpus)] if self._judged else []
        judged = np.array([one in self._judged for one in hashes], np.float32) if hashes else np.zeros_like(empty)
        of_texts = {"empty": empty, "cut": cut, "evaluation": judged}
        self.scores = {name: largest_of_rows(corpus, values, in_files=self._in_files) for name, values in of_texts.items()}
        self.scores["same_text"] = self._same_text()
        yield corpus.text_count

    def _cut_texts(self) -> NDArray[np.int64]:
        """Ids of the texts of which some view is as long as the student reads."""
        views = np.arange(self._corpus.view_count)
        long = views[self._tokens.lengths(views) >= self._student.max_length]
        return np.unique(self._corpus.texts_of_views(long))

    def _same_text(self) -> Scores:
        corpus = self._corpus
        hashes = np.ascontiguousarray(normalized_hashes(corpus)).view("<u8")
        row = np.repeat(np.arange(corpus.row_count), np.diff(corpus.positive_offsets))
        same = (hashes[corpus.anchor[row]] == hashes[corpus.positive]).all(axis=1)
        scores = np.zeros(corpus.row_count, np.float32)
        np.maximum.at(scores, row, same.astype(np.float32))
        return scores
