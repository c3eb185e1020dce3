"""The guide's one pass over data sets before a training: sorted by length, and shared by all processes.

A training that meets a text for the first time has it embedded by itself. Ahead of it the same work is done in larger batches of
like lengths, and no two processes embed the same text.

Legend: N different texts.
"""

from collections.abc import Mapping
from typing import TypeAlias

import numpy as np
import torch
from datasets import Dataset, Features, List, Value
from numpy.typing import NDArray

from gist_train.config.errors import Fault, UserError, shown
from gist_train.config.models import StoredModelConfig
from gist_train.data.corpus import text_hashes
from gist_train.inside.growing import GrowingStore
from gist_train.inside.guides import ROLES, ModelGuide
from gist_train.inside.texts import LOSS, refused_list
from gist_train.progress import follow, say, terminal

TrainingData: TypeAlias = Dataset | Mapping[str, Dataset]
ROWS_AT_A_TIME = 4096
LABELS = ("label", "labels", "score", "scores")
"""Columns that their collator takes for labels."""
TEXT_TYPES = ("string", "large_string")


class _Texts:
    """The different texts of some columns, by place: the texts themselves stay where they are.

    Args:
        columns: (data set, its column) of each.
    """

    def __init__(self, columns: list[tuple[Dataset, str]]):
        self._columns = columns
        hashes, lengths, places = [np.empty((0, 16), np.uint8)], [np.empty(0, np.int64)], [np.empty((0, 2), np.int64)]
        for number, (dataset, column) in enumerate(columns):
            for first in range(0, len(dataset), ROWS_AT_A_TIME):
                texts = dataset[first : first + ROWS_AT_A_TIME][column]
                if None in texts:
                    where = f"{LOSS}: column {shown(column)}, row {first + texts.index(None):,}"
                    fix = "leave such rows out, or put those without a negative into a data set of their own"
                    raise UserError(Fault(where, "no text", "a text in each column of each row", fix))
                hashes.append(text_hashes(texts))
                lengths.append(np.array([len(text) for text in texts], np.int64))
                places.append(np.stack([np.full(len(texts), number), np.arange(first, first + len(texts))], axis=1))
        everything = np.concatenate(hashes)
        _, once = np.unique(np.ascontiguousarray(everything).view("<u8").reshape(-1, 2), axis=0, return_index=True)
        self.hashes: NDArray[np.uint8] = everything[once]
        """(N, 16)."""
        self.lengths: NDArray[np.int64] = np.concatenate(lengths)[once]
        """(N,) characters."""
        self._places: NDArray[np.int64] = np.concatenate(places)[once]

    def text(self, which: int) -> str:
        """One of the N texts."""
        number, row = self._places[which].tolist()
        dataset, column = self._columns[number]
        return str(dataset[row][column])


def embed_ahead(guide: ModelGuide, data: TrainingData, device: torch.device, processes: int, *, first: bool) -> int:
    """Has every text of the data in the guide's stores; returns how many these are, counted once for each prompt.

    Args:
        device: to run the guide on.
        processes: that call this at the same time.
        first: whether this is the first of them, which shows how far all are.

    Raises:
        UserError: the data are no data sets, or have no columns of texts, or rows without one; or nothing can be written.
    """
    sets = list(data.values()) if isinstance(data, Mapping) else [data]
    for one in sets:
        if not isinstance(one, Dataset):
            fix = "make one of it: Dataset.from_list(rows), or a list of a stream's rows first"
            raise UserError(Fault(f"{LOSS}: data", f"a {type(one).__name__}", "a datasets.Dataset, or some by name", fix))
    # By store, for the columns of one prompt have one.
    columns: dict[GrowingStore, tuple[StoredModelConfig, list[tuple[Dataset, str]]]] = {}
    for dataset in sets:
        for name, kind in dataset.features.items():
            if name not in LABELS and isinstance(kind, List) and getattr(kind.feature, "dtype", None) in TEXT_TYPES:
                raise refused_list(f"{LOSS}: column {shown(name)}", "lists of texts")
        for number, name in enumerate(text_columns(dataset.features)):
            role = min(number, ROLES - 1)
            columns.setdefault(guide.stores[role], (guide.configs[role], []))[1].append((dataset, name))
    if not columns:
        raise UserError(
            Fault(f"{LOSS}: data", "no column of texts", "columns of texts: anchors, positives, negatives", "give them")
        )
    count, console = 0, terminal()
    for store, (config, given) in columns.items():
        texts = _Texts(given)
        count += len(texts.hashes)
        store.write()
        missing = int((store.store.positions(texts.hashes) < 0).sum())
        counts = store.store.fill_together(
            lambda: guide.model.to(device), config, texts.hashes, texts.lengths, texts.text, processes, missing
        )
        prompt = f" after {shown(config.prompt)}" if config.prompt else ""
        try:
            follow(counts, f"embedding with {guide.name}{prompt}", missing, console, shown=first and missing > 0)
        except KeyboardInterrupt:
            say(console, "Stopped. What was embedded is kept: call embed again, or train: the rest is embedded as it is met.")
            raise
        except OSError as error:
            fix = "free space, or name another folder in cache_dir; or train without: texts are then embedded as they are met"
            raise UserError(
                Fault(f"{LOSS}: cache_dir", f"{store.folder}: {error}", "a folder that can be written", fix)
            ) from None
        store.write()
    return count


def text_columns(features: Features) -> list[str]:
    """The columns of a data set that are texts, in their order; a label is none."""
    return [
        name for name, kind in features.items() if name not in LABELS and isinstance(kind, Value) and kind.dtype in TEXT_TYPES
    ]
