"""Progress where there is no terminal: a job's log must say that it is alive, how far it is and when it will be done."""

import io
import re
import time

import pytest
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gist_train import progress
from gist_train.config.errors import Fault
from gist_train.progress import Terminal, counting, follow


def console_into(stream):
    return Console(file=stream, force_terminal=False, width=200)


def slowly(count, seconds):
    for done in range(1, count + 1):
        time.sleep(seconds)
        yield 10 * done


def test_a_log_has_a_line_every_so_often(monkeypatch):
    """Minutes without a word look like a hang, and get a job killed."""
    monkeypatch.setattr(progress, "EVERY", 0.1)
    stream = io.StringIO()
    follow(slowly(5, 0.11), "embedding", 50, console_into(stream))
    first, *between, last = stream.getvalue().splitlines()
    assert (first, last) == ("embedding: 50 to do", "embedding: 50 done")
    assert len(between) >= 3
    told = [re.fullmatch(r"embedding: (\d+) of 50(, [\d.,]+ a second, \d+ s left)?, \d+ s so far", line) for line in between]
    assert all(told)
    done = [int(match[1]) for match in told]
    assert done == sorted(done)
    assert any(match[2] for match in told)


def test_work_that_says_nothing_is_told_too(monkeypatch):
    """It may sort, or wait for another process: the line comes all the same."""
    monkeypatch.setattr(progress, "EVERY", 0.05)
    stream = io.StringIO()
    follow(slowly(1, 0.3), "reading", None, console_into(stream))
    assert stream.getvalue().count("reading, 0 s so far\n") >= 2


def test_work_that_fails_is_not_done():
    """A last line that says done would be believed."""

    def breaks():
        yield 1
        raise OSError("no space left")

    stream = io.StringIO()
    with pytest.raises(OSError, match="no space"):
        follow(breaks(), "reading", 3, console_into(stream))
    assert stream.getvalue() == "reading: 3 to do\n"


def test_who_does_not_show_is_silent_and_stays_so():
    """One process on each machine speaks; the others share its work."""
    stream = io.StringIO()
    console = console_into(stream)
    follow(slowly(2, 0.0), "reading", 2, console, shown=False)
    assert stream.getvalue() == ""
    assert console.quiet is False
    console.quiet = True
    follow(slowly(1, 0.0), "reading", 1, console)
    assert stream.getvalue() == "reading: 1 to do\nreading: 10 done\n"
    assert console.quiet is True


@pytest.mark.parametrize(("seconds", "told"), [(0.4, "0 s"), (59.4, "59 s"), (185, "3 min 05 s"), (7620, "2 h 07 min")])
def test_times_are_told_in_units_that_matter(seconds, told):
    """12,345 s left is a sum to do in one's head."""
    assert progress.duration(seconds) == told


def test_passing_work_leaves_a_log_as_it_was(monkeypatch):
    """Two lines for each of a task's lists of texts, at each evaluation, would bury the scores."""
    stream = io.StringIO()
    with counting("evaluating", 2, console_into(stream), passing=True) as count:
        count.reach(2)
    assert stream.getvalue() == ""
    monkeypatch.setattr(progress, "EVERY", 0.05)
    with counting("evaluating", 2, console_into(stream), passing=True) as count:
        count.reach(1)
        time.sleep(0.2)
    assert "evaluating: 1 of 2" in stream.getvalue()


def test_passing_work_has_a_bar_while_it_lasts():
    """On a terminal two minutes of nothing look like a hang."""
    stream = io.StringIO()
    terminal = Console(file=stream, force_terminal=True, width=80)
    with counting("evaluating stsb (1 of 5)", 30, terminal, passing=True) as count:
        count.reach(20)
        time.sleep(0.3)
    assert "evaluating stsb (1 of 5)" in stream.getvalue()
    assert "20/30" in stream.getvalue()


@pytest.mark.parametrize(("seconds", "told"), [(0.4, "0:00:00"), (61, "0:01:01"), (43_533.2, "12:05:33"), (360_000, "100:00:00")])
def test_a_clock_has_seconds(seconds, told):
    """What a row of training says is left."""
    assert progress.clock(seconds) == told


@pytest.mark.parametrize(
    ("after", "before", "told", "style"),
    [(0.712, 0.7, "+1.2", "green"), (0.7, 0.712, "-1.2", "red"), (0.7001, 0.7, "+0.0", ""), (0.6999, 0.7, "+0.0", "")],
)
def test_rises_and_falls_are_told_apart(after, before, told, style):
    """A fall in the colour of a rise, or a zero with a colour or a minus, misleads at a glance."""
    points = progress.in_points(after, before)
    assert (points.plain, str(points.style)) == (told, style)


def drawn(picture):
    """What a picture of a bar looks like."""
    stream = io.StringIO()
    Console(file=stream, width=100).print(picture)
    return stream.getvalue()


@pytest.mark.parametrize("passing", [False, True])
def test_a_notebook_has_a_bar_in_its_cell(monkeypatch, passing):
    """There is no cursor to move, and rich's own bar needs widgets: it would show nothing, or a line for each step."""
    pytest.importorskip("IPython")
    pictures = []

    class Cell:
        def update(self, picture):
            pictures.append(drawn(picture))

    monkeypatch.setattr("IPython.display.display", lambda picture, **_: pictures.append(drawn(picture)) or Cell())
    monkeypatch.setattr(progress, "REDRAWN", 0.05)
    console = Console(file=io.StringIO(), force_jupyter=True, force_terminal=False)
    with counting("embedding", 100, console, passing=passing) as count:
        for done in range(1, 101):
            time.sleep(0.002)
            count.reach(done)
    assert 3 <= len(pictures) < 50  # in its place, and not each time
    assert "embedding" in pictures[0]
    assert "0/100" in pictures[0]
    assert any("━" in picture and "100/100" not in picture for picture in pictures[1:-1])
    assert ("100/100" in pictures[-1]) == (not passing)


def test_a_notebook_that_is_not_to_speak_shows_no_bar(monkeypatch):
    """Of several processes one speaks."""
    pytest.importorskip("IPython")
    monkeypatch.setattr("IPython.display.display", lambda *_, **__: pytest.fail("a bar"))
    console = Console(file=io.StringIO(), force_jupyter=True, force_terminal=False)
    follow(slowly(2, 0.0), "reading", 2, console, shown=False)


def test_a_terminal_obeys_no_text_of_the_data():
    """A row of the web could set the title of a terminal, clear it, or hide what is said of it."""
    stream = io.StringIO()
    shown = Terminal(file=stream, force_terminal=True, width=60, color_system=None)
    hostile = "a\x1b]0;mine\x07b\x9b2Jc\u202ed"
    table = Table()
    table.add_row(hostile, Text(hostile))
    shown.print(hostile, Text(hostile), table, "naïve 日本\u3000語 \U0001f468\u200d\U0001f469", highlight=False)
    text = stream.getvalue()
    assert not {*text} & {"\x1b", "\x07", "\x9b", "\u202e"}
    assert "a\\x1b]0;mine" in text
    assert "naïve 日本\u3000語 \U0001f468\u200d\U0001f469" in text
    fault = str(Fault(f"{hostile}.jsonl", hostile, "a text", "write one"))
    assert "\\x1b]0;mine\\x07b\\x9b2Jc\\u202ed" in fault
    assert "\x1b" not in fault
