"""What `select` is asked for: the command's words over the config's selection, checked before anything is measured."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from gist_train.config.errors import Fault, UserError, shown
from gist_train.config.evaluation import is_measured, listed_metrics
from gist_train.config.fields import LARGEST_WEIGHT
from gist_train.config.schema import Config

LOSS_PERCENTILE = "loss-percentile"


@dataclass(frozen=True, slots=True)
class Criteria:
    """How to choose, and from what."""

    metric: Mapping[str, float] | None
    """<task>/<metric> -> weight; None where no metric decides."""
    loss_percentile: float | None
    """The rule of GISTEmbed's authors: by training loss, the one at index int(n * percentile); None where it does not decide."""
    around: int | None
    """Optimizer step to choose around; None = the whole run. The step itself is chosen where neither of the above decides."""
    window: int
    """Optimizer steps to either side."""
    average: int | None
    """Checkpoints whose weights are averaged; None = none."""
    average_of: Literal["best", "last"]
    """Which these are."""
    merge_base: float | None
    """Share of the base model that is mixed in; None = none."""

    @property
    def rule(self) -> str:
        """As selected.json names it."""
        if self.loss_percentile is not None:
            return f"{LOSS_PERCENTILE} {self.loss_percentile:g}"
        return "metric" if self.metric is not None else "step"


def criteria_of(
    config: Config,
    *,
    metrics: Sequence[str],
    rule: tuple[str, float] | None,
    around: int | None,
    window: int | None,
    average: int | None,
    average_of: Literal["best", "last"] | None,
    merge_base: float | None,
) -> Criteria:
    """The command's words, and the config's selection where it says nothing.

    Args:
        metrics: "<task>/<metric>", or "<task>/<metric>=<weight>".
        rule: ("loss-percentile", share).

    Raises:
        UserError: with all faults: unknown metrics or rules, shares out of range, parts that do not fit together.
    """
    faults: list[Fault] = []
    metric = _weights(config, metrics, faults) if metrics else config.selection.metric
    if rule is not None:
        _check_rule(rule, metrics, faults)
        metric = None
    criteria = Criteria(
        metric,
        None if rule is None else rule[1],
        config.selection.around if around is None else around,
        config.selection.window if window is None else window,
        average,
        average_of or "best",
        merge_base,
    )
    if window is not None and window < 0:
        faults.append(Fault("--window", shown(window), "0 steps or more", "leave it out for selection.window"))
    if window is not None and criteria.around is None:
        faults.append(Fault("--window", shown(window), "a step to choose around", "add --around, or leave it out"))
    if average_of is not None and average is None:
        faults.append(Fault("--average-of", average_of, "with --average", "add --average K, or leave it out"))
    for option, given in (("--average", average), ("--merge-base", merge_base)):
        if given is not None and criteria.rule != "metric":
            fix = "add --metric: it is evaluated before it may be chosen"
            faults.append(Fault(option, f"{shown(given)} with the rule {criteria.rule}", "a metric to judge it by", fix))
    if average is not None and average < 2:
        faults.append(Fault("--average", shown(average), "2 checkpoints or more", "leave it out to choose one checkpoint"))
    if merge_base is not None and not 0 < merge_base < 1:
        fix = "try 0.2: weights are then 0.8 of the run's and 0.2 of base's"
        faults.append(Fault("--merge-base", shown(merge_base), "a share of the base model between 0 and 1", fix))
    if criteria.rule == "step" and criteria.around is None:
        expected = f"a metric ({listed_metrics(config.evaluation)}), a rule ({LOSS_PERCENTILE}) or a step"
        fix = f"add --metric <task>/<metric>, --rule {LOSS_PERCENTILE} 0.025 or --around STEP, or set selection in the config"
        faults.append(Fault("how to choose", "no metric, no rule and no step", expected, fix))
    if faults:
        raise UserError(*faults)
    return criteria


def _weights(config: Config, metrics: Sequence[str], faults: list[Fault]) -> dict[str, float]:
    weights: dict[str, float] = {}
    for argument in metrics:
        name, given, weight = argument.partition("=")
        if not is_measured(config.evaluation, name):
            fix = "name one of these, or add its task to evaluation.tasks"
            faults.append(Fault("--metric", shown(name), listed_metrics(config.evaluation), fix))
        if name in weights:
            faults.append(Fault("--metric", f"{name}, twice", "each metric once", "leave one out"))
        try:
            weights[name] = float(weight) if given else 1.0
        except ValueError:
            weights[name] = 0.0
        if not 0 < weights[name] <= LARGEST_WEIGHT:
            faults.append(
                Fault(
                    "--metric",
                    shown(argument),
                    f"a weight above 0, at most {LARGEST_WEIGHT:,}",
                    f"write it as {name}=2, or leave the weight out",
                )
            )
    return weights


def _check_rule(rule: tuple[str, float], metrics: Sequence[str], faults: list[Fault]) -> None:
    name, share = rule
    if name != LOSS_PERCENTILE:
        faults.append(Fault("--rule", shown(name), LOSS_PERCENTILE, f"write --rule {LOSS_PERCENTILE} 0.025"))
    elif not 0 <= share < 1:
        faults.append(Fault(f"--rule {name}", shown(share), "a share from 0 to below 1", "the authors' is 0.025"))
    if metrics:
        faults.append(Fault("--rule", f"{name}, and --metric", "one of the two", "leave one out: a rule looks at no metric"))
