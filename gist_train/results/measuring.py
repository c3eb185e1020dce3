"""A model, or a step of a run, on the tasks of a config: what is there is not computed again."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from gist_train.config.errors import Fault, UserError
from gist_train.config.evaluation import EvaluationConfig, MtebTask
from gist_train.config.models import ModelConfig
from gist_train.config.schema import Config, cache_folder
from gist_train.data.files import read_json
from gist_train.model.pretrained import Pretrained, load_finished, load_student
from gist_train.results.evaluation import Figure, evaluate
from gist_train.results.figures import Terms, append_figures, read_figures, read_items
from gist_train.results.loaded_tasks import LoadedMteb, LoadedTask, content_hash
from gist_train.results.metrics import Items
from gist_train.results.mteb_tasks import measure_mteb
from gist_train.results.tasks import load_tasks
from gist_train.training.checkpoint import MANIFEST, checkpoint_folder, verified_manifest
from gist_train.training.distributed import this_device

Figures = dict[str, float]
"""<task>/<metric> -> value, a fraction."""


@dataclass(frozen=True)
class Measuring:
    """The tasks of a config, read, and the terms that models are measured under."""

    config: EvaluationConfig
    tasks: list[LoadedTask]
    mteb_cache: Path
    """Folder of mteb's own results."""

    @classmethod
    def of(cls, config: Config) -> "Measuring":
        """Raises UserError with all faults of the tasks' files."""
        return cls(config.evaluation, load_tasks(config.evaluation.tasks), cache_folder(config) / "mteb")

    @cached_property
    def contents(self) -> Mapping[str, str]:
        """Task -> hash over what it asks."""
        return {task.name: content_hash(task) for task in self.tasks}

    @property
    def terms(self) -> Terms:
        """What the figures are measured under."""
        return Terms.of(self.config)

    def only(self, names: Collection[str]) -> "Measuring":
        """Those tasks alone."""
        config = self.config.model_copy(update={"tasks": [task for task in self.config.tasks if task.name in names]})
        return replace(self, config=config, tasks=[task for task in self.tasks if task.name in names])

    def cut_to(self, truncate_dim: int) -> "Measuring":
        """The same tasks, of the first `truncate_dim` numbers of an embedding."""
        return replace(self, config=self.config.model_copy(update={"truncate_dim": truncate_dim}))

    def metrics(self, task: LoadedTask) -> list[str]:
        """Names of the task's figures, "<task>/<metric>"."""
        if isinstance(task, LoadedMteb):
            return [f"{task.name}/{metric}" for metric in task.metrics()]
        (of_config,) = [of for of in self.config.tasks if of.name == task.name and not isinstance(of, MtebTask)]
        return [f"{task.name}/{metric}" for metric in of_config.METRICS]

    def in_order(self, figures: Mapping[str, float]) -> Figures:
        """The figures of all tasks, in the order of the config."""
        return {name: figures[name] for task in self.tasks for name in self.metrics(task)}

    def require(self, metric: Collection[str]) -> None:
        """Raises UserError where a figure is asked for that no task gives: mteb's names are known only once it was asked."""
        known = [name for task in self.tasks for name in self.metrics(task)]
        if unknown := [name for name in metric if name not in known]:
            raise UserError(Fault("the metric to go by", ", ".join(unknown), ", ".join(known), "name one of these"))

    def of_model(self, model: Pretrained) -> dict[str, Figure]:
        """Figures of a model that is no step of a run; kept nowhere.

        Raises:
            UserError: it has fewer positions than evaluation.max_length, or fewer numbers than evaluation.truncate_dim.
        """
        return self._evaluate(model, self.tasks)

    def of_step(self, run: Path, step: int, model: Pretrained) -> Figures:
        """Figures of a step: those that evaluations.jsonl has, and those of the other tasks, which are added to it.

        Args:
            model: the step's; at step 0 the student before training.
        """
        base = model.fingerprint() if step == 0 else None
        known = read_figures(run, self.terms, self.contents, base).get(step, {})
        if missing := self._missing(known):
            found = self._evaluate(model, missing)
            self._keep(run, step, found, model, base)
            known |= values(found)
        return self.in_order(known)

    def of_base(self, run: Path, model: ModelConfig) -> Figures:
        """Figures of the student before training, which are step 0 of the run."""
        return self.of_step(run, 0, on_this_device(load_student(model)))

    def of_checkpoint(self, run: Path, step: int) -> Figures | None:
        """Figures of the step's checkpoint; None where it is gone: a run that trains meanwhile deletes those it need not keep.

        Raises:
            UserError: it is damaged.
        """
        known = self.known(run).get(step, {})
        folder = checkpoint_folder(run, step)
        if missing := self._missing(known):
            try:
                sealed = verified_manifest(folder)["sha256"]
                model = on_this_device(load_finished(str(folder)))
            except (UserError, OSError):
                if folder.exists():
                    raise
                return None
            found = self._evaluate(model, missing)
            # A run that went back meanwhile has moved it away: these are no figures of the step as it will be.
            if not folder.exists() or read_json(folder / MANIFEST)["sha256"] != sealed:
                return None
            self._keep(run, step, found, model, None)
            known |= values(found)
        return self.in_order(known)

    def known(self, run: Path) -> dict[int, Figures]:
        """By step, what evaluations.jsonl has of these tasks under these terms."""
        return read_figures(run, self.terms, self.contents)

    def items(self, run: Path, step: int, key: str) -> Items | None:
        """The items of a figure of a step, where they are on disk."""
        return read_items(run, step, key, self.terms, self.contents[key.split("/", 1)[0]])

    def _missing(self, known: Mapping[str, float]) -> list[LoadedTask]:
        return [task for task in self.tasks if not known.keys() >= set(self.metrics(task))]

    def _keep(self, run: Path, step: int, found: Mapping[str, Figure], model: Pretrained, base: str | None) -> None:
        normalized = model.encoder.normalized
        length = model.with_max_length(self.config.max_length).max_length
        append_figures(
            *(run, step, found), terms=self.terms, normalized=normalized, length=length, contents=self.contents, base=base
        )

    def _evaluate(self, model: Pretrained, tasks: Sequence[LoadedTask]) -> dict[str, Figure]:
        model = model.with_max_length(self.config.max_length).with_truncation(self.config.truncate_dim)
        figures: dict[str, Figure] = {}
        for task in tasks:
            if not isinstance(task, LoadedMteb):
                figures |= evaluate(model, [task])
                continue
            found = measure_mteb(
                model,
                task,
                identity=model.fingerprint(),
                normalized=model.encoder.normalized,
                prompts={name: prompt or "" for name, prompt in model.sentence_transformer.prompts.items()},
                cache=self.mteb_cache,
            )
            figures |= {f"{task.name}/{metric}": Figure(value, None) for metric, value in found.items()}
        return figures


def on_this_device(model: Pretrained) -> Pretrained:
    """The same model, moved to where this process would train."""
    model.encoder.to(this_device())
    return model


def figures_line(name: str, figures: Mapping[str, float]) -> str:
    """A line that tells the figures of one model."""
    return f"{name}: " + "  ".join(f"{key} {100 * value:.1f}" for key, value in figures.items())


def values(figures: Mapping[str, Figure]) -> Figures:
    """The values alone."""
    return {key: figure.value for key, figure in figures.items()}
