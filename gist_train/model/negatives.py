"""Hard negatives: for each row, texts of its task that a guide finds near its anchor, and not too near. numpy and torch alone.

A near candidate is a positive that nobody has marked as one, or it is a hard negative: the guide's similarity of the row's own
pair tells (NV-Retriever, Moreira et al. 2024, arXiv 2407.15831: a negative has at most 95 % of it). Of a negative similarity 95 %
are more, so the threshold is g - |g| margin, as it is in the loss.

Legend: R rows of a corpus, n of them at a time, G width of the guide, K candidates that are kept of a row, P negatives that a row
is to get.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import astuple, dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gist_train.config.hard_negatives import HardNegativesConfig
from gist_train.data.corpus import Corpus
from gist_train.data.drawing import of_rows
from gist_train.model.masks import threshold

Ints = NDArray[np.int64]
Vectors = Callable[[NDArray[np.int32]], Tensor]
"""(m,) text ids -> (m, G) float32 of length 1."""
ROWS_AT_A_TIME = CANDIDATES_AT_A_TIME = 8192
"""Their similarities take 268 MB."""
NONE = -1


@dataclass(frozen=True, slots=True)
class Guiding:
    """The guide's vectors of a corpus' texts."""

    anchors: Vectors
    positives: Vectors
    candidates: Vectors


@dataclass(frozen=True, slots=True)
class Counts:
    """What became of the candidates of some rows."""

    rows: int
    """Rows that negatives were looked for."""
    own: int
    """Candidates that are a row's own text, positive or negative, or carry its label."""
    ahead: int
    """Candidates nearer than the first of the ranks."""
    near: int
    """Candidates of the ranks that are nearer than the threshold: likely positives."""
    left: int
    """Candidates of the ranks that may be negatives."""
    taken: int
    """Negatives that were taken."""
    short: int
    """Rows that got fewer than they were to get."""

    @classmethod
    def of_all(cls, counts: Iterable["Counts"]) -> "Counts":
        """The sums over parts."""
        return cls(*map(sum, zip(*map(astuple, counts), strict=True)))


@dataclass(frozen=True, slots=True)
class Part:
    """Rows of one pool of candidates, a piece of the work."""

    rows: Ints
    """(n,)"""
    pool: NDArray[np.int32]
    """(m,) text ids that are candidates of all of them, ascending."""


def parts_of(corpus: Corpus, *, same_task: bool, at_a_time: int = ROWS_AT_A_TIME) -> Iterator[Part]:
    """All rows in pieces, with what they may take: positives and negatives of rows, of the same task or of all tasks, and the
    corpus' documents."""
    texts = np.concatenate([corpus.positive, corpus.negative])
    rows = np.arange(corpus.row_count)
    row = np.concatenate([np.repeat(rows, np.diff(bounds)) for bounds in (corpus.positive_offsets, corpus.negative_offsets)])
    task = corpus.task if same_task else np.zeros(corpus.row_count, np.int32)
    tasks = np.arange(int(task.max()) + 2)
    rows, places = np.argsort(task, kind="stable"), np.argsort(task[row], kind="stable")
    row_bounds, place_bounds = np.searchsorted(task[rows], tasks), np.searchsorted(task[row[places]], tasks)
    for one in tasks[:-1]:
        of_task = rows[row_bounds[one] : row_bounds[one + 1]]
        pool = np.unique(np.concatenate([texts[places[place_bounds[one] : place_bounds[one + 1]]], corpus.documents]))
        for begin in range(0, len(of_task), at_a_time):
            yield Part(of_task[begin : begin + at_a_time], pool)


def labels_of_texts(corpus: Corpus) -> NDArray[np.int32]:
    """(N,) the label that rows give a text, -1 where none gives it one; where their labels differ, one of them."""
    labels = np.full(corpus.text_count, NONE, np.int32)
    of_positives = np.repeat(corpus.label, np.diff(corpus.positive_offsets))
    given = ((corpus.negative, corpus.negative_label), (corpus.positive, of_positives), (corpus.anchor, corpus.label))
    for texts, known in given:
        labels[texts[known >= 0]] = known[known >= 0]
    return labels


