"""What a run's folder says of it, small enough for a page however long the run is."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from gist_train.config.errors import Fault, UserError
from gist_train.config.loading import load_config
from gist_train.data.files import json_lines, read_json
from gist_train.evaluation.score_file import Terms, read_scores
from gist_train.results.selected import Selected, read_selected
from gist_train.run_folder import Run

MOST_ROWS = 400
"""Of a chart. More rows than that are averaged, neighbours with neighbours."""


@dataclass(frozen=True, slots=True)
class Figures:
    """A run, as a page shows it."""

    name: str
    config: dict[str, object]
    """Dotted key -> value."""
    described: dict[str, Any]
    """run.json."""
    rows: list[dict[str, float]]
    """Rows of metrics.jsonl, or the means of neighbouring ones."""
    scores: dict[int, dict[str, float]]
    """Step -> "<task>/<metric>" -> fraction; step 0 is the base model."""
    selected: Selected | None

    @property
    def chosen_step(self) -> int | None:
        """The selected step, or else the newest that was measured."""
        return self.selected.step if self.selected is not None else max(self.scores, default=None)

    @property
    def after(self) -> dict[str, float]:
        """Scores of the selected model, or of the newest step that was measured."""
        if self.selected is not None:
            return self.selected.scores
        return self.scores.get(max(self.scores, default=0), {})

    @property
    def before(self) -> dict[str, float]:
        """Scores of the base model."""
        return self.scores.get(0, {}) if self.selected is None else self.selected.base


def figures_of(run: Run) -> Figures:
    """What the folder of a run says.

    Raises:
        UserError: it is no run folder, or a file in it can't be read.
    """
    if not run.config.is_file() or not run.description.is_file():
        found = f"{run}, which has no {run.config.name} and {run.description.name}"
        raise UserError(Fault("RUN", found, "a run that has begun", "name a run folder, or train first"))
    config = load_config(run.config)  # which has the defaults of fields that the run knew nothing of
    terms = Terms.of(config.evaluation)
    scores = read_scores(run, terms) if run.evaluations.exists() else {}
    rows = thinned(row for _, row in json_lines(run.metrics)) if run.metrics.exists() else []
    values = dict(flat(config.model_dump(mode="json")))
    return Figures(config.name, values, read_json(run.description), rows, scores, read_selected(run))


def told_apart(runs: Sequence[Figures]) -> list[Figures]:
    """The runs under names of their own: of those with one name each gets its number too."""
    names = [run.name for run in runs]
    return [
        replace(run, name=f"{run.name} ({number})") if names.count(run.name) > 1 else run
        for number, run in enumerate(runs, start=1)
    ]


def flat(value: object, above: str = "") -> Iterator[tuple[str, object]]:
    """Dotted key -> value of every leaf of a config."""
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from flat(part, f"{above}.{key}" if above else str(key))
    elif isinstance(value, list) and any(isinstance(part, Mapping | list) for part in value):
        for index, part in enumerate(value):
            yield from flat(part, f"{above}[{index}]")
    else:
        yield above, value


def thinned(rows: Iterator[dict[str, Any]], most: int = MOST_ROWS) -> list[dict[str, float]]:
    """At most `most` rows: the numbers of each so many neighbouring rows averaged, under the last one's step."""
    kept: list[dict[str, float]] = []
    waiting: list[dict[str, float]] = []
    width = 1
    for row in rows:
        waiting.append({name: float(value) for name, value in row.items() if _is_number(value)})
        if len(waiting) == width:
            kept.append(_mean(waiting))
            waiting = []
        if len(kept) > most:
            kept = [_mean(kept[first : first + 2]) for first in range(0, len(kept), 2)]
            width *= 2
    return kept + ([_mean(waiting)] if waiting else [])


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _mean(rows: list[dict[str, float]]) -> dict[str, float]:
    names = dict.fromkeys(name for row in rows for name in row)
    means = {name: math.fsum(known := [row[name] for row in rows if name in row]) / len(known) for name in names}
    return means | {"step": rows[-1]["step"]}
