"""Help: what fits a screen is read, and an example is what is typed."""

import os
import re
import shlex

import pytest
import typer
from support.running import gist

from gist_train.cli import app
from gist_train.commands.examples import EXAMPLES, FIRST

COMMANDS = typer.main.get_command(app).commands
SCREEN = 36
"""Lines: the longest has 35."""


@pytest.fixture(autouse=True)
def eighty_columns(monkeypatch):
    """A screen of 80 columns."""
    monkeypatch.setitem(os.environ, "COLUMNS", "80")


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_fits_a_screen(command):
    """What scrolled away is not read."""
    ended = gist(*([command] if command else []), "--help")
    lines = ended.out.splitlines()
    assert ended.code == 0
    assert 10 < len(lines) <= SCREEN
    assert max(map(len, lines)) <= 80
    (example,) = [line.strip() for line in lines if line.startswith(" Example: ")]
    assert example.removeprefix("Example: ") == (EXAMPLES[command] if command else FIRST)


def test_each_command_has_a_line():
    """A list of thirteen things is looked through, one of twenty-five lines is not."""
    lines = [line.strip("│ ") for line in gist("--help").out.splitlines()]
    for name, command in COMMANDS.items():
        first = command.help.split("\n\n")[0]
        assert f"{name:8}  {first}" in lines


@pytest.mark.parametrize("command", COMMANDS)
def test_help_says_all_of_each_option(command):
    """Words in square brackets are taken for colours, and are not there; a word that is too wide for its column is cut in two."""
    out = gist(command, "--help").out
    assert "…" not in out
    # Columns have two spaces between them, and words have one.
    cells = [re.split(r" {2,}", line.strip("│ ")) for line in out.splitlines() if line.startswith("│")]
    told, beside = " ".join(row[-1] for row in cells), {cell for row in cells for cell in row[:-1]}
    parameters = COMMANDS[command].params
    assert parameters
    assert [one.name for one in parameters if one.help not in told] == []
    assert [one.name for one in parameters if one.metavar and not any(cell.startswith(one.metavar) for cell in beside)] == []
    assert told.count("[default: ") == len(re.findall(r"\[default: [^\]]+\]", told))


@pytest.mark.parametrize("command", COMMANDS)
def test_the_example_of_a_command_is_understood(command):
    """An example that is refused is worse than none: one of its options was renamed."""
    program, name, *words = shlex.split(EXAMPLES[command])
    assert (program, name) == ("gist-train", command)
    COMMANDS[name].make_context(name, words)
