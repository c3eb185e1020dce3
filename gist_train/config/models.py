"""The student, and the models that embed once: the guide, and what mining looks for triplets with."""

from typing import Annotated, Literal, TypeAlias

from pydantic import Field, ValidationInfo, field_validator

from gist_train.config.fields import (
    BatchTokens,
    BelowOne,
    Count,
    Layers,
    MaxLength,
    PathText,
    Prompt,
    Section,
    Text,
)

Pooling = Literal["cls", "mean", "last"]


class LoraConfig(Section):
    """Low-rank adapters that are trained in place of the model's weights (extra lora)."""

    rank: Count = 16
    """Width of an adapter: a matrix of (out, in) gets rank * (out + in) weights that are trained."""
    alpha: Count = 32
    """What an adapter adds is multiplied by alpha / rank."""
    targets: Annotated[list[Text], Field(min_length=1), "a list of names"] | None = None
    """Names of the matrices that get one, e.g. [q_proj, v_proj]; null = all of every layer."""


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
    lora: LoraConfig | None = None
    """Low-rank adapters that are trained in place of the model's weights; null = all weights are trained."""
    trust_remote_code: bool = False
    """Whether Python code from the model's repository may run."""


class StoredModelConfig(Section):
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


class VectorColumns(Section):
    """Columns of a Parquet file of vectors."""

    text: Text = "text"
    """Column of the texts, each as the corpus has it: without a prompt."""
    vector: Text = "embedding"
    """Column of the vectors: lists of numbers, all of one length."""


class GuideVectorsConfig(Section):
    """A guide whose embeddings were computed elsewhere, such as by a model behind an API."""

    vectors: PathText
    """A .parquet file of texts and vectors, or a .npy file of N vectors beside a .jsonl file of that name with the N texts."""
    columns: VectorColumns = VectorColumns()
    """Columns of the .parquet file; of a .jsonl file, `text` is the key."""
    dtype: Literal["float32", "float16"] = "float16"
    """Number format of the store on disk."""


class GuidePrompts(Section):
    """Text the guide reads before the texts of each column."""

    anchor: Prompt = ""
    """Text before every anchor, and before labelled texts that triplets are mined from."""
    positive: Prompt = ""
    """Text before every positive."""
    negative: Prompt = ""
    """Text before every negative."""


class GuideConfig(StoredModelConfig):
    """The guide: a frozen model whose similarities decide which texts of a batch are no negatives."""

    prompts: GuidePrompts | None = None
    """Text before the texts of each column, in place of `prompt`; null = `prompt` before all of them."""

    @field_validator("prompts")
    @classmethod
    def _one_of_both(cls, prompts: GuidePrompts | None, info: ValidationInfo) -> GuidePrompts | None:
        if prompts is not None and info.data.get("prompt") is not None:
            raise ValueError("leave guide.prompt out, or put its text into each of guide.prompts")
        return prompts

    @property
    def of_roles(self) -> tuple[StoredModelConfig, StoredModelConfig, StoredModelConfig]:
        """The model as it reads anchors, positives and negatives; they differ in `prompt` alone."""
        plain = self.model_dump(exclude={"prompts"})
        by_column = dict.fromkeys(GuidePrompts.model_fields, self.prompt) if self.prompts is None else dict(self.prompts)
        anchor, positive, negative = [StoredModelConfig(**{**plain, "prompt": prompt}) for prompt in by_column.values()]
        return anchor, positive, negative


OneGuide: TypeAlias = GuideConfig | GuideVectorsConfig
"""A guide whose embeddings are stored."""


def stored_guides(guide: object) -> dict[str, OneGuide]:
    """Of the config's `guide`, the guides whose embeddings are stored, by key; {} for none, and for the student itself."""
    if isinstance(guide, list):
        return {f"guide[{index}]": one for index, one in enumerate(guide)}
    return {"guide": guide} if isinstance(guide, OneGuide) else {}


def first_model(guide: object) -> GuideConfig | None:
    """Of the config's `guide`, the first guide that is a model: triplets are mined with it where no other model is named."""
    return next((one for one in stored_guides(guide).values() if isinstance(one, GuideConfig)), None)
