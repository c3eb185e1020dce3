"""Words in, exit code out: 0 done, 1 the work failed, 2 the user's input is wrong, 128 + n after signal n."""

import json
import logging
import os
import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TextIO, cast

import typer
from safetensors import SafetensorError

from gist_train.bug_report import bug_report
from gist_train.cli_examples import add_examples
from gist_train.cli_tools import set_keys, tools
from gist_train.config.errors import Fault, UserError
from gist_train.config.fields import expanded
from gist_train.config.loading import load_config
from gist_train.config.schema import Config
from gist_train.config.secrets import HidingStream, hide_command_line
from gist_train.data.files import no_room
from gist_train.environment import FEW_KERNELS, KERNELS_OF_BF16, keep_kernels, let_segments_expand
from gist_train.memory import MemoryShortageError, asked_for
from gist_train.progress import Terminal, say, terminal
from gist_train.pulse import RankFailedError
from gist_train.run_folder import Run, config_and_run
from gist_train.telling import tell
from gist_train.training.signals import Stopped, StopSignal
from gist_train.version import __version__

if TYPE_CHECKING:
    from gist_train.training.ranks import Ranks  # torch is slow to import

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Fine-tunes text-embedding models with GISTEmbed: a frozen guide decides which in-batch samples may serve as negatives.",
)
app.add_typer(tools)
err = terminal()
SHARED = ("prepare", "mine", "train", "extend", "evaluate")
"""Commands that several processes do together."""
INTERRUPTED = 128 + signal.SIGINT
KEPT = {
    "init": "Nothing was written.",
    "prepare": "What was read and embedded is kept: the same command goes on from there.",
    "plan": "What was read is kept: the same command goes on from there.",
    "mine": "What was read, embedded and compared is kept, and no file was written: the same command goes on from there.",
    "audit": "What was read and embedded is kept, and no file was begun that is not whole: the same command goes on from there.",
    "evaluate": "Scores of a run's checkpoints that were measured are kept in its folder: the same command goes on from there.",
    "select": "The scores that were measured are kept, and the old choice stays: the same command goes on from there.",
    "export": "The folder is as it was before.",
    "report": "The page is as it was before.",
}
"""What is left of a command that was stopped; `train` says it itself."""

ConfigPath = Annotated[Path, typer.Argument(help="The YAML of a run.", metavar="CONFIG", show_default=False)]
RunPaths = Annotated[
    list[Path], typer.Argument(help="Run folders, or the YAMLs that made them.", metavar="RUN...", show_default=False)
]
RunPath = Annotated[Path, typer.Argument(help="A run folder, or the YAML that made it.", metavar="RUN", show_default=False)]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set", help="key.sub=value; may be repeated.", metavar="KEY=VALUE", autocompletion=set_keys, show_default=False
    ),
]
Timeout = Annotated[
    float | None,
    typer.Option(help="Seconds without progress after which a process counts as hung; 600 by default.", show_default=False),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else on stdout.")]


@app.callback(invoke_without_command=True)
def _on_command(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and end.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="With --version: all that a report of a fault needs.")] = False,
) -> None:
    if version:
        typer.echo(bug_report() if verbose else __version__)
        raise typer.Exit
    if context.invoked_subcommand is None:
        raise UserError(Fault("--verbose", "alone", "with --version, or a command", "gist-train --version --verbose"))
    if context.invoked_subcommand not in SHARED:
        _leave_to_one(context.invoked_subcommand)
    elif context.invoked_subcommand in SHARED and _launched_together() and os.environ["RANK"] == "0":
        say(err, f"gist-train {__version__}: {context.invoked_subcommand} by {os.environ['WORLD_SIZE']} processes")


def _leave_to_one(command: str) -> None:
    """Ends all processes of a launch but the first, which goes on as if it had been started alone."""
    if _launched_together():
        if os.environ["RANK"] != "0":
            raise typer.Exit
        err.print(f"{command} is the work of one process: the others of this launch have ended")
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
            os.environ.pop(name, None)  # else torch would wait for them


def _launched_together() -> bool:
    """Whether this is one of several processes."""
    return os.environ.get("WORLD_SIZE", "1") != "1" and "RANK" in os.environ


def _go_on_alike(ranks: "Ranks", config: Config) -> None:
    """Refuses processes with other configs; of those that go on the first alone speaks."""
    from gist_train.training.alike import refuse_unlike_configs

    refuse_unlike_configs(ranks, config)
    err.quiet = ranks.rank != 0


def _begin(command: str, config: Config) -> Config:
    """Says what begins, before anything slow is imported, and gives the config back, which has been read and has no fault."""
    say(err, f"gist-train {__version__}: {command} {config.name}")
    return config


