"""The processes of one launch watch over each other: one that fails, dies or hangs ends all, and one message says which and why.

Each rank reports into the store of the process group every second how far it is, and reads the others' reports. Two threads do
so, since the main thread may wait for another rank in C code, where no exception reaches it: one speaks to the store; the other
judges by the last reports, and ends the process where the main thread can't.
"""

import contextlib
import faulthandler
import json
import logging
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from threading import Event, Lock, Thread
from types import TracebackType
from typing import NoReturn, Self, TypeVar

from gist_train.config.errors import Fault, UserError
from gist_train.config.faults import found_words
from gist_train.config.secrets import hidden
from gist_train.data.leases import born, machine
from gist_train.pulse import PULSE, RankFailedError, waiting
from gist_train.training.activity import Activity
from gist_train.training.error_file import ErrorFile
from gist_train.training.launch_store import LaunchStore, StoreGoneError
from gist_train.training.rank_reports import End, LastReport, Report, death_message, end_of, hang_message, name_of, standstill
from gist_train.training.signals import Stopped, ignored

TIMEOUT = 600.0
"""Seconds without a sign of progress after which a rank counts as hung."""
BEAT = 1.0
"""Seconds between two words of a rank."""
GRACE = 3.0
"""Seconds that the main thread has to end by itself once it is known that a rank failed."""
_END = "end"
_LOG = logging.getLogger(__name__)
T = TypeVar("T")


