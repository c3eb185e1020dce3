"""A row of texts as all sources give it, and what its columns are usually called."""

import re
from dataclasses import dataclass, field

ALIASES = {
    "anchor": ("anchor", "query"),
    "positive": ("positive", "pos", "positives", "positive_passages"),
    "negative": ("negative", "neg", "negatives", "hard_negative", "hard_negatives", "hard_neg", "negative_passages"),
    "task": ("task", "task_name"),
}
"""By the key under `columns:`, what a column is usually called."""
INSTRUCTIONS = {
    "anchor_instruction": ("query_instruct", "anchor_instruct"),
    "positive_instruction": ("pos_instruct", "positive_instruct"),
    "negative_instruction": ("neg_instruct", "negative_instruct"),
}
"""Columns of the published triplets that hold MEDI's instructions."""
NUMBERED = re.compile(r"(?:negatives?|neg|hard_negatives?|hard_neg)_?\d+")
"""Columns that hold one negative each, as mine_hard_negatives of sentence-transformers writes them."""


@dataclass(frozen=True, slots=True)
class Row:
    """A checked row: texts are stripped, not empty and can be written as UTF-8."""

    anchor: str
    positives: tuple[str, ...]
    """At least one."""
    negatives: tuple[str, ...]
    """May be empty."""
    task: str
    prompts: tuple[str, str, str]
    """Of anchor, positive and negative; "" for none."""
    label: str | None = None
    """What anchor and positives are labelled with; None where they are not."""
    negative_labels: tuple[str, ...] = ()
    """Of each negative; empty where they have none."""
    positive_scores: tuple[float, ...] = ()
    """Of each positive; empty where they have none."""
    negative_scores: tuple[float, ...] = ()
    """Of each negative; empty where they have none."""
    file: int = field(default=0, compare=False)
    """`Table.place` of its table."""
    number: int = field(default=0, compare=False)
    """In its table, as messages have it: of two bare texts, and of a mined triplet, the anchor's."""


@dataclass(frozen=True, slots=True)
class Labelled:
    """A checked row of a source of labelled texts."""

    text: str
    label: str
    task: str
    file: int = field(default=0, compare=False)
    """`Table.place` of its table."""
    number: int = field(default=0, compare=False)
    """In its table, as messages have it."""
