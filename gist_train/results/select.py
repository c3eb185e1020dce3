"""Chooses the model of a run: measures what is missing, ranks, averages where asked to, and writes selected.json."""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from gist_train.config.errors import Fault, UserError
from gist_train.config.schema import Config
from gist_train.data.files import json_lines
from gist_train.data.leases import locked
from gist_train.data.manifests import verified_manifest
from gist_train.evaluation.leakage import leaks_of
from gist_train.evaluation.measuring import Measuring, Scores, on_this_device, values
from gist_train.evaluation.metrics import Items, task_of
from gist_train.results.averaging import averaged, save_averaged
from gist_train.results.criteria import Criteria
from gist_train.results.ranking import Candidate, Distance, by_loss, distance, ranked, resampled_scores, weighted_score
from gist_train.results.selected import Selected, SelectedCandidate, drop_other_means, write_selected
from gist_train.run_folder import SELECT_LOCK, Run
from gist_train.training.checkpoint import no_checkpoint, no_such_step

RUNNERS_UP = 5
"""Checkpoints whose distance to the chosen one is compared with the noise."""


def select(config: Config, run: Run, criteria: Criteria, console: Console) -> Selected:
    """Chooses and writes selected.json. Returns what it says.

    Raises:
        UserError: nothing to choose from, a step without a checkpoint, or a damaged checkpoint.
    """
    if not run.saved_steps():
        raise no_checkpoint(run)
    measuring = Measuring.of(config, console) if config.evaluation.judges else None
    with locked(run.folder, SELECT_LOCK):
        losses = training_losses(run, run.saved_steps())
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
    """A choice by scores: every checkpoint is measured on the tasks that the metric names, and the means that were asked for."""

    config: Config
    run: Run
    criteria: Criteria
    metric: Mapping[str, float]
    measuring: Measuring
    console: Console

    def ranked(self, steps: Sequence[int]) -> tuple[list[Candidate], dict[Candidate, Distance]]:
        """The candidates, the best first, and how far the runners-up and all means are behind it."""
        self.measuring.require(self.metric)
        count = self.criteria.average
        if count is not None and count > len(steps):
            more = f"{count}, of {len(steps)} checkpoints to choose from"
            raise UserError(Fault("--average", more, f"at most {len(steps)}", "lower it, or widen --window"))
        of_metric = self.measuring.only({task_of(key) for key in self.metric})
        single = self._checkpoints(of_metric, steps)
        means = self._means(of_metric, single)
        order = ranked([*single, *means], self.metric)
        best, others = order[0], order[1:]
        best_score = weighted_score(best.scores, self.metric)
        if self.criteria.around is None:
            self._tell_what_is_gone(of_metric, best_score)

        def scores_of(candidate: Candidate) -> NDArray[np.float64] | None:
            items = means.get(candidate)
            if items is None:
                items = {key: of_metric.items(self.run, candidate.steps[0], key) for key in self.metric}
            return resampled_scores(items, self.metric)

        compared = [candidate for number, candidate in enumerate(others) if number < RUNNERS_UP or candidate.averaged]
        of_best = scores_of(best) if compared else None
        spread = {candidate: None if of_best is None else scores_of(candidate) for candidate in compared}
        distances = {}
        for candidate in others:
            behind = best_score - weighted_score(candidate.scores, self.metric)
            distances[candidate] = distance(behind, of_best, spread.get(candidate))
        return order, distances

    def _checkpoints(self, measuring: Measuring, steps: Sequence[int]) -> list[Candidate]:
        known = measuring.known(self.run)  # once: a run may have thousands of checkpoints
        candidates = []
        for number, step in enumerate(steps, 1):
            scores: Scores | None = known.get(step)
            if scores is None or not scores.keys() >= self.metric.keys():
                self.console.print(f"measuring step {step:,} ({number} of {len(steps)})", highlight=False)
                scores = measuring.of_checkpoint(self.run, step)
            if scores is None:
                self.console.print(f"step {step:,} is gone: its checkpoint was deleted meanwhile", highlight=False)
                continue
            candidates.append(Candidate((step,), 0.0, scores))
        if not candidates:
            raise _nothing("no checkpoint that is left", "choose again")
        return candidates

    def _means(self, measuring: Measuring, single: Sequence[Candidate]) -> dict[Candidate, Mapping[str, Items | None]]:
        """The mean of checkpoints and the mixture with the base model that were asked for, measured, with their items."""
        best = ranked(single, self.metric)
        start, made = best[0], list[Candidate]()
        if self.criteria.average is not None:
            newest = sorted(single, key=lambda candidate: candidate.steps, reverse=True)
            taken = (best if self.criteria.average_of == "best" else newest)[: self.criteria.average]
            start = Candidate(tuple(sorted(candidate.steps[0] for candidate in taken)), 0.0, {})
            made.append(start)
        if self.criteria.merge_base is not None:
            made.append(replace(start, base_weight=self.criteria.merge_base))
        means: dict[Candidate, Mapping[str, Items | None]] = {}
        for candidate in made:
            self.console.print(f"measuring the {candidate.name}", highlight=False)
            try:
                model = on_this_device(averaged(self.run, candidate.steps, self.config.model, candidate.base_weight))
            except (UserError, OSError):
                if all(self.run.checkpoint(step).exists() for step in candidate.steps):
                    raise
                self.console.print(f"{candidate.name}: left out, a checkpoint was deleted meanwhile", highlight=False)
                continue
            scores = measuring.of_model(model)
            means[replace(candidate, scores=values(scores))] = {key: scores[key].items for key in self.metric}
        return means

    def _tell_what_is_gone(self, measuring: Measuring, best: float) -> None:
        """Names the best step that was measured and has no checkpoint any more, where it was better than what is left."""
        saved = self.run.saved_steps()
        gone = {
            step: weighted_score(scores, self.metric)
            for step, scores in measuring.known(self.run).items()
            if step and step not in saved and scores.keys() >= self.metric.keys()
        }
        first = max(gone, key=lambda step: gone[step], default=None)
        if first is not None and gone[first] > best:
            better = f"step {first:,} was better ({100 * gone[first]:.2f} against {100 * best:.2f}), but its checkpoint is gone"
            fix = "selection.metric in the YAML keeps the best, a higher checkpoint.keep_last more of them"
            self.console.print(f"{better}: {fix}", highlight=False, soft_wrap=True)


