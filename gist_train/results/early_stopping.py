"""Ends a run when the chosen metric has not risen for `evaluation.stop_after` evaluations, and lets it go on when told to.

What the decision rests on is in the run folder (evaluations.jsonl and early-stop.json), so that a resumed run decides the same.
"""

from pathlib import Path

from gist_train.config.schema import Config
from gist_train.data.files import read_json, write_json
from gist_train.results.measuring import Measuring
from gist_train.results.selection import evaluations_since_rise, score

EARLY_STOP = "early-stop.json"


def out_of_patience(config: Config, run: Path, measuring: Measuring, step: int) -> bool:
    """Whether the run ends at `step`, which was just evaluated."""
    patience, metric = config.evaluation.stop_after, config.selection.metric
    if patience is None or metric is None:
        return False
    known = measuring.known(run)
    scores = {at: score(figures, metric) for at, figures in known.items() if at <= step and metric.keys() <= figures.keys()}
    return evaluations_since_rise(scores, after=_stopped_at(run)) >= patience


def remember_end(config: Config, run: Path, step: int) -> None:
    """Keeps that the run was ended at `step`, once its checkpoint is whole, and under which limits."""
    limits = {"stop_after": config.evaluation.stop_after, "stop_at_step": config.training.stop_at_step}
    write_json(run / EARLY_STOP, {"step": step, **limits})


def stays_ended(config: Config, run: Path, step: int) -> bool:
    """Whether a run that stands at `step` was ended there, and nothing was changed to let it go on.

    It goes on where `training.stop_at_step` was raised or set, or `evaluation.stop_after` raised or taken out. Patience then
    counts anew from that step.
    """
    if _stopped_at(run) != step or step == 0:
        return False
    was = read_json(run / EARLY_STOP)
    now_stop, now_patience = config.training.stop_at_step, config.evaluation.stop_after
    further = now_stop is not None and now_stop > max(step, was["stop_at_step"] or 0)
    more_patient = now_patience is None or now_patience > was["stop_after"]
    return not (further or more_patient)


def _stopped_at(run: Path) -> int:
    """The step at which the run was ended last; 0 where it never was."""
    path = run / EARLY_STOP
    return int(read_json(path)["step"]) if path.exists() else 0
