"""Pair classification: pairs of texts that belong together or not. Config: `PairTask`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from gist_train.config.errors import Fault
from gist_train.config.evaluation import PairTask
from gist_train.data.tables import text
from gist_train.evaluation.encoding import TextEncoder, cosines, encode_lists
from gist_train.evaluation.metrics import Items
from gist_train.evaluation.task_files import Record, TaskFile, zero_or_one


@dataclass(frozen=True, slots=True)
class LoadedPairs:
    """N pairs of texts that belong together or not."""

    METRICS: ClassVar = PairTask.METRICS
    name: str
    texts1: tuple[str, ...]
    texts2: tuple[str, ...]
    together: NDArray[np.bool_]
    """(N,), both values among them."""
    prompt: str | None = field(default=None, kw_only=True)
    """Before every text; None for the model's default."""

    def judged_texts(self) -> Mapping[str, Sequence[str]]:
        """Part -> the texts that scores are taken on."""
        return {"pairs": self.texts1 + self.texts2}

    def measure(self, encoder: TextEncoder) -> dict[str, Items]:
        """Average precision of cosine similarities, 0 to 1."""
        first, second = encode_lists(encoder, self.name, self.texts1, self.texts2, prompt=self.prompt)
        return {"ap": np.stack([cosines(first, second), self.together], axis=1)}


def read_pairs(task: PairTask, where: str, faults: list[Fault]) -> LoadedPairs | None:
    """The task with its file read; None, and faults, where it has some."""
    path, columns = Path(task.path), task.columns
    file = TaskFile(path, f"{where}: {path.name}", faults, task)

    def pair(row: Record) -> tuple[str, str, bool]:
        text1, text2 = text(row[columns.text1], columns.text1), text(row[columns.text2], columns.text2)
        return text1, text2, zero_or_one(row[columns.label], columns.label)

    pairs = file.read({"text1": columns.text1, "text2": columns.text2, "label": columns.label}, pair)
    if not file.clean:
        return None
    texts1, texts2, together = zip(*pairs, strict=True)
    if len(set(together)) < 2:
        same = f"{int(together[0])} in each of {len(together):,} rows"
        file.fault(same, "0 and 1, both of them", "add pairs of the other kind", what=f": {columns.label}")
    return LoadedPairs(task.name, texts1, texts2, np.array(together), prompt=task.prompt)
