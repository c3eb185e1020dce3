"""Functions for programs and notebooks: each does what the command of its name does."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gist_train.api.arguments import arguments_checked
from gist_train.api.process import by_one_process
from gist_train.api.run import Run
from gist_train.auditing import audit as auditing
from gist_train.auditing.html_page import keep_audit
from gist_train.auditing.writing import check_clean
from gist_train.auditing.writing import write_clean as save_clean
from gist_train.auditing.writing import write_suspects as save_suspects
from gist_train.checks import check
from gist_train.config.errors import Fault, UserError, shown
from gist_train.config.schema import Config
from gist_train.data.writing import check_targets, left_behind, write_rows
from gist_train.hard_negatives import with_rules
from gist_train.model.device import this_device
from gist_train.planning import plan as planning
from gist_train.planning.findings import Plan
from gist_train.preparation import mined_corpus
from gist_train.progress import say, terminal
from gist_train.run_folder import Run as RunFolder

if TYPE_CHECKING:
    from pandas import DataFrame  # slow to import


def train(config: Config, *, resume: str | int = "auto", timeout: float | None = None) -> Run:
    """Trains from where the run folder is to the end, and returns the run: `Run(config).train(...)`, which says more."""
    return Run(config).train(resume=resume, timeout=timeout)


@arguments_checked
@by_one_process
def plan(config: Config, *, measure: bool = False) -> Plan:
    """What training will do. Builds the corpus and the student's tokens where no run has built them yet.

    Args:
        measure: whether to take five steps on this machine, on weights that are thrown away, for a time estimate.

    Raises:
        UserError: data, models or evaluation tasks are not what the config says.
    """
    return planning.plan(_checked(config), measure=measure)


@arguments_checked
@by_one_process
def audit(
    config: Config,
    *,
    margins: Sequence[float] = (),
    thresholds: Mapping[str, float] | None = None,
    write_suspects: str | Path | None = None,
    write_clean: str | Path | None = None,
) -> auditing.Audit:
    """Which rows may be bad, by the guide's embeddings and by the texts, and what the guide would mask.

    A page of it is written beside the run folder, and the run's report shows it.
    `pandas.DataFrame(audit(config).lines())` has a row for each suspect, the worst of each kind first.

    Args:
        margins: besides loss.margin, under which it is counted what the guide would mask.
        thresholds: by kind, from which on a row is suspect, in place of the usual ones; of duplicate and labels 0.97 or more.
        write_suspects: a .jsonl or .parquet file for the suspect rows.
        write_clean: such a file for the others: pairs and triplets, or labelled texts of one source with their labels.

    Raises:
        UserError: data or models are not what the config says, an unknown kind, a number that is not finite, a file of another
            ending, or one that rows are read from.
    """
    written = {"write_suspects": write_suspects, "write_clean": write_clean}
    files = {name: Path(path) for name, path in written.items() if path is not None}
    check_targets(files, _checked(config))
    if write_clean is not None:
        check_clean(config.data, "write_clean")
    auditing.check_asked(config, margins, thresholds or {}, names=("margins", "thresholds"))
    audited = auditing.audit(config, this_device(), terminal(), margins=margins, thresholds=thresholds or {})
    if write_suspects is not None:
        save_suspects(audited, files["write_suspects"])
    if write_clean is not None:
        _say_left_behind(save_clean(audited, files["write_clean"])[1])
    keep_audit(RunFolder.of(config), audited.record(), None)
    return audited


@arguments_checked
@by_one_process
def mine(config: Config, to: str | Path) -> Path:
    """Writes the training rows with the negatives that the guide finds for them, by data.hard_negatives, and returns where.

    Args:
        to: a .jsonl or .parquet file.

    Raises:
        UserError: data or models are not what the config says, no guide, a file of another ending, or one that rows are
            read from.
    """
    path = Path(to)
    with_negatives = with_rules(_checked(config))
    check_targets({"to": path}, with_negatives)
    check(with_negatives, terminal())
    corpus = mined_corpus(with_negatives, this_device(), terminal())
    write_rows(corpus, with_negatives.data, path)
    _say_left_behind(left_behind(corpus, with_negatives.data))
    return path


def evaluate(config: Config, models: str | Path | Sequence[str | Path] = (), *, dimensions: Sequence[int] = ()) -> "DataFrame":
    """Scores of models on the config's tasks, by default of base, tuned model and guide: `Run(config).evaluate(...)`."""
    return Run(config).evaluate(models, dimensions=dimensions)


def _say_left_behind(lost: str | None) -> None:
    if lost is not None:
        say(terminal(), f"left behind in the sources and the YAML: {lost}")


def _checked(config: Config) -> Config:
    """The config, if it is one: a path or a dict has to be loaded first."""
    given: object = config
    if not isinstance(given, Config):
        fix = "gist_train.load_config(...) makes one of a YAML or of nested dicts"
        raise UserError(Fault("config", shown(given), "a Config", fix))
    return given
