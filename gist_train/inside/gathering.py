"""The texts of a batch as the losses take them: those of this process, or of all.

Legend: n texts of a process (its anchors, its positives, and its negatives, column by column), D and G widths of student and
guide.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gist_train.training.distributed import gather_with_gradient


@dataclass(frozen=True, slots=True)
class Known:
    """What is known of the texts of a batch besides the student's embeddings. It travels as the labels of their losses do."""

    guides: list[Tensor] | None
    """Of each column the guide's embeddings; None without a guide, and where the student guides itself."""
    ids: list[Tensor] | None
    """Of each column int64 that are equal for equal texts; None where duplicates count."""


@dataclass(frozen=True, slots=True)
class Gathered:
    """Texts of each process, in rank order; of one, where nothing is gathered."""

    students: list[Tensor]
    """(n, D) of each process, with their gradient."""
    guides: list[Tensor] | None
    """(n, G) of each process."""
    ids: list[Tensor] | None
    """(n,) of each process."""
    sizes: list[tuple[int, int]]
    """(rows, negatives) of each process."""
    rank: int
    """Which of them is this one."""

    @property
    def count(self) -> int:
        """Texts of all processes."""
        return sum(map(len, self.students))

    def given(self) -> dict[str, Any]:
        """What `guided_contrastive_loss` and `distillation_loss` take of the texts, by name."""
        first = sum(rows for rows, _ in self.sizes[: self.rank])
        given: dict[str, Any] = {"rows": (first, first + self.sizes[self.rank][0])}
        for name, parts in (("{}", self.students), ("guide_{}", self.guides), ("{}_ids", self.ids)):
            sides = (None, None, None) if parts is None else self._sides(parts)
            given |= {name.format(side): value for side, value in zip(("anchor", "positive", "negative"), sides, strict=True)}
        return given

    def _sides(self, parts: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
        """Anchors, positives and the pool of negatives of all processes; None where no row has one."""
        split = [torch.split(part, [rows, rows, negatives]) for part, (rows, negatives) in zip(parts, self.sizes, strict=True)]
        anchor, positive, negative = (torch.cat(column) for column in zip(*split, strict=True))
        return anchor, positive, negative if len(negative) else None


def gather(embeddings: Sequence[Tensor], known: Known, *, across: bool) -> Gathered:
    """The texts of this process, or of all.

    Args:
        embeddings: of each column, (rows, D): of anchors, positives and any number of columns of negatives.
        across: whether those of all processes; their numbers of rows and columns may differ.
    """
    students = torch.cat(list(embeddings))
    guides = None if known.guides is None else torch.cat(known.guides)
    ids = None if known.ids is None else torch.cat(known.ids)
    rows = len(embeddings[0])
    here = (rows, len(students) - 2 * rows)
    if not (across and dist.is_initialized() and dist.get_world_size() > 1):
        return Gathered([students], None if guides is None else [guides], None if ids is None else [ids], [here], 0)
    counts = gather_with_gradient(torch.tensor([here], device=students.device), [1] * dist.get_world_size())
    sizes = [(int(count[0, 0]), int(count[0, 1])) for count in counts]
    lengths = [2 * count + negatives for count, negatives in sizes]
    return Gathered(
        gather_with_gradient(students, lengths),
        None if guides is None else gather_with_gradient(guides, lengths),
        None if ids is None else [part[:, 0] for part in gather_with_gradient(ids[:, None], lengths)],
        sizes,
        dist.get_rank(),
    )
