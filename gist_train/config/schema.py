"""The configuration of a run: one strict, frozen model per section of the YAML.

A string inside `Annotated` is what an error message says is allowed there. The docstring under a field says what the field is,
with its unit, and is shown in error messages too.
"""

import logging
import re
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, ValidationInfo, ValidatorFunctionWrapHandler, field_validator

from gist_train.config.evaluation import EvaluationConfig, MtebTask, is_measured, listed_metrics
from gist_train.config.fields import (
    Betas,
    Count,
    CountOrZero,
    FolderName,
    MetricWeights,
    MisplacedError,
    PathText,
    Positive,
    PositiveOrZero,
    Section,
    Share,
    Title,
)
from gist_train.config.hard_negatives import HardNegativesConfig
from gist_train.config.losses import DistillationConfig, LossConfig
from gist_train.config.models import GuideConfig, GuideVectorsConfig, ModelConfig, OneGuide, first_model, stored_guides
from gist_train.config.secrets import without_secrets
from gist_train.config.sources import (
    OUTSIDE_CORPUS,
    ClassificationSource,
    MediSource,
    Source,
    TableSource,
    TextsSource,
    is_graded,
)
from gist_train.config.suspects import Suspects
from gist_train.config.tracking import TrackingConfig
from gist_train.config.training import TrainingConfig

logger = logging.getLogger(__name__)


@cache
def _warn(line: str) -> None:
    """Says it once, however often a config is read."""
    logger.warning("%s", line)


class DataConfig(Section):
    """Training rows and how batches are cut from them."""

    train: Annotated[list[Source], Field(min_length=1), "a list of sources, at least one"]
    """Sources of the training rows, in order."""
    batching: Literal["reference", "task", "mixed", "similar"] = "task"
    """How rows are grouped into batches."""
    similarity_depth: Annotated[int, Field(ge=0, le=20), "a whole number from 0 to 20"] = 3
    """With batching: similar, how often the rows of a task are halved by what the guide finds alike; 0 = task."""
    keep_instructions: bool = False
    """Whether MEDI's instructions become the rows' prompts (else they are dropped)."""
    hard_negatives: HardNegativesConfig | None = None
    """Negatives that the guide finds for every row among the texts of the corpus; null = none."""
    drop_suspects: Suspects | None = None
    """By kind of gist-train audit, the score from which on a row is left out; null = none is. duplicate, labels: 0.97 or more."""

    @field_validator("drop_suspects")
    @classmethod
    def _graded_pairs_may_be_unrelated(cls, kinds: dict[str, float] | None, info: ValidationInfo) -> dict[str, float] | None:
        by_pair = sorted({*(kinds or {})} & {"unrelated", "outranked", "disagreeing"})
        if by_pair and any(map(is_graded, info.data.get("train", []))):
            raise ValueError(f"leave {', '.join(by_pair)} out where rows are graded pairs (scores: pairs), related or not")
        return kinds

    on_bad_row: Literal["fail", "skip"] = "fail"
    """What to do with a row that can't be used."""
    exclude_evaluation_texts: bool = False
    """Whether rows lose the texts that evaluation.tasks judge on; before triplets are mined, rows drawn and windows cut."""

    @field_validator("hard_negatives")
    @classmethod
    def _negatives_of_pairs(cls, negatives: HardNegativesConfig | None, info: ValidationInfo) -> HardNegativesConfig | None:
        if negatives is not None and any(isinstance(source, TextsSource) for source in info.data.get("train", [])):
            raise ValueError("leave it out where rows are bare texts (source: texts): they have no positive to go by")
        if negatives is not None and any(map(is_graded, info.data.get("train", []))):
            raise ValueError("leave it out where rows are graded pairs (scores: pairs): they would contrast with negatives")
        return negatives

    @field_validator("batching")
    @classmethod
    def _reference_has_no_weights(cls, batching: str, info: ValidationInfo) -> str:
        weighted = [index for index, source in enumerate(info.data.get("train", [])) if source.weight != 1.0]
        if batching == "reference" and weighted:
            places = ", ".join(f"data.train[{index}].weight" for index in weighted)
            raise ValueError(f"reference takes each row once, in file order: use task or mixed, or leave out {places}")
        return batching


class OptimizerConfig(Section):
    """AdamW."""

    lr: Positive = 5e-6
    """Peak learning rate."""
    betas: Betas = Field(default=[0.9, 0.999])
    """Decay rates of the two moments."""
    eps: Positive = 1e-8
    """Added to the denominator of the update."""
    weight_decay: PositiveOrZero = 0.0
    """Decoupled weight decay, times the learning rate each step."""


