"""Hard negatives that a guide finds for rows."""

from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator

from gist_train.config.fields import Count, Delimiter, PathText, PositiveOrZero, Section, Seed, Text
from gist_train.config.sources import TextColumns, TextsSource

Ranks = Annotated[list[Count], Field(min_length=2, max_length=2), "a list of two whole numbers, the smaller one first"]


class DocumentsConfig(Section):
    """Further texts that negatives are taken from, besides those of the rows."""

    path: PathText
    """Text file, a text a line, or JSONL, CSV, TSV, Parquet or Excel file, a pattern of them, a data set's folder or hub id."""
    columns: TextColumns = TextColumns()
    """Names of the columns."""
    delimiter: Delimiter | None = None
    """Character between the columns of a CSV file; null = a comma, or a tab in a .tsv file."""
    header: bool = True
    """Whether the first row of a CSV file names the columns; without one they are called "1", "2", ..."""
    revision: Text | None = None
    """Commit, tag or branch on the hub; null = the newest."""
    subset: Text | None = None
    """Configuration of the data set, e.g. corpus; null = its only one, or its default."""
    split: Text = "train"
    """Split of the data set; single files have none."""

    @property
    def source(self) -> TextsSource:
        """The same as a source of bare texts."""
        return TextsSource(**self.model_dump())


class HardNegativesConfig(Section):
    """Texts of the corpus that rows get as further negatives: near their anchors by the guide, and not too near."""

    per_row: Count = 4
    """Negatives that a row gets, besides its own."""
    ranks: Ranks = Field(default=[1, 100], validate_default=True)
    """First and last of the nearest candidates that are looked at; a row's own texts are none."""
    margin: PositiveOrZero = 0.05
    """How much less similar than the row's own positive a negative must be: share of that when relative, cosine when absolute."""
    margin_strategy: Literal["absolute", "relative"] = "relative"
    """How the margin is taken off."""
    pick: Literal["top", "random", "quantiles"] = "top"
    """Which of those that are left: the nearest, any, or one of each part of them in order of nearness."""
    same_task: bool = True
    """Whether candidates are of rows of the same task alone, and of `documents`."""
    documents: DocumentsConfig | None = None
    """Further texts that negatives are taken from, for rows of all tasks; null = none."""
    drop_short: bool = False
    """Whether rows that got fewer than per_row are left out."""
    seed: Seed = 42
    """Of the draws of pick: random."""

    @field_validator("ranks")
    @classmethod
    def _room_for_a_row(cls, ranks: list[int], info: ValidationInfo) -> list[int]:
        first, last = ranks
        if first > last:
            raise ValueError("write the first rank first, e.g. [1, 100]")
        if last - first + 1 < info.data.get("per_row", 0):  # absent where it is at fault itself
            raise ValueError(f"look at as many as per_row asks for at least, e.g. [{first}, {first + 99}]")
        return ranks
