"""docs/cli.md is the program's, and names every option."""

import typer
from conftest import ROOT

from gist_train.cli import app
from scripts.cli_page import page


def test_the_page_of_commands_is_current():
    """A page of before has people type what is refused: run `python scripts/cli_page.py > docs/cli.md`."""
    assert (ROOT / "docs" / "cli.md").read_text(encoding="utf-8") == page()


def test_every_option_has_a_row():
    """An option without a row is one that nobody finds without a terminal."""
    parts = page().split("\n## ")[1:]
    program = typer.main.get_command(app)
    sections = {part.split("\n", 1)[0]: part for part in parts}
    assert [*sections] == ["gist-train", *program.commands]
    for name, command in program.commands.items():
        options = [option for one in command.params for option in (*one.opts, *one.secondary_opts) if option.startswith("-")]
        assert len(options) >= (name != "explain")
        for option in options:
            (row,) = [line for line in sections[name].splitlines() if f"`{option}`" in line]
            assert row.count(" | ") == 3, row
