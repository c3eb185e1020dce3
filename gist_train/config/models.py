"""The student, and the models that embed once: the guide, and what mining looks for triplets with."""

from typing import Literal

from gist_train.config.fields import BatchTokens, BelowOne, Layers, MaxLength, PathText, Prompt, Section, Text

Pooling = Literal["cls", "mean", "last"]


class ModelConfig(Section):
    """The student: the model that is trained."""

    name: PathText
    """Hub id or local folder of the model to train."""
    revision: Text | None = None
    """Commit, tag or branch on the hub; null = the newest."""
    pooling: Pooling | None = None
    """How token vectors become one text vector: the first token's, the mean or the last token's; null = as the model says."""
    max_length: MaxLength | None = None
    """Tokens a text is cut to; null = as the model says."""
    layers: Layers | None = None
    """Encoder layers to keep, counted from 0; null = all."""
    dropout: BelowOne | None = None
    """Probability that replaces hidden and attention dropout; null = as the model says."""
    trust_remote_code: bool = False
    """Whether Python code from the model's repository may run."""


class GuideConfig(Section):
    """A frozen model whose embeddings are kept in a store: the guide, or the model that triplets are mined with."""

    name: PathText
    """Hub id or local folder of the model."""
    revision: Text | None = None
    """Commit, tag or branch on the hub; null = the newest."""
    pooling: Pooling | None = None
    """How token vectors become one text vector: the first token's, the mean or the last token's; null = as the model says."""
    max_length: MaxLength | None = None
    """Tokens a text is cut to; null = as the model says."""
    prompt: Prompt | None = None
    """Text the model reads before every text; null = the default prompt of its folder, which most have not."""
    dtype: Literal["float32", "float16"] = "float16"
    """Number format of the store on disk."""
    batch_tokens: BatchTokens = 16384
    """Tokens that are embedded at a time; changes speed and memory only."""
    trust_remote_code: bool = False
    """Whether Python code from the model's repository may run."""
