"""Sources of training rows, as the YAML's `data.train` lists them."""

from typing import Annotated, Literal

from pydantic import Field

from gist_train.config.fields import Section, Text


class Columns(Section):
    """What the columns of a file are called; null = the usual names are looked for."""

    anchor: Text | None = None
    """Column of the anchor (the query)."""
    positive: Text | None = None
    """Column of the positive: one text or a list of them."""
    negative: Text | None = None
    """Column of the negative: one text or a list of them."""
    task: Text | None = None
    """Column of the task's name."""


class Prompts(Section):
    """Text the student reads before the texts of each column."""

    anchor: str = ""
    """Text before every anchor."""
    positive: str = ""
    """Text before every positive."""
    negative: str = ""
    """Text before every negative."""


class TableSource(Section):
    """What all sources of rows with named columns share."""

    source: str
    """Format of the source."""
    path: Text
    """File, or a pattern such as data/*.jsonl, relative to the folder where the command runs."""
    columns: Columns | None = None
    """Names of the columns; null = the usual names are looked for."""
    task: Text | None = None
    """Task of all rows; null = as the file says, else the file's name."""
    prompts: Prompts | None = None
    """Text the student reads before the texts; null = none."""


class JsonlSource(TableSource):
    """JSON Lines: one object a row."""

    source: Literal["jsonl"] = "jsonl"
    """Format of the source."""


class CsvSource(TableSource):
    """CSV with a header."""

    source: Literal["csv"] = "csv"
    """Format of the source."""


class ParquetSource(TableSource):
    """Parquet."""

    source: Literal["parquet"] = "parquet"
    """Format of the source."""


class MediSource(Section):
    """A JSON file in MEDI's format: query, pos, neg as [instruction, text], and task_name."""

    source: Literal["medi"] = "medi"
    """Format of the source."""
    path: Text
    """File, relative to the folder where the command runs."""


Source = Annotated[
    JsonlSource | CsvSource | ParquetSource | MediSource,
    Field(discriminator="source"),
    "a mapping with a key source: jsonl, csv, parquet or medi",
]
