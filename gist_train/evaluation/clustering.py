"""Clustering: k-means into as many clusters as there are labels, against the labels. Config: `ClusteringTask`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from gist_train.config.errors import Fault
from gist_train.config.evaluation import ClusteringTask
from gist_train.evaluation.encoding import TextEncoder, encode_lists
from gist_train.evaluation.metrics import Items
from gist_train.evaluation.task_files import TaskFile, labelled

DRAW_SEED = 42
"""Of k-means' first centres. No setting: scores of two models are comparable alike only."""


@dataclass(frozen=True, slots=True)
class LoadedClustering:
    """N labelled texts."""

    METRICS: ClassVar = ClusteringTask.METRICS
    name: str
    texts: tuple[str, ...]
    labels: NDArray[np.int64]
    """(N,), numbered from 0 as they first appear; two different ones at least, and fewer than texts."""
    prompt: str | None = field(default=None, kw_only=True)
    """Before every text; None for the model's default."""

    def judged_texts(self) -> Mapping[str, Sequence[str]]:
        """Part -> the texts that scores are taken on."""
        return {"texts": self.texts}

    def measure(self, encoder: TextEncoder) -> dict[str, Items]:
        """(cluster, label) of each text, by k-means on the vectors as the encoder gives them."""
        (vectors,) = encode_lists(encoder, self.name, self.texts, prompt=self.prompt)
        from sklearn.cluster import KMeans  # type: ignore[import-untyped]

        clusters = KMeans(int(self.labels.max()) + 1, n_init=4, random_state=DRAW_SEED).fit_predict(vectors)
        return {"v_measure": np.stack([clusters, self.labels], axis=1).astype(np.float64)}


def read_clustering(task: ClusteringTask, where: str, faults: list[Fault]) -> LoadedClustering | None:
    """The task with its file read; None, and faults, where it has some."""
    path, columns = Path(task.path), task.columns
    file = TaskFile(path, f"{where}: {path.name}", faults, task)
    numbers: dict[str, int] = {}
    rows = file.read({"text": columns.text, "label": columns.label}, partial(labelled, columns, numbers))
    if not file.clean:
        return None
    if not 2 <= len(numbers) < len(rows):
        counts = f"{len(numbers):,} different in {len(rows):,} rows"
        file.fault(counts, "two different labels or more, and fewer than rows", "check the column", what=f": {columns.label}")
    texts, labels = zip(*rows, strict=True)
    return LoadedClustering(task.name, texts, np.array(labels), prompt=task.prompt)