class ScheduleConfig(Section):
    """The learning rate over the steps."""

    type: Literal["linear", "cosine", "constant"] = "linear"
    """Shape after the warm-up."""
    warmup_ratio: Share = 0.1
    """Share of all steps that warm up, rounded up to whole steps."""


class CheckpointConfig(Section):
    """When checkpoints are written and which are kept."""

    every: Count = 500
    """Optimizer steps between two checkpoints."""
    keep_last: Count = 3
    """Newest checkpoints that are kept."""
    keep_every: Count | None = None
    """Checkpoints at multiples of this step are kept for good; null = none."""


class SelectionConfig(Section):
    """Which checkpoints are kept for the choice of the final one, and what it goes by."""

    around: Count | None = None
    """Optimizer step to choose around; null = the whole run."""
    window: CountOrZero = 5000
    """Optimizer steps to either side of `around`."""
    metric: MetricWeights | None = None
    """Metric to choose by, "<task>/<metric>", or several with weights, whose mean counts; null = none."""
    note: Title | None = None
    """What a reader should know of that step, shown beside it by `plan`; null = nothing."""


def _guide_kind(guide: object) -> str | None:
    """One branch of the guide's union, so that a fault inside is told once and not once per branch."""
    if guide is None:
        return "no guide"
    if guide == "self":
        return "self"
    if isinstance(guide, list):
        return "guides"
    if isinstance(guide, GuideVectorsConfig) or (isinstance(guide, dict) and "vectors" in guide):
        return "GuideVectorsConfig"
    return "GuideConfig" if isinstance(guide, dict | GuideConfig) else None


_StoredGuide = Annotated[
    Annotated[GuideConfig, Tag("GuideConfig")] | Annotated[GuideVectorsConfig, Tag("GuideVectorsConfig")],
    Discriminator(_guide_kind),
]
Guide = Annotated[
    Annotated[GuideConfig, Tag("GuideConfig")]
    | Annotated[GuideVectorsConfig, Tag("GuideVectorsConfig")]
    | Annotated[list[_StoredGuide], Field(min_length=2), Tag("guides"), "a list of such mappings"]
    | Annotated[Literal["self"], Tag("self")]
    | Annotated[None, Tag("no guide")],
    Discriminator(_guide_kind),
]


