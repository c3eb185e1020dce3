"""Triplets: is an anchor more similar to its positive than to its negative? Config: `TripletTask`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np

from gist_train.config.errors import Fault
from gist_train.config.evaluation import TripletTask
from gist_train.data.tables import text
from gist_train.evaluation.encoding import TextEncoder, cosines, encode_lists
from gist_train.evaluation.metrics import Items
from gist_train.evaluation.task_files import Record, TaskFile


@dataclass(frozen=True, slots=True)
class LoadedTriplets:
    """N anchors with a positive and a negative each."""

    METRICS: ClassVar = TripletTask.METRICS
    name: str
    anchors: tuple[str, ...]
    positives: tuple[str, ...]
    negatives: tuple[str, ...]
    prompt: str | None = field(default=None, kw_only=True)
    """Before every text; None for the model's default."""

    def judged_texts(self) -> Mapping[str, Sequence[str]]:
        """Part -> the texts that scores are taken on."""
        return {"triplets": self.anchors + self.positives + self.negatives}

    def measure(self, encoder: TextEncoder) -> dict[str, Items]:
        """1 for each anchor that is more similar to its positive, else 0: a tie decides nothing, and so is no success."""
        anchors, positives, negatives = encode_lists(
            encoder, self.name, self.anchors, self.positives, self.negatives, prompt=self.prompt
        )
        return {"accuracy": (cosines(anchors, positives) > cosines(anchors, negatives)).astype(np.float64)}


def read_triplets(task: TripletTask, where: str, faults: list[Fault]) -> LoadedTriplets | None:
    """The task with its file read; None, and faults, where it has some."""
    path, columns = Path(task.path), task.columns
    file = TaskFile(path, f"{where}: {path.name}", faults, task)
    names = {"anchor": columns.anchor, "positive": columns.positive, "negative": columns.negative}

    def triplet(row: Record) -> tuple[str, ...]:
        return tuple(text(row[column], column) for column in names.values())

    triplets = file.read(names, triplet)
    return LoadedTriplets(task.name, *zip(*triplets, strict=True), prompt=task.prompt) if file.clean else None
