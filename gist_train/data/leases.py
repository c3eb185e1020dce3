"""Who works on what: a file that says so, renewed while its process lives.

It needs no lock of the file system, which disks over a network have in part, or not at all: a file that must not exist yet is
made by one process alone wherever files can be made. A process that died is known by its number on its own machine, and elsewhere
by a lease that is no longer renewed.
"""

import contextlib
import errno
import hashlib
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from threading import Event, Lock, Thread
from types import TracebackType
from typing import Self
from uuid import uuid4

from gist_train.config.errors import Fault, UserError
from gist_train.data.files import naming
from gist_train.pulse import PULSE

RENEWED = 10.0
"""Seconds between two renewals of a lease."""
STALE = 35.0
"""Seconds without a renewal after which a lease of another machine counts as that of a dead process."""
UNREAD = 10.0
"""Seconds in which who makes a lease writes its name into it, over a network too; else it was killed meanwhile."""
ANOTHER_MACHINES = 3600.0
"""Seconds without a renewal after which a lease of another machine is that of a dead process, by clocks that may differ."""
PAUSE = 5.0
"""Seconds between two looks at a lease after which this process stood still itself."""
HEADER = 512
"""Bytes at the beginning of a lease that say who holds it."""


@dataclass(frozen=True, slots=True)
class Holder:
    """A process that holds something."""

    host: str
    machine: str
    """What processes share that see each other's numbers."""
    process: int
    born: str
    """When the process began, by the system's clock: a number is given again."""
    since: float
    """When it took hold, in seconds since 1970."""
    renewals: int = 0

    def __str__(self) -> str:
        return f"process {self.process} on {self.host}, since {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(self.since))}"


class Lease:
    """Made by the one process that gets it.

    Args:
        path: of the file, which must not be there.

    Raises:
        FileExistsError: another process has it, or a link is in its place.
    """

    def __init__(self, path: Path):
        self.path = path
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        number = os.getpid()
        self._holder = Holder(socket.gethostname(), machine(), number, born(number), time.time())
        self._lock = Lock()
        try:
            with naming(path):
                self.write(b"")
        except OSError:  # a full disk
            os.close(self._file)
            path.unlink()
            raise
        _RENEWER.add(self)

    def write(self, content: bytes) -> None:
        """What is held, in place of what was before."""
        with self._lock:
            os.ftruncate(self._file, HEADER)
            self._write_header()
            os.pwrite(self._file, content, HEADER)
            os.fsync(self._file)  # other machines see what is on the disk

    def renew(self) -> None:
        """Says that the process lives. Where the file is gone, or its disk, nothing is said."""
        with self._lock, contextlib.suppress(OSError):
            self._holder = replace(self._holder, renewals=self._holder.renewals + 1)
            self._write_header()
            os.fsync(self._file)

    def move(self, path: Path) -> None:
        """Has the file at `path`, in place of what is there."""
        with self._lock:
            os.rename(self.path, path)
            self.path = path

    def release(self) -> None:
        """Lets go; the file is removed, unless another process took it over."""
        _RENEWER.remove(self)
        with self._lock:
            with contextlib.suppress(FileNotFoundError):
                if os.stat(self.path, follow_symlinks=False).st_ino == os.fstat(self._file).st_ino:
                    os.unlink(self.path)
            os.close(self._file)

    def _write_header(self) -> None:
        os.pwrite(self._file, json.dumps(asdict(self._holder)).encode().ljust(HEADER - 1) + b"\n", 0)


class _Renewer:
    """Renews what this process holds, in a thread of its own, which ends when nothing is held."""

    def __init__(self) -> None:
        self._held: set[Lease] = set()
        self._lock = Lock()
        self._process = 0
        """In which the thread runs, 0 where it does not: a forked process has none."""

    def add(self, lease: Lease) -> None:
        with self._lock:
            self._held.add(lease)
            if self._process != os.getpid():
                self._process = os.getpid()
                Thread(target=self._renew, name="leases", daemon=True).start()

    def remove(self, lease: Lease) -> None:
        with self._lock:
            self._held.discard(lease)

    def _renew(self) -> None:
        while not Event().wait(RENEWED):
            with self._lock:
                held = list(self._held)
                if not held:
                    self._process = 0
                    return
            for lease in held:
                lease.renew()


_RENEWER = _Renewer()


class _Watch:
    """Tells whether who holds the leases that it is shown lives, by what it saw of them before."""

    def __init__(self) -> None:
        self._seen: dict[Path, tuple[_Look, float]] = {}
        self._looked = time.monotonic()

    def look(self, path: Path) -> "_Look | None":
        """What a lease says; None where there is none."""
        try:
            with path.open("rb") as file:
                content, inode = file.read(), os.fstat(file.fileno()).st_ino
        except FileNotFoundError:
            self._seen.pop(path, None)
            return None
        look, now = _Look(inode, _read(content), content[HEADER:]), time.monotonic()
        # While this process was stopped, or its disk stood still, nobody's renewals were seen: that time does not count.
        lost, self._looked = now - self._looked, now
        if lost > PAUSE:
            self._seen = {seen: (before, since + lost) for seen, (before, since) in self._seen.items()}
        if path not in self._seen or not self._seen[path][0].is_of(look):
            self._seen[path] = look, now
        return look

    def is_dead(self, path: Path, look: "_Look") -> bool:
        """Whether who made the lease that `look` saw is gone."""
        holder, since = look.holder, self._seen[path][1]
        if holder is not None and holder.machine == machine():
            return not lives(holder.process, holder.born)
        return time.monotonic() - since > (UNREAD if holder is None else STALE)