@contextmanager
def _answering(as_json: bool) -> Iterator[TextIO]:
    """Where a command's answer goes. While it works out one that is JSON, what libraries print there goes to stderr."""
    out = sys.stdout
    with redirect_stdout(sys.stderr) if as_json else nullcontext():
        yield out


@app.command()
def init(
    files: Annotated[list[Path], typer.Argument(help="Data files, or folders of them.", metavar="FILES", show_default=False)],
    to: Annotated[Path, typer.Option(help="The YAML to write.")] = Path("my-model.yaml"),
    model: Annotated[
        str | None, typer.Option(help="Student, hub id or local folder; by default what this machine trains.")
    ] = None,
    guide: Annotated[str | None, typer.Option(help="The guide, likewise; self; or none.")] = None,
    columns: Annotated[
        str | None, typer.Option(help="What columns are: anchor=A,positive=B; text=A,label=B; text1=A,text2=B,score=C.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the YAML if it is there.")] = False,
) -> None:
    """Look at your own files and write a commented starter YAML for them."""
    from gist_train.starter.models import pair_for
    from gist_train.starter.page import named_columns, starter_yaml, write_starter

    no_gpu = False
    if model is None or guide is None:  # only then is torch worth its seconds
        from gist_train.model.device import on_cpu

        no_gpu = on_cpu()
    pair = pair_for(model and expanded(model), guide and expanded(guide), on_cpu=no_gpu)
    named = None if pair.guide == "none" else pair.guide
    roles = {} if columns is None else named_columns(columns)
    write_starter(to, starter_yaml(files, model=pair.model, guide=named, to=to, columns=roles), force=force)
    err.print(f"wrote {to}. Read it, then: gist-train plan {shlex.quote(str(to))}", highlight=False, soft_wrap=True)


@app.command()
def prepare(config: ConfigPath, set_: Set = None, timeout: Timeout = None) -> None:
    """Build the corpus, the student's tokens and the guide's store. Other commands do what they need of this by themselves."""
    if not _launched_together():
        _begin("prepare", load_config(config, set_ or []))
    from gist_train.checks import check
    from gist_train.model.device import this_device
    from gist_train.preparation import prepare as prepare_all
    from gist_train.training.embedding import Processes
    from gist_train.training_run import launched

    keep_kernels(FEW_KERNELS)
    with launched(timeout) as ranks:
        loaded = load_config(config, set_ or [])
        _go_on_alike(ranks, loaded)
        check(loaded, err)
        prepared = prepare_all(loaded, this_device(), err, Processes(ranks.size, ranks.first_here))
    corpus, steps = prepared.corpus, prepared.plan.steps_per_epoch
    rows = f"{corpus.row_count:,} rows over {len(corpus.tasks):,} tasks, {corpus.text_count:,} unique texts"
    err.print(f"{rows}, {steps:,} steps per epoch: {corpus.folder}", soft_wrap=True)


@app.command()
def mine(
    config: ConfigPath,
    to: Annotated[Path, typer.Option(help="The file to write: .jsonl or .parquet.", metavar="FILE", show_default=False)],
    set_: Set = None,
    timeout: Timeout = None,
) -> None:
    """Write the training rows with the negatives that the guide finds for them, by data.hard_negatives."""
    if not _launched_together():
        _begin("mine", load_config(config, set_ or [], selects=False))
    from gist_train.checks import check
    from gist_train.data.writing import check_ending, write_rows
    from gist_train.hard_negatives import with_rules
    from gist_train.model.device import this_device
    from gist_train.preparation import mined_corpus
    from gist_train.training.embedding import Processes
    from gist_train.training_run import launched

    keep_kernels(FEW_KERNELS)
    with launched(timeout) as ranks:
        check_ending(to, "--to")
        loaded = with_rules(load_config(config, set_ or [], selects=False))
        _go_on_alike(ranks, loaded)
        check(loaded, err)
        corpus = mined_corpus(loaded, this_device(), err, Processes(ranks.size, ranks.first_here))
        if ranks.rank == 0:
            write_rows(corpus, to)
    if len(corpus.prompts) > 1 or corpus.scored:
        err.print(f"{to} has no prompts and no scores: these stay in the YAML and its files", soft_wrap=True)
    err.print(f"{corpus.row_count:,} rows: {to}", highlight=False, soft_wrap=True)


