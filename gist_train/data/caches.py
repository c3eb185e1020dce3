"""What a cache folder holds, and since when nobody has used it: corpora, guides' stores and rows that are held out.

All of it is made again by the next run that needs it. A folder's own time of change says when it was used last: files that are
read leave no trace on most disks.
"""

import contextlib
import os
import re
import shutil
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from gist_train.config.errors import Fault, UserError
from gist_train.data.files import folder_bytes, read_json
from gist_train.data.leases import Claims, Holder, held, living, locked

KINDS = {"corpora": "corpus", "guides": "guide store", "held-out": "held-out rows"}
"""Folders of a cache, and what each folder in them is."""
UNFINISHED = re.compile(r"\.(.+)\.(parts|partial|replaced|cleared)")
"""What killed processes left beside a folder, by its name."""


@dataclass(frozen=True, slots=True)
class Cached:
    """A folder of a cache."""

    kind: str
    """As `KINDS` has it; "unfinished" for what killed processes left."""
    folder: Path
    bytes: int
    used: float
    """When a run used it last, in seconds since 1970."""
    about: str
    """What is in it, in words; "" where it does not say."""
    holder: Holder | None
    """A process that is at work with it."""

    @property
    def name(self) -> str:
        """What it is called, without the point before what is unfinished."""
        return self.folder.name.removeprefix(".")


def mark_used(folder: Path) -> None:
    """Has a folder of a cache count as used now. Where it may not be written to, it stays as it was."""
    with contextlib.suppress(OSError):
        os.utime(folder)


@contextmanager
def in_use(cache: Path, folders: Sequence[Path]) -> Iterator[None]:
    """Within it these folders of a cache are not cleared; at its end they count as used."""
    with locked(cache):
        claims = Claims(cache)
    with claims:
        claims.hold("\n".join(_place(folder) for folder in folders).encode())
        yield
    for folder in folders:
        mark_used(folder)


def use_while_alive(owner: object, folder: Path) -> None:
    """`in_use` until `owner` is no more, for what has no end of its own. A cache that may not be written to stays as it is."""
    use, process = ExitStack(), os.getpid()
    with contextlib.suppress(OSError):
        use.enter_context(in_use(folder.parent.parent, [folder]))
    mark_used(folder)

    def end() -> None:
        if os.getpid() == process:  # and not a fork of it
            use.close()

    weakref.finalize(owner, end)


def cached(cache: Path) -> list[Cached]:
    """All that a cache holds, the largest first."""
    used_by = {place: holder for holder, content in living(cache, ".claim-*") for place in content.decode().split("\n")}
    entries = []
    for part, kind in KINDS.items():
        for folder in (cache / part).glob("*"):
            unfinished = UNFINISHED.fullmatch(folder.name)
            if not folder.is_dir() or folder.is_symlink() or (folder.name.startswith(".") and not unfinished):
                continue
            whole = folder.with_name(unfinished[1]) if unfinished else folder
            holder = used_by.get(_place(whole)) or _at_work(whole)
            about = "" if unfinished else _about(folder)
            with contextlib.suppress(FileNotFoundError):  # cleared meanwhile, or become whole
                used = folder.stat().st_mtime
                entries.append(Cached("unfinished" if unfinished else kind, folder, folder_bytes(folder), used, about, holder))
    return sorted(entries, key=lambda entry: -entry.bytes)


def clear(entry: Cached) -> None:
    """Deletes it: from one moment to the next it is not there.

    Raises:
        UserError: a process is at work with it.
    """
    whole = UNFINISHED.fullmatch(entry.folder.name)
    name = whole[1] if whole else entry.folder.name
    with held(entry.folder.with_name(f".{name}.lock")) as other:
        if (holder := entry.holder or other) is not None:
            fix = "wait for it, or stop it; nothing of this folder was deleted"
            raise UserError(Fault(str(entry.folder), f"in use by {holder}", "a folder that nobody works with", fix))
        cleared = entry.folder.with_name(f".{name}.cleared")
        if entry.folder != cleared:
            shutil.rmtree(cleared, ignore_errors=True)
            entry.folder.rename(cleared)
        shutil.rmtree(cleared)


def _place(folder: Path) -> str:
    """What a folder is called from its cache on."""
    return f"{folder.parent.name}/{folder.name}"


def _at_work(folder: Path) -> Holder | None:
    """Who makes it, or adds to it."""
    beside = [*living(folder.parent, f".{folder.name}.lock")]
    # Parts of a corpus or of tokens are taken on one by one, and said in a claim.
    parts = f".{folder.name}".encode()
    beside += [(holder, content) for holder, content in living(folder.parent, ".claim-*") if content.startswith(parts)]
    inside = [*living(folder, ".claim-*"), *living(folder, ".lock"), *living(folder / "tokens", ".claim-*")]
    return next((holder for holder, _ in [*beside, *inside]), None)


def _about(folder: Path) -> str:
    from gist_train.data.collecting import HASH_BYTES  # which brings numpy along, and a command must start fast

    try:
        meta = read_json(folder / "meta.json")
        match folder.parent.name:
            case "corpora":
                sources = ", ".join(dict.fromkeys(str(origin["name"]) for origin in meta["origins"]))
                return f"{meta['rows']:,} rows of {sources}"
            case "guides":
                texts = (folder / "hashes.bin").stat().st_size // HASH_BYTES
                return f"{texts:,} texts by {meta.get('name') or meta['vectors']}, {meta['dtype']}"
    except (OSError, ValueError, KeyError, TypeError):  # damaged: the next run that needs it says so
        pass
    return ""


def days_unused(entry: Cached) -> float:
    """Days since a run used it."""
    return (time.time() - entry.used) / 86_400
