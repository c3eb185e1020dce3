"""What a plan finds out. `gist-train plan --json` prints these under these names."""

from dataclasses import dataclass

from rich.console import RenderableType

from gist_train.evaluation.leakage import Leak
from gist_train.preparation import SourceRows
from gist_train.progress import PagedResult


@dataclass(frozen=True, slots=True)
class SelectedStep:
    """The step that the config wants to select around, or else the last."""

    step: int
    chosen: bool
    """Whether the config names it."""
    reached: bool
    """Whether the run gets there."""
    has_checkpoint: bool
    epoch: float
    learning_rate: float
    triplets_seen: int
    in_warmup: bool
    note: str | None
    """`selection.note`."""


@dataclass(frozen=True, slots=True)
class TextTokens:
    """Tokens of every different text that the student reads."""

    max_length: int
    mean: float
    median: float
    p95: float
    """Of 95 % of the texts, at most."""
    at_max_length: int
    """Texts."""
    texts_up_to: dict[int, int]
    """Tokens, in powers of two -> texts of at most so many, and more than the edge before."""


@dataclass(frozen=True, slots=True)
class EpochTokenCounts:
    """Tokens of the first epoch."""

    tokens: int
    """Real ones."""
    padded_to_longest: int
    """That a trainer computes which pads each column of a batch to its longest text."""
    padded_to_max_length: int
    """That a trainer computes which pads to the limit."""
    mean_batch_tokens: float
    largest_batch_tokens: int


@dataclass(frozen=True, slots=True)
class GuidePass:
    """What the guide has still to embed."""

    name: str
    texts_to_embed: int
    tokens_to_embed: int
    tokens_are_estimated: bool
    """From a sample of the texts."""
    store_bytes: int
    """Of the whole store."""
    store_bytes_now: int


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes on one device that does the whole batch, and the settings that they depend on."""

    precision: str
    max_tokens_per_forward: int | None
    gradient_checkpointing: bool
    weights: int
    gradients: int
    moments: int
    activations: int
    total: int


@dataclass(frozen=True, slots=True)
class DiskEstimate:
    """Bytes on disk."""

    checkpoints: int
    """Kept at the end."""
    checkpoint_bytes: int
    """Of one."""
    checkpoints_bytes: int
    """Of all that are kept, and one that is being written."""
    corpus_bytes: int


@dataclass(frozen=True, slots=True)
class Measured:
    """Times of this machine, in one process."""

    device: str
    threads: int
    steps: int
    """That were timed."""
    step_seconds: float
    tokens_per_second: float
    guide_pass_seconds: float
    guide_stood_in_for: bool
    """Whether the student's own similarities took the guide's place, whose store is not whole."""
    training_seconds: float
    total_seconds: float


@dataclass(frozen=True, slots=True)
class ExampleRow:
    """The first row of a source as the student reads it, prompts included."""

    task: str
    anchor: str
    positive: str
    """The first of its positives."""
    negative: str | None
    """The first of its negatives; None where it has none."""


@dataclass(frozen=True, slots=True)
class Plan(PagedResult):
    """What training will do."""

    name: str
    sources: list[SourceRows]
    examples: list[ExampleRow | None]
    """By source; None of one of which no row is left."""
    batching: str
    batch_size: int
    rows: int
    """Before any is dropped."""
    dropped_rows: int
    dropped: dict[str, int]
    """Reason -> rows."""
    excluded_texts: int
    unique_texts: int
    tasks: dict[str, int]
    """Task -> rows, the largest first."""
    rows_beside_a_shared_text: int
    """In a batch with a row of the same anchor or positive."""
    tokens: int
    """Of all different texts."""
    steps_per_epoch: int
    total_steps: int
    stop_at_step: int
    warmup_steps: int
    peak_learning_rate: float
    peak_reached: bool
    selected: SelectedStep
    text_tokens: TextTokens
    epoch: EpochTokenCounts
    evaluation_tasks: list[str]
    leakage: list[Leak]
    guide: GuidePass | None
    """None without a store: no guide, or the student itself."""
    memory: MemoryEstimate
    disk: DiskEstimate
    flops_per_step: float
    steps_per_second_for_a_day: float
    """To be done in one."""
    measured: Measured | None
    """With --measure."""

    def page(self) -> RenderableType:
        """What `gist-train plan` prints."""
        from gist_train.planning.page import plan_page

        return plan_page(self)
