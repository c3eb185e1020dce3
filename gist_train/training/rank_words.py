"""What ranks say of themselves, and what is said of one that failed."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gist_train.config.errors import UserError
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
class Word:
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
class Heard:
    """What this rank heard of one of them, and when."""

    word: Word | None = None
    beat_at: float = field(default_factory=time.monotonic)
    moved_at: float = field(default_factory=time.monotonic)
    gone: int = 0
    """Looks in a row at which its process was not there."""

    def hear(self, word: Word) -> None:
        now = time.monotonic()
        if self.word is None or word.beat != self.word.beat:
            self.beat_at = now
        if self.word is None or (word.count, word.work) != (self.word.count, self.word.work):
            self.moved_at = now
        self.word = word


def name_of(rank: int, word: Word | None) -> str:
    """A rank, and where it runs."""
    return f"rank {rank}" + (" (which never came)" if word is None else f" (host {word.host}, process {word.process})")


def died(rank: int, word: Word | None, safe: str) -> str:
    """The message of a rank whose process is gone.

    Args:
        safe: what is not lost.
    """
    fix = "its last lines, and the system's log (dmesg), tell what ended it: often want of memory; then run the same command"
    return f"{name_of(rank, word)} died {_standing(word)}\n  fix       {fix}\n  safe      {safe}"


def hung(ranks: Sequence[tuple[int, Word | None]], why: str, stacks: Path | None, safe: str) -> str:
    """The message of ranks that do not get on.

    Args:
        stacks: the folder that says where each stood.
    """
    names = "; ".join(f"{name_of(rank, word)} {_standing(word)}" for rank, word in ranks[:4])
    more = f" and {len(ranks) - 4:,} more" if len(ranks) > 4 else ""
    places = "" if stacks is None else f"\n  stacks    {stacks}: where each rank that could say so stood"
    fix = "look at that machine and its network; then run the same command, with a larger --timeout if all was well"
    return f"hung: {names}{more}: {why}{places}\n  fix       {fix}\n  safe      {safe}"


def no_progress(seconds: float) -> str:
    """Why a rank counts as hung."""
    return f"no progress for {duration(seconds)} (--timeout)"


def _standing(word: Word | None) -> str:
    return "before its first word" if word is None else f"at step {word.step:,}, {word.work}"


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
