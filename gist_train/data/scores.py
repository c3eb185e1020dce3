"""Scores that a file has for the texts of a row: by a reranker for each positive and negative, or of people for a pair."""

from collections.abc import Sequence
from dataclasses import replace

from gist_train.config.errors import shown
from gist_train.config.sources import TableSource
from gist_train.data.rows import Row
from gist_train.data.tables import BadRow, Field, content_of

COLUMNS = {"texts": ("pos_scores", "neg_scores"), "pairs": ("score",)}
"""By what is scored, the keys of the columns, and their usual names."""
A_NUMBER, NUMBERS = "a finite number", "a list of finite numbers, one for each text"


def score_fields(source: TableSource) -> list[Field]:
    """What a reader asks of every row besides its texts; nothing where no scores are to be read."""
    given = {} if source.columns is None else source.columns.model_dump(exclude_none=True)
    keys = () if source.scores is None else COLUMNS[source.scores]
    return [Field(key, (given.get(key, key),), key != "neg_scores", key in given) for key in keys]


def with_scores(row: Row, names: Sequence[str], values: Sequence[object]) -> Row | BadRow:
    """The row with the scores in its cells.

    Args:
        names: of the columns: one, of a pair's score, or two, of those of positives and of negatives.
    """
    try:
        if len(names) == 1:
            if len(row.positives) > 1 or row.negatives:
                texts = f"{len(row.positives)} positives and {len(row.negatives)} negatives"
                raise BadRow(f'"{names[0]}" is a score of a pair', texts, "one positive, and no negative")
            return replace(row, positive_scores=(_number(values[0], names[0]),))
        positives = _numbers(values[0], names[0], len(row.positives))
        return replace(row, positive_scores=positives, negative_scores=_numbers(values[1], names[1], len(row.negatives)))
    except BadRow as bad:
        return bad


def _numbers(value: object, column: str, texts: int) -> tuple[float, ...]:
    content = content_of(value)
    if content is None and not texts:
        return ()
    numbers = content if isinstance(content, list) else [content]
    if len(numbers) != texts:
        raise BadRow(f'"{column}" has {len(numbers)} numbers, for {texts} texts', shown(value), NUMBERS)
    return tuple(_number(number, column, NUMBERS) for number in numbers)


def _number(value: object, column: str, expected: str = A_NUMBER) -> float:
    try:
        number = float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else float("nan")
    except ValueError:
        number = float("nan")
    if not abs(number) < float("inf"):
        raise BadRow(f'"{column}" is no finite number', shown(value), expected)
    return number
