"""A model, or a step of a run, on the tasks of a config: what is there is not computed again."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.text import Text

from gist_train.config.errors import Fault, UserError, listed
from gist_train.config.evaluation import EvaluationConfig
from gist_train.config.fields import SHORTEST
from gist_train.config.models import ModelConfig
from gist_train.config.schema import Config, cache_folder, training_prompts
from gist_train.data.files import read_json
from gist_train.data.manifests import verified_manifest
from gist_train.evaluation.held_out import held_out_tasks
from gist_train.evaluation.metrics import Items, Score, task_of
from gist_train.evaluation.mteb_tasks import LoadedMteb, measure_mteb
from gist_train.evaluation.score_file import Terms, append_scores, read_items, read_scores
from gist_train.evaluation.tasks import LoadedTask, content_hash, load_tasks, measure
from gist_train.evaluation.together import TaskEncoder, Team
from gist_train.memory import lowered, naming_work
from gist_train.model.device import this_device
from gist_train.model.loading import load_student, load_trained
from gist_train.model.pretrained import Pretrained
from gist_train.model.whole import TextModel
from gist_train.progress import Count, counting, in_points
from gist_train.pulse import PULSE
from gist_train.run_folder import MANIFEST, Run

Model = TypeVar("Model", bound=TextModel)
Scores = dict[str, float]
"""<task>/<metric> -> value, a fraction."""


@dataclass(frozen=True)
class Measuring:
    """The tasks of a config, read, and the terms that models are measured under."""

    config: EvaluationConfig
    model: ModelConfig
    """That the run trains."""
    prompts: Mapping[str, str]
    """That it is trained with, by side."""
    tasks: list[LoadedTask]
    mteb_cache: Path
    """Folder of mteb's own results."""
    console: Console
    """Where it is shown how far the work is."""

    @classmethod
    def of(cls, config: Config, console: Console) -> "Measuring":
        """Raises UserError with all faults of the tasks' files."""
        return cls(
            config.evaluation,
            config.model,
            training_prompts(config),
            [*load_tasks(config.evaluation.tasks), *held_out_tasks(config)],
            cache_folder(config) / "mteb",
            console,
        )

    @classmethod
    def of_some(cls, config: Config, console: Console) -> "Measuring":
        """The same, of one task or more.

        Raises:
            UserError: there is none, or their files have faults.
        """
        if not config.evaluation.judges:
            fix = "add one, e.g. {type: sts, name: stsb, path: stsb_dev.tsv}"
            raise UserError(Fault("evaluation.tasks", "no task", "one task at least", fix))
        return cls.of(config, console)

    @cached_property
    def contents(self) -> Mapping[str, str]:
        """Task -> hash over what it asks."""
        return {task.name: content_hash(task) for task in self.tasks}

    @property
    def terms(self) -> Terms:
        """What the scores are measured under."""
        return Terms.of(self.config)

    def only(self, names: Collection[str]) -> "Measuring":
        """Those tasks alone."""
        return replace(self, tasks=[task for task in self.tasks if task.name in names])

    def cut_to(self, truncate_dim: int) -> "Measuring":
        """The same tasks, of embeddings cut to `truncate_dim` dimensions."""
        return replace(self, config=self.config.model_copy(update={"truncate_dim": truncate_dim}))

    def metrics(self, task: LoadedTask) -> list[str]:
        """Names of the task's scores, "<task>/<metric>"."""
        if isinstance(task, LoadedMteb):
            return [f"{task.name}/{metric}" for metric in task.metrics()]
        return [f"{task.name}/{metric}" for metric in task.METRICS]

    def in_order(self, scores: Mapping[str, float]) -> Scores:
        """The scores of all tasks, in the order of the config."""
        return {name: scores[name] for task in self.tasks for name in self.metrics(task)}

    def require(self, metric: Collection[str]) -> None:
        """Raises UserError where a metric is asked for that no task gives: mteb's names are known only once it was asked."""
        known = [name for task in self.tasks for name in self.metrics(task)]
        if unknown := [name for name in metric if name not in known]:
            expected, fix = listed(known), "name one of these"
            if not known:
                expected, fix = "a score of a task, and no task has any", "name a task in evaluation.tasks"
            raise UserError(Fault("the metric to go by", listed(unknown), expected, fix))

    def of_model(self, model: TextModel) -> dict[str, Score]:
        """Scores of a model that is no step of a run; kept nowhere.

        Raises:
            UserError: it has fewer positions than evaluation.max_length, or fewer dimensions than evaluation.truncate_dim.
        """
        return {key: score for scores in self._evaluate(model, self.tasks) for key, score in scores.items()}

    def of_step(self, run: Run, step: int, model: TextModel, team: Team | None = None) -> Scores:
        """Scores of a step: those that evaluations.jsonl has, and those of the other tasks, each added to it once it is measured.

        Args:
            model: the step's; at step 0 the student before training.
            team: whose others call `help_with_step`.
        """
        base = model.fingerprint() if step == 0 else None
        known = dict(read_scores(run, self.terms, self.contents, base).get(step, {}))
        missing = self._missing(known)
        if team is not None:
            team.agreed([task.name for task in missing])
        for measured in self._evaluate(model, missing, team) if missing else ():
            self._keep(run, step, measured, model, base)
            known |= values(measured)
        return self.in_order(known)

    def help_with_step(self, model: TextModel, team: Team) -> None:
        """What the processes but the first do while that measures `of_step`."""
        names = team.agreed([])
        for _ in self._evaluate(model, [task for task in self.tasks if task.name in names], team):
            pass

    def of_base(self, run: Run) -> Scores:
        """Scores of the student before training, which are step 0 of the run."""
        return self.of_step(run, 0, on_this_device(load_student(self.model, self.prompts)))

    def of_checkpoint(self, run: Run, step: int) -> Scores | None:
        """Scores of the step's checkpoint; None where it is gone: a run that trains meanwhile deletes those it need not keep.

        Raises:
            UserError: it is damaged.
        """
        known = dict(self.known(run).get(step, {}))
        folder = run.checkpoint(step)
        if missing := self._missing(known):
            try:
                sealed = verified_manifest(folder)["sha256"]
                model = on_this_device(load_trained(folder, self.model))
            except (UserError, OSError):
                if folder.exists():
                    raise
                return None
            for measured in self._evaluate(model, missing):
                # A run that went back meanwhile has moved it away: these are no scores of the step as it will be.
                if not folder.exists() or read_json(folder / MANIFEST)["sha256"] != sealed:
                    return None
                self._keep(run, step, measured, model, None)
                known |= values(measured)
        return self.in_order(known)

    def known(self, run: Run) -> dict[int, Scores]:
        """By step, what evaluations.jsonl has of these tasks under these terms."""
        return read_scores(run, self.terms, self.contents)

    def items(self, run: Run, step: int, key: str) -> Items | None:
        """The items of a score of a step, where they are on disk."""
        return read_items(run, step, key, self.terms, self.contents[task_of(key)])

    def _missing(self, known: Mapping[str, float]) -> list[LoadedTask]:
        return [task for task in self.tasks if not known.keys() >= set(self.metrics(task))]

    def _keep(self, run: Run, step: int, measured: Mapping[str, Score], model: TextModel, base: str | None) -> None:
        append_scores(
            run,
            step,
            measured,
            terms=self.terms,
            normalized=model.normalized,
            length=model.with_max_length(self.config.max_length).max_length,
            contents=self.contents,
            base=base,
        )

    def _evaluate(self, model: TextModel, tasks: Sequence[LoadedTask], team: Team | None = None) -> Iterator[dict[str, Score]]:
        """Yields the scores of each task; on other processes than the first, nothing of mteb's."""
        model = model.with_max_length(self.config.max_length).with_truncation(self.config.truncate_dim)
        # Mteb's come last: where the first process, alone at them, is stopped, no other waits for its share.
        for number, task in enumerate(sorted(tasks, key=lambda task: isinstance(task, LoadedMteb)), 1):
            what = f"evaluating {task.name} ({number} of {len(tasks)})"
            PULSE.beat(what)
            with naming_work(partial(_work, task, model.max_length)):
                if isinstance(task, LoadedMteb):
                    if team is not None and team.rank > 0:
                        continue
                    with nullcontext() if team is None else team.stoppable(), self._waiting(what):
                        measured = self._of_mteb(model, task)
                elif isinstance(model, Pretrained):
                    measured = measure(TaskEncoder(model, team, what, self.console), [task])
                else:
                    with self._waiting(what):
                        measured = measure(model, [task])
            yield measured

    def _waiting(self, what: str) -> AbstractContextManager[Count]:
        """Shows that work goes on which does not say how far it is: mteb's, and that of models with code of their own."""
        return counting(what, None, self.console, passing=True)

    def _of_mteb(self, model: TextModel, task: LoadedMteb) -> dict[str, Score]:
        measured = measure_mteb(
            model,
            task,
            identity=model.fingerprint(),
            normalized=model.normalized,
            prompts=model.prompts,
            cache=self.mteb_cache,
        )
        return {f"{task.name}/{metric}": Score(value, None) for metric, value in measured.items()}


def _work(task: LoadedTask, max_length: int) -> tuple[str, list[str]]:
    """What was being done where memory ran out, and what lowers what it takes."""
    length = lowered("evaluation.max_length", max_length, None, SHORTEST)
    return f"evaluating {task.name}", [] if length is None else [length]


def on_this_device(model: Model) -> Model:
    """The same model, moved to where this process would train."""
    model.to(this_device())
    return model


def main_metrics(scores: Iterable[str]) -> list[str]:
    """The first of each task's metrics, "<task>/<metric>": the one that the field judges by."""
    return list({task_of(key): key for key in reversed(list(scores))}.values())[::-1]


def scores_line(name: str, scores: Mapping[str, float], base: Mapping[str, float] | None = None) -> Text:
    """A line with the main score of each task, and how far that is from the base model's where they are given."""
    line = Text(f"{name}: ")
    for number, key in enumerate(main_metrics(scores)):
        line.append(f"{'  ' if number else ''}{key} {100 * scores[key]:.1f}")
        if base is not None and key in base:
            line.append(" (").append(in_points(scores[key], base[key])).append(")")
    return line


def values(scores: Mapping[str, Score]) -> Scores:
    """The values alone."""
    return {key: score.value for key, score in scores.items()}