def _keep(
    config: Config,
    run: Run,
    criteria: Criteria,
    measuring: Measuring | None,
    order: Sequence[Candidate],
    losses: Mapping[int, float],
    distances: Mapping[Candidate, Distance],
) -> Selected:
    """Measures the chosen model and the base on all tasks, and writes selected.json."""
    chosen = order[0]
    base = {} if measuring is None else measuring.of_base(run)
    if chosen.averaged and measuring is not None:
        folder, scores = _write_mean(config, run, chosen, measuring)
    else:
        folder = run.checkpoint(chosen.steps[0])
        scores = {} if measuring is None else measuring.of_checkpoint(run, chosen.steps[0]) or {}
    if not folder.exists():
        raise _nothing(f"{chosen.name}, whose checkpoint was deleted meanwhile", "choose again, or raise checkpoint.keep_last")
    selected = Selected(
        step=chosen.steps[-1],
        steps=chosen.steps,
        base_weight=chosen.base_weight,
        name=chosen.name,
        checkpoint=str(folder.relative_to(run.folder)),
        rule=criteria.rule,
        metric=None if criteria.metric is None else dict(criteria.metric),
        around=criteria.around,
        window=None if criteria.around is None else criteria.window,
        scores=scores,
        base=base,
        candidates=[_row(candidate, criteria, losses, distances.get(candidate)) for candidate in order],
        evaluation=config.evaluation,
        leakage=leaks_of(run, config.evaluation),
    )
    write_selected(run, selected)
    drop_other_means(run, folder)
    return selected


def _write_mean(config: Config, run: Run, chosen: Candidate, measuring: Measuring) -> tuple[Path, Scores]:
    """Folder of a mean that was chosen, and its scores on all tasks."""
    model = on_this_device(averaged(run, chosen.steps, config.model, chosen.base_weight))
    judged_by = {task_of(key) for key in chosen.scores}
    others = measuring.only({task.name for task in measuring.tasks} - judged_by)
    scores = measuring.in_order({**chosen.scores, **values(others.of_model(model))})
    # What its newest checkpoint says of itself holds for the mean too.
    facts = verified_manifest(run.checkpoint(chosen.steps[-1]))
    facts |= {"steps": chosen.steps, "base_weight": chosen.base_weight}
    folder = run.averaged(chosen.steps, chosen.base_weight)
    save_averaged(model, folder, facts)
    return folder, scores


def training_losses(run: Run, steps: Sequence[int]) -> dict[int, float]:
    """Step -> training loss of those steps that have one: `loss_mean` of the row of metrics.jsonl at the step or last before it.

    That mean over the steps since the row before is what transformers' trainer, and so the authors' snapshots, call the loss.
    """
    means: dict[int, float] = {}
    for _, row in json_lines(run.metrics):
        step, loss = row.get("step"), row.get("loss_mean")
        if isinstance(step, int) and isinstance(loss, int | float) and isfinite(loss):
            means[step] = float(loss)
    logged = sorted(means)
    rows_before = {step: bisect_right(logged, step) for step in steps}
    return {step: means[logged[count - 1]] for step, count in rows_before.items() if count}


def _steps_to_choose_from(run: Run, criteria: Criteria, losses: Mapping[int, float]) -> list[int]:
    """Steps with a checkpoint, within the window; with the rule "step", that step alone."""
    saved = run.saved_steps()
    if criteria.loss_percentile is not None:
        saved = [step for step in saved if step in losses]
        if not saved:
            fix = "train further with a smaller tracking.log_every, or choose by --metric"
            raise _nothing(f"no row of {run.metrics.name} at a checkpoint or before it", fix)
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
        none = f"no checkpoint from step {around - criteria.window:,} to {around + criteria.window:,}"
        raise _nothing(none, f"the nearest is step {nearest:,}: choose --around or --window so that they take it in")
    return within


def _row(candidate: Candidate, criteria: Criteria, losses: Mapping[int, float], away: Distance | None) -> SelectedCandidate:
    """A candidate as selected.json has it; `away` is how far it is behind, if that was asked."""
    metric = criteria.metric
    return SelectedCandidate(
        name=candidate.name,
        steps=candidate.steps,
        base_weight=candidate.base_weight,
        score=None if metric is None else weighted_score(candidate.scores, metric),
        loss=None if candidate.averaged else losses.get(candidate.steps[0]),
        behind=None if away is None else away.behind,
        interval=None if away is None or away.low is None or away.high is None else (away.low, away.high),
        within_noise=None if away is None else away.within_noise,
        scores={key: candidate.scores[key] for key in metric or {}},
    )


def _nothing(found: str, fix: str) -> UserError:
    return UserError(Fault("what to choose from", found, "a checkpoint at least", fix))
