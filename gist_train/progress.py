"""How far a long piece of work is: a bar on a terminal or in a notebook, and plain lines in a job's log, where people look."""

import io
import logging
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from threading import Event, Thread
from typing import Any, Protocol

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from gist_train.config.errors import visible
from gist_train.config.secrets import hidden
from gist_train.pulse import PULSE

EVERY = 30.0
"""Seconds between two plain lines, whether the work came any further or not."""
PAGE_WIDTH = 110
"""Columns of a page in a notebook."""
REDRAWN = 0.2
"""Seconds between two pictures of a bar in a notebook."""


class Terminal(Console):
    """A console that shows no password and no token, in no cell of a table either, which may be broken over lines; and what a
    terminal would obey of texts that it shows, it shows.

    Names of models, runs, files and tasks may hold brackets and colons: none of them is markup, and none becomes a picture.
    """

    def __init__(self, **options: Any):
        super().__init__(**{"markup": False, "emoji": False, **options})

    def render_str(self, text: str, **options: Any) -> Text:
        """What a text looks like."""
        return super().render_str(visible(hidden(text)), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        """The pieces of what is shown."""
        for segment in super().render(renderable, options):
            plain = segment.control or segment.text.isprintable()
            yield segment if plain else Segment(visible(segment.text), segment.style)


def terminal() -> Terminal:
    """Where what is said to a person goes: stderr, since stdout is for results."""
    return Terminal(stderr=True)


class PagedResult:
    """A result that a notebook shows as its command's page, where a cell ends with it, and not as its fields."""

    def page(self) -> RenderableType:
        """What the command prints."""
        raise NotImplementedError

    def _repr_mimebundle_(self, **_: Any) -> dict[str, str]:
        """Asked for by IPython, before what a class says of itself."""
        console = Terminal(file=io.StringIO(), width=PAGE_WIDTH, force_jupyter=False)
        with console.capture() as captured:
            console.print(self.page())
        return {"text/plain": captured.get().rstrip()}


@contextmanager
def others_silent() -> Iterator[None]:
    """Keeps warnings, notices and whatever other packages print to themselves; their errors come through."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def say(console: Console, line: str) -> None:
    """Prints a line as it is: paths and texts of users may hold brackets, and are not to be broken."""
    console.print(line, highlight=False, markup=False, soft_wrap=True)


def follow(counts: Iterator[int], what: str, total: int | None, console: Console, *, shown: bool = True) -> None:
    """Runs `counts` to its end and shows how far it is.

    Args:
        counts: does the work, and yields how much of it is done so far.
        what: the work, in words.
        total: how much there is to do, if that is known.
        shown: shows it even if this process's console is quiet: only the process that holds the lock knows the progress.
    """
    with counting(what, total, console, shown=shown) as count:
        for done in _felt(counts, what):
            count.reach(done)


class Count(Protocol):
    """How much of a piece of work is done."""

    done: int

    def reach(self, done: int) -> None:
        """Takes in how much is done by now."""
        ...


@contextmanager
def counting(what: str, total: int | None, console: Console, *, shown: bool = True, passing: bool = False) -> Iterator[Count]:
    """Shows how far the work within it is, which it tells the count. Arguments as `follow` has them.

    Args:
        passing: the work is a small part of another: its bar goes when it is done, and plain lines come only while it takes long.
    """
    quiet, console.quiet = console.quiet, console.quiet if passing else not shown
    try:
        with _bar(what, total, console, passing) if has_bars(console) else _plain_lines(what, total, console, passing) as count:
            yield count
    finally:
        console.quiet = quiet


def _felt(counts: Iterator[int], what: str) -> Iterator[int]:
    """The same counts; the other processes of the run see that the work gets on, where it does."""
    before = None
    for done in counts:
        if done != before:
            PULSE.beat(what)
        before = done
        yield done


def has_bars(console: Console) -> bool:
    """Whether a bar can be shown there and shown anew in its place: on a terminal and in a notebook."""
    return console.is_terminal or console.is_jupyter


def bar_on(console: Console, *columns: ProgressColumn, passing: bool = False) -> Progress:
    """A bar of these columns, shown where the console has bars and speaks; `passing` as `counting` has it."""
    kind = _CellProgress if console.is_jupyter else Progress
    return kind(*columns, console=console, disable=console.quiet or not has_bars(console), transient=passing)


class _CellProgress(Progress):
    """A bar in the cell of a notebook: an output that is shown anew in its place, since there is no cursor to move. Rich's own
    bar needs widgets there, which few kernels have, and which no saved notebook shows."""

    _cell: Any = None
    _shown = 0.0

    def start(self) -> None:
        """Nothing: the first task is the first thing to show."""

    def add_task(self, *given: Any, **fields: Any) -> TaskID:
        """A task, shown at once."""
        task = super().add_task(*given, **fields)
        if not self.disable and self._cell is None:
            from IPython.display import display

            show: Any = display  # untyped
            self._cell = show(self._picture(), display_id=True)
        return task

    def update(self, task_id: TaskID, **given: Any) -> None:
        """Takes in how far a task is, and shows it if it was last shown a while ago."""
        super().update(task_id, **given)
        if not self.disable and time.monotonic() - self._shown > REDRAWN:
            self._shown = time.monotonic()
            self._cell.update(self._picture())

    def stop(self) -> None:
        if self._cell is not None:
            self._cell.update("" if self.live.transient else self._picture())

    def _picture(self) -> Table:
        return self.make_tasks_table(self.tasks)


class _Bar:
    """A task of a bar."""

    def __init__(self, bar: Progress, task: TaskID):
        self.done = 0
        self._bar, self._task = bar, task

    def reach(self, done: int) -> None:
        self.done = done
        self._bar.update(self._task, completed=done)


@contextmanager
def _bar(what: str, total: int | None, console: Console, passing: bool) -> Iterator[_Bar]:
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with bar_on(console, *columns, passing=passing) as bar:
        task = bar.add_task(what, total=total)
        count = _Bar(bar, task)
        yield count
        bar.update(task, total=count.done, completed=count.done)


class _Lines:
    """What is done so far, and how that reads."""

    def __init__(self, what: str, total: int | None):
        self.done = 0
        self._what, self._total, self._began = what, total, time.monotonic()

    def reach(self, done: int) -> None:
        self.done = done

    def line(self) -> str:
        """How far the work is, how fast it goes, and when it will be done."""
        seconds = time.monotonic() - self._began
        rate = self.done / seconds if seconds > 0 else 0.0
        parts = [f"{self._what}: {self.done:,}{'' if self._total is None else f' of {self._total:,}'}"]
        if self._total is None and not self.done:  # work that does not say how far it is
            parts = [self._what]
        if rate > 0:
            parts.append(f"{rate:,.0f} a second" if rate >= 10 else f"{rate:,.2f} a second")
            if self._total is not None:
                parts.append(f"{duration(max(self._total - self.done, 0) / rate)} left")
        return ", ".join([*parts, f"{duration(seconds)} so far"])


@contextmanager
def _plain_lines(what: str, total: int | None, console: Console, passing: bool) -> Iterator[_Lines]:
    """A line at the beginning, one every `EVERY` seconds, one at the end if it is reached; of passing work the second kind."""
    if not passing:
        console.print(what if total is None else f"{what}: {total:,} to do", highlight=False)
    lines, over = _Lines(what, total), Event()

    def speak() -> None:
        while not over.wait(EVERY):
            say(console, lines.line())

    # A thread of its own: the work may say nothing for minutes, while it sorts or waits for a lock.
    thread = Thread(target=speak, name="progress", daemon=True)
    thread.start()
    try:
        yield lines
    finally:
        over.set()
        thread.join()
    if not passing:
        console.print(f"{what}: {lines.done:,} done", highlight=False)


def clock(seconds: float) -> str:
    """As a clock shows it: 0:00:42, 12:05:33."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def in_points(after: float, before: float, decimals: int = 1) -> Text:
    """How far a score (a fraction) rose or fell, in points: green or red on a terminal."""
    points = points_apart(after, before, decimals)
    return Text(f"{points:+.{decimals}f}", "" if points == 0 else "green" if points > 0 else "red")


def points_apart(after: float, before: float, decimals: int) -> float:
    """Points between two scores (fractions) as they are shown: who subtracts what stands there finds no other number."""
    return round(round(100 * after, decimals) - round(100 * before, decimals), decimals) + 0.0  # no -0.0


def duration(seconds: float) -> str:
    """In the largest units that matter: 42 s, 3 min 05 s, 2 h 07 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"
