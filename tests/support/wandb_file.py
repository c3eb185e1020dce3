"""Reads what wandb writes of a run that is offline."""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK, FILE_HEADER, HEADER = 32768, 7, 7
"""Bytes. LevelDB's log format (https://github.com/google/leveldb/blob/main/doc/log_format.md), after a header of wandb's."""
FULL, LAST = 1, 4


def records_of(path: Path) -> Iterator[Any]:
    """The records of a .wandb file, as `wandb_internal_pb2.Record`."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, place, parts = path.read_bytes(), FILE_HEADER, b""
    while place + HEADER <= len(content):
        if BLOCK - place % BLOCK < HEADER:  # the end of a block is filled up
            place += BLOCK - place % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", content, place)
        parts += content[place + HEADER : place + HEADER + length]
        place += HEADER + length
        if kind in (FULL, LAST):
            yield Record.FromString(parts)
            parts = b""
