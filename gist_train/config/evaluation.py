"""Tasks that judge a model, as the YAML's `evaluation` lists them."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from gist_train.config.fields import (
    Count,
    CountOrZero,
    Delimiter,
    FolderName,
    HeldOut,
    MaxLength,
    MisplacedError,
    MtebName,
    PathText,
    Prompt,
    Section,
    Text,
    Where,
)
from gist_train.config.sources import RowColumns


class StsColumns(Section):
    """Columns of a file of scored pairs."""

    text1: Text = "sentence1"
    """Column of the first text."""
    text2: Text = "sentence2"
    """Column of the second text."""
    score: Text = "score"
    """Column of the human score."""


class LabelColumns(Section):
    """Columns of a file of labelled texts."""

    text: Text = "text"
    """Column of the text."""
    label: Text = "label"
    """Column of the label."""


class PairColumns(Section):
    """Columns of a file of pairs that belong together or not."""

    text1: Text = "sentence1"
    """Column of the first text."""
    text2: Text = "sentence2"
    """Column of the second text."""
    label: Text = "label"
    """Column of 1 (belongs together) and 0."""


class TripletColumns(Section):
    """Columns of a file of triplets."""

    anchor: Text = "anchor"
    """Column of the anchor."""
    positive: Text = "positive"
    """Column of what is nearer to it."""
    negative: Text = "negative"
    """Column of what is less near."""


class SidePrompts(Section):
    """Text before the texts of each side."""

    query: Prompt | None = None
    """Text before every query; null = the folder's prompt for queries, else the training's for anchors."""
    document: Prompt | None = None
    """Text before every document; null = the folder's prompt for documents, else the training's for positives."""


class ReadTask(Section):
    """What tasks share whose rows are read here."""

    type: str
    """Kind of the task."""
    name: FolderName
    """Name of the task, the first part of its metrics' names."""
    on_bad_row: Literal["fail", "skip"] = "fail"
    """Whether a row that can't be used ends the command, or is left out and counted."""


class FileTask(ReadTask):
    """What tasks share that are files of rows."""

    delimiter: Delimiter | None = None
    """Character between the columns of a CSV file; null = a comma, or a tab in a .tsv file."""
    header: bool = True
    """Whether the first row of a CSV file names the columns; without one they are called "1", "2", ..."""


class PromptedTask(FileTask):
    """What tasks share that have one prompt for all texts."""

    prompt: Prompt | None = None
    """Text the model reads before every text; null = the folder's default prompt, else the one that all rows are trained with."""


class StsTask(PromptedTask):
    """Semantic textual similarity: rank correlation with human scores."""

    METRICS: ClassVar = ("spearman", "pearson")
    type: Literal["sts"] = "sts"
    """Kind of the task."""
    path: PathText
    """File of scored pairs."""
    columns: StsColumns = StsColumns()
    """Names of the file's columns."""


class RetrievalTask(FileTask):
    """Retrieval over a folder of corpus, queries and judgements, or over the anchors and positives of a file of rows."""

    METRICS: ClassVar = ("ndcg@10", "recall@100", "mrr@10")
    type: Literal["retrieval"] = "retrieval"
    """Kind of the task."""
    path: PathText
    """Folder in BEIR's or the flat layout; or a file of rows, whose anchors are to find their positives among all texts."""
    split: Text = "test"
    """Which queries and judgements of a folder."""
    columns: RowColumns | None = None
    """Names of a file's columns; null = the usual names are looked for."""
    where: Where | None = None
    """Rows of a file that are taken: a condition over columns; null = all."""
    prompts: SidePrompts = SidePrompts()
    """Text the model reads before queries and documents."""


class ClassificationTask(PromptedTask):
    """Classifiers fitted on the embeddings of `train`, judged on `test`: a logistic regression, and the 5 nearest neighbours."""

    METRICS: ClassVar = ("accuracy", "f1", "knn_accuracy")
    type: Literal["classification"] = "classification"
    """Kind of the task."""
    train: PathText
    """File the classifiers are fitted on."""
    test: PathText
    """File they are judged on."""
    columns: LabelColumns = LabelColumns()
    """Names of the columns of both files."""
    per_class: Count | None = None
    """Rows per class drawn from train with a seed; null = all rows."""


class ClusteringTask(PromptedTask):
    """Clustering: k-means into as many clusters as there are labels, against the labels."""

    METRICS: ClassVar = ("v_measure",)
    type: Literal["clustering"] = "clustering"
    """Kind of the task."""
    path: PathText
    """File of labelled texts."""
    columns: LabelColumns = LabelColumns()
    """Names of the file's columns."""


class PairTask(PromptedTask):
    """Pair classification: do the pairs that belong together have the higher similarities?"""

    METRICS: ClassVar = ("ap",)
    type: Literal["pair"] = "pair"
    """Kind of the task."""
    path: PathText
    """File of pairs with a label of 0 or 1."""
    columns: PairColumns = PairColumns()
    """Names of the file's columns."""


