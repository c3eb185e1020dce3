"""Semantic textual similarity: pairs of texts with a human score each. Config: `StsTask`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from gist_train.config.errors import Fault
from gist_train.config.evaluation import StsTask
from gist_train.data.tables import text
from gist_train.evaluation.encoding import TextEncoder, cosines, encode_lists
from gist_train.evaluation.metrics import Items
from gist_train.evaluation.task_files import Record, TaskFile, number


@dataclass(frozen=True, slots=True)
class LoadedSts:
    """N pairs of texts with a human score each."""

    METRICS: ClassVar = StsTask.METRICS
    name: str
    texts1: tuple[str, ...]
    texts2: tuple[str, ...]
    scores: NDArray[np.float64]
    """(N,), in the file's own unit, not all the same."""
    prompt: str | None = field(default=None, kw_only=True)
    """Before every text; None for the model's default."""

    def judged_texts(self) -> Mapping[str, Sequence[str]]:
        """Part -> the texts that scores are taken on."""
        return {"pairs": self.texts1 + self.texts2}

    def measure(self, encoder: TextEncoder) -> dict[str, Items]:
        """Correlation of cosine similarities with human scores, -1 to 1."""
        first, second = encode_lists(encoder, self.name, self.texts1, self.texts2, prompt=self.prompt)
        items = np.stack([cosines(first, second), self.scores], axis=1)
        return {"spearman": items, "pearson": items}


def read_sts(task: StsTask, where: str, faults: list[Fault]) -> LoadedSts | None:
    """The task with its file read; None, and faults, where it has some."""
    path, columns = Path(task.path), task.columns
    file = TaskFile(path, f"{where}: {path.name}", faults, task)

    def pair(row: Record) -> tuple[str, str, float]:
        text1, text2 = text(row[columns.text1], columns.text1), text(row[columns.text2], columns.text2)
        return text1, text2, number(row[columns.score], columns.score)

    pairs = file.read({"text1": columns.text1, "text2": columns.text2, "score": columns.score}, pair)
    if not file.clean:
        return None
    texts1, texts2, scores = zip(*pairs, strict=True)
    if min(scores) == max(scores):
        same, fix = f"{scores[0]:g} in each of {len(scores):,} rows", "check the column: a correlation needs scores that differ"
        file.fault(same, "two different scores or more", fix, what=f": {columns.score}")
    return LoadedSts(task.name, texts1, texts2, np.array(scores), prompt=task.prompt)
