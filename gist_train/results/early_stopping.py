"""Ends a run when the chosen metric has not risen for `evaluation.stop_after` evaluations, and lets it resume if asked.

What the decision rests on is in the run folder (evaluations.jsonl and early-stop.json), so that a resumed run decides the same.
"""

from pathlib import Path

from pydantic import BaseModel

from gist_train.config.errors import Fault, UserError
from gist_train.config.schema import Config
from gist_train.data.files import read_json, write_json
from gist_train.evaluation.measuring import Measuring
from gist_train.results.ranking import evaluations_since_rise, weighted_score
from gist_train.run_folder import Run


def out_of_patience(config: Config, run: Run, measuring: Measuring, step: int) -> bool:
    """Whether the run ends at `step`, which was just evaluated."""
    patience = config.evaluation.stop_after
    if patience is None:
        return False
    return evaluations_since_rise(_own_scores(config, run, measuring, step), after=_stopped_at(run)) >= patience


def no_rise(config: Config, run: Run, measuring: Measuring) -> str:
    """What did not rise since when, in words."""
    metric, end = config.selection.metric or {}, _stopped_at(run)
    scores = _own_scores(config, run, measuring, end)
    best = min(scores, key=lambda step: (-scores[step], step))
    what = next(iter(metric)) if len(metric) == 1 else f"the weighted mean of {', '.join(metric)}"
    return f"{what} was {100 * scores[best]:.2f} at step {best:,}, and no evaluation since was better"


def _own_scores(config: Config, run: Run, measuring: Measuring, step: int) -> dict[int, float]:
    """Step -> score of the evaluations up to `step` that the run itself made."""
    metric = config.selection.metric or {}
    # Its own alone: what a watcher or `select` measured in between must not use patience up.
    every = max(config.evaluation.every, 1)
    return {
        evaluated: weighted_score(scores, metric)
        for evaluated, scores in measuring.known(run).items()
        if evaluated <= step and (evaluated % every == 0 or evaluated == step) and metric.keys() <= scores.keys()
    }


def remember_end(config: Config, run: Run, step: int) -> None:
    """Keeps that the run was ended at `step`, once its checkpoint is whole, and under which limits."""
    limits = {"stop_after": config.evaluation.stop_after, "stop_at_step": config.training.stop_at_step}
    write_json(run.early_stop, {"step": step, **limits})


def stays_ended(config: Config, run: Run, step: int) -> bool:
    """Whether a run that is at `step` was ended there, and nothing was changed to let it resume.

    It resumes where `training.stop_at_step` was raised or set, or `evaluation.stop_after` raised or taken out. Patience then
    counts anew from that step.
    """
    if _stopped_at(run) != step or step == 0:
        return False
    was = _read(run.early_stop)
    now_stop, now_patience = config.training.stop_at_step, config.evaluation.stop_after
    further = now_stop is not None and now_stop > max(step, was.stop_at_step or 0)
    more_patient = now_patience is None or now_patience > was.stop_after
    return not (further or more_patient)


def forget_later_end(run: Run, step: int) -> None:
    """Drops what is known of an end after `step`, which a run that goes back to it has before it again."""
    if _stopped_at(run) > step:
        run.early_stop.unlink()


def best_saved(config: Config, run: Run, measuring: Measuring) -> int | None:
    """The step with a checkpoint whose score by `selection.metric` is the best so far: retention must leave it to be selected."""
    metric = config.selection.metric
    if metric is None:
        return None
    known = measuring.known(run)
    evaluated = [step for step in run.saved_steps() if metric.keys() <= known.get(step, {}).keys()]
    scores = {step: weighted_score(known[step], metric) for step in evaluated}
    return min(scores, key=lambda step: (-scores[step], step), default=None)


def _stopped_at(run: Run) -> int:
    """The step at which the run was ended last; 0 where it never was."""
    return _read(run.early_stop).step if run.early_stop.exists() else 0


class _EarlyStop(BaseModel):
    """early-stop.json."""

    step: int
    stop_after: int
    stop_at_step: int | None


def _read(path: Path) -> _EarlyStop:
    try:
        return _EarlyStop.model_validate(read_json(path))
    except (ValueError, RecursionError):  # pydantic's errors are ValueErrors
        fix = "delete it: patience then counts from the start"
        raise UserError(Fault(str(path), "a file that can't be read", "what gist-train train writes", fix)) from None
