"""Files that are whole or do not exist."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from gist_train.config.errors import Fault, UserError, shown
from gist_train.config.secrets import without_secrets


def sync(path: Path) -> None:
    """Has the operating system put a file's bytes, or a folder's entries, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _opened(path: Path, flags: int) -> BinaryIO:
    """The file, opened to be written; UserError where a link is in its place.

    Its name can be foretold: where others may write to the folder, a link would have any file of ours overwritten.
    """
    try:
        return os.fdopen(os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666), "wb")
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise _a_link(path) from None
        raise


def _a_link(path: Path) -> UserError:
    own = "nothing, or what gist-train left there itself"
    return UserError(Fault(str(path), "a link", own, "remove it, and see who put it there"))


READ_AT_A_TIME = 1 << 16
"""Bytes, of a file that is read from its end."""
DIGEST_BYTES = 16
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""A full disk, a quota, a limit on the size of files."""


def no_room(error: BaseException) -> bool:
    """Whether something could not be written for want of room; safetensors and tokenizers say so in words alone."""
    return (isinstance(error, OSError) and error.errno in NO_ROOM) or "No space left" in str(error)


def check_target(where: str, to: Path) -> None:
    """What is refused before work whose outcome is to be written to the file `to`, which `where` names.

    Raises:
        UserError: it is a folder, or in no folder, or in one that this user may not write to.
    """
    if to.is_dir():
        found = "a folder"
    elif not to.parent.is_dir():
        found = "in no folder"
    elif not os.access(to.parent, os.W_OK):
        found = "in a folder that can't be written to"
    else:
        return
    raise UserError(Fault(where, f"{shown(to)}, {found}", "a file in a folder that is there and can be written to", "name one"))


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Has what fails within the block name the file: a write to an open file does not."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


def append_text(path: Path, text: str) -> None:
    """Appends `text` in UTF-8, or leaves the file as it was."""
    with naming(path), path.open("ab", buffering=0) as stream:
        size, content = os.fstat(stream.fileno()).st_size, memoryview(text.encode())
        try:
            while content:
                content = content[stream.write(content) :]
        except BaseException:
            stream.truncate(size)
            raise


def write_text(path: Path, text: str) -> None:
    """`text` in UTF-8, written as `write_bytes` does."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file beside `path`, syncs it and renames it: a reader sees the old file or the new one, never a part."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with naming(path), _opened(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) as stream:
            stream.write(content)
        sync(beside)
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    sync(path.parent)


def write_checked(path: Path, content: bytes) -> None:
    """`content` after its digest, written as `write_bytes` does."""
    write_bytes(path, _digest(content) + content)


def read_checked(path: Path) -> bytes | None:
    """What `write_checked` wrote; None where it is damaged."""
    whole = path.read_bytes()
    content = whole[DIGEST_BYTES:]
    return content if whole[:DIGEST_BYTES] == _digest(content) else None


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=DIGEST_BYTES).digest()


def write_json(path: Path, value: Any) -> None:
    """`value`, its passwords and tokens hidden, as indented JSON, written as `write_text` does."""
    write_text(path, json.dumps(without_secrets(value), indent=2, ensure_ascii=False) + "\n")


def json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(line, object) of each line of a JSONL file that holds one; nothing where there is no file.

    Lines that were cut short when the power went, or garbled, are left out.
    """
    if not path.exists():
        return
    with path.open("rb") as file:
        for raw in file:
            line = raw.decode(errors="replace").removesuffix("\n")
            if (row := json_row(line)) is not None:
                yield line, row


def json_row(line: str | bytes) -> dict[str, Any] | None:
    """The object in a line of a JSONL file; None where it holds none."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def lines_from_the_end(path: Path) -> Iterator[tuple[int, bytes]]:
    """(where it begins, line) of each line of a file, the last one first, without the end of the line."""
    with path.open("rb") as file:
        begin = file.seek(0, os.SEEK_END)
        rest = b""  # what is known of a line that begins further ahead
        while begin > 0:
            size = min(READ_AT_A_TIME, begin)
            begin = file.seek(begin - size)
            first, *lines = (file.read(size) + rest).split(b"\n")
            place = begin + len(first) + sum(len(line) + 1 for line in lines)
            for line in reversed(lines):
                place -= len(line)
                yield place, line
                place -= 1
            rest = first
        yield 0, rest


def read_json(path: Path) -> Any:
    """The value in a JSON file; ValueError where there is none in it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError(f"{path}: nested too deep") from None


@contextmanager
def whole_folder(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """A folder to fill that becomes `target` when the block ends well, all its bytes on the disk; else nothing is left.

    Args:
        replace: whether a folder at `target` gives way, once the new one is whole.

    Raises:
        FileExistsError: `target` exists already, and is not to be replaced.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists() and not replace:
        raise FileExistsError(target)
    beside = target.with_name(f".{target.name}.partial")
    if beside.is_symlink():
        raise _a_link(beside)
    # Left by a process that was killed: nobody else writes here, or the caller holds the lock.
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    try:
        yield beside
        readable = beside.stat().st_mode & 0o666  # as the umask has it: safetensors writes files for their owner alone
        for path in sorted(beside.rglob("*"), reverse=True):
            if path.is_file():
                path.chmod(readable)
            sync(path)
        sync(beside)
        replaced = target.with_name(f".{target.name}.replaced")
        if target.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            target.rename(replaced)
        try:
            beside.rename(target)
        except BaseException:
            if replaced.exists():
                replaced.rename(target)
            raise
        sync(target.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


def folder_bytes(folder: Path) -> int:
    """Bytes of all files in a folder, 0 where there is none. What another process deletes meanwhile does not count."""
    size = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            size += path.lstat().st_size if path.is_file() else 0
    return size
