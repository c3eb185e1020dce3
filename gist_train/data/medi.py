"""MEDI's JSON: one array of objects with query, pos and neg as [instruction, text], read as a stream."""

from collections.abc import Iterator
from typing import Any

import ijson  # type: ignore[import-untyped]

from gist_train.config.errors import shown
from gist_train.data.tables import READ_BYTES, BadRow, TableFile, encodable, text

MEDI_TEXT = "[instruction, text], or a non-empty string"
MEDI_FILE = 'an array of objects: [{"query": [instruction, text], "pos": ..., "neg": ..., "task_name": ...}, ...]'

Pairs = tuple[list[tuple[str, str]], object]
"""(instruction, text) of query, pos and, where the row has one, neg; and what is under task_name."""


def medi_pairs(file: TableFile) -> Iterator[Pairs | BadRow]:
    """The rows of the file, checked but for the task's name; one that is no array of objects raises UserError."""
    with file.open() as stream:
        head = stream.peek()
        body = head.lstrip(b"\xef\xbb\xbf \t\r\n")  # a byte-order mark, which ijson refuses, and white space
        if not body:
            return
        if not body.startswith(b"["):  # of an object ijson would read what is under a key "item"
            begin = shown(body[:40].decode(errors="replace"))
            raise file.broken(f"it begins with {begin}", MEDI_FILE, "write it as one array, or as lines under source: jsonl")
        stream.read(len(head) - len(body))
        try:
            for record in ijson.items(stream, "item", buf_size=READ_BYTES):
                if not isinstance(record, dict):
                    raise file.broken(f"{shown(record)} in the array", MEDI_FILE, "write it as an array of objects")
                file.row += 1
                try:
                    keys = ["query", "pos"] if record.get("neg") in (None, []) else ["query", "pos", "neg"]
                    yield [pair(_value(record, key), key) for key in keys], record.get("task_name")
                except BadRow as bad:
                    yield bad
        except ijson.JSONError as error:
            raise file.broken(f"broken JSON: {shown(str(error))}", MEDI_FILE, "fetch or write it again, in UTF-8") from error


def _value(record: dict[str, Any], key: str) -> object:
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