@app.command()
def audit(
    config: ConfigPath,
    set_: Set = None,
    margins: Annotated[str, typer.Option(help="Further margins to count masked candidates under, e.g. 0.05,0.1.")] = "",
    threshold: Annotated[
        list[str] | None, typer.Option(help="From which on a row is suspect; may be repeated.", metavar="KIND=NUMBER")
    ] = None,
    page: Annotated[
        Path | None, typer.Option(help="The .html file to write; OUTPUT_DIR/NAME-audit.html by default.", show_default=False)
    ] = None,
    write_suspects: Annotated[Path | None, typer.Option(help="A .jsonl or .parquet file to write suspect rows to.")] = None,
    write_clean: Annotated[Path | None, typer.Option(help="A .jsonl or .parquet file to write the other rows to.")] = None,
    as_json: AsJson = False,
) -> None:
    """Find rows that may be bad, by the guide's embeddings and by the texts, and say what the guide would mask."""
    loaded = _begin("audit", load_config(config, set_ or [], selects=False))
    with _answering(as_json) as out:
        from gist_train.auditing import audit as auditing
        from gist_train.auditing.html_page import keep_audit
        from gist_train.auditing.page import audit_page
        from gist_train.data.writing import check_ending
        from gist_train.model.device import this_device
        from gist_train.pages.rendering import check_folder

        if page is not None:
            check_folder(page, "--page")
        for to, option in ((write_suspects, "--write-suspects"), (write_clean, "--write-clean")):
            if to is not None:
                check_ending(to, option)
        thresholds = auditing.read_numbers(threshold or [], "--threshold")
        others = auditing.read_margins(margins)
        audited = auditing.audit(loaded, this_device(), err, margins=others, thresholds=thresholds)
        if write_suspects is not None:
            err.print(
                f"{auditing.write_suspects(audited, write_suspects):,} lines: {write_suspects}", highlight=False, soft_wrap=True
            )
        if write_clean is not None:
            rows = auditing.write_clean(audited, write_clean)
            err.print(f"{rows:,} rows, without prompts and scores: {write_clean}", highlight=False, soft_wrap=True)
        record = audited.record()
        err.print(f"page: {keep_audit(Run.of(loaded), record, page)}", highlight=False, soft_wrap=True)
        if as_json:
            print(record.model_dump_json(), file=out)
        else:
            Terminal().print(audit_page(audited), highlight=False)


@app.command()
def plan(
    config: ConfigPath,
    set_: Set = None,
    measure: Annotated[bool, typer.Option("--measure", help="Take five steps on this machine, for a time estimate.")] = False,
    as_json: AsJson = False,
) -> None:
    """Say what training will do, without training: steps, warm-up, dropped rows, tokens, memory, disk."""
    loaded = _begin("plan", load_config(config, set_ or []))
    with _answering(as_json) as out:
        from gist_train.planning.page import plan_page
        from gist_train.planning.plan import plan as make_plan

        planned = make_plan(loaded, measure=measure, console=err)
        if as_json:
            print(json.dumps(asdict(planned)), file=out)
        else:
            Terminal().print(plan_page(planned), highlight=False)


@app.command()
def train(
    config: ConfigPath,
    set_: Set = None,
    resume: Annotated[
        str, typer.Option(help="auto: resume from the newest checkpoint, if any; never: refuse a non-empty folder; or a step.")
    ] = "auto",
    timeout: Timeout = None,
) -> None:
    """Train. The same command resumes after Ctrl-C, a crash or a reboot."""
    if not _launched_together():
        _begin("train", load_config(config, set_ or []))
    from gist_train.training_run import launched, train_on

    with launched(timeout) as ranks:
        loaded = load_config(config, set_ or [])  # one process of several may read another file
        keep_kernels(KERNELS_OF_BF16 if loaded.training.precision == "bf16" else FEW_KERNELS)
        code = train_on(ranks, loaded, resume=resume, console=err)
    raise typer.Exit(code)


