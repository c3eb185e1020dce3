"""Chooses the model of a run: measures what is missing, ranks, averages where asked to, and writes selected.json."""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from gist_train.config.errors import Fault, UserError
from gist_train.config.schema import Config
from gist_train.results.averaging import averaged, save_averaged
from gist_train.results.comparison import tasks_of
from gist_train.results.criteria import Criteria
from gist_train.results.measuring import Figures, Measuring, on_this_device, values
from gist_train.results.selected import AVERAGED, write_selected
from gist_train.results.selection import Candidate, Distance, by_loss, distance, ranked, score
from gist_train.training.checkpoint import checkpoint_folder, no_such_step, saved_steps, verified_manifest
from gist_train.training.runlog import METRICS

RUNNERS_UP = 5
"""Checkpoints whose distance to the chosen one is put against the noise."""


def select(config: Config, run: Path, criteria: Criteria, console: Console) -> dict[str, Any]:
    """Chooses and writes selected.json. Returns what it says.

    Raises:
        UserError: nothing to choose from, a step without a checkpoint, or a damaged checkpoint.
    """
    steps = _steps_to_choose_from(run, criteria)
    measuring = tasks_of(config) if config.evaluation.tasks else None
    losses = training_losses(run, steps)
    distances: dict[Candidate, Distance] = {}
    if criteria.metric is not None and measuring is not None:
        measuring.require(criteria.metric)
        order = ranked(_candidates(config, run, criteria, criteria.metric, measuring, steps, console), criteria.metric)
        distances = _distances(order, criteria.metric)
    else:
        by_rule = steps if criteria.loss_percentile is None else by_loss(losses, criteria.loss_percentile)
        order = [Candidate((step,), 0.0, {}, {}) for step in by_rule]
    chosen = order[0]
    base = {} if measuring is None else measuring.of_base(run, config.model)
    folder, figures = _chosen_model(config, run, chosen, measuring)
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
    }
    write_selected(run, told)
    if not chosen.averaged:
        shutil.rmtree(run / AVERAGED, ignore_errors=True)  # an earlier choice's
    return told


def _chosen_model(config: Config, run: Path, chosen: Candidate, measuring: Measuring | None) -> tuple[Path, Figures]:
    """Folder of the chosen model, written where it is a mean, and its figures on all tasks."""
    if chosen.averaged and measuring is not None:
        model = averaged(run, chosen.steps, config.model, chosen.base_weight)
        figures = values(measuring.of_model(on_this_device(model)))
        # What its newest checkpoint says of itself holds for the mean too.
        facts = verified_manifest(checkpoint_folder(run, chosen.steps[-1]))
        facts |= {"steps": chosen.steps, "base_weight": chosen.base_weight}
        save_averaged(model, run / AVERAGED, facts)
        return run / AVERAGED, figures
    step = chosen.steps[0]
    figures = {} if measuring is None else measuring.of_checkpoint(run, step) or {}
    return checkpoint_folder(run, step), figures


def training_losses(run: Path, steps: Sequence[int]) -> dict[int, float]:
    """Step -> training loss of those steps that have one: `loss_mean` of the row of metrics.jsonl at the step or last before it.

    That mean over the steps since the row before is what transformers' trainer, and so the authors' snapshots, call the loss.
    """
    path = run / METRICS
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    means = {row["step"]: row["loss_mean"] for row in rows}
    before = {step: max((logged for logged in means if logged <= step), default=None) for step in steps}
    return {step: means[logged] for step, logged in before.items() if logged is not None}


def _steps_to_choose_from(run: Path, criteria: Criteria) -> list[int]:
    """Steps with a checkpoint, within the window; with the rule "step", that step alone."""
    saved = saved_steps(run)
    if not saved:
        raise UserError(Fault(f"{run}/checkpoints", "no checkpoint", "one at least", "train first"))
    if criteria.loss_percentile is not None:
        logged = training_losses(run, saved)
        saved = [step for step in saved if step in logged]
        if not saved:
            raise _nothing(f"no row of {METRICS} at a checkpoint or before it", "train further, or choose by --metric")
    if criteria.around is None:
        return saved
    if criteria.rule == "step":
        if criteria.around not in saved:
            raise no_such_step(run, criteria.around, saved)
        return [criteria.around]
    within = [step for step in saved if abs(step - criteria.around) <= criteria.window]
    if not within:
        nearest = min(saved, key=lambda step: abs(step - (criteria.around or 0)))
        found = f"no checkpoint from step {criteria.around - criteria.window:,} to {criteria.around + criteria.window:,}"
        raise _nothing(found, f"the nearest is step {nearest:,}: choose --around or --window so that they take it in")
    return within


def _candidates(
    config: Config,
    run: Path,
    criteria: Criteria,
    metric: Mapping[str, float],
    measuring: Measuring,
    steps: Sequence[int],
    console: Console,
) -> list[Candidate]:
    """Every checkpoint with its figures, and the means that were asked for."""
    if criteria.average is not None and criteria.average > len(steps):
        found = f"{criteria.average}, of {len(steps)} checkpoints to choose from"
        raise UserError(Fault("--average", found, f"at most {len(steps)}", "lower it, or widen --window"))
    of_metric = measuring.only({key.split("/", 1)[0] for key in metric})
    known = of_metric.known(run)  # once: a run may have thousands of checkpoints
    candidates = []
    for number, step in enumerate(steps, 1):
        figures: Figures | None = known.get(step)
        if figures is None or not figures.keys() >= metric.keys():
            console.print(f"measuring step {step:,} ({number} of {len(steps)})", highlight=False)
            figures = of_metric.of_checkpoint(run, step)
        if figures is None:
            console.print(f"step {step:,} is gone: its checkpoint was deleted meanwhile", highlight=False)
            continue
        items = {key: of_metric.items(run, step, key) for key in metric}
        candidates.append(Candidate((step,), 0.0, figures, items))
    if not candidates:
        raise _nothing("no checkpoint that is left", "choose again")
    return candidates + _averages(config, run, criteria, metric, of_metric, candidates, console)


def _averages(
    config: Config,
    run: Path,
    criteria: Criteria,
    metric: Mapping[str, float],
    measuring: Measuring,
    single: Sequence[Candidate],
    console: Console,
) -> list[Candidate]:
    """The mean of checkpoints and the mixture with the base model that were asked for, measured."""
    best = ranked(single, metric)
    made: list[Candidate] = []
    start = best[0]
    if criteria.average is not None:
        newest = sorted(single, key=lambda of: of.steps, reverse=True)
        taken = (best if criteria.average_of == "best" else newest)[: criteria.average]
        start = Candidate(tuple(sorted(of.steps[0] for of in taken)), 0.0, {}, {})
        made.append(start)
    if criteria.merge_base is not None:
        made.append(replace(start, base_weight=criteria.merge_base))
    measured = []
    for candidate in made:
        console.print(f"measuring the {candidate.name}", highlight=False)
        model = on_this_device(averaged(run, candidate.steps, config.model, candidate.base_weight))
        figures = measuring.of_model(model)
        items = {key: figures[key].items for key in metric}
        measured.append(replace(candidate, figures=values(figures), items=items))
    return measured


def _distances(order: Sequence[Candidate], metric: Mapping[str, float]) -> dict[Candidate, Distance]:
    """How far the runners-up, and all means, lie behind the first."""
    others = [of for number, of in enumerate(order[1:]) if number < RUNNERS_UP or of.averaged]
    return {of: distance(order[0], of, metric) for of in others}


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


def _nothing(found: str, mend: str) -> UserError:
    return UserError(Fault("what to choose from", found, "a checkpoint at least", mend))