def negatives_of(
    part: Part,
    corpus: Corpus,
    guiding: Guiding,
    labels: NDArray[np.int32],
    rules: HardNegativesConfig,
    random: np.random.Generator,
    candidates_at_a_time: int = CANDIDATES_AT_A_TIME,
) -> tuple[NDArray[np.int32], Counts]:
    """(n, P) text ids, -1 where a row has no more, and the counts.

    Args:
        labels: (N,) of texts.
        random: of `pick: random`.
    """
    first, last = rules.ranks
    queries = guiding.anchors(corpus.anchor[part.rows])
    limits = _limits(part.rows, corpus, queries, guiding, rules)
    nearest = queries.new_full((len(part.rows), last), -torch.inf)
    texts = torch.full((len(part.rows), last), NONE, dtype=torch.int32, device=queries.device)
    own = 0
    own_row, own_text = _own_texts(part.rows, corpus)
    label = torch.from_numpy(corpus.label[part.rows]).to(queries.device)[:, None]
    for begin in range(0, len(part.pool), candidates_at_a_time):
        pool = part.pool[begin : begin + candidates_at_a_time]
        similarities = queries @ guiding.candidates(pool).T
        out = (torch.from_numpy(labels[pool]).to(queries.device)[None, :] == label) & (label >= 0)
        place = np.minimum(np.searchsorted(pool, own_text), len(pool) - 1)
        here = pool[place] == own_text
        out[torch.from_numpy(own_row[here]), torch.from_numpy(place[here])] = True
        own += int(out.sum())
        similarities.masked_fill_(out, -torch.inf)
        # The nearest so far, and these: of both the nearest.
        ids = torch.cat([texts, torch.from_numpy(pool).to(texts.device).expand(len(part.rows), -1)], dim=1)
        nearest, places = torch.cat([nearest, similarities], dim=1).topk(last, dim=1)
        texts = ids.gather(1, places)
    rank = torch.arange(1, last + 1, device=nearest.device)
    there, near = nearest > -torch.inf, nearest > limits
    left = there & ~near & (rank >= first)
    chosen = _chosen(texts.cpu().numpy(), left.cpu().numpy(), rules, random)
    counts = Counts(
        rows=len(part.rows),
        own=own,
        ahead=int((there & (rank < first)).sum()),
        near=int((there & near & (rank >= first)).sum()),
        left=int(left.sum()),
        taken=int((chosen != NONE).sum()),
        short=int((chosen[:, -1] == NONE).sum()),
    )
    return chosen, counts


def _limits(rows: Ints, corpus: Corpus, queries: Tensor, guiding: Guiding, rules: HardNegativesConfig) -> Tensor:
    """(n, 1) above which a candidate is likely a positive: by the row's own positive that the guide finds least similar."""
    row = np.repeat(np.arange(len(rows)), np.diff(corpus.positive_offsets)[rows])
    positives = of_rows(corpus.positive, corpus.positive_offsets, rows)
    least = queries.new_full((len(rows),), torch.inf)
    for begin in range(0, len(row), CANDIDATES_AT_A_TIME):
        some = slice(begin, begin + CANDIDATES_AT_A_TIME)
        of_row = torch.from_numpy(row[some]).to(queries.device)
        own = (queries[of_row] * guiding.positives(positives[some])).sum(dim=1)
        least.scatter_reduce_(0, of_row, own, "amin")
    return threshold(least, rules.margin, rules.margin_strategy)


def _own_texts(rows: Ints, corpus: Corpus) -> tuple[Ints, NDArray[np.int32]]:
    """(k,) the place in `rows` and (k,) the text id of all that a row has itself."""
    one_each = np.arange(corpus.row_count + 1)
    columns = (
        (corpus.anchor, one_each),
        (corpus.positive, corpus.positive_offsets),
        (corpus.negative, corpus.negative_offsets),
    )
    places = [np.repeat(np.arange(len(rows)), np.diff(bounds)[rows]) for _, bounds in columns]
    return np.concatenate(places), np.concatenate([of_rows(flat, bounds, rows) for flat, bounds in columns])


def _chosen(
    texts: NDArray[np.int32], left: NDArray[np.bool_], rules: HardNegativesConfig, random: np.random.Generator
) -> NDArray[np.int32]:
    """(n, P) of the texts (n, K), the nearest first, that are left: the nearest, any, or one of each P-th part of them."""
    counts = left.sum(axis=1)
    order = np.argsort(~left, axis=1, kind="stable")  # those that are left, the nearest first
    wanted = np.arange(rules.per_row)
    match rules.pick:
        case "top":
            picks = np.broadcast_to(wanted, (len(texts), rules.per_row))
        case "random":
            draws = np.where(np.arange(texts.shape[1]) < counts[:, None], random.random(texts.shape), np.inf)
            picks = np.argsort(draws, axis=1)[:, : rules.per_row]
        case "quantiles":
            many = counts[:, None] > rules.per_row
            picks = np.where(many, wanted * counts[:, None] // rules.per_row, wanted)
    picked = np.take_along_axis(texts, np.take_along_axis(order, np.minimum(picks, texts.shape[1] - 1), axis=1), axis=1)
    return np.where(wanted < counts[:, None], picked, NONE).astype(np.int32)