class Ranks:
    """Of one launch, from before the config is read to the end. With one process it does nothing.

    Where this process fails, the others end with its code; where another one did, leaving raises `RankFailedError`. A process
    that can't leave, because it waits in C code, is ended.

    Args:
        timeout: seconds without progress after which a rank counts as hung.
    """

    def __init__(self, timeout: float = TIMEOUT):
        self.rank = int(os.environ.get("RANK", "0"))
        self.size = int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1
        self.first_here = os.environ.get("LOCAL_RANK", "0") == "0"
        """Whether it is the first of its machine."""
        self.timeout = timeout
        self.safe: Callable[[], str] = lambda: "what was whole before is whole now: the same command goes on from there"
        """Says what is not lost."""
        self.stacks: Path | None = None
        """Folder for a file a rank of where each stood when one of them hung."""
        self._heard = [LastReport() for _ in range(self.size)]
        self._beats = self._questions = 0
        self._end: End | None = None
        self._found: End | None = None
        """What this rank judged, for the thread that speaks to the store to pass on."""
        self._answered = time.monotonic()
        self._said_over = False
        self._error_file, self._shown_work = ErrorFile(), ""
        self._over, self._leaving = Event(), Event()
        self._activity, self._worked = Activity(), 0
        self._reporting = Lock()

    def __enter__(self) -> Self:
        if self.size > 1:
            self._store = LaunchStore(self.rank, self.timeout)
            self._count_anew(time.monotonic())  # the first rank may have come long after this one
            self._speak()
            for work in (self._talk, self._judge):
                Thread(target=work, name=work.__name__.strip("_"), daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.size == 1:
            return
        self._leaving.set()
        if error is None and self._end is None:
            self._leave_well()
            return
        with ignored():  # a launcher stops those that are left, which must not keep them from saying why
            end = self._end or self._after(error)
            if end is None:
                own = end_of(error, name_of(self.rank, self._own_report()))
                end = self._post(own)  # None where this is the first that fails: its own message says it
            said = not self._claim_word()
            if end is None and said and isinstance(error, UserError):  # another rank was quicker to tell what this one posted
                end = own
            self._error_file.write(own.message if end is None else end.message, final=True)
            self._wait_for_readers()
            self._over.set()
        if end is not None:
            raise RankFailedError(end.message, end.code, said=said) from None

    def agree(self, what: str, facts: Mapping[str, object], fix: str) -> None:
        """Goes on where all ranks have the same facts, and waits until that is known.

        Args:
            what: the facts, for the message.
            facts: name -> value, which JSON can hold.

        Raises:
            UserError: ranks differ; the same on all of them.
        """
        if self.size == 1:
            return
        own = json.dumps(facts, sort_keys=True, default=str)
        with waiting():
            self._write(f"{what}/{self.rank}", own)
            if self.rank == 0:
                faults = []
                for rank in range(1, self.size):
                    if (theirs := self._get(f"{what}/{rank}")) != own:
                        faults += self._differences(rank, json.loads(own), json.loads(theirs), fix)
                self._write(f"{what}/agreed", json.dumps([asdict(fault) for fault in faults]))
            agreed = json.loads(self._get(f"{what}/agreed"))
        PULSE.beat()
        if agreed:
            raise UserError(*(Fault(**fault) for fault in agreed))

    def first_says(self, value: str) -> str:
        """What the first rank says here, on all of them, which wait for it as long as it gets on. Called by all, in one order."""
        if self.size == 1:
            return value
        self._questions += 1
        key = f"first/{self._questions}"
        with waiting() if self.rank else contextlib.nullcontext():
            if self.rank == 0:
                self._write(key, value)
            said = self._get(key)
        PULSE.beat()
        return said

    def all_say(self, value: str) -> list[str]:
        """What each rank says here, in their order, on all of them. Called by all, in one order."""
        if self.size == 1:
            return [value]
        self._questions += 1
        with waiting():
            self._write(f"all/{self._questions}/{self.rank}", value)
            said = [self._get(f"all/{self._questions}/{rank}") for rank in range(self.size)]
        PULSE.beat()
        return said

    def _differences(self, rank: int, first: dict[str, object], other: dict[str, object], fix: str) -> list[Fault]:
        self._listen()
        missing = "nothing"
        return [
            Fault(
                name,
                f"{found_words(other.get(name, missing))}, on {name_of(rank, self._heard[rank].report)}",
                f"{found_words(first.get(name, missing))}, as on {name_of(0, self._own_report())}",
                fix,
            )
            for name in sorted(first.keys() | other.keys())
            if first.get(name, missing) != other.get(name, missing)
        ]

    def _get(self, key: str) -> str:
        """What a rank has set, or will. It ends the wait where a rank failed."""
        while not self._patiently(lambda: self._store.has(key)):
            if self._end is not None:
                raise RankFailedError(self._end.message, self._end.code, said=True)
            time.sleep(0.02)
        return self._patiently(lambda: self._store.read([key])[0])

    def _write(self, key: str, value: str) -> None:
        self._patiently(lambda: self._store.write(key, value))

    def _patiently(self, work: Callable[[], T]) -> T:
        """What `work` gives, tried again while the store does not answer: a network that stood still for seconds is no failure.

        Raises:
            RankFailedError: a rank failed meanwhile.
            StoreGoneError: the store has not answered for the timeout.
        """
        while True:
            try:
                return work()
            except StoreGoneError:
                if self._end is not None:
                    raise RankFailedError(self._end.message, self._end.code, said=True) from None
                if time.monotonic() - self._answered > self.timeout:
                    raise
                time.sleep(BEAT / 4)

    def _post(self, end: End) -> End | None:
        """Tells all ranks how the run ended. Returns how another rank had said it did before, None if it was the first to."""
        mine = json.dumps(asdict(end))
        with contextlib.suppress(StoreGoneError):
            stands = self._store.write_first(_END, mine)
            return None if stands == mine else End(**json.loads(stands))
        return None

    def _claim_word(self) -> bool:
        """Whether this process is the one on its machine that says how the run ended."""
        with contextlib.suppress(StoreGoneError):
            return self._store.add(f"said/{machine()}", 1) == 1
        return True

    # Two threads.

    def _talk(self) -> None:
        """Writes how far this process is, and reads how far the others are."""
        while not self._over.wait(BEAT):
            try:
                self._exchange()
                self._answered = time.monotonic()
            except StoreGoneError:  # its process may have ended well
                if self._leaving.is_set():
                    return
            except Exception as error:  # whatever it was, the next report may arrive: a thread that is gone looks like a hang
                _LOG.warning("rank %s can't say how far it is: %s", self.rank, error)

    def _exchange(self) -> None:
        self._beats += 1
        self._worked += self._activity.got_on(waits=PULSE.waits)
        self._speak()
        if self._found is not None:
            self._end = self._post(self._found) or self._found
        elif self._store.has(_END):
            self._end = End(**json.loads(self._get(_END)))
        self._listen()
        if self._error_file.path is not None and (self._beats % 5 == 1 or PULSE.work != self._shown_work):
            self._shown_work = PULSE.work
            self._error_file.write(death_message(self.rank, self._own_report(), self._safe()), final=False)

    def _speak(self, *, over: bool = False) -> None:
        with self._reporting:  # the last report is the last one that is written
            self._said_over = self._said_over or over
            self._store.write(f"report/{self.rank}", json.dumps(asdict(self._own_report(over=self._said_over))))

    def _listen(self) -> None:
        keys = [f"report/{rank}" for rank in range(self.size)]
        if any(heard.report is None for heard in self._heard):  # read all at once, it would wait for those that are to come
            keys = [key for key in keys if self._store.has(key)]
        for key, report in zip(keys, self._store.read(keys), strict=True):
            self._heard[int(key.split("/")[1])].hear(Report(**json.loads(report)))

    def _own_report(self, *, over: bool = False) -> Report:
        number = os.getpid()
        state = (PULSE.work, PULSE.step, PULSE.count + self._worked, PULSE.waits)
        return Report(socket.gethostname(), machine(), number, born(number), *state, over, self._beats)

    def _judge(self) -> None:
        """Finds ranks that died or hang, and ends this process where a rank failed and the main thread can't leave."""
        looked = time.monotonic()
        while not self._over.wait(BEAT):
            lost, looked = time.monotonic() - looked, time.monotonic()
            if lost > 5 * BEAT:  # this process was stopped, all of the launch perhaps: that time is nobody's fault
                self._count_anew(looked)
                continue
            if self._end is None and self._found is None and not self._leaving.is_set():
                self._found = self._failure()
            unheard = self._found is not None and time.monotonic() - self._answered > 2 * BEAT  # the store can't pass it on
            if self._end is not None or unheard:
                end = self._end or self._found
                assert end is not None
                self._end = end
                if end.hung:
                    within(GRACE, self._write_stack)
                # The main thread, where it can, leaves by itself and says why.
                if not self._over.wait(GRACE) and not (self._leaving.is_set() and self._over.wait(4 * GRACE)):
                    self._leave_at_once(end)

    def _count_anew(self, now: float) -> None:
        """Counts the silence of all ranks anew."""
        self._answered = now
        for heard in self._heard:
            heard.beat_at = heard.moved_at = now

    def _failure(self) -> End | None:
        """A rank that died or hangs."""
        now = time.monotonic()
        for rank, heard in enumerate(self._heard):
            # Three times, with looks at the store in between: one that fails says so before it ends.
            heard.gone = heard.gone + 1 if rank != self.rank and heard.dead() else 0
            if heard.gone > 2:
                return End(death_message(rank, heard.report, self._safe()), 1)
        first = self._heard[0].report
        if first is not None and first.over:  # its store may be gone with it
            return None
        if now - self._answered > self.timeout:
            return self._hung([0], "its store does not answer")
        running = [rank for rank, heard in enumerate(self._heard) if heard.report is None or not heard.report.over]
        silent = [rank for rank in running if self._heard[rank].silent(now, self.timeout)]
        if not silent and all(now - self._heard[rank].moved_at > self.timeout for rank in running):
            silent = running  # each waits for the others
        return self._hung(silent, standstill(self.timeout)) if silent else None

    def _hung(self, ranks: Sequence[int], why: str) -> End:
        reports = [(rank, self._heard[rank].report) for rank in ranks]
        return End(hang_message(reports, why, self.stacks, self._safe()), 1, hung=True)

    def _safe(self) -> str:
        """What is not lost; the disk that would tell may be what hangs."""
        return within(GRACE, self.safe) or "what was whole before is whole now"

    # Ends.

    def _after(self, error: BaseException | None) -> End | None:
        """The end of another rank that led to this process' error: a connection that closed, or a launcher that stops those that
        are left; None where there is none."""
        if not isinstance(error, (RuntimeError, Stopped)):
            return None
        ends = time.monotonic() + (5 if isinstance(error, RuntimeError) else 1) * BEAT
        while self._end is None and time.monotonic() < ends:
            if self._found is None:
                self._found = self._failure()
            time.sleep(BEAT / 4)
        if self._end is None and isinstance(error, RuntimeError) and (isinstance(error, StoreGoneError) or _is_lost(error)):
            now = time.monotonic()
            silent = [rank for rank, heard in enumerate(self._heard) if rank != self.rank and now - heard.beat_at > 3 * BEAT]
            self._end = self._hung(silent or [0], f"can't be reached any more ({str(error).splitlines()[0]})")
        return self._end

    def _leave_well(self) -> None:
        with contextlib.suppress(StoreGoneError):
            self._speak(over=True)
            left = set(range(1, self.size)) if self.rank == 0 else set()
            while left and self._end is None:  # the first may keep the store, and others may have hours of work left
                self._listen()
                now = time.monotonic()
                left = {rank for rank in left if self._heard[rank].at_work(now, self.timeout)}
                time.sleep(BEAT / 50)
        self._over.set()
        self._error_file.remove()

    def _wait_for_readers(self) -> None:
        """Keeps the store, which may be this process', until the others have read how the run ended."""
        with contextlib.suppress(StoreGoneError):
            self._store.add("read", 1)
            ends = time.monotonic() + GRACE
            while self.rank == 0 and time.monotonic() < ends and self._store.add("read", 0) < self.size:
                time.sleep(BEAT / 10)

    def _leave_at_once(self, end: End) -> NoReturn:
        """Ends this process, whose main thread waits where no exception reaches it. Nothing whole is harmed, as by kill -9."""
        try:
            if self._claim_word():
                shows = "\x1b[?25h" if sys.stderr.isatty() else ""  # a bar hides the cursor
                sys.stderr.write(f"{shows}{hidden(end.message)}\n")
                sys.stderr.flush()
            within(GRACE, lambda: self._error_file.write(end.message, final=True))
            self._wait_for_readers()
        finally:  # a closed terminal is no reason to stay
            os._exit(end.code)

    def _write_stack(self) -> None:
        if self.stacks is not None:
            with contextlib.suppress(OSError):
                self.stacks.mkdir(parents=True, exist_ok=True)
                with (self.stacks / f"rank-{self.rank}.txt").open("w", encoding="utf-8") as file:
                    faulthandler.dump_traceback(file, all_threads=True)


def within(seconds: float, work: Callable[[], str | None]) -> str | None:
    """What `work` gives, None where it takes longer: it then goes on beside."""
    results: list[str | None] = []

    def try_it() -> None:
        with contextlib.suppress(OSError):
            results.append(work())

    thread = Thread(target=try_it, daemon=True)
    thread.start()
    thread.join(seconds)
    return results[0] if results else None


def _is_lost(error: RuntimeError) -> bool:
    """Whether an error of a backend is that of a connection."""
    return any(word in str(error) for word in ("onnection", "ead error", "NCCL", "Gloo", "gloo"))
