"""Commands that train and measure: train, extend and evaluate."""

import json
from typing import Annotated

import typer

from gist_train.commands.completion import how_to_resume, several_steps
from gist_train.commands.completion import steps as steps_of
from gist_train.commands.options import (
    AsJson,
    ConfigPath,
    RunPath,
    RunPaths,
    Set,
    Timeout,
    answering,
    begin,
    go_on_alike,
    leave_to_one,
)
from gist_train.config.errors import Fault, UserError
from gist_train.config.fields import expanded
from gist_train.config.loading import load_config
from gist_train.config.schema import Config
from gist_train.environment import keep_kernels, launched_together
from gist_train.progress import Terminal, terminal
from gist_train.run_folder import config_and_run

training = typer.Typer()


@training.command()
def train(
    config: ConfigPath,
    set_: Set = None,
    resume: Annotated[
        str,
        typer.Option(
            help="auto: from the newest checkpoint, if any; never: refuse a non-empty folder; or from a step.",
            metavar="HOW",
            autocompletion=how_to_resume,
        ),
    ] = "auto",
    timeout: Timeout = None,
) -> None:
    """Train. The same command resumes after Ctrl-C, a crash or a reboot."""
    err = terminal()
    if not launched_together():
        begin("train", load_config(config, set_ or []))
    from gist_train.training_run import launched, train_on

    with launched(timeout) as ranks:
        loaded = load_config(config, set_ or [])  # one process of several may read another file
        keep_kernels(loaded.training.precision)
        code = train_on(ranks, loaded, resume=resume, console=err)
    raise typer.Exit(code)


@training.command()
def extend(
    run: RunPath,
    epochs: Annotated[int, typer.Option(help="Further passes over the data.", min=1, metavar="N", show_default=False)],
    name: Annotated[
        str | None, typer.Option(help="Of the new run; by default the first one's and -more.", metavar="NAME")
    ] = None,
    step: Annotated[
        int | None,
        typer.Option(
            help="The checkpoint to begin with; by default the selected one, else the newest.",
            metavar="N",
            autocompletion=steps_of,
        ),
    ] = None,
    set_: Set = None,
    timeout: Timeout = None,
) -> None:
    """Give a run's model more epochs, in a run of its own.

    It stands beside the first. The same command resumes.
    """
    config, first = config_and_run(run, [])
    if not launched_together():
        begin("extend", config)
    from gist_train.results.extension import extended
    from gist_train.training_run import launched, train_on

    err = terminal()

    def more() -> Config:
        return extended(config, first, epochs=epochs, name=name, step=step, overrides=set_ or [], console=err)

    with launched(timeout) as ranks:
        err.quiet = ranks.rank != 0
        made = more() if ranks.rank == 0 else None
        ranks.first_says("")  # its start is there for all
        loaded = made or more()
        keep_kernels(loaded.training.precision)
        code = train_on(ranks, loaded, console=err)
    raise typer.Exit(code)


@training.command()
def evaluate(
    runs: RunPaths,
    set_: Set = None,
    model: Annotated[
        list[str] | None, typer.Option(help="A folder or hub id; may be repeated.", metavar="MODEL", show_default=False)
    ] = None,
    steps: Annotated[
        str | None,
        typer.Option(
            help="Checkpoints: all, selected, or N,N,...", metavar="WHICH", autocompletion=several_steps, show_default=False
        ),
    ] = None,
    truncate_dim: Annotated[
        list[int] | None,
        typer.Option(
            help="Also evaluate embeddings cut to so many dimensions; may be repeated.", min=1, metavar="N", show_default=False
        ),
    ] = None,
    watch: Annotated[
        bool, typer.Option("--watch", metavar="", help="Evaluate checkpoints as they are written, until training ends.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Evaluate models on the config's tasks, side by side.

    By default base, the selected or newest checkpoint and the guide; of several runs, each one's selected or newest checkpoint.
    """
    err = terminal()
    keep_kernels()
    if len(runs) > 1 and (model or steps or watch):
        raise UserError(Fault("--model, --steps or --watch", "several runs", "one run with it", "name one run"))
    if watch and (model or steps or truncate_dim):
        raise UserError(Fault("--watch", "another option that names models", "--watch alone", "leave the other one out"))
    if watch:
        leave_to_one("evaluate --watch")
    if not launched_together():
        for run in runs:
            begin("evaluate", config_and_run(run, set_ or [])[0])
    with answering(as_json) as out:
        from gist_train.results.comparison import compare, compare_runs, comparison_table, joined, watched
        from gist_train.training_run import launched

        with launched(None) as ranks:
            together = [config_and_run(run, set_ or []) for run in runs]
            for loaded, _ in together:
                go_on_alike(ranks, loaded, err)
            if watch:
                models = watched(*together[0], err)
            else:
                named, dimensions, share = [expanded(name) for name in model or []], truncate_dim or [], (ranks.rank, ranks.size)
                if len(together) > 1:
                    compared = compare_runs(together, dimensions=dimensions, console=err, share=share)
                else:
                    one = together[0]
                    compared = compare(*one, models=named, steps=steps, dimensions=dimensions, console=err, share=share)
                models = joined([json.loads(said) for said in ranks.all_say(json.dumps(dict(compared)))])
        if ranks.rank != 0:
            return
        if as_json:
            print(json.dumps(next(iter(models.values())) if len(models) == 1 else models), file=out)
        else:
            Terminal().print(comparison_table(models))