def _read(content: bytes) -> Holder | None:
    try:
        return Holder(**json.loads(content[:HEADER]))
    except (ValueError, TypeError):
        return None


@dataclass(frozen=True, slots=True)
class _Look:
    """A lease as it was seen."""

    inode: int
    holder: Holder | None
    """None as long as it is being made."""
    content: bytes

    @property
    def name(self) -> str:
        """What no other lease is called."""
        return hashlib.blake2b(repr((self.inode, self.holder)).encode(), digest_size=4).hexdigest()

    def is_of(self, other: "_Look") -> bool:
        """Whether it is the same lease, not renewed in between."""
        return (self.inode, self.holder) == (other.inode, other.holder)


def _taken(path: Path, watch: _Watch) -> Lease | Holder | None:
    """The lease, or who holds it; None where neither is known yet."""
    with contextlib.suppress(FileExistsError):
        return Lease(path)
    if path.is_symlink():
        own = "nothing, or what gist-train left there itself"
        raise UserError(Fault(str(path), "a link", own, "remove it, and see who put it there"))
    look = watch.look(path)
    if look is None:
        return None
    if not watch.is_dead(path, look):
        return look.holder
    # Its process died, and an heir puts its own lease in this one's place: at no time is there none. To be the heir is a lease
    # too, and whoever has it knows that nobody else touches the dead one.
    heir = _taken(path.with_name(f".{path.name}.{look.name}"), watch)
    if not isinstance(heir, Lease):
        return None
    still = watch.look(path)
    if still is not None and still.is_of(look):
        heir.move(path)
        return heir
    heir.release()  # an heir of before has been here
    return None


@contextmanager
def held(path: Path) -> Iterator[Holder | None]:
    """Holds the lease at `path` if nobody else does; yields None where it does, else who has it.

    Where a process of another machine has it, this waits until that renews it, or until it must be dead.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    watch, first = _Watch(), None
    while True:
        taken = _taken(path, watch)
        if isinstance(taken, Lease):
            break
        if taken is not None and (taken.machine == machine() or (first is not None and first != taken)):
            yield taken
            return
        first = first or taken
        time.sleep(0.1)
    try:
        yield None
    finally:
        taken.release()


@contextmanager
def locked(folder: Path, name: str = ".lock") -> Iterator[None]:
    """Holds a lease in `folder`, waiting for whoever has it. One whose process died, however it died, is taken over."""
    folder.mkdir(parents=True, exist_ok=True)
    watch, pause = _Watch(), 0.002
    while not isinstance(lease := _taken(folder / name, watch), Lease):
        time.sleep(pause)
        pause = min(pause * 1.5, 0.2)
        PULSE.beat()  # who holds it lives; whether it gets on, its own run watches
    try:
        yield
    finally:
        lease.release()


class Claims:
    """What this process has taken on, in a lease of its own.

    Every process of any run, on any machine that shares the disk, sees what all others have taken. Claims are opened, and `hold`
    and `others` called, while the folder is locked (`locked`).

    Args:
        folder: where all that share the work have their claims; it exists.
    """

    def __init__(self, folder: Path):
        self._own = Lease(folder / f".claim-{uuid4().hex}")
        self._watch = _Watch()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._own.release()

    def hold(self, content: bytes) -> None:
        """Says that this process has taken `content` on, in place of what it had before."""
        self._own.write(content)

    def others(self) -> list[bytes]:
        """What each other living process has taken on; the claims of dead ones are removed."""
        taken = []
        for path in self._own.path.parent.glob(".claim-*"):
            if path == self._own.path:
                continue
            if (look := self._watch.look(path)) is None:  # its owner is done
                continue
            if self._watch.is_dead(path, look):
                path.unlink(missing_ok=True)
            else:
                taken.append(look.content)
        return taken


def living(folder: Path, pattern: str) -> Iterator[tuple[Holder, bytes]]:
    """Who has the leases of these names in a folder, and what each says; those of dead processes are left out.

    Whether a process of another machine lives shows in time. Here nobody waits: one that has renewed its lease within the hour
    counts as living.
    """
    watch = _Watch()
    for path in folder.glob(pattern):
        try:
            renewed, look = path.stat().st_mtime, watch.look(path)
        except FileNotFoundError:
            continue
        if look is None or look.holder is None:
            continue
        here = look.holder.machine == machine()
        if not watch.is_dead(path, look) if here else time.time() - renewed < ANOTHER_MACHINES:
            yield look.holder, look.content


def machine() -> str:
    """What processes share that see each other's numbers."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return socket.gethostname()


def born(process: int) -> str:
    """When it began, in the system's ticks; "" where there is no such process, or it is dead and not yet buried."""
    try:
        state, *rest = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()
    except FileNotFoundError:
        return "" if Path("/proc/self").exists() or not _signalled(process) else str(process)
    except ProcessLookupError:
        return ""
    return "" if state in "ZX" else rest[18]


def lives(process: int, since: str) -> bool:
    """Whether a process of this machine that was born at `since` is there: others' processes may be hidden from /proc."""
    known = born(process)
    return known == since or (known == "" and not Path(f"/proc/{process}").exists() and _signalled(process))


def _signalled(process: int) -> bool:
    """Whether there is such a process, whoever's it is."""
    try:
        os.kill(process, 0)
    except OSError as error:
        return error.errno == errno.EPERM
    return True
