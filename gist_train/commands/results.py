"""Commands after a training: select, report and export."""

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from gist_train.commands.completion import steps
from gist_train.commands.options import AsJson, RunPath, RunPaths, Set, answering, begin
from gist_train.config.errors import Fault, UserError
from gist_train.progress import Terminal, say, terminal
from gist_train.run_folder import config_and_run

results = typer.Typer()


@results.command()
def select(
    config: RunPath,
    set_: Set = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            help="stsb/spearman, or with a weight stsb/spearman=2; the mean of several.", metavar="METRIC", show_default=False
        ),
    ] = None,
    rule: Annotated[
        tuple[str, float] | None,
        typer.Option(
            metavar="NAME SHARE",
            help="loss-percentile 0.025: by training loss, as the recipe's authors chose.",
            show_default=False,
        ),
    ] = None,
    around: Annotated[
        int | None, typer.Option(help="Choose near it; without a metric, choose it.", min=0, metavar="STEP")
    ] = None,
    window: Annotated[int | None, typer.Option(help="So many steps before and after it.", min=0, metavar="N")] = None,
    average: Annotated[int | None, typer.Option(help="Also try the average of K checkpoints' weights.", metavar="K")] = None,
    average_of: Annotated[
        Literal["best", "last"] | None,
        typer.Option(help="Which K: best (default) or last.", metavar="WHICH", show_default=False),
    ] = None,
    merge_base: Annotated[
        float | None, typer.Option(help="Also try mixing in this share of the base model's weights (0 to 1).", metavar="X")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Choose a run's final model, and say why.

    With a confidence interval; the checkpoint is kept.
    """
    err = terminal()
    loaded, run = config_and_run(config, set_ or [], selects=True)
    begin("select", loaded)
    with answering(as_json) as out:
        from gist_train.results.criteria import criteria_of
        from gist_train.results.model_logging import select_and_log
        from gist_train.results.selection_table import selection_page

        criteria = criteria_of(
            loaded,
            metrics=metric or [],
            rule=rule,
            around=around,
            window=window,
            average=average,
            average_of=average_of,
            merge_base=merge_base,
        )
        selected = select_and_log(loaded, run, criteria, err)
        if as_json:
            print(json.dumps(selected.located(run).model_dump(mode="json", by_alias=True)), file=out)
        else:
            Terminal().print(selection_page(selected))


@results.command()
def report(
    runs: RunPaths,
    to: Annotated[
        Path | None,
        typer.Option(help="The .html file to write; of one run RUN/report.html by default.", metavar="FILE", show_default=False),
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", metavar="", help="Serve it on this machine while runs train.")] = False,
) -> None:
    """Write a page of a run, or of several side by side.

    One HTML file that opens anywhere.
    """
    err = terminal()
    if follow and to is not None:
        raise UserError(Fault("--to", "with --follow, which writes no file", "one of both", "leave the other one out"))
    named = [config_and_run(one, []) for one in runs]
    for loaded, _ in named:
        begin("report", loaded)
    from gist_train.reporting.page import write_report
    from gist_train.reporting.serving import serve

    folders = [folder for _, folder in named]
    if follow:
        serve(folders, err)
        return
    err.print(f"{write_report(folders, to)}", highlight=False, soft_wrap=True)


@results.command()
def export(
    config: RunPath,
    set_: Set = None,
    step: Annotated[
        int | None,
        typer.Option(
            help="The checkpoint; by default the selected one, else the newest.",
            metavar="N",
            autocompletion=steps,
            show_default=False,
        ),
    ] = None,
    to: Annotated[
        Path | None, typer.Option(help="By default export/ in the run folder.", metavar="DIR", show_default=False)
    ] = None,
    format_: Annotated[
        Literal["sentence-transformers", "onnx"],
        typer.Option(
            "--format",
            help="sentence-transformers (default), or onnx beside it, checked against it.",
            metavar="FORMAT",
            show_default=False,
        ),
    ] = "sentence-transformers",
    quantize: Annotated[
        bool, typer.Option("--quantize", metavar="", help="With onnx: 8-bit weights too, and what they lose on STS.")
    ] = False,
    push_to_hub: Annotated[
        str | None,
        typer.Option(help="Push it there, with the token of HF_TOKEN or the login.", metavar="USER/NAME", show_default=False),
    ] = None,
    private: Annotated[
        bool | None,
        typer.Option(
            "--private/--no-private",
            metavar="",
            help="Of a new repository; else as the account is set.",
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", metavar="", help="Write it, check the token, say what would be pushed.")
    ] = False,
) -> None:
    """Write the selected model for sentence-transformers, with a card.

    The newest checkpoint where none is selected.
    """
    err = terminal()
    loaded, run = config_and_run(config, set_ or [])
    begin("export", loaded)
    from gist_train.results.export import export_model
    from gist_train.results.onnx import plan_onnx
    from gist_train.results.push import check_push, planned_push, push_folder

    onnx = plan_onnx(loaded, format_, quantize=quantize)
    check_push(push_to_hub, private, dry_run=dry_run)
    folder = export_model(run, step, to or run.export, evaluation=loaded.evaluation, onnx=onnx, hub_id=push_to_hub, console=err)
    print(folder)
    if push_to_hub is not None and dry_run:
        say(err, str(planned_push(folder, push_to_hub, private=private)))
    elif push_to_hub is not None:
        say(err, f"pushed: {push_folder(folder, push_to_hub, private=private, console=err)}")
