"""What the ranks of one launch write for each other: the store of the process group, which answers before there is a group."""

import contextlib
import os
import socket
from collections.abc import Iterator, Sequence
from datetime import timedelta
from functools import cache
from itertools import count
from threading import Lock

from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from gist_train.config.errors import Fault, UserError

ANSWERED = 3.0
"""Seconds in which the store answers, or counts as gone: that of a process that hangs answers nobody."""
_RUNS = count(1)
"""Trainings that this process began: those of one launch have one store."""


class StoreGoneError(RuntimeError):
    """The process that keeps the store has ended, hangs, or can't be reached."""


class LaunchStore:
    """Texts by key, of one training. All ranks of a launch begin the same trainings, in one order.

    Args:
        rank: of this process.
        timeout: seconds to wait for the first one, which may come later.

    Raises:
        UserError: the store can't be reached, or kept.
    """

    def __init__(self, rank: int, timeout: float):
        self._store = PrefixStore(f"gist_train/{next(_RUNS)}", _connected(rank, timeout))
        self._lock = Lock()

    def write(self, key: str, value: str) -> None:
        """Sets what `key` says."""
        with self._speaking():
            self._store.set(key, value)

    def has(self, key: str) -> bool:
        """Whether `key` was written."""
        with self._speaking():
            return bool(self._store.check([key]))

    def read(self, keys: Sequence[str]) -> list[str]:
        """What `keys`, which were all written, say."""
        with self._speaking():
            return [bytes(value).decode() for value in self._store.multi_get(list(keys))]

    def write_first(self, key: str, value: str) -> str:
        """Sets what `key` says if nobody has; returns what it says."""
        with self._speaking():
            return bytes(self._store.compare_set(key, "", value)).decode()

    def add(self, key: str, number: int) -> int:
        """Adds to a number that begins with 0; returns the sum."""
        with self._speaking():
            return int(self._store.add(key, number))

    @contextlib.contextmanager
    def _speaking(self) -> Iterator[None]:
        """One thread at a time: one that waits for an answer for ever keeps the others from asking."""
        if not self._lock.acquire(timeout=ANSWERED):
            raise StoreGoneError("the store does not answer")
        try:
            yield
        except RuntimeError as error:
            raise StoreGoneError(str(error)) from None
        finally:
            self._lock.release()


@cache
def _connected(rank: int, timeout: float) -> Store:
    """The launcher's store, else that of rank 0; it lasts as long as the process.

    It is torch's own choice for `init_process_group`, which uses the same one.
    """
    host, port = os.environ.get("MASTER_ADDR", "127.0.0.1"), int(os.environ.get("MASTER_PORT", "29500"))
    launchers = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        store = TCPStore(
            host,
            port,
            is_master=rank == 0 and not launchers,
            timeout=timedelta(seconds=timeout),
            wait_for_workers=False,
            multi_tenant=not launchers,
        )
    except RuntimeError as error:
        if "EADDRINUSE" in str(error):
            fix = "name another port: --main_process_port of accelerate launch, --master-port of torchrun"
            raise UserError(Fault("MASTER_PORT", f"{port}, which another program uses", "a free port", fix)) from None
        found = f"{host}:{port}, which rank {rank} on {socket.gethostname()} can't reach"
        fix = "start all ranks; name a host that all reach, and a port that no firewall closes"
        raise UserError(Fault("MASTER_ADDR and MASTER_PORT", found, "where rank 0 is", fix)) from None
    launch = [os.environ.get(name, "") for name in ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")]
    return PrefixStore("/".join(launch), store)
