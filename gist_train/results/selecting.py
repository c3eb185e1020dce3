"""Chooses the model of a run: measures what is missing, ranks, averages where asked to, and writes selected.json."""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path
from typing import Any

from rich.console import Console

from gist_train.config.errors import Fault, UserError
from gist_train.config.schema import Config
from gist_train.data.files import json_lines, locked
from gist_train.results.averaging import averaged, save_averaged
from gist_train.results.comparison import tasks_of
from gist_train.results.criteria import Criteria
from gist_train.results.leakage import leaks_of
from gist_train.results.measuring import Figures, Measuring, on_this_device, values
from gist_train.results.metrics import Items
from gist_train.results.selected import averaged_folder, drop_other_means, write_selected
from gist_train.results.selection import Candidate, Distance, by_loss, distance, ranked, resampled_scores, score
from gist_train.training.checkpoint import checkpoint_folder, no_such_step, saved_steps, verified_manifest
from gist_train.training.runlog import METRICS

RUNNERS_UP = 5
"""Checkpoints whose distance to the chosen one is put against the noise."""


def select(config: Config, run: Path, criteria: Criteria, console: Console) -> dict[str, Any]:
    """Chooses and writes selected.json. Returns what it says.

    Raises:
        UserError: nothing to choose from, a step without a checkpoint, or a damaged checkpoint.
    """
    if not saved_steps(run):
        raise UserError(Fault(f"{run}/checkpoints", "no checkpoint", "one at least", "train first"))
    measuring = tasks_of(config) if config.evaluation.tasks else None
    with locked(run, ".select.lock"):
        losses = training_losses(run, saved_steps(run))
        steps = _steps_to_choose_from(run, criteria, losses)
        distances: dict[Candidate, Distance] = {}
        if criteria.metric is not None and measuring is not None:
            by_metric = _ByMetric(config, run, criteria, criteria.metric, measuring, console)
            order, distances = by_metric.ranked(steps)
        else:
            share = criteria.loss_percentile
            by_rule = steps if share is None else by_loss({step: losses[step] for step in steps}, share)
            order = [Candidate((step,), 0.0, {}) for step in by_rule]
        return _keep(config, run, criteria, measuring, order, losses, distances)