class Config(Section):
    """The whole YAML of a run."""

    name: FolderName
    """Name of the run: its folder is output_dir/name."""
    output_dir: PathText = "runs"
    """Folder of all run folders."""
    cache_dir: PathText | None = None
    """Folder of corpora and guide stores; null = output_dir/.cache."""
    model: ModelConfig
    """The model to train."""
    guide: Guide = None
    """The guide: a model, or vectors computed elsewhere, or several of these in a list, whose mean similarity counts; null =
    unguided baseline; self = the student's own similarities."""

    @field_validator("guide", mode="before")
    @classmethod
    def _one_in_a_list_is_one(cls, guide: object) -> object:
        return guide[0] if isinstance(guide, list) and len(guide) == 1 else guide

    data: DataConfig
    """Training rows and batches."""

    @field_validator("data")
    @classmethod
    def _mining_has_a_model(cls, data: DataConfig, info: ValidationInfo) -> DataConfig:
        for index, source in enumerate(data.train):
            mined = isinstance(source, ClassificationSource) and source.mining.model is None
            guide = info.data.get("guide")  # absent where it is at fault itself
            if mined and "guide" in info.data and first_model(guide) is None:
                raise MisplacedError(
                    "name the model that triplets are mined with, e.g. {name: BAAI/bge-small-en-v1.5}, or a guide",
                    path=("train", index, "mining", "model"),
                    found=f"null, and guide: {'vectors' if stored_guides(guide) else guide or 'null'}",
                    expected="a model, or null where the guide is one",
                )
        return data

    @field_validator("data")
    @classmethod
    def _likeness_has_a_guide(cls, data: DataConfig, info: ValidationInfo) -> DataConfig:
        guide = info.data.get("guide")
        if "guide" not in info.data or stored_guides(guide):
            return data
        if data.hard_negatives is not None:
            raise MisplacedError(
                "name a guide, or leave hard_negatives out",
                path=("hard_negatives",),
                found=f"set, and guide: {guide or 'null'}",
                expected="null where no guide's embeddings tell which texts are near",
            )
        if data.batching == "similar":
            raise MisplacedError(
                "name a guide, or set it to task",
                path=("batching",),
                found=f"similar, and guide: {guide or 'null'}",
                expected="task, mixed or reference where no guide's embeddings tell which rows are alike",
            )
        return data

    loss: LossConfig = LossConfig()
    """The loss."""

    @field_validator("loss")
    @classmethod
    def _votes_of_several(cls, loss: LossConfig, info: ValidationInfo) -> LossConfig:
        if loss.votes is not None and "guide" in info.data and not isinstance(info.data["guide"], list):
            raise MisplacedError(
                "give several guides as a list, or leave it out",
                path=("votes",),
                found=f"{loss.votes}, and one guide or none",
                expected="null where there are not several guides to vote",
            )
        return loss

    distillation: Annotated[DistillationConfig, Field(validate_default=True)] = DistillationConfig()
    """What is learned of the guide's own similarities."""

    @field_validator("distillation")
    @classmethod
    def _something_is_learned(cls, distillation: DistillationConfig, info: ValidationInfo) -> DistillationConfig:
        guide, loss = info.data.get("guide"), info.data.get("loss")  # absent where they are at fault themselves
        if (distillation.weight or distillation.regression) and "guide" in info.data and not stored_guides(guide):
            key = "weight" if distillation.weight else "regression"
            raise MisplacedError(
                "name a guide, or leave distillation out",
                path=(key,),
                found=f"{distillation.weight or distillation.regression:g}, and guide: {guide or 'null'}",
                expected="0 where there is no guide to learn from: the student itself is none",
            )
        if loss is not None and not loss.weight and not distillation.on:
            raise MisplacedError(
                "raise it, or loss.weight, or set distillation.regression",
                path=("weight",),
                found="0, and loss.weight: 0",
                expected="a number above 0 where loss.weight is 0: else nothing is learned",
            )
        sources = info.data["data"].train if "data" in info.data else []
        scored = [index for index, source in enumerate(sources) if isinstance(source, TableSource) and source.scores is not None]
        if bool(distillation.scores) != bool(scored) and "data" in info.data:
            raise MisplacedError(
                "set scores: texts or pairs for a source, and distillation.scores above 0: the two come together",
                path=("scores",),
                found=f"{distillation.scores:g}, and {len(scored) or 'no'} source{'' if len(scored) == 1 else 's'} with scores",
                expected="above 0 where rows have scores, and else 0",
            )
        bare = [index for index, source in enumerate(sources) if isinstance(source, TextsSource)]
        if bare and loss is not None and loss.weight:
            raise MisplacedError(
                "set loss.weight: 0, or give rows that belong together",
                path=("data", "train", bare[0], "source"),
                from_top=True,
                found=f"texts, and loss.weight: {loss.weight:g}",
                expected="texts where loss.weight is 0: texts that follow each other are no pairs to be learned",
            )
        return distillation

    training: TrainingConfig = TrainingConfig()
    """Length, size and precision of the training."""

    @field_validator("training")
    @classmethod
    def _no_graph_with_adapters(cls, training: TrainingConfig, info: ValidationInfo) -> TrainingConfig:
        adapters = "model" in info.data and info.data["model"].lora is not None
        for key in ("compile", "cuda_graph"):
            if adapters and training.model_dump()[key]:
                fix, expected = "set it to false, or leave model.lora out", "false where model.lora is given: untried together"
                raise MisplacedError(fix, path=(key,), found="true, and model.lora", expected=expected)
        return training

    optimizer: OptimizerConfig = OptimizerConfig()
    """AdamW."""
    schedule: ScheduleConfig = ScheduleConfig()
    """The learning rate over the steps."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """When checkpoints are written and which are kept."""
    evaluation: Annotated[EvaluationConfig, Field(validate_default=True)] = EvaluationConfig()
    """Which tasks judge the model, and when."""

    @field_validator("evaluation")
    @classmethod
    def _excluded_texts_have_tasks(cls, evaluation: EvaluationConfig, info: ValidationInfo) -> EvaluationConfig:
        data = info.data.get("data")  # absent where it is at fault itself
        read = [task for task in evaluation.tasks if not isinstance(task, MtebTask)]  # whose texts are mteb's, and not read here
        if data is not None and evaluation.held_out is not None and any(isinstance(s, TextsSource) for s in data.train):
            raise MisplacedError(
                "name tasks that judge the model in evaluation.tasks",
                path=("held_out",),
                found=f"{evaluation.held_out}, and source: texts",
                expected="null where rows are bare texts, which judge nothing",
            )
        if data is not None and data.exclude_evaluation_texts and not read:
            raise MisplacedError(
                "list the tasks whose texts are to be left out in evaluation.tasks, or set it to false",
                path=("data", "exclude_evaluation_texts"),
                from_top=True,
                found="true, and no task in evaluation.tasks that reads files",
                expected="false, or true where evaluation.tasks has a task over files",
            )
        return evaluation

    selection: SelectionConfig = Field(SelectionConfig(), validate_default=True)
    """Which checkpoints are kept for the choice of the final one, and what it goes by."""

    @field_validator("selection", mode="wrap")
    @classmethod
    def _faultless_where_it_counts(
        cls, value: Any, handler: ValidatorFunctionWrapHandler, info: ValidationInfo
    ) -> SelectionConfig:
        try:
            return cls._measured(handler(value), info.data.get("evaluation"))
        except ValueError:  # pydantic's errors are ValueErrors
            if info.context is None or info.context["selects"]:
                raise
            _warn("selection has a fault, which plan tells. This command does not select, and goes on without it.")
            return SelectionConfig()

    @staticmethod
    def _measured(selection: SelectionConfig, evaluation: EvaluationConfig | None) -> SelectionConfig:
        """The same, if its metric is one of those that are measured; `evaluation` is None where it is at fault itself."""
        if evaluation is None:
            return selection
        if selection.metric is None and evaluation.stop_after is not None:
            fix = "name the metric that evaluation.stop_after goes by"
            raise MisplacedError(
                fix, path=("metric",), found="null, and evaluation.stop_after", expected=listed_metrics(evaluation)
            )
        for name in selection.metric or {}:
            if not is_measured(evaluation, name):
                fix = "name one of these, or add its task to evaluation.tasks"
                raise MisplacedError(fix, path=("metric",), found=name, expected=listed_metrics(evaluation))
        return selection

    tracking: TrackingConfig = TrackingConfig()
    """Where metrics go besides metrics.jsonl."""

    @property
    def guides(self) -> dict[str, OneGuide]:
        """The guides whose embeddings are stored, by key."""
        return stored_guides(self.guide)


def training_prompts(config: Config) -> dict[str, str]:
    """What rows are trained with, by sentence-transformers' names of the sides; {} where sources differ, or have none."""
    given = {None if isinstance(source, MediSource) else source.prompts for source in config.data.train}
    prompts = next(iter(given))
    if len(given) > 1 or prompts is None:
        return {}
    return {name: prompt for name, prompt in (("query", prompts.anchor), ("document", prompts.positive)) if prompt}


