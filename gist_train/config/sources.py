"""Sources of training rows, as the YAML's `data.train` lists them."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from gist_train.config.fields import (
    Count,
    Delimiter,
    MisplacedError,
    PathText,
    Positive,
    Prompt,
    Section,
    Seed,
    Text,
    Title,
    Weight,
    Where,
)
from gist_train.config.models import StoredModelConfig


class RowColumns(Section):
    """What the columns of a table of rows are called; null = the usual names are looked for."""

    anchor: Text | None = None
    """Column of the anchor (the query)."""
    positive: Text | None = None
    """Column of the positive: one text or a list of them."""
    negative: Text | None = None
    """Column of the negative: one text or a list of them."""


class Columns(RowColumns):
    """What the columns of a table are called; null = the usual names are looked for."""

    task: Title | None = None
    """Column of the task's name."""
    pos_scores: Text | None = None
    """With scores: texts, the column of the positives' scores; null = pos_scores."""
    neg_scores: Text | None = None
    """With scores: texts, the column of the negatives' scores; null = neg_scores."""
    score: Text | None = None
    """With scores: pairs, the column of the pair's score; null = score."""


class LabelColumns(Section):
    """Columns of a table of labelled texts."""

    text: Text = "text"
    """Column of the text."""
    label: Text = "label"
    """Column of the label."""


class TextColumns(Section):
    """Columns of a table of bare texts."""

    text: Text = "text"
    """Column of the text."""


class Prompts(Section):
    """Text the student reads before the texts of each column."""

    anchor: Prompt = ""
    """Text before every anchor."""
    positive: Prompt = ""
    """Text before every positive."""
    negative: Prompt = ""
    """Text before every negative."""


class AnySource(Section):
    """What all sources share."""

    source: str
    """Format of the source."""
    path: PathText
    """File, or a pattern such as data/*.jsonl, relative to the folder where the command runs."""
    max_rows: Count | None = None
    """Rows drawn from the source, with a fixed seed; null = all."""
    max_rows_per_task: Count | None = None
    """Rows drawn of each task of the source, with a fixed seed; null = all."""
    weight: Weight = 1.0
    """Times that a row of the source is trained on in an epoch: 2 = twice, 0.5 = in every other epoch."""
    in_batch_negatives: bool = True
    """Whether a row of the source contrasts with other rows of its batch; false = with its own negatives only."""


class TableSource(AnySource):
    """What all sources of rows with named columns share."""

    columns: Columns | None = None
    """Names of the columns; null = the usual names are looked for."""
    task: Title | None = None
    """Task of all rows; null = as the column says, else the name of file or data set."""
    prompts: Prompts | None = None
    """Text the student reads before the texts; null = none."""
    scores: Literal["texts", "pairs"] | None = None
    """Scores that rows came with, for distillation.scores: of each positive and negative, or one of the pair; null = none."""
    where: Where | None = None
    """Rows that are taken: a condition over columns, such as label == 1 and lang in ["en", "de"]; null = all."""

    @model_validator(mode="after")
    def _columns_of_scores_are_read(self) -> "TableSource":
        read = {"texts": ("pos_scores", "neg_scores"), "pairs": ("score",), None: ()}[self.scores]
        for key in ("pos_scores", "neg_scores", "score"):
            named = None if self.columns is None else self.columns.model_dump()[key]
            if named is not None and key not in read:
                expected = f"null where scores is {self.scores or 'null'}"
                fix = "set scores: pairs" if key == "score" else "set scores: texts"
                raise MisplacedError(fix, path=("columns", key), found=named, expected=expected)
        return self


class JsonlSource(TableSource):
    """JSON: an object a row, one a line or all in one array; or the file in which LlamaIndex saves pairs."""

    source: Literal["jsonl"] = "jsonl"
    """Format of the source."""


class CsvSource(TableSource):
    """CSV or TSV."""

    source: Literal["csv"] = "csv"
    """Format of the source."""
    delimiter: Delimiter | None = None
    """Character between the columns; null = a comma, or a tab in a .tsv file."""
    header: bool = True
    """Whether the first row names the columns; without one they are called "1", "2", ..."""


class XlsxSource(TableSource):
    """A sheet of an Excel workbook (extra excel)."""

    source: Literal["xlsx"] = "xlsx"
    """Format of the source."""
    sheet: Text | None = None
    """Name of the sheet; null = the first one."""
    header: bool = True
    """Whether the first row names the columns; without one they are called "1", "2", ..."""