@dataclass(frozen=True)
class _ByMetric:
    """A choice by figures: every checkpoint is measured on the tasks that the metric names, and the means that were asked for."""

    config: Config
    run: Path
    criteria: Criteria
    metric: Mapping[str, float]
    measuring: Measuring
    console: Console

    def ranked(self, steps: Sequence[int]) -> tuple[list[Candidate], dict[Candidate, Distance]]:
        """The candidates, the best first, and how far the runners-up and all means lie behind it."""
        self.measuring.require(self.metric)
        count = self.criteria.average
        if count is not None and count > len(steps):
            found = f"{count}, of {len(steps)} checkpoints to choose from"
            raise UserError(Fault("--average", found, f"at most {len(steps)}", "lower it, or widen --window"))
        of_metric = self.measuring.only({key.split("/", 1)[0] for key in self.metric})
        single = self._checkpoints(of_metric, steps)
        means = self._means(of_metric, single)
        order = ranked([*single, *means], self.metric)
        if self.criteria.around is None:
            self._tell_what_is_gone(of_metric, score(order[0].figures, self.metric))

        def scores_of(candidate: Candidate) -> Any:
            items = means.get(candidate)
            if items is None:
                items = {key: of_metric.items(self.run, candidate.steps[0], key) for key in self.metric}
            return resampled_scores(items, self.metric)

        others = [of for number, of in enumerate(order[1:]) if number < RUNNERS_UP or of.averaged]
        best, of_best = order[0], scores_of(order[0]) if others else None
        behind = {of: score(best.figures, self.metric) - score(of.figures, self.metric) for of in order[1:]}
        spread = {of: None if of_best is None else scores_of(of) for of in others}
        return order, {of: distance(behind[of], of_best, spread.get(of)) for of in order[1:]}

    def _checkpoints(self, measuring: Measuring, steps: Sequence[int]) -> list[Candidate]:
        known = measuring.known(self.run)  # once: a run may have thousands of checkpoints
        candidates = []
        for number, step in enumerate(steps, 1):
            figures: Figures | None = known.get(step)
            if figures is None or not figures.keys() >= self.metric.keys():
                self.console.print(f"measuring step {step:,} ({number} of {len(steps)})", highlight=False)
                figures = measuring.of_checkpoint(self.run, step)
            if figures is None:
                self.console.print(f"step {step:,} is gone: its checkpoint was deleted meanwhile", highlight=False)
                continue
            candidates.append(Candidate((step,), 0.0, figures))
        if not candidates:
            raise _nothing("no checkpoint that is left", "choose again")
        return candidates

    def _means(self, measuring: Measuring, single: Sequence[Candidate]) -> dict[Candidate, Mapping[str, Items | None]]:
        """The mean of checkpoints and the mixture with the base model that were asked for, measured, with their items."""
        best = ranked(single, self.metric)
        start, made = best[0], list[Candidate]()
        if self.criteria.average is not None:
            newest = sorted(single, key=lambda of: of.steps, reverse=True)
            taken = (best if self.criteria.average_of == "best" else newest)[: self.criteria.average]
            start = Candidate(tuple(sorted(of.steps[0] for of in taken)), 0.0, {})
            made.append(start)
        if self.criteria.merge_base is not None:
            made.append(replace(start, base_weight=self.criteria.merge_base))
        means: dict[Candidate, Mapping[str, Items | None]] = {}
        for candidate in made:
            self.console.print(f"measuring the {candidate.name}", highlight=False)
            try:
                model = on_this_device(averaged(self.run, candidate.steps, self.config.model, candidate.base_weight))
            except (UserError, OSError):
                if all(checkpoint_folder(self.run, step).exists() for step in candidate.steps):
                    raise
                self.console.print(f"{candidate.name}: left out, a checkpoint was deleted meanwhile", highlight=False)
                continue
            figures = measuring.of_model(model)
            means[replace(candidate, figures=values(figures))] = {key: figures[key].items for key in self.metric}
        return means

    def _tell_what_is_gone(self, measuring: Measuring, best: float) -> None:
        """Names the best step that was measured and has no checkpoint any more, where it was better than what is left."""
        known = {step: of for step, of in measuring.known(self.run).items() if step and of.keys() >= self.metric.keys()}
        saved = saved_steps(self.run)
        gone = {step: score(of, self.metric) for step, of in known.items() if step not in saved}
        first = max(gone, key=lambda step: gone[step], default=None)
        if first is not None and gone[first] > best:
            told = f"step {first:,} was better ({100 * gone[first]:.2f} against {100 * best:.2f}), but its checkpoint is gone"
            self.console.print(f"{told}: a higher checkpoint.keep_last keeps more", highlight=False, soft_wrap=True)


def _keep(
    config: Config,
    run: Path,
    criteria: Criteria,
    measuring: Measuring | None,
    order: Sequence[Candidate],
    losses: Mapping[int, float],
    distances: Mapping[Candidate, Distance],
) -> dict[str, Any]:
    """Measures the chosen model and the base on all tasks, and writes selected.json."""
    chosen = order[0]
    base = {} if measuring is None else measuring.of_base(run, config.model)
    if chosen.averaged and measuring is not None:
        folder, figures = _write_mean(config, run, chosen, measuring)
    else:
        folder = checkpoint_folder(run, chosen.steps[0])
        figures = {} if measuring is None else measuring.of_checkpoint(run, chosen.steps[0]) or {}
    if not folder.exists():
        raise _nothing(f"{chosen.name}, whose checkpoint was deleted meanwhile", "choose again, or raise checkpoint.keep_last")
    told = {
        "step": chosen.steps[-1],
        "steps": list(chosen.steps),
        "base_weight": chosen.base_weight,
        "name": chosen.name,
        "checkpoint": str(folder.relative_to(run)),
        "rule": criteria.rule,
        "metric": None if criteria.metric is None else dict(criteria.metric),
        "around": criteria.around,
        "window": None if criteria.around is None else criteria.window,
        "figures": figures,
        "base": base,
        "candidates": [_told(of, criteria, losses, distances) for of in order],
        "evaluation": config.evaluation.model_dump(mode="json"),
        "leakage": [leak.told() for leak in leaks_of(run, [task.name for task in config.evaluation.tasks])],
    }
    write_selected(run, told)
    drop_other_means(run, folder)
    return told


