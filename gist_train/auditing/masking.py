"""What the guide would mask of batches, before a step is trained: by task, block and margin.

Legend: B rows of a batch.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gist_train.config.losses import LossConfig
from gist_train.data.batches import BatchPlan
from gist_train.data.corpus import Batch, Corpus
from gist_train.model.loss import BLOCKS, guided_contrastive_loss
from gist_train.training.guides import StoredGuide
from gist_train.training.step_context import SourceRules, labels_of, own_negatives_of

SAMPLED_BATCHES = 200
BLOCK = 2048
"""Rows and columns of similarities that are in memory at a time, where the loss says nothing of it."""
OPTIONS = {"margin_strategy", "contrast_anchors", "contrast_positives", "mask", "softness", "votes"}
"""Of the loss, that decide what is masked."""
SEVERAL = "(several tasks)"
"""Of batches whose rows are of more than one."""


@dataclass(slots=True)
class Masked:
    """What became of the candidates of some batches under one margin."""

    batches: int = 0
    rows: int = 0
    bare: int = 0
    """Rows that are left without a candidate: they teach nothing."""
    masked: dict[str, int] = field(default_factory=lambda: dict.fromkeys(BLOCKS, 0))
    """By block."""
    candidates: dict[str, int] = field(default_factory=lambda: dict.fromkeys(BLOCKS, 0))
    """By block, masked ones included."""

    @property
    def share(self) -> float:
        """Of all candidates, those that are masked."""
        return sum(self.masked.values()) / max(1, sum(self.candidates.values()))


def together(parts: Iterable[Masked]) -> Masked:
    """All of them added up."""
    total = Masked()
    for one in parts:
        total.batches += one.batches
        total.rows += one.rows
        total.bare += one.bare
        for block in BLOCKS:
            total.masked[block] += one.masked[block]
            total.candidates[block] += one.candidates[block]
    return total


class Masking:
    """What is masked, filled by `look`.

    Args:
        loss: its options; the margin is that of each of `margins` in turn.
    """

    def __init__(
        self,
        corpus: Corpus,
        plan: BatchPlan,
        guide: StoredGuide,
        loss: LossConfig,
        sources: SourceRules,
        margins: Sequence[float],
    ):
        self._corpus, self._plan, self._guide, self._loss, self._sources = corpus, plan, guide, loss, sources
        self.margins = tuple(margins)
        self.by_task: dict[float, dict[str, Masked]] = {margin: {} for margin in margins}
        """By margin and task."""

    def look(self) -> Iterator[int]:
        """Looks at batches of the first epoch, evenly spaced; yields how many are done."""
        asked = np.unique(np.linspace(1, self.epoch, self.batches).astype(np.int64))
        for done, step in enumerate(asked.tolist(), start=1):
            rows = self._plan.batch(step)
            batch = self._corpus.batch(rows, self._plan.positives(rows, 0))
            tasks = np.unique(self._corpus.task[rows])
            name = self._corpus.tasks[int(tasks[0])] if len(tasks) == 1 else SEVERAL
            for margin in self.margins:
                self._add(self.by_task[margin].setdefault(name, Masked()), batch, margin)
            yield done

    @property
    def batches(self) -> int:
        """That are looked at."""
        return min(self.epoch, SAMPLED_BATCHES)

    @property
    def epoch(self) -> int:
        """Batches of the first epoch."""
        return self._plan.steps_per_epoch

    def _add(self, to: Masked, batch: Batch, margin: float) -> None:
        guides = [
            texts.embeddings(ids)
            for texts, ids in zip(self._guide.columns, (batch.anchor, batch.positive, batch.negative), strict=True)
        ]
        # The guide stands in for the student, whose similarities decide nothing of what is counted.
        options = self._loss.model_dump(include=OPTIONS)
        if self._loss.votes is not None:
            options["guide_widths"] = self._guide.anchor.widths
        ids = [
            _tensor(of_role) if self._loss.mask_duplicates else None for of_role in (batch.anchor, batch.positive, batch.negative)
        ]
        labels = labels_of(self._sources, batch)
        own = own_negatives_of(self._sources, batch)
        out = guided_contrastive_loss(
            *guides,
            labels=_tensor(labels[0]),
            negative_labels=_tensor(labels[1]),
            own_negatives_only=_tensor(own[0]),
            negative_rows=_tensor(own[1]),
            block_size=self._loss.block_size or BLOCK,
            guide_anchor=guides[0],
            guide_positive=guides[1],
            guide_negative=guides[2],
            anchor_ids=ids[0],
            positive_ids=ids[1],
            negative_ids=ids[2],
            temperature=1.0,
            margin=margin,
            **options,
        )
        to.batches += 1
        to.rows += len(batch.rows)
        to.bare += int((out.row_losses <= 0).sum())
        for block, masked, candidates in zip(BLOCKS, out.masked.tolist(), out.candidates.tolist(), strict=True):
            to.masked[block] += masked
            to.candidates[block] += candidates


def _tensor(values: NDArray[Any] | None) -> Tensor | None:
    return None if values is None else torch.from_numpy(np.ascontiguousarray(values))
