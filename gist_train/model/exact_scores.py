"""What ids of texts say of rows, of whatever task and file, guide or none: pairs that stand twice, positives of many rows.

Legend: R rows of a corpus, P pairs of an anchor and one of its positives.
"""

import numpy as np
from numpy.typing import NDArray

from gist_train.data.corpus import Corpus, Int64
from gist_train.model.pair_scores import Scores, places_in_files


def repeated_rows(corpus: Corpus) -> Scores:
    """(R,) 1 where earlier rows have every pair of the row, 0 elsewhere; of labelled texts a pair is text and label."""
    row = _rows_of_positives(corpus)
    labels = np.asarray(corpus.label)[row].astype(np.int64)
    # A positive that was mined says nothing. Labels are numbered below 0, where no text is.
    other = np.where(labels >= 0, -1 - labels, corpus.positive)
    pair = (corpus.anchor[row].astype(np.int64) << 32) | (other & 0xFFFFFFFF)
    order = np.lexsort((places_in_files(corpus)[row], pair))
    begins = np.concatenate([[True], np.diff(pair[order]) != 0])
    first = np.empty_like(row)
    first[order] = row[order][np.flatnonzero(begins)[np.cumsum(begins) - 1]]
    new = np.bincount(row, first == row, minlength=corpus.row_count)
    scores: Scores = (new == 0).astype(np.float32)
    return scores


def times_repeated(corpus: Corpus, unusual: NDArray[np.bool_] | None) -> Scores:
    """(R,) how many rows have the row's positive: the most frequent one, of several. Positives that were drawn do not count.

    Args:
        unusual: (R,) whose pair is less similar than is usual; 0 is scored where most rows of a positive are not. None where no
            guide says so: then each counts.
    """
    row = _rows_of_positives(corpus)
    paired = ~corpus.drawn[row]
    times = np.bincount(corpus.positive, paired, minlength=corpus.text_count)
    if unusual is not None:
        times = np.where(np.bincount(corpus.positive, unusual[row] & paired, minlength=corpus.text_count) > times / 2, times, 0)
    scores = np.zeros(corpus.row_count, np.float32)
    np.maximum.at(scores, row, np.where(paired, times[corpus.positive], 0).astype(np.float32))
    return scores


def _rows_of_positives(corpus: Corpus) -> Int64:
    """(P,) the row of each."""
    return np.repeat(np.arange(corpus.row_count), np.diff(corpus.positive_offsets))
