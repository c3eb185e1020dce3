"""What ranks say of themselves, and what is said of one that failed."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gist_train.config.errors import UserError
from gist_train.data.leases import lives, machine
from gist_train.progress import duration
from gist_train.training.signals import Stopped


@dataclass(frozen=True, slots=True)
class End:
    """How a run ended that did not end well."""

    message: str
    code: int
    """That all ranks exit with."""
    hung: bool = False
    """Whether each rank is to write down where it stands."""


@dataclass(frozen=True, slots=True)
class Report:
    """What a rank says of itself."""

    host: str
    machine: str
    """What processes that can see each other have in common."""
    process: int
    born: str
    """When the process began, by the system's clock: a number is given again."""
    work: str
    step: int
    count: int
    waits: bool
    over: bool
    """Whether it has ended well."""
    beat: int


@dataclass(slots=True)
class LastReport:
    """What this rank heard of one of them, and when."""

    report: Report | None = None
    beat_at: float = field(default_factory=time.monotonic)
    moved_at: float = field(default_factory=time.monotonic)
    gone: int = 0
    """Looks in a row at which its process was not there."""

    def hear(self, report: Report) -> None:
        now = time.monotonic()
        if self.report is None or report.beat != self.report.beat:
            self.beat_at = now
        if self.report is None or (report.count, report.work) != (self.report.count, self.report.work):
            self.moved_at = now
        self.report = report

    def silent(self, now: float, timeout: float) -> bool:
        """Whether it has not reported for so many seconds, or does not get on, unless it waits for others."""
        if now - self.beat_at > timeout:
            return True
        return self.report is not None and not self.report.waits and now - self.moved_at > timeout

    def dead(self) -> bool:
        """Whether its process is gone before it ended well, as far as this machine can see."""
        report = self.report
        if report is None or report.over or report.machine != machine():
            return False
        return not lives(report.process, report.born)

    def at_work(self, now: float, timeout: float) -> bool:
        """Whether it may still need the store."""
        over = self.report is not None and self.report.over
        return not over and not self.dead() and now - self.beat_at <= timeout


def name_of(rank: int, report: Report | None) -> str:
    """A rank, and where it runs."""
    return f"rank {rank}" + (" (which never came)" if report is None else f" (host {report.host}, process {report.process})")


def death_message(rank: int, report: Report | None, safe: str) -> str:
    """The message of a rank whose process is gone.

    Args:
        safe: what is not lost.
    """
    fix = "its last lines, and the system's log (dmesg), tell what ended it: often want of memory; then run the same command"
    return f"{name_of(rank, report)} died {_standing(report)}\n  fix       {fix}\n  safe      {safe}"


def hang_message(ranks: Sequence[tuple[int, Report | None]], why: str, stacks: Path | None, safe: str) -> str:
    """The message of ranks that do not get on.

    Args:
        stacks: the folder that says where each stood.
    """
    names = "; ".join(f"{name_of(rank, report)} {_standing(report)}" for rank, report in ranks[:4])
    more = f" and {len(ranks) - 4:,} more" if len(ranks) > 4 else ""
    places = "" if stacks is None else f"\n  stacks    {stacks}: where each rank that could say so stood"
    fix = "look at that machine and its network; then run the same command, with a larger --timeout if all was well"
    return f"hung: {names}{more}: {why}{places}\n  fix       {fix}\n  safe      {safe}"


def standstill(seconds: float) -> str:
    """Why a rank counts as hung."""
    return f"no progress for {duration(seconds)} (--timeout)"


def _standing(report: Report | None) -> str:
    return "before its first report" if report is None else f"at step {report.step:,}, {report.work}"


def end_of(error: BaseException | None, name: str) -> End:
    """What the others are told of this process' own error."""
    match error:
        case Stopped(number=number):
            return End(f"{name} was told to stop", 128 + number)
        case KeyboardInterrupt():
            return End(f"{name} was told to stop", 130)
        case SystemExit(code=int(code)):
            return End(f"{name} ended with code {code}", code)
        case UserError():
            return End(f"{name}:\n{error}", 2)
    return End(f"{name}: {error or type(error).__name__}", 1)
