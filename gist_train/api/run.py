"""A run as an object: what it logged as tables, and what the commands make of it."""

import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from gist_train.api.arguments import arguments_checked
from gist_train.api.process import by_one_process, process_as_it_was, refuse_several
from gist_train.config.errors import Fault, UserError, shown
from gist_train.config.fields import expanded
from gist_train.config.schema import Config
from gist_train.data.files import json_lines
from gist_train.evaluation.score_file import Terms, read_scores
from gist_train.progress import say, terminal
from gist_train.results.comparison import compare
from gist_train.results.criteria import criteria_of
from gist_train.results.export import export_model
from gist_train.results.extension import extended
from gist_train.results.model_logging import select_and_log
from gist_train.results.onnx import plan_onnx
from gist_train.results.push import check_push, push_folder
from gist_train.results.selected import Selected, read_selected
from gist_train.run_folder import Run as RunFolder
from gist_train.run_folder import config_and_run
from gist_train.training.signals import Stopped
from gist_train.training_run import train as train_in_folder

if TYPE_CHECKING:
    from pandas import DataFrame  # slow to import


class Run:
    """A run that has begun, or is about to.

    Args:
        where: its folder, the YAML that made it, or its config.

    Raises:
        UserError: it is none of these, or the config has faults.
    """

    config: Config
    folder: Path

    def __init__(self, where: str | Path | Config):
        given: object = where
        if not isinstance(given, str | Path | Config):
            fix = "gist_train.load_config(...) makes a config of a YAML or of nested dicts"
            raise UserError(Fault("Run", shown(given), "a folder, a YAML's path or a Config", fix))
        self._where = where if isinstance(where, Config) else Path(where)
        self.config, self._files = self._read(selects=False)
        self.folder = self._files.folder

    def __repr__(self) -> str:
        return f'Run("{self.folder}")'

    def _read(self, *, selects: bool) -> tuple[Config, RunFolder]:
        if isinstance(self._where, Config):
            return self._where, RunFolder.of(self._where)
        return config_and_run(self._where, [], selects=selects)

    @property
    def steps(self) -> list[int]:
        """Steps that have a checkpoint, ascending."""
        return self._files.saved_steps()

    @property
    def selected(self) -> Selected | None:
        """What `select` chose; None where nothing was. Its `checkpoint` opens with SentenceTransformer.

        Raises:
            UserError: selected.json can't be read, or the model that it names is gone.
        """
        chosen = read_selected(self._files)
        return None if chosen is None else chosen.located(self._files)

    def metrics(self) -> "DataFrame":
        """A row every `tracking.log_every` steps, by step: loss, learning rate, speed and the like, as metrics.jsonl has them."""
        from pandas import DataFrame

        rows = DataFrame([row for _, row in json_lines(self._files.metrics)])
        return rows.set_index("step") if len(rows) else rows

    def scores(self) -> "DataFrame":
        """Scores as fractions: a row for each step that was evaluated, 0 the base model, a column for each "<task>/<metric>"."""
        from pandas import DataFrame

        there = self._files.evaluations.exists()
        scores = read_scores(self._files, Terms.of(self.config.evaluation)) if there else {}
        return DataFrame.from_dict(scores, orient="index").sort_index().rename_axis("step")

    @arguments_checked
    def train(self, *, resume: str | int = "auto", timeout: float | None = None) -> "Run":
        """Trains from where the run is to its end, and returns the run.

        A signal, such as Ctrl-C or a notebook's interrupt, ends it with a checkpoint, and then acts as it would have without us:
        Ctrl-C raises KeyboardInterrupt. To call this again goes on from there.

        Args:
            resume: "auto" (from the newest checkpoint, if any), "never" (refuse a folder with a run in it) or a step, whose later
                checkpoints are set aside.
            timeout: of several processes, seconds without progress after which one counts as hung; None for 600.

        Raises:
            UserError: data, models or the run folder are not what the config says.
            NonFiniteError: loss or gradient is not finite.
            KeyboardInterrupt: it was interrupted.
            Stopped: another signal stopped it, and a handler of the program's own has dealt with the signal.
        """
        config, _ = self._read(selects=True)
        with process_as_it_was(config.training.precision):
            try:
                code = train_in_folder(config, resume=str(resume), timeout=timeout)
                if code:
                    raise Stopped(code - 128)
            except Stopped as stopped:
                _hand_on(stopped.number)
                raise
        return self

    @arguments_checked
    def extend(self, epochs: int, *, name: str | None = None, step: int | None = None, overrides: Sequence[str] = ()) -> "Run":
        """Gives the run's model more epochs, in a run of its own beside this one, which it returns. To call this again resumes.

        Args:
            epochs: passes over the data, with a warm-up and a schedule of their own.
            name: of the new run; None for this one's and "-more".
            step: of the checkpoint to begin with; None for the selected one, or else the newest.
            overrides: key.sub=value, of what else is to be otherwise, such as optimizer.lr=1e-5.

        Raises:
            UserError: no such checkpoint, a damaged one, this run's own name, or faults of the overrides; and as `train` does.
        """
        refuse_several("extend")
        with process_as_it_was():
            more = extended(
                self.config, self._files, epochs=epochs, name=name, step=step, overrides=overrides, console=terminal()
            )
        return Run(more).train()

    @arguments_checked
    @by_one_process
    def evaluate(
        self,
        models: str | Path | Sequence[str | Path] = (),
        *,
        steps: Literal["all", "selected"] | int | Sequence[int] | None = None,
        dimensions: Sequence[int] = (),
    ) -> "DataFrame":
        """Scores as fractions on the config's tasks: a row for each model, a column for each "<task>/<metric>".

        Args:
            models: a folder or hub id, or several. With neither these nor steps: base, the selected or newest checkpoint, and
                the guide.
            steps: checkpoints of the run, or one.
            dimensions: besides embeddings as they are, cut to each of these.

        Raises:
            UserError: no tasks, or a model, checkpoint or file that is not there.
        """
        from pandas import DataFrame

        steps = [steps] if isinstance(steps, int) else steps
        named = steps if steps is None or isinstance(steps, str) else ",".join(map(str, steps))
        of_models = [expanded(str(model)) for model in ([models] if isinstance(models, str | Path) else models)]
        compared = compare(self.config, self._files, models=of_models, steps=named, dimensions=dimensions, console=terminal())
        return DataFrame.from_dict(dict(compared), orient="index").rename_axis("model")

    @arguments_checked
    @by_one_process
    def select(
        self,
        metric: str | Mapping[str, float] | None = None,
        *,
        rule: tuple[str, float] | None = None,
        around: int | None = None,
        window: int | None = None,
        average: int | None = None,
        average_of: Literal["best", "last"] | None = None,
        merge_base: float | None = None,
    ) -> Selected:
        """Chooses the final model, writes selected.json and keeps its checkpoint; the fields are those of `select --json`.

        Args:
            metric: "<task>/<metric>", or several with their weights; None: the config's selection.metric.
            rule: ("loss-percentile", 0.025): by training loss, as the recipe's authors chose.
            around: choose near this step; without a metric, this step.
            window: steps to either side of it.
            average: try the mean of so many checkpoints' weights too.
            average_of: which these are, "best" unless given.
            merge_base: try mixing in this share of the base model's weights too.

        Raises:
            UserError: with all faults of the arguments; nothing to choose from; a damaged checkpoint.
        """
        config, _ = self._read(selects=True)
        weights = {metric: 1.0} if isinstance(metric, str) else metric or {}
        criteria = criteria_of(
            config,
            metrics=[f"{name}={weight!r}" for name, weight in weights.items()],
            rule=rule,
            around=around,
            window=window,
            average=average,
            average_of=average_of,
            merge_base=merge_base,
        )
        return select_and_log(config, self._files, criteria, terminal()).located(self._files)

    @arguments_checked
    @by_one_process
    def export(
        self,
        to: str | Path | None = None,
        *,
        step: int | None = None,
        format: Literal["sentence-transformers", "onnx"] = "sentence-transformers",
        quantize: bool = False,
        push_to_hub: str | None = None,
        private: bool | None = None,
    ) -> Path:
        """Writes the selected checkpoint, or else the newest, as a sentence-transformers model with its card, and returns where.

        Args:
            to: the folder; None for export/ in the run folder.
            step: another checkpoint.
            format: "onnx" writes ONNX beside torch's weights, and holds it against them.
            quantize: with onnx, whether to write 8-bit weights too.
            push_to_hub: "user/name" of a repository that it is pushed to.
            private: whether a new repository is private; None as the account is set.

        Raises:
            UserError: no such checkpoint, a damaged one, one that can't be ONNX, or something else is at `to`.
            ArithmeticError: the ONNX model gives other embeddings than torch.
        """
        onnx, console = plan_onnx(self.config, format, quantize=quantize), terminal()
        check_push(push_to_hub, private)
        folder = export_model(
            self._files,
            step,
            self._files.export if to is None else Path(to),
            evaluation=self.config.evaluation,
            onnx=onnx,
            hub_id=push_to_hub,
            console=console,
        )
        if push_to_hub is not None:
            say(console, f"pushed: {push_folder(folder, push_to_hub, private=private, console=console)}")
        return folder

    @arguments_checked
    @by_one_process
    def report(self, to: str | Path | None = None, *, beside: Sequence["Run"] = ()) -> Path:
        """Writes one HTML file that opens anywhere, and returns where (extra report).

        Args:
            to: the file; None for report.html in the run folder.
            beside: further runs, which this one is compared with; the file must be named then.

        Raises:
            UserError: a run has not begun, `to` is in no folder or must be given, or the extra is not installed.
        """
        from gist_train.reporting.page import write_report

        return write_report([run._files for run in (self, *beside)], None if to is None else Path(to))


def _hand_on(number: int) -> None:
    """Has a signal do what it would have done without us: end the process, raise KeyboardInterrupt, or call who asked for it."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    signal.raise_signal(number)
