"""Small corpora for tests."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gist_train.config.schema import DataConfig
from gist_train.config.sources import JsonlSource, Prompts
from gist_train.data.building import build_corpus
from gist_train.data.corpus import Corpus
from gist_train.data.overlap import normalized_hash

WriteRows = Callable[..., Path]
ROWS: list[dict[str, Any]] = [
    {"anchor": "a", "positive": ["p", "p2"], "negative": ["n", "a", "n"], "task": "x"},
    {"anchor": "b", "positive": "p", "task": "x"},
    {"anchor": "a", "positive": ["日本", "ñ"], "negative": "n2", "task": "y"},
    {"anchor": "p", "positive": "a", "negative": [], "task": "x"},
    {"anchor": "a", "positive": ["p", "p2"], "negative": ["n", "a", "n"], "task": "x"},
    {"anchor": "A", "positive": "a b", "negative": ["a  b"], "task": "y"},
]
PROMPTS = Prompts(anchor="query: ", positive="passage: ", negative="passage: ")


def data_of(*paths: Path, prompts: Prompts | None = None, **settings: Any) -> DataConfig:
    return DataConfig(train=[JsonlSource(path=str(path), prompts=prompts) for path in paths], **settings)


def built(folder: Path, data: DataConfig, excluded: Iterable[str] = ()) -> Corpus:
    """The corpus of `data` without the texts `excluded`."""
    for _ in build_corpus(folder, data, "f" * 32, no_embeddings, settled, {normalized_hash(text) for text in excluded}):
        pass
    return Corpus(folder)


def no_embeddings(index: int, texts: Sequence[str]) -> NDArray[np.float32]:
    """For data without labelled texts."""
    raise AssertionError(f"source {index} asks for embeddings of {len(texts)} texts")


def texts_of(value: Any) -> list[str]:
    return [] if value is None else [value] if isinstance(value, str) else list(value)


def read_back(corpus: Corpus) -> list[dict[str, Any]]:
    """The rows of a corpus, by its arrays alone."""
    rows = []
    for row in range(corpus.row_count):
        positives = corpus.positive[corpus.positive_offsets[row] : corpus.positive_offsets[row + 1]]
        negatives = corpus.negative[corpus.negative_offsets[row] : corpus.negative_offsets[row + 1]]
        rows.append(
            {
                "anchor": corpus.text(corpus.anchor[row]),
                "positive": [corpus.text(i) for i in positives],
                "negative": [corpus.text(i) for i in negatives],
                "task": corpus.tasks[corpus.task[row]],
                "prompts": tuple(corpus.prompts[i] for i in corpus.row_prompts[row]),
            }
        )
    return rows


def expected_rows(rows: list[dict[str, Any]], prompts: tuple[str, str, str] = ("", "", "")) -> list[dict[str, Any]]:
    return [
        {
            "anchor": row["anchor"],
            "positive": texts_of(row["positive"]),
            "negative": texts_of(row.get("negative")),
            "task": row["task"],
            "prompts": prompts,
        }
        for row in rows
    ]


def settled() -> None:
    """For sources that stay as they are."""
