"""Commands before a training: init, prepare, mine, audit and plan."""

import json
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from gist_train.commands.options import AsJson, ConfigPath, Set, Timeout, announce, answering, begin, go_on_alike
from gist_train.config.fields import expanded
from gist_train.config.loading import load_config
from gist_train.environment import keep_kernels, launched_together
from gist_train.progress import Terminal, terminal
from gist_train.run_folder import Run

data = typer.Typer()


@data.command()
def init(
    files: Annotated[list[Path], typer.Argument(help="Data files, or folders of them.", metavar="FILES", show_default=False)],
    to: Annotated[Path, typer.Option(help="The YAML to write.", metavar="FILE")] = Path("my-model.yaml"),
    model: Annotated[
        str | None,
        typer.Option(help="Student, hub id or local folder; by default what this machine trains.", metavar="MODEL"),
    ] = None,
    guide: Annotated[str | None, typer.Option(help="The guide, likewise; self; or none.", metavar="MODEL")] = None,
    columns: Annotated[
        str | None,
        typer.Option(
            help="What columns are: anchor=A,positive=B; text=A,label=B; text1=A,text2=B,score=C.", metavar="ROLE=NAME,..."
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", metavar="", help="Replace the YAML if it is there.")] = False,
) -> None:
    """Look at your own files, and write a commented YAML for them."""
    err = terminal()
    announce("init", str(to))
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


@data.command()
def prepare(config: ConfigPath, set_: Set = None, timeout: Timeout = None) -> None:
    """Build the corpus, the student's tokens and the guide's store.

    Other commands do what they need of this by themselves.
    """
    err = terminal()
    if not launched_together():
        begin("prepare", load_config(config, set_ or []))
    from gist_train.checks import check
    from gist_train.model.device import this_device
    from gist_train.preparation import prepare as prepare_all
    from gist_train.training.embedding import Processes
    from gist_train.training_run import launched

    keep_kernels()
    with launched(timeout) as ranks:
        loaded = load_config(config, set_ or [])
        go_on_alike(ranks, loaded, err)
        check(loaded, err)
        prepared = prepare_all(loaded, this_device(), err, Processes(ranks.size, ranks.first_here))
    corpus, steps = prepared.corpus, prepared.plan.steps_per_epoch
    rows = f"{corpus.row_count:,} rows over {len(corpus.tasks):,} tasks, {corpus.text_count:,} unique texts"
    err.print(f"{rows}, {steps:,} steps per epoch: {corpus.folder}", soft_wrap=True)


@data.command()
def mine(
    config: ConfigPath,
    to: Annotated[Path, typer.Option(help="The file to write: .jsonl or .parquet.", metavar="FILE", show_default=False)],
    set_: Set = None,
    timeout: Timeout = None,
) -> None:
    """Write the training rows with negatives that the guide finds.

    By the rules of data.hard_negatives.
    """
    err = terminal()
    if not launched_together():
        begin("mine", load_config(config, set_ or [], selects=False))
    from gist_train.checks import check
    from gist_train.data.writing import check_targets, left_behind, write_rows
    from gist_train.hard_negatives import with_rules
    from gist_train.model.device import this_device
    from gist_train.preparation import mined_corpus
    from gist_train.training.embedding import Processes
    from gist_train.training_run import launched

    keep_kernels()
    with launched(timeout) as ranks:
        loaded = with_rules(load_config(config, set_ or [], selects=False))
        check_targets({"--to": to}, loaded)
        go_on_alike(ranks, loaded, err)
        check(loaded, err)
        corpus = mined_corpus(loaded, this_device(), err, Processes(ranks.size, ranks.first_here))
        if ranks.rank == 0:
            write_rows(corpus, loaded.data, to)
    err.print(f"{corpus.row_count:,} rows: {to}", highlight=False, soft_wrap=True)
    if lost := left_behind(corpus, loaded.data):
        err.print(f"left behind in the sources and the YAML: {lost}", highlight=False, soft_wrap=True)


@data.command()
def audit(
    config: ConfigPath,
    set_: Set = None,
    margins: Annotated[
        str, typer.Option(help="Further margins to count masked candidates under, e.g. 0.05,0.1.", metavar="X,X,...")
    ] = "",
    threshold: Annotated[
        list[str] | None,
        typer.Option(
            help="From which on a row is suspect; duplicate and labels from 0.97 on. May be repeated.", metavar="KIND=NUMBER"
        ),
    ] = None,
    page: Annotated[
        Path | None,
        typer.Option(help="The .html file to write; OUTPUT_DIR/NAME-audit.html by default.", metavar="FILE", show_default=False),
    ] = None,
    write_suspects: Annotated[
        Path | None, typer.Option(help="Write suspect rows there: .jsonl or .parquet.", metavar="FILE")
    ] = None,
    write_clean: Annotated[
        Path | None, typer.Option(help="Write the other rows there: .jsonl or .parquet.", metavar="FILE")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Find rows that may be bad, and say what the guide would mask.

    By the guide's embeddings and by the texts; without training.
    """
    err = terminal()
    loaded = begin("audit", load_config(config, set_ or [], selects=False))
    with answering(as_json) as out:
        from gist_train.auditing import audit as auditing
        from gist_train.auditing import writing
        from gist_train.auditing.html_page import keep_audit
        from gist_train.auditing.page import audit_page
        from gist_train.data.writing import check_targets
        from gist_train.model.device import this_device
        from gist_train.pages.rendering import check_page

        if page is not None:
            check_page("--page", page)
        written = {"--write-suspects": write_suspects, "--write-clean": write_clean}
        if write_clean is not None:
            writing.check_clean(loaded.data, "--write-clean")
        check_targets({option: to for option, to in written.items() if to is not None}, loaded)
        thresholds = auditing.read_numbers(threshold or [], "--threshold")
        others = auditing.read_margins(margins)
        auditing.check_asked(loaded, others, thresholds)
        audited = auditing.audit(loaded, this_device(), err, margins=others, thresholds=thresholds)
        if write_suspects is not None:
            err.print(
                f"{writing.write_suspects(audited, write_suspects):,} lines: {write_suspects}", highlight=False, soft_wrap=True
            )
        if write_clean is not None:
            rows, lost = writing.write_clean(audited, write_clean)
            err.print(f"{rows:,} rows: {write_clean}", highlight=False, soft_wrap=True)
            if lost is not None:
                err.print(f"left behind in the sources and the YAML: {lost}", highlight=False, soft_wrap=True)
        record = audited.record()
        err.print(f"page: {keep_audit(Run.of(loaded), record, page)}", highlight=False, soft_wrap=True)
        if as_json:
            print(record.model_dump_json(), file=out)
        else:
            Terminal().print(audit_page(audited), highlight=False)


@data.command()
def plan(
    config: ConfigPath,
    set_: Set = None,
    measure: Annotated[
        bool, typer.Option("--measure", metavar="", help="Take five steps here, for an estimate of the time.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Say what training will do, without training.

    Steps, warm-up, dropped rows, tokens, memory, disk.
    """
    err = terminal()
    loaded = begin("plan", load_config(config, set_ or []))
    with answering(as_json) as out:
        from gist_train.planning.page import plan_page
        from gist_train.planning.plan import plan as make_plan

        planned = make_plan(loaded, measure=measure, console=err)
        if as_json:
            print(json.dumps(asdict(planned)), file=out)
        else:
            Terminal().print(plan_page(planned), highlight=False)