class TripletTask(PromptedTask):
    """Triplets: the share of anchors that are more similar to their positive than to their negative."""

    METRICS: ClassVar = ("accuracy",)
    type: Literal["triplet"] = "triplet"
    """Kind of the task."""
    path: PathText
    """File of triplets."""
    columns: TripletColumns = TripletColumns()
    """Names of the file's columns."""


LocalTask = Annotated[
    StsTask | RetrievalTask | ClassificationTask,
    Field(discriminator="type"),
    "a mapping with a key type: sts, retrieval or classification",
]


class MtebTask(Section):
    """A task or a benchmark of the package mteb, run as mteb runs it: its protocol, its metrics, its cache of results."""

    type: Literal["mteb"] = "mteb"
    """Kind of the task."""
    name: MtebName
    """Name in mteb of a task or a benchmark, such as Banking77Classification or MTEB(eng, v2); with files, any name."""
    revision: Text | None = None
    """Revision of the task's data set on the hub; null = the one that mteb pins."""
    files: LocalTask | None = None
    """Local files for mteb's protocol to judge on, written as a task of their own; null = the task that mteb has by this name."""

    @model_validator(mode="after")
    def _files_have_no_revision(self) -> "MtebTask":
        if self.files is not None and self.revision is not None:
            raise ValueError("remove revision or files: local files have no revision")
        return self


EvaluationTask = Annotated[
    StsTask | RetrievalTask | ClassificationTask | ClusteringTask | PairTask | TripletTask | MtebTask,
    Field(discriminator="type"),
    "a mapping with a key type: sts, retrieval, classification, clustering, pair, triplet or mteb",
]


HELD_OUT, HELD_OUT_LABELS = "held_out", "held_out_labels"
"""Names of the tasks that rows held out of training make: of pairs and triplets, and of labelled texts."""
HELD_OUT_METRICS = {HELD_OUT: RetrievalTask.METRICS, HELD_OUT_LABELS: ClassificationTask.METRICS}


class EvaluationConfig(Section):
    """Which tasks judge the model, and when."""

    every: CountOrZero = 0
    """Optimizer steps between two evaluations, each with a checkpoint, and one at the end; 0 = only when asked."""
    max_length: MaxLength | None = None
    """Tokens a text is cut to; null = as the evaluated model says."""
    truncate_dim: Count | None = None
    """Dimensions that an embedding is cut to; null = all. Scores of two values are never mixed."""
    stop_after: Count | None = None
    """Evaluations without a rise of selection.metric after which the run ends; null = it trains to its end."""
    held_out: HeldOut | None = None
    """Rows of data.train that judge and do not train, as tasks held_out and held_out_labels: a share (0.05) or a number (500); of
    no source more than half, and of graded pairs (scores: pairs) none."""

    @field_validator("stop_after")
    @classmethod
    def _stops_on_evaluations(cls, stop_after: int | None, info: ValidationInfo) -> int | None:
        if stop_after is not None and info.data.get("every") == 0:
            fix = "set evaluation.every too: without it nothing is evaluated during training"
            raise MisplacedError(fix, path=(), found=str(stop_after), expected="null while evaluation.every is 0")
        return stop_after

    tasks: Annotated[list[EvaluationTask], "a list of tasks, each with a name of its own"] = Field(default=[])
    """The tasks."""

    @field_validator("tasks")
    @classmethod
    def _names_are_unique(cls, tasks: list[EvaluationTask], info: ValidationInfo) -> list[EvaluationTask]:
        names = [task.name for task in tasks]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"give each task a name of its own; used more than once: {', '.join(twice)}")
        if info.data.get("held_out") is not None and (taken := [name for name in names if name in HELD_OUT_METRICS]):
            raise ValueError(f"give {taken[0]} another name: what evaluation.held_out holds out is called so")
        return tasks

    @property
    def judges(self) -> bool:
        """Whether there is a task."""
        return bool(self.tasks) or self.held_out is not None


def is_measured(evaluation: EvaluationConfig, name: str) -> bool:
    """Whether a task gives the metric `name`, "<task>/<metric>". What mteb calls its metrics is not known before it is asked."""
    task_name, _, metric = name.partition("/")
    if evaluation.held_out is not None and task_name in HELD_OUT_METRICS:
        return metric in HELD_OUT_METRICS[task_name]
    named = [task for task in evaluation.tasks if task.name == task_name]
    return any(isinstance(task, MtebTask) or metric in task.METRICS for task in named)


def listed_metrics(evaluation: EvaluationConfig) -> str:
    """The metrics that exist, for a message."""
    names = []
    for task in evaluation.tasks:
        metrics = ["<mteb's name of the metric>"] if isinstance(task, MtebTask) else task.METRICS
        names += [f"{task.name}/{metric}" for metric in metrics]
    if evaluation.held_out is not None:
        names += [f"{task}/{metric}" for task, metrics in HELD_OUT_METRICS.items() for metric in metrics]
    return ", ".join(names) or "none: evaluation.tasks is empty"