@app.command()
def evaluate(
    runs: RunPaths,
    set_: Set = None,
    model: Annotated[list[str] | None, typer.Option(help="A folder or hub id; may be repeated.", show_default=False)] = None,
    steps: Annotated[str | None, typer.Option(help="Checkpoints: all, selected, or N,N,...", show_default=False)] = None,
    truncate_dim: Annotated[
        list[int] | None,
        typer.Option(help="Also evaluate embeddings cut to this many dimensions; may be repeated.", min=1, show_default=False),
    ] = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Evaluate checkpoints as they are written, until training ends.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Evaluate models on the config's tasks: by default base, the selected or newest checkpoint and the guide, side by side.

    Of several runs, each one's selected or newest checkpoint stands beside the others'.
    """
    keep_kernels(FEW_KERNELS)
    if len(runs) > 1 and (model or steps or watch):
        raise UserError(Fault("--model, --steps or --watch", "several runs", "one run with it", "name one run"))
    if watch and (model or steps or truncate_dim):
        raise UserError(Fault("--watch", "another option that names models", "--watch alone", "leave the other one out"))
    if watch:
        _leave_to_one("evaluate --watch")
    if not _launched_together():
        for run in runs:
            _begin("evaluate", config_and_run(run, set_ or [])[0])
    with _answering(as_json) as out:
        from gist_train.results.comparison import compare, compare_runs, comparison_table, joined, watched
        from gist_train.training_run import launched

        with launched(None) as ranks:
            together = [config_and_run(run, set_ or []) for run in runs]
            for loaded, _ in together:
                _go_on_alike(ranks, loaded)
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


@app.command()
def select(
    config: RunPath,
    set_: Set = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(help="<task>/<metric>, or <task>/<metric>=WEIGHT; the mean of several.", show_default=False),
    ] = None,
    rule: Annotated[
        tuple[str, float] | None,
        typer.Option(
            metavar="NAME SHARE",
            help="loss-percentile 0.025: by training loss, as the recipe's authors chose.",
            show_default=False,
        ),
    ] = None,
    around: Annotated[int | None, typer.Option(help="Choose near this step; without a metric, choose this step.", min=0)] = None,
    window: Annotated[int | None, typer.Option(help="How many steps before and after it.", min=0)] = None,
    average: Annotated[int | None, typer.Option(help="Also try the average of K checkpoints' weights.")] = None,
    average_of: Annotated[
        Literal["best", "last"] | None, typer.Option(help="Which K: best (default) or last.", show_default=False)
    ] = None,
    merge_base: Annotated[
        float | None, typer.Option(help="Also try mixing this fraction of the base model's weights in (0 to 1).")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Choose a run's final model, with the reason and a confidence interval, and keep its checkpoint."""
    loaded, run = config_and_run(config, set_ or [], selects=True)
    _begin("select", loaded)
    with _answering(as_json) as out:
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


@app.command()
def report(
    runs: RunPaths,
    to: Annotated[
        Path | None, typer.Option(help="The .html file to write; RUN/report.html by default.", show_default=False)
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", help="Serve the page on this machine while runs train.")] = False,
) -> None:
    """Write a page of a run, or of several side by side: one HTML file that opens anywhere."""
    named = [config_and_run(one, []) for one in runs]
    for loaded, _ in named:
        _begin("report", loaded)
    from gist_train.reporting.figures import figures_of
    from gist_train.reporting.page import write_report
    from gist_train.reporting.serving import serve

    folders = [folder for _, folder in named]
    if follow:
        serve(folders, err)
        return
    path = to or folders[0].report
    write_report([figures_of(one) for one in folders], path)
    err.print(f"{path}", highlight=False, soft_wrap=True)


@app.command()
def export(
    config: RunPath,
    set_: Set = None,
    step: Annotated[
        int | None, typer.Option(help="The checkpoint; the selected one by default, else the newest.", show_default=False)
    ] = None,
    to: Annotated[
        Path | None, typer.Option(help="Where to write it; export/ in the run folder by default.", show_default=False)
    ] = None,
    format_: Annotated[
        Literal["sentence-transformers", "onnx"],
        typer.Option("--format", help="onnx: written beside torch's weights and checked against them."),
    ] = "sentence-transformers",
    quantize: Annotated[
        bool, typer.Option("--quantize", help="With onnx: write 8-bit weights too, and report the loss on STS.")
    ] = False,
    push_to_hub: Annotated[
        str | None,
        typer.Option(
            help="Repository to push it to, with the token of HF_TOKEN or the login.", metavar="USER/NAME", show_default=False
        ),
    ] = None,
    private: Annotated[
        bool | None,
        typer.Option(
            "--private/--no-private",
            help="Whether a new repository is private; without it as the account is set.",
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Write the folder, check the token, and say what would be pushed.")
    ] = False,
) -> None:
    """Write the selected checkpoint, or else the newest, as a sentence-transformers model with its card."""
    loaded, run = config_and_run(config, set_ or [])
    _begin("export", loaded)
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
        err.print(f"pushed: {push_folder(folder, push_to_hub, private=private)}", highlight=False, soft_wrap=True)


add_examples(app, tools)


def main() -> None:
    """Runs the command line and exits."""
    words = sys.argv[1:]
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
        with StopSignal():
            app(args=words)
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
            err.print(f"{safe} {fix}", highlight=False, soft_wrap=True)
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
        say(err, f"Stopped. {KEPT[words[0]]}")


if __name__ == "__main__":
    main()