class ParquetSource(TableSource):
    """Parquet."""

    source: Literal["parquet"] = "parquet"
    """Format of the source."""


class DataSetSource(AnySource):
    """What sources share that may be on the Hugging Face hub."""

    revision: Text | None = None
    """Commit, tag or branch on the hub; null = the newest."""
    subset: Text | None = None
    """Configuration of the data set, e.g. a language; null = its only one, or its default."""
    split: Text = "train"
    """Split of the data set; single files have none."""


class HubSource(TableSource, DataSetSource):
    """A data set of the Hugging Face hub, or a local folder of the same shape."""

    source: Literal["hub"] = "hub"
    """Format of the source."""
    path: PathText
    """Hub id of the data set, or a local folder of its files."""
    streaming: bool = False
    """Whether rows are read over the network as they are needed, in place of a copy of the data set in the hub's cache."""


class MediSource(AnySource):
    """A JSON file in MEDI's format: query, pos, neg as [instruction, text], and task_name."""

    source: Literal["medi"] = "medi"
    """Format of the source."""


class MiningConfig(Section):
    """How labelled texts become triplets. The defaults are those of the MTEB triplets that GIST-small was trained with."""

    model: StoredModelConfig | None = None
    """Model whose embeddings say which texts are alike; null = the guide."""
    seed: Seed = 1029
    """Seed of the rows' order and of every draw."""
    positives: Count = 100
    """The most similar rows of an anchor's class that its positive is drawn from."""
    temperature: Positive = 0.05
    """A draw is from softmax(cosine / temperature); no unit."""
    negatives: Literal["uniform", "least_similar"] = "uniform"
    """Negative: any row of another class, or softmax(-cosine / temperature) over the least similar of them."""
    negative_pool: Count = 100
    """The least similar rows of other classes that a negative is drawn from; read where negatives is least_similar."""


class TextFileSource(DataSetSource):
    """What sources share whose rows are single texts, in whatever file they come."""

    path: PathText
    """JSONL, CSV, TSV, Parquet or Excel file, a pattern of them, a local folder of a data set, or the hub id of one."""
    delimiter: Delimiter | None = None
    """Character between the columns of a CSV file; null = a comma, or a tab in a .tsv file."""
    header: bool = True
    """Whether the first row of a CSV file names the columns; without one they are called "1", "2", ..."""
    task: Title | None = None
    """Task of all rows; null = the name of file or data set."""


class ClassificationSource(TextFileSource):
    """Labelled texts, from which triplets are mined: each row is an anchor once."""

    source: Literal["classification"] = "classification"
    """Format of the source."""
    columns: LabelColumns = LabelColumns()
    """Names of the columns."""
    prompts: Prompts | None = None
    """Text the student reads before the texts; null = none."""
    mining: MiningConfig = MiningConfig()
    """How triplets are mined."""
    mask_same_label: bool = False
    """Whether candidates known to carry the anchor's label leave the loss, guide or no guide."""


class TextsSource(TextFileSource):
    """Bare texts, for distillation alone: two that follow each other are a row."""

    source: Literal["texts"] = "texts"
    """Format of the source."""
    path: PathText
    """Text file, a text a line, or JSONL, CSV, TSV, Parquet or Excel file, a pattern of them, a data set's folder or hub id."""
    columns: TextColumns = TextColumns()
    """Names of the columns."""
    prompt: Prompt = ""
    """Text the student reads before every text."""

    @property
    def prompts(self) -> Prompts | None:
        """Of all columns."""
        return Prompts(anchor=self.prompt, positive=self.prompt, negative=self.prompt) if self.prompt else None


OUTSIDE_CORPUS = {"weight", "in_batch_negatives", "mask_same_label"}
"""Keys of sources that decide how rows are used and not which rows there are: a corpus does not depend on them."""

Source = Annotated[
    HubSource | JsonlSource | CsvSource | XlsxSource | ParquetSource | MediSource | ClassificationSource | TextsSource,
    Field(discriminator="source"),
    "a mapping with a key source: hub, jsonl, csv, xlsx, parquet, medi, classification or texts",
]


def is_graded(source: Source) -> bool:
    """Whether its rows are pairs with a score that says how related they are, if at all."""
    return isinstance(source, TableSource) and source.scores == "pairs"
