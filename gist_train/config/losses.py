"""What the student learns: the guided contrastive loss, and the guide's own similarities."""

from typing import Literal

from pydantic import ValidationInfo, field_validator, model_validator

from gist_train.config.fields import Count, Dimensions, MisplacedError, Positive, PositiveOrZero, Section, Weights

LARGEST_MARGIN = 2.0
"""Absolute: with a larger one the guide would mask every candidate."""


class LossConfig(Section):
    """The guided contrastive loss."""

    weight: PositiveOrZero = 1.0
    """What the loss is multiplied by; 0 = not taken: then distillation is all that is learned."""
    temperature: Positive = 0.01
    """Similarities are divided by this; no unit."""
    margin: float = 0.0
    """Lowers the guide's threshold: cosine when absolute, share of the threshold when relative; may be negative."""
    margin_strategy: Literal["absolute", "relative"] = "absolute"
    """How the margin is taken off the threshold."""
    mask: Literal["hard", "soft"] = "hard"
    """Whether the guide leaves a candidate out, or lowers its weight by how far it is above or below the threshold."""
    votes: Literal["any", "majority", "all"] | None = None
    """Of several guides, how many must find a candidate too similar for it to be masked; null = their mean similarity decides."""
    softness: Positive = 0.05
    """Cosine from the threshold over which a soft mask falls; of no account where `mask` is hard."""
    hardness: PositiveOrZero = 0.0
    """A candidate's logit gains this times its similarity, without gradient; 0 = off."""
    contrast_anchors: bool = True
    """Whether other anchors are candidates against an anchor."""
    contrast_positives: bool = True
    """Whether other positives are candidates against a positive."""
    negatives: Literal["all", "hard"] = "all"
    """Which negatives of the batch are candidates."""
    mask_duplicates: bool = True
    """Whether candidates with the same text as the row's anchor or positive are left out."""
    block_size: Count | None = None
    """Rows and columns of the similarities that are in memory at a time; null = whole; changes speed and memory only."""
    dimensions: Dimensions | None = None
    """Matryoshka dimensions: the loss is also taken over the first d dimensions, for each d; null = whole embeddings only."""
    dimension_weights: Weights | None = None
    """What each of these losses is multiplied by before they are added up, in the order of `dimensions`; null = 1 each."""

    @model_validator(mode="after")
    def _margin_leaves_candidates(self) -> "LossConfig":
        if self.margin_strategy == "absolute" and abs(self.margin) > LARGEST_MARGIN:
            fix = "lower it: two cosine similarities differ by 2 at most, and with more the guide masks all candidates, or none"
            raise MisplacedError(
                fix, path=("margin",), found=f"{self.margin:g}", expected="a number from -2 to 2 where it is absolute"
            )
        return self

    @field_validator("dimension_weights")
    @classmethod
    def _one_weight_a_dimension(cls, weights: list[float] | None, info: ValidationInfo) -> list[float] | None:
        if weights is None or "dimensions" not in info.data:  # absent where it is at fault itself
            return weights
        dimensions = info.data["dimensions"]
        if dimensions is None:
            raise ValueError("give loss.dimensions, e.g. [384, 256, 128, 64], or leave the weights out")
        if len(weights) != len(dimensions):
            raise ValueError(f"give one for each of the {len(dimensions)} numbers of loss.dimensions, in their order")
        return weights


class DistillationConfig(Section):
    """What the student learns of the guide's own similarities, beside the contrastive loss."""

    weight: PositiveOrZero = 0.0
    """The divergence of the student's distribution over a batch from the guide's, times this, is added to the loss; 0 = off."""
    temperature: Positive = 0.05
    """The student's similarities are divided by this before the softmax; no unit."""
    guide_temperature: Positive | None = None
    """The guide's similarities are divided by this; null = as `temperature`."""
    scores: PositiveOrZero = 0.0
    """The divergence of the student's distribution over scored texts from that of their scores, times this, is added; 0 = off."""
    score_temperature: Positive = 1.0
    """Scores are divided by this before the softmax: what a difference of one is worth."""
    regression: PositiveOrZero = 0.0
    """1 - cosine of the student's embedding of a text and the guide's, times this, is added to the loss; 0 = off."""

    @property
    def on(self) -> bool:
        """Whether anything is learned of the guide's own similarities or embeddings, or of scores."""
        return bool(self.weight or self.regression or self.scores)
