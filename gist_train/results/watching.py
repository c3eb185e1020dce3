"""Evaluates checkpoints as they land, in a process of its own, so that training never waits for a figure."""

import time
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from gist_train.config.schema import Config
from gist_train.results.comparison import tasks_of
from gist_train.results.measuring import Figures, figures_line
from gist_train.training.checkpoint import saved_steps

ENDED = "ended.json"
"""There while a training has come to its end: {"step": N}. Not where it was interrupted: then it may go on."""
LOOK_EVERY = 2.0
"""Seconds between two looks at the run folder."""


def watch(config: Config, run: Path) -> Iterator[tuple[int, Figures | None]]:
    """Yields (step, figures) of the base model, step 0, and of every checkpoint as it lands; the oldest first.

    Figures are None for a checkpoint that was deleted before its turn came: raise checkpoint.keep_last where that happens. It
    waits for a run that is not there yet, and ends when the training has ended and its last checkpoint is measured.

    Raises:
        UserError: no tasks, their files have faults, or a checkpoint is damaged.
    """
    measuring = tasks_of(config)
    done: set[int] = set()
    while True:
        # Asked before the folder is looked at: what landed before the end is seen.
        ended = (run / ENDED).exists()
        saved = saved_steps(run)
        done &= {0, *saved}  # a run that went back takes its later steps anew
        if run.exists() and 0 not in done:
            yield 0, measuring.of_base(run, config.model)
            done.add(0)
        for step in saved:
            if step not in done:
                yield step, measuring.of_checkpoint(run, step)
                done.add(step)
        if ended and done >= {0, *saved_steps(run)}:
            return
        time.sleep(LOOK_EVERY)


def watched(config: Config, run: Path, console: Console) -> dict[str, Figures]:
    """Watches to the end, a line a checkpoint on `console`. Returns "base" and "step N" -> figures."""
    console.print(f"waiting for checkpoints in {run}, until its training ends", soft_wrap=True)
    figures: dict[str, Figures] = {}
    for step, found in watch(config, run):
        name = f"step {step}" if step else "base"
        if found is None:
            console.print(f"{name}: deleted before its turn came; a higher checkpoint.keep_last keeps it longer", soft_wrap=True)
            continue
        figures[name] = found
        console.print(figures_line(name, found), soft_wrap=True, highlight=False)
    return figures
