"""What a shell completes words to, where these are names of ours: keys and values of the YAML, steps of a run.

What is returned need not begin as the word does: typer looks.
"""

import io
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

import typer

from gist_train.config.errors import UserError
from gist_train.config.reference import all_paths, fixed_values, without_indices
from gist_train.run_folder import Run, config_and_run

VARIABLE = "_GIST_TRAIN_COMPLETE"
"""Set by the shell that asks for a completion."""


def paths(incomplete: str) -> list[str]:
    """Keys of the YAML that begin so. Indices of lists stay as they were typed."""
    typed = without_indices(incomplete)
    return [incomplete + path.removeprefix(typed) for path in all_paths() if path.startswith(typed)]


def settings(incomplete: str) -> list[str]:
    """What a `--set` may be: a key, with its values where these are a few words; others are the user's own."""
    typed, equals, _ = incomplete.partition("=")
    keys = [typed] if equals else paths(typed)
    if len(keys) > 1:
        return [f"{key}=" for key in keys]
    return [f"{key}={value}" for key in keys for value in fixed_values(key) or ([] if equals else [""])]


def steps(context: typer.Context) -> list[str]:
    """Steps of which the run that is named before has a checkpoint."""
    path = first_argument(context)
    if path is None:
        return []
    try:
        run = Run(path) if path.is_dir() else config_and_run(path, [])[1]
        return [str(step) for step in run.saved_steps()]
    except (OSError, UserError):
        return []


def first_argument(context: typer.Context) -> Path | None:
    """What was typed before that is no option, or its default."""
    if context.args:  # where the option to complete stands last: its missing value keeps typer from going on
        return Path(context.args[0])
    value = context.params.get(context.command.params[0].name or "")
    return next(iter(value), None) if isinstance(value, list) else value


def how_to_resume(context: typer.Context) -> list[str]:
    """What `--resume` takes."""
    return ["auto", "never", *steps(context)]


def several_steps(context: typer.Context, incomplete: str) -> list[str]:
    """What `--steps` takes: a word, or steps with commas between them."""
    before, comma, _ = incomplete.rpartition(",")
    return [*([] if comma else ["all", "selected"]), *(f"{before}{comma}{step}" for step in steps(context))]


@contextmanager
def for_a_shell() -> Iterator[None]:
    """Within it a shell that asks for a completion is answered: without warnings, which would stand in what a person types.

    Bash cuts words at each "=", and takes an answer for what stands behind the last one; typer knows neither.
    """
    if VARIABLE not in os.environ:
        yield
        return
    there = _rejoined() if os.environ[VARIABLE] == "complete_bash" else ""
    answer, level = io.StringIO(), logging.root.manager.disable
    logging.disable()
    try:
        with redirect_stdout(answer):
            yield
    finally:
        logging.disable(level)
        for line in answer.getvalue().splitlines():
            print(line.removeprefix(there))


def _rejoined() -> str:
    """Makes the words that bash asks about whole. Returns what it has already of the one that it asks for: "key="."""
    cut, whole, asked = os.environ["COMP_WORDS"].split("\n"), list[str](), 0
    if "=" not in cut:
        return ""
    for number, word in enumerate(cut):
        if whole and "=" in (word, cut[number - 1]):
            whole[-1] += word
        else:
            whole.append(word)
        if number == int(os.environ["COMP_CWORD"]):
            asked = len(whole) - 1
    os.environ.update(COMP_WORDS="\n".join(whole), COMP_CWORD=str(asked))
    value = whole[asked].partition("=")[2] if whole[asked].startswith("-") else whole[asked]
    return value[: value.rfind("=") + 1]
