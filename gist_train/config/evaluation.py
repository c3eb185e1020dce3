"""Tasks that judge a model, as the YAML's `evaluation` lists them."""

from typing import Annotated, Literal

from pydantic import Field, field_validator

from gist_train.config.fields import Count, CountOrZero, FolderName, MaxLength, Section, Text


class StsColumns(Section):
    """Columns of a file of scored pairs."""

    text1: Text = "sentence1"
    """Column of the first text."""
    text2: Text = "sentence2"
    """Column of the second text."""
    score: Text = "score"
    """Column of the human score."""


class ClassificationColumns(Section):
    """Columns of a file of labelled texts."""

    text: Text = "text"
    """Column of the text."""
    label: Text = "label"
    """Column of the label."""


class StsTask(Section):
    """Semantic textual similarity: rank correlation with human scores."""

    type: Literal["sts"] = "sts"
    """Kind of the task."""
    name: FolderName
    """Name of the task, the first part of its figures' names."""
    path: Text
    """File of scored pairs."""
    columns: StsColumns = StsColumns()
    """Names of the file's columns."""


class RetrievalTask(Section):
    """Retrieval over a folder of corpus, queries and judgements."""

    type: Literal["retrieval"] = "retrieval"
    """Kind of the task."""
    name: FolderName
    """Name of the task, the first part of its figures' names."""
    path: Text
    """Folder in BEIR's or the flat layout."""
    split: Text = "test"
    """Which queries and judgements of the folder."""


class ClassificationTask(Section):
    """A linear classifier fitted on the embeddings of `train`, judged on `test`."""

    type: Literal["classification"] = "classification"
    """Kind of the task."""
    name: FolderName
    """Name of the task, the first part of its figures' names."""
    train: Text
    """File the classifier is fitted on."""
    test: Text
    """File it is judged on."""
    columns: ClassificationColumns = ClassificationColumns()
    """Names of the columns of both files."""
    per_class: Count | None = None
    """Rows per class drawn from train with a seed; null = all rows."""


EvaluationTask = Annotated[
    StsTask | RetrievalTask | ClassificationTask,
    Field(discriminator="type"),
    "a mapping with a key type: sts, retrieval or classification",
]


class EvaluationConfig(Section):
    """Which tasks judge the model, and when."""

    every: CountOrZero = 0
    """Optimizer steps between two evaluations; 0 = only when asked."""
    max_length: MaxLength | None = None
    """Tokens a text is cut to; null = as the evaluated model says."""
    tasks: Annotated[list[EvaluationTask], "a list of tasks, each with a name of its own"] = Field(default=[])
    """The tasks."""

    @field_validator("tasks")
    @classmethod
    def _names_are_unique(cls, tasks: list[EvaluationTask]) -> list[EvaluationTask]:
        names = [task.name for task in tasks]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"give each task a name of its own; used more than once: {', '.join(twice)}")
        return tasks
