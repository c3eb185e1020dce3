"""MEDI's JSON: one array of objects with query, pos and neg as [instruction, text], read as a stream."""

from collections.abc import Iterator, Mapping

from gist_train.config.errors import shown
from gist_train.data.formats import array_elements
from gist_train.data.tables import BEFORE_JSON, BadRow, TableFile, encodable, text

MEDI_TEXT = "[instruction, text], or a non-empty string"
MEDI_FILE = 'an array of objects: [{"query": [instruction, text], "pos": ..., "neg": ..., "task_name": ...}, ...]'

Pairs = tuple[list[tuple[str, str]], object]
"""(instruction, text) of query, pos and, where the row has one, neg; and what is under task_name."""


def medi_pairs(file: TableFile) -> Iterator[Pairs | BadRow]:
    """The rows of the file, checked but for the task's name; one that is no array of objects raises UserError."""
    with file.open() as stream:
        body = stream.peek().lstrip(BEFORE_JSON)
        if not body:
            return
        if not body.startswith(b"["):  # of an object ijson would read what is under a key "item"
            begin = shown(body[:40].decode(errors="replace"))
            raise file.broken(f"it begins with {begin}", MEDI_FILE, "write it as one array, or as lines under source: jsonl")
    for record in array_elements(file, MEDI_FILE):
        try:
            keys = ["query", "pos"] if record.get("neg") in (None, []) else ["query", "pos", "neg"]
            if isinstance(record.get("query"), str):
                _refuse_texts(record, keys[1:])
            yield [pair(_value(record, key), key) for key in keys], record.get("task_name")
        except BadRow as bad:
            yield bad


def _refuse_texts(record: Mapping[str, object], keys: list[str]) -> None:
    """BadRow where a list beside a query without instruction begins with a text: it is FlagEmbedding's list of texts."""
    for key in keys:
        value = record.get(key)
        if isinstance(value, list) and value and isinstance(value[0], str) and value[0].strip():
            found = f"{shown(value)} beside a query without instruction"
            raise BadRow(f'"{key}" is a list of texts', found, f"{MEDI_TEXT}; source: jsonl reads lists of texts")


def _value(record: Mapping[str, object], key: str) -> object:
    if key not in record:
        raise BadRow(f'"{key}" is missing', f"the keys {shown(list(record))}", MEDI_TEXT)
    return record[key]


def pair(value: object, key: str) -> tuple[str, str]:
    """Instruction as written and text of `[instruction, text]`, `[instruction, text, 0]` or a text alone; BadRow for all else."""
    if isinstance(value, str):
        return "", text(value, key, MEDI_TEXT)
    if not isinstance(value, list) or len(value) not in (2, 3) or (len(value) == 3 and isinstance(value[2], str)):
        raise BadRow(f'"{key}" is no pair', shown(value), MEDI_TEXT)
    instruction = value[0]
    if not isinstance(instruction, str) or not encodable(instruction):
        raise BadRow(f'the instruction of "{key}" is not a string', shown(instruction), MEDI_TEXT)
    return instruction, text(value[1], key, MEDI_TEXT)
