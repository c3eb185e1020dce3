"""docs/cli.md, made from the command line itself: every command with its arguments, options and defaults.

python scripts/cli_page.py > docs/cli.md
"""

from collections.abc import Iterator
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import typer

from gist_train.cli import app

HEAD = """\
# Command line

Made from the program by `python scripts/cli_page.py`; a test holds it to be current. `gist-train COMMAND --help` prints the same.
What the commands are for: [Commands, exit codes, files](runs.md).
"""
WORDS = {int: "N", float: "X", str: "TEXT"}


def page() -> str:
    """The whole page, as Markdown."""
    program = typer.main.get_command(app)
    lines = [HEAD, "## gist-train\n", *_options(program)]
    for name, command in program.commands.items():
        arguments = [one for one in command.params if one.param_type_name == "argument"]
        shown = " ".join(one.metavar if one.required else f"[{one.metavar}]" for one in arguments)
        lines += [f"\n## {name}\n", f"{_cell(command.help)}\n", "```text", f"gist-train {name} {shown} [OPTIONS]", "```\n"]
        lines += [*_options(command), f"\n{command.epilog.replace(': ', ': `', 1)}`"]
    return "\n".join(lines) + "\n"


def _options(command: Any) -> Iterator[str]:
    """A table of what a command takes. Its function's annotations say what values are: releases of typer say it in other ways."""
    hints = get_type_hints(command.callback)
    yield "| | value | default | |"
    yield "|---|---|---|---|"
    for one in command.params:
        if one.param_type_name == "argument":
            name, value = f"`{one.metavar}`", ""
        else:
            name = ", ".join(f"`{option}`" for option in (*one.opts, *one.secondary_opts))
            value = "" if one.is_flag or one.name not in hints else f"`{one.metavar or _word(hints[one.name])}`"
        default = f"`{one.default}`" if one.default not in (None, False, "") else ""
        yield f"| {name} | {value} | {default} | {_cell(one.help)} |"


def _word(hint: Any) -> str:
    """What stands for a value of this type."""
    options = [option for option in get_args(hint) if option is not type(None)]
    if get_origin(hint) in (Union, UnionType, list):
        return _word(options[0])
    return " or ".join(options) if get_origin(hint) is Literal else WORDS.get(hint, "PATH")


def _cell(text: str) -> str:
    """Text as Markdown shows it as it is, in a table too."""
    return " ".join(text.split()).replace("<", "&lt;").replace("|", "\\|").replace("*", "\\*")


if __name__ == "__main__":
    print(page(), end="")