def _write_mean(config: Config, run: Path, chosen: Candidate, measuring: Measuring) -> tuple[Path, Figures]:
    """Folder of a mean that was chosen, and its figures on all tasks."""
    model = on_this_device(averaged(run, chosen.steps, config.model, chosen.base_weight))
    judged_by = {key.split("/", 1)[0] for key in chosen.figures}
    others = measuring.only({task.name for task in measuring.tasks} - judged_by)
    figures = measuring.in_order({**chosen.figures, **values(others.of_model(model))})
    # What its newest checkpoint says of itself holds for the mean too.
    facts = verified_manifest(checkpoint_folder(run, chosen.steps[-1]))
    facts |= {"steps": chosen.steps, "base_weight": chosen.base_weight}
    folder = averaged_folder(run, chosen.steps, chosen.base_weight)
    save_averaged(model, folder, facts)
    return folder, figures


def training_losses(run: Path, steps: Sequence[int]) -> dict[int, float]:
    """Step -> training loss of those steps that have one: `loss_mean` of the row of metrics.jsonl at the step or last before it.

    That mean over the steps since the row before is what transformers' trainer, and so the authors' snapshots, call the loss.
    """
    means: dict[int, float] = {}
    for _, row in json_lines(run / METRICS):
        step, loss = row.get("step"), row.get("loss_mean")
        if isinstance(step, int) and isinstance(loss, int | float) and isfinite(loss):
            means[step] = float(loss)
    logged = sorted(means)
    at = {step: bisect_right(logged, step) for step in steps}
    return {step: means[logged[position - 1]] for step, position in at.items() if position}


def _steps_to_choose_from(run: Path, criteria: Criteria, losses: Mapping[int, float]) -> list[int]:
    """Steps with a checkpoint, within the window; with the rule "step", that step alone."""
    saved = saved_steps(run)
    if criteria.loss_percentile is not None:
        saved = [step for step in saved if step in losses]
        if not saved:
            fix = "train further with a smaller tracking.log_every, or choose by --metric"
            raise _nothing(f"no row of {METRICS} at a checkpoint or before it", fix)
    if criteria.around is None:
        return saved
    around = criteria.around
    if criteria.rule == "step":
        if around not in saved:
            raise no_such_step(run, around, saved)
        return [around]
    within = [step for step in saved if abs(step - around) <= criteria.window]
    if not within:
        nearest = min(saved, key=lambda step: abs(step - around))
        found = f"no checkpoint from step {around - criteria.window:,} to {around + criteria.window:,}"
        raise _nothing(found, f"the nearest is step {nearest:,}: choose --around or --window so that they take it in")
    return within


def _told(
    of: Candidate, criteria: Criteria, losses: Mapping[int, float], distances: Mapping[Candidate, Distance]
) -> dict[str, Any]:
    """A candidate as selected.json has it."""
    away = distances.get(of)
    return {
        "name": of.name,
        "steps": list(of.steps),
        "base_weight": of.base_weight,
        "score": None if criteria.metric is None else score(of.figures, criteria.metric),
        "loss": None if of.averaged else losses.get(of.steps[0]),
        "behind": None if away is None else away.behind,
        "interval": None if away is None or away.low is None else [away.low, away.high],
        "within_noise": None if away is None else away.within_noise,
        "figures": {key: of.figures[key] for key in criteria.metric or {}},
    }


def _nothing(found: str, fix: str) -> UserError:
    return UserError(Fault("what to choose from", found, "a checkpoint at least", fix))