def cache_folder(config: Config) -> Path:
    """Where corpora, guide stores and mteb's results are."""
    return Path(config.cache_dir) if config.cache_dir is not None else Path(config.output_dir) / ".cache"


# What may change when a run is resumed. Everything else alters the mathematics, and so does any field added later unless it is
# named here: forgetting one refuses a resume, it does not spoil a run. `data.train`, and what was left out of it, is judged by
# the content of the corpus. With dropout on, other chunks draw other elements, as another number of processes does: as random
# as before, and who has to resume with less memory may.
_FREE_ON_RESUME = {
    "name",
    "output_dir",
    "cache_dir",
    "checkpoint",
    "evaluation.every",
    "evaluation.max_length",
    "evaluation.truncate_dim",
    "evaluation.stop_after",
    "evaluation.tasks",
    "selection",
    "tracking",
    "model.trust_remote_code",
    "guide.trust_remote_code",
    "guide.batch_tokens",
    "guide.vectors",  # a checkpoint holds what is in the file
    "data.train",
    "data.hard_negatives.documents.path",
    "data.exclude_evaluation_texts",
    "loss.block_size",
    "training.stop_at_step",
    "training.max_tokens_per_forward",
    "training.gradient_checkpointing",
}


def mathematics(config: Config) -> dict[str, object]:
    """Dotted key -> value of every field that alters the mathematics: what must be the same when a run is resumed.

    Without the passwords and tokens in paths, as checkpoints keep it.
    """
    flat: dict[str, object] = {}

    def flatten(fields: dict[str, object], above: str) -> None:
        for key, value in fields.items():
            path = above + key
            if re.sub(r"^guide\[\d+\]", "guide", path) in _FREE_ON_RESUME:
                continue
            match value:
                case dict():
                    flatten(value, f"{path}.")
                case list() if path == "guide":
                    for index, one in enumerate(value):
                        flatten(one, f"{path}[{index}].")
                case _:
                    flat[path] = value

    flatten(without_secrets(config.model_dump()), "")
    for index, source in enumerate(config.data.train):  # what the corpus does not know of its sources
        flat |= {f"data.train[{index}].{key}": value for key, value in source.model_dump(include=OUTSIDE_CORPUS).items()}
        if isinstance(source, TableSource) and source.scores is not None:  # decides too what a row contrasts with
            flat[f"data.train[{index}].scores"] = source.scores
    return flat
