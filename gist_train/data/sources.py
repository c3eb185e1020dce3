"""Readers: hub data sets, MEDI JSON, JSONL, CSV, Excel, Parquet and labelled texts -> checked rows.

A bad row comes out as a Fault, for the caller to fail or skip; a file that is not what it is said to be raises UserError.
Every reader streams: a file is never whole in memory.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from gist_train.config.conditions import Condition, UnlikeError
from gist_train.config.errors import Fault, shown
from gist_train.config.sources import (
    ClassificationSource,
    CsvSource,
    HubSource,
    JsonlSource,
    MediSource,
    ParquetSource,
    Prompts,
    Source,
    TableSource,
    TextsSource,
    XlsxSource,
)
from gist_train.data.formats import Cells
from gist_train.data.judging import WATCHED, Judging
from gist_train.data.medi import Pairs, medi_pairs, pair
from gist_train.data.opening import checked, table_files, tables
from gist_train.data.rows import ALIASES, INSTRUCTIONS, NUMBERED, Labelled, Row
from gist_train.data.scores import score_fields, with_scores
from gist_train.data.tables import BadRow, Columns, Field, Table, TableFile, document_text, encodable, flat, text, texts

NO_PROMPTS = ("", "", "")


def read_rows(
    source: Source, where: str, *, keep_instructions: bool = False, unread: dict[str, None] | None = None
) -> Iterator[Row | Fault | None]:
    """Rows of all of the source's files in order, a bad row as a Fault, one that `where` leaves out as None.

    Args:
        where: the source's key in the YAML.
        unread: the names of columns that are not read are added to it.

    Raises:
        UserError: a file is broken, or has pairs that one of its columns says do not belong together.
        TypeError: the source is of labelled texts, of which rows are mined (`read_labelled`).
    """
    match source:
        case MediSource():
            for file in table_files(source, where):
                yield from checked(file, (_medi_row(file, pairs, keep_instructions) for pairs in medi_pairs(file)))
        case HubSource() | JsonlSource() | CsvSource() | XlsxSource() | ParquetSource():
            condition = None if source.where is None else Condition(source.where)
            fields, scored = _row_fields(source, keep_instructions), score_fields(source)
            asked = [] if condition is None else condition.columns
            read = {*asked, *(name for field in scored for name in field.names)}
            judges = {name: None for name in WATCHED if name not in read}
            after = len(fields) + len(scored)  # where the columns of `where` begin
            all_fields = [
                *fields,
                *scored,
                *(Field(None, (name,), False, True) for name in asked),
                *(Field(None, (name,), False, False, watched=True) for name in judges),
            ]
            prompts = prompts_of(source.prompts)
            for table, rows in tables(source, where, all_fields):
                judging, known, names, watched, instructed = Judging(list(judges)), None, list[str](), False, False
                for cells in checked(table, rows):
                    if isinstance(cells, Fault):
                        yield cells
                        continue
                    columns, values = cells
                    if columns is not known:  # the same object from row to row, while the columns are the same
                        known, names = columns, _names(fields, columns[: len(fields)])
                        instructed = any(columns[len(ALIASES) : len(fields)])
                        watched = any(column is not None for column in columns[after + len(asked) :])
                    if watched:
                        judging.see(values[after + len(asked) :], has_negative=values[2] is not None and values[2] != [])
                    row = _row(table, names, source.task, prompts, values[: len(fields)], instructed=instructed)
                    if scored and isinstance(row, Row):
                        row = with_scores(row, [field.names[0] for field in scored], values[len(fields) : after])
                    if condition is None:
                        yield table.fault(row) if isinstance(row, BadRow) else row
                    else:
                        yield _selected(table, condition, dict(zip(asked, values[after:], strict=False)), row)
                judging.refuse(table)
                if unread is not None:
                    unread.update(table.unread)
        case TextsSource():
            for table, of_table in _text_tables(source, where):
                yield from _paired(source, table, of_table)
        case ClassificationSource():
            raise TypeError("rows of labelled texts are mined")


def read_labelled(source: ClassificationSource, where: str, unread: dict[str, None] | None = None) -> Iterator[Labelled | Fault]:
    """Labelled texts in order, a bad row as a Fault; UserError where a file is broken. `unread` as `read_rows` has it."""
    columns = source.columns
    fields = [Field("text", (columns.text,), True, True), Field("label", (columns.label,), True, True)]
    for table, rows in tables(source, where, fields):
        task = source.task or table.name
        yield from checked(table, (_labelled(table, fields, task, cells) for cells in rows))
        if unread is not None:
            unread.update(table.unread)


def read_texts(source: TextsSource, where: str) -> Iterator[str | Fault]:
    """Bare texts in order, a bad row as a Fault; UserError where a file is broken."""
    for _, of_table in _text_tables(source, where):
        yield from of_table


def _text_tables(source: TextsSource, where: str) -> Iterator[tuple[Table, Iterator[str | Fault]]]:
    for table, rows in tables(source, where, [Field("text", (source.columns.text,), True, True)]):
        yield table, checked(table, (_text_of(source, cells) for cells in rows))


def _paired(source: TextsSource, table: Table, texts_of_table: Iterator[str | Fault]) -> Iterator[Row | Fault]:
    """A row of each text and the next: what batches are made of, when all their texts are only candidates of each other."""
    task, waiting, first, number = source.task or table.name, "", "", 0

    def row_of(anchor: str, positive: str) -> Row:
        return Row(anchor, (positive,), (), task, prompts_of(source.prompts), file=table.place, number=number)

    for one in texts_of_table:
        if isinstance(one, Fault):
            yield one
        elif waiting:
            yield row_of(waiting, one)
            waiting = ""
        else:
            waiting, first, number = one, first or one, table.row
    if waiting:  # the last of an odd number goes with the first
        yield row_of(waiting, first)


def _text_of(source: TextsSource, cells: Cells | BadRow) -> str | BadRow:
    if isinstance(cells, BadRow):
        return cells
    try:
        return text(cells[1][0], source.columns.text)
    except BadRow as bad:
        return bad


def prompts_of(prompts: Prompts | None) -> tuple[str, str, str]:
    """Of anchor, positive and negative."""
    return NO_PROMPTS if prompts is None else (prompts.anchor, prompts.positive, prompts.negative)


def _row_fields(source: TableSource, keep_instructions: bool) -> list[Field]:
    """Anchor, positive, negative and task; then, where instructions are kept, the three columns that may hold them."""
    given = {} if source.columns is None else source.columns.model_dump(exclude_none=True)
    fields = []
    for key, names in ALIASES.items():
        numbered = NUMBERED if key == "negative" and key not in given else None
        own = (given[key],) if key in given else names
        fields.append(Field(key, own, key in ("anchor", "positive"), key in given, numbered))
    return fields + [Field(key, names, False, False) for key, names in INSTRUCTIONS.items() if keep_instructions]


def _selected(table: Table, condition: Condition, values: dict[str, object], row: Row | BadRow) -> Row | Fault | None:
    """The row, if `condition` holds of its columns; a row that it leaves out may be bad."""
    try:
        if not condition.holds(values):
            return None
    except UnlikeError as unlike:
        row = BadRow(unlike.what, unlike.found, unlike.expected)
    return table.fault(row) if isinstance(row, BadRow) else row


def _row(
    table: Table, names: Sequence[str], task: str | None, prompts: tuple[str, str, str], cells: Sequence[Any], *, instructed: bool
) -> Row | BadRow:
    """The row of anchor, positive, negative and task as they are in the table; no negative is None or [].

    Args:
        names: of the columns of the cells, for messages.
        instructed: whether the table has columns of instructions, and they are kept.
    """
    anchor, positive, negative, named_task, *instructions = cells
    try:
        named = task or _task(named_task, names[3], table.name)
        if isinstance(anchor, list):  # MEDI's [instruction, text], in a table
            pairs = [pair(anchor, names[0]), pair(positive, names[1])]
            if negative is not None and negative != []:
                pairs.append(pair(negative, names[2]))
            return _row_of_pairs(table, pairs, named, None if instructions else prompts)
        return Row(
            text(document_text(anchor), names[0]),
            texts(positive, names[1]),
            () if negative is None or negative == [] else texts(negative, names[2]),
            named,
            _instructions(instructions, names[4:]) if instructed else prompts,
            file=table.place,
            number=table.row,
        )
    except BadRow as bad:
        return bad


def _names(fields: Sequence[Field], columns: Columns) -> list[str]:
    """Of each field the name of its column, for messages."""
    return [", ".join(flat([column])) or field.names[0] for column, field in zip(columns, fields, strict=True)]


def _task(value: object, column: str, default: str) -> str:
    if value is None or (isinstance(value, str) and not value.strip()):
        return default
    return text(value, column, "a string")


def _instructions(values: Sequence[object], columns: Sequence[str]) -> tuple[str, str, str]:
    """Instructions as written, "" where a row has none."""
    for value, column in zip(values, columns, strict=True):
        if value is not None and not (isinstance(value, str) and encodable(value)):
            raise BadRow(f'"{column}" is not a string', shown(value), "a string")
    anchor, positive, negative = [str(value or "") for value in values]
    return anchor, positive, negative


def _labelled(table: Table, fields: Sequence[Field], task: str, cells: Cells | BadRow) -> Labelled | BadRow:
    if isinstance(cells, BadRow):
        return cells
    columns, (value, label) = cells
    names = _names(fields, columns)
    try:
        # A whole number is its digits, so that Parquet's 7 is CSV's 7.
        number = isinstance(label, int) and not isinstance(label, bool)
        name = str(label) if number else text(label, names[1], "a string or a whole number")
        return Labelled(text(value, names[0]), name, task, table.place, table.row)
    except BadRow as bad:
        return bad


def _medi_row(file: TableFile, read: Pairs | BadRow, keep_instructions: bool) -> Row | BadRow:
    if isinstance(read, BadRow):
        return read
    pairs, named_task = read
    try:
        return _row_of_pairs(file, pairs, _task(named_task, "task_name", file.name), None if keep_instructions else NO_PROMPTS)
    except BadRow as bad:
        return bad


def _row_of_pairs(table: Table, pairs: Sequence[tuple[str, str]], task: str, prompts: tuple[str, str, str] | None) -> Row:
    """The row of (instruction, text) of anchor, positive and, if there is one, negative; without prompts its instructions are."""
    (anchor_prompt, anchor), (positive_prompt, positive), *negative = pairs
    prompts = prompts or (anchor_prompt, positive_prompt, negative[0][0] if negative else "")
    negatives = tuple([text for _, text in negative])
    return Row(anchor, (positive,), negatives, task, prompts, file=table.place, number=table.row)
