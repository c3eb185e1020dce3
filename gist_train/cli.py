"""Words in, exit code out: 0 done, 1 the work failed, 2 the user's input is wrong, 128 + n after signal n."""

import errno
import logging
import os
import signal
import sys
from typing import Annotated, TextIO, cast

import typer
from safetensors import SafetensorError

from gist_train.bug_report import bug_report
from gist_train.commands.completion import for_a_shell
from gist_train.commands.data import data
from gist_train.commands.examples import FIRST, add_examples
from gist_train.commands.options import leave_to_one
from gist_train.commands.results import results
from gist_train.commands.tools import tools
from gist_train.commands.training import training
from gist_train.config.errors import Fault, UserError
from gist_train.config.secrets import HidingStream, hide_command_line
from gist_train.data.files import no_room
from gist_train.environment import launched_together, let_segments_expand
from gist_train.memory import MemoryShortageError, asked_for
from gist_train.progress import say, terminal
from gist_train.pulse import RankFailedError
from gist_train.telling import tell
from gist_train.training.signals import Stopped, StopSignal
from gist_train.version import __version__

GROUPS = (data, training, results, tools)
app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Fine-tunes text-embedding models with GISTEmbed: a frozen guide decides which in-batch samples may serve as negatives.",
    epilog=f"Example: {FIRST}",
)
for _group in GROUPS:
    app.add_typer(_group)
add_examples(*GROUPS)
SHARED = ("prepare", "mine", "train", "extend", "evaluate")
"""Commands that several processes do together."""
INTERRUPTED = 128 + signal.SIGINT
KEPT = {
    "init": "Nothing was written.",
    "prepare": "What was read and embedded is kept: the same command goes on from there.",
    "plan": "What was read is kept: the same command goes on from there.",
    "mine": "What was read, embedded and compared is kept, and no file was written: the same command goes on from there.",
    "audit": "What was read and embedded is kept, and each file that is there is whole: the same command goes on from there.",
    "evaluate": "Scores of a run's checkpoints that were measured are kept in its folder: the same command goes on from there.",
    "select": "The scores that were measured are kept, and selected.json is whole: the same command goes on from there.",
    "export": "The folder is whole: the new export if its path was printed, else as it was. The same command completes a push.",
    "report": "The page is as it was before.",
}
"""What is left of a command that was stopped; `train` says it itself."""


@app.callback(invoke_without_command=True)
def _on_command(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", metavar="", help="Print the version and end.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", metavar="", help="With --version: for a report of a fault.")] = False,
) -> None:
    if version:
        typer.echo(bug_report(context.obj) if verbose else __version__)
        raise typer.Exit
    if context.invoked_subcommand is None:
        raise UserError(Fault("--verbose", "alone", "with --version, or a command", "gist-train --version --verbose"))
    if context.invoked_subcommand not in SHARED:
        leave_to_one(context.invoked_subcommand)
    elif launched_together() and os.environ["RANK"] == "0":
        say(terminal(), f"gist-train {__version__}: {context.invoked_subcommand} by {os.environ['WORLD_SIZE']} processes")


def main() -> None:
    """Runs the command line and exits."""
    words, before = sys.argv[1:], dict(os.environ)
    hide_command_line()
    # For good: what ends this process in an unforeseen way is told after we are gone.
    sys.stdout, sys.stderr = (cast(TextIO, HidingStream(stream)) for stream in (sys.stdout, sys.stderr))
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    # Their bars and notices for every folder that is read would tear ours.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    let_segments_expand()  # before torch is imported
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # each retry of each request, twice
    try:
        with StopSignal(), for_a_shell():
            app(args=words, obj=before)
    except UserError as error:
        tell(error)
        sys.exit(2)
    except RankFailedError as failed:
        if not failed.said:
            tell(failed)
        sys.exit(failed.code)
    except (ArithmeticError, MemoryError, OSError, RuntimeError, SafetensorError) as error:
        if not isinstance(error, MemoryShortageError) and (asked := asked_for(error)):
            error = MemoryShortageError(f"gist-train {' '.join(sys.argv[1:2])}", asked, [])
        if isinstance(error, RuntimeError):
            raise
        tell(error)
        if no_room(error):
            safe = "What was whole before is whole now, and what is half written is removed or is left out when it is read."
            fix = "Make room, or set output_dir and cache_dir to another disk, and run the same command again."
            terminal().print(f"{safe} {fix}", highlight=False, soft_wrap=True)
        elif isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            fix = "This user may not do that there: name another folder, or change its rights, and run the same command again."
            terminal().print(fix, highlight=False, soft_wrap=True)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except Stopped as stopped:
        _tell_what_is_kept(words)
        sys.exit(128 + stopped.number)
    except SystemExit as end:
        if end.code == INTERRUPTED:  # typer makes it of Ctrl-C
            _tell_what_is_kept(words)
        raise


def _tell_what_is_kept(words: list[str]) -> None:
    if words[0] in KEPT:
        say(terminal(), f"Stopped. {KEPT[words[0]]}")


if __name__ == "__main__":
    main()
