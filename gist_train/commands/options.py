"""What commands share: their arguments, how they begin, and where their answers go."""

import ctypes
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TextIO

import typer
from rich.console import Console

from gist_train.commands.completion import settings
from gist_train.config.schema import Config
from gist_train.environment import launched_together
from gist_train.progress import say, terminal
from gist_train.version import __version__

if TYPE_CHECKING:
    from gist_train.training.ranks import Ranks  # torch is slow to import


ConfigPath = Annotated[Path, typer.Argument(help="The YAML of a run.", metavar="CONFIG", show_default=False)]
RunPaths = Annotated[
    list[Path], typer.Argument(help="Run folders, or the YAMLs that made them.", metavar="RUN...", show_default=False)
]
RunPath = Annotated[Path, typer.Argument(help="A run folder, or the YAML that made it.", metavar="RUN", show_default=False)]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set", help="key.sub=value; may be repeated.", metavar="KEY=VALUE", autocompletion=settings, show_default=False
    ),
]
Timeout = Annotated[
    float | None,
    typer.Option(
        help="After so long without progress a process counts as hung; 600 by default.", metavar="SECONDS", show_default=False
    ),
]
AsJson = Annotated[bool, typer.Option("--json", metavar="", help="Print one JSON object, and nothing else on stdout.")]
"""Like all options without a value it has an empty metavar: help would say <bool>, which nobody may type."""


def leave_to_one(command: str) -> None:
    """Ends all processes of a launch but the first, which goes on as if it had been started alone."""
    if launched_together():
        if os.environ["RANK"] != "0":
            raise typer.Exit
        terminal().print(f"{command} is the work of one process: the others of this launch have ended")
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
            os.environ.pop(name, None)  # else torch would wait for them


def go_on_alike(ranks: "Ranks", config: Config, console: Console) -> None:
    """Refuses processes with other configs; of those that go on the first alone speaks."""
    from gist_train.training.alike import refuse_unlike_configs

    refuse_unlike_configs(ranks, config)
    console.quiet = ranks.rank != 0


def begin(command: str, config: Config) -> Config:
    """Says what begins, before anything slow is imported, and gives the config back, which has been read and has no fault."""
    announce(command, config.name)
    return config


def announce(command: str, what: str) -> None:
    """Says that a command begins, and with what."""
    say(terminal(), f"gist-train {__version__}: {command} {what}")


@contextmanager
def answering(as_json: bool) -> Iterator[TextIO]:
    """Where a command's answer goes. One that is JSON is written at the end, alone: what else is printed until then, by
    libraries, their C code or processes that they start, goes to stderr."""
    out = sys.stdout
    if not as_json:
        yield out
        return
    answer = io.StringIO()
    with redirect_stdout(sys.stderr), _descriptor_to_stderr(out):
        yield answer
    out.write(answer.getvalue())
    out.flush()


@contextmanager
def _descriptor_to_stderr(out: TextIO) -> Iterator[None]:
    """Has file descriptor 1 lead where 2 does: that is what C code and processes that are started write to."""
    out.flush()
    kept = os.dup(1)
    try:
        os.dup2(2, 1)
        yield
    finally:
        ctypes.CDLL(None).fflush(None)  # what C code has written and libc has not
        os.dup2(kept, 1)
        os.close(kept)
