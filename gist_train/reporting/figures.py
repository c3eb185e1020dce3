"""What a run's folder says of it, small enough for a page however long the run is."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, NonNegativeInt

from gist_train.auditing.record import AuditRecord, read_audit
from gist_train.config.errors import Fault, UserError, shown
from gist_train.config.loading import load_config
from gist_train.data.files import json_lines, read_json
from gist_train.evaluation.score_file import Terms, contents_of, read_scores
from gist_train.model.loss import BLOCKS
from gist_train.reporting.noise import Resampled, resampled
from gist_train.results.selected import Selected, read_selected
from gist_train.run_folder import Run
from gist_train.training.schedule import make_schedule

MOST_ROWS = 400
"""Of a chart. More rows than that are averaged, neighbours with neighbours."""


@dataclass(slots=True)
class MaskedOfTask:
    """What was masked in the batches of a task, over the steps that were logged."""

    steps: int = 0
    sums: dict[str, float] = field(default_factory=lambda: dict.fromkeys(BLOCKS, 0.0))

    def add(self, row: Mapping[str, Any]) -> None:
        """Takes in a row of metrics.jsonl."""
        self.steps += 1
        for block in BLOCKS:
            self.sums[block] += row[f"masked_{block}"]

    def share(self, block: str) -> float:
        """The mean over the steps of the share of the block's candidates."""
        return self.sums[block] / self.steps


class _Part(BaseModel):
    """A part of run.json: what a page shows of it is checked, since people edit files."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)


class SourceRead(_Part):
    """A source of the data."""

    name: str
    rows: int | None = None
    """Left to train on; early versions did not say."""


class Described(_Part):
    """What run.json says that a page shows."""

    gist_train: str
    python: str
    packages: dict[str, str]
    """Name -> version."""
    device: str
    precision: str
    processes: int
    data: list[SourceRead]
    total_steps: NonNegativeInt | None = None
    """Of the schedule; early versions did not say."""


@dataclass(frozen=True, slots=True)
class Figures:
    """A run, as a page shows it."""

    name: str
    sections: dict[str, Any]
    """The config, as JSON has it."""
    described: Described
    rows: list[dict[str, float]]
    """Rows of metrics.jsonl, or the means of neighbouring ones."""
    masked: dict[str | None, MaskedOfTask]
    """By task, None for batches of several; of rows that say their task."""
    scores: dict[int, dict[str, float]]
    """Step -> "<task>/<metric>" -> fraction; step 0 is the base model."""
    selected: Selected | None
    terms: Terms
    """That the scores were measured under."""
    contents: dict[str, str]
    """By task, what its scores are of: those of two runs can be compared where it is the same."""
    resampled_before: dict[str, Resampled]
    """Of the base model's scores, those whose items are on disk."""
    resampled_after: dict[str, Resampled]
    """Of the selected model's, or of the newest step's."""
    audit: AuditRecord | None
    audited: bool
    """Whether the audit looked at the data that the run was trained on."""

    @property
    def config(self) -> dict[str, object]:
        """Dotted key -> value."""
        return dict(flat(self.sections))

    @property
    def config_text(self) -> str:
        """The config in YAML, as config.yaml has it."""
        return yaml.safe_dump(self.sections, sort_keys=False, allow_unicode=True, width=math.inf)

    @property
    def masked_tasks(self) -> list[tuple[str | None, MaskedOfTask]]:
        """What was masked by task, that of most steps first."""
        return sorted(self.masked.items(), key=lambda item: -item[1].steps)

    @property
    def warmup_steps(self) -> int:
        """Steps over which the learning rate rises; 0 where it is not said how many steps the schedule has."""
        share = self.config["schedule.warmup_ratio"]
        assert isinstance(share, int | float)
        total = self.described.total_steps or 0
        return make_schedule("linear", 1.0, share, steps_per_epoch=1, epochs=None, max_steps=total).warmup_steps

    @property
    def chosen_step(self) -> int | None:
        """The selected step, or else the newest that was measured; None where none was but the base model."""
        return self.selected.step if self.selected is not None else _newest(self.scores)

    @property
    def after(self) -> dict[str, float]:
        """Scores of the selected model, or of the newest step that was measured; {} where none was but the base model."""
        if self.selected is not None:
            return self.selected.scores
        newest = _newest(self.scores)
        return {} if newest is None else self.scores[newest]

    @property
    def before(self) -> dict[str, float]:
        """Scores of the base model."""
        return self.scores.get(0, {}) if self.selected is None else self.selected.base


def begun(run: Run) -> bool:
    """Whether a training has begun there."""
    return run.config.is_file() and run.description.is_file()


def figures_of(run: Run) -> Figures:
    """What the folder of a run says.

    Raises:
        UserError: it is no run folder, or a file in it can't be read.
    """
    if not begun(run):
        found = f"{run}, which has no {run.config.name} and {run.description.name}"
        raise UserError(Fault("RUN", found, "a run that has begun", "name a run folder, or train first"))
    config = load_config(run.config)  # which has the defaults of fields that the run knew nothing of
    masked: dict[str | None, MaskedOfTask] = {}
    rows = thinned(_by_task(_stepped(run), masked))
    terms, chosen = Terms.of(config.evaluation), read_selected(run)
    scores = read_scores(run, terms) if run.evaluations.exists() else {}
    contents = contents_of(run, terms) if run.evaluations.exists() else {}
    step = (_newest(scores) or 0) if chosen is None else chosen.step
    after = {} if step == 0 or (chosen is not None and chosen.averaged) else scores.get(step, {})
    audit = read_audit(run)
    return Figures(
        name=config.name,
        sections=config.model_dump(mode="json"),
        described=_described(run),
        rows=rows,
        masked=masked,
        scores=scores,
        selected=chosen,
        terms=terms,
        contents=contents,
        resampled_before=resampled(run, 0, scores.get(0, {}), terms, contents),
        resampled_after=resampled(run, step, after, terms, contents),
        audit=audit,
        audited=audit is not None and audit.of_data(config),
    )


def _newest(scores: Mapping[int, object]) -> int | None:
    """The newest step that was measured, the base model aside; None where there is none."""
    return max((step for step in scores if step > 0), default=None)


def _described(run: Run) -> Described:
    try:
        return Described.model_validate(read_json(run.description))
    except (OSError, ValueError):  # a ValidationError is a ValueError
        fix = "put the file back as training wrote it; to resume the run writes it anew"
        raise UserError(Fault(str(run.description), "a file that can't be read", "what training writes", fix)) from None


def _stepped(run: Run) -> Iterator[dict[str, Any]]:
    """The rows of metrics.jsonl, each of which must say its step."""
    for line, row in json_lines(run.metrics):
        if not _is_number(row.get("step")):
            raise UserError(
                Fault(str(run.metrics), f"a row without a step: {shown(line)}", "rows as training writes them", "delete that row")
            )
        yield row


def _by_task(rows: Iterable[dict[str, Any]], masked: dict[str | None, MaskedOfTask]) -> Iterator[dict[str, Any]]:
    """The same rows, adding up on the way what was masked of each task."""
    for row in rows:
        named = isinstance(row.get("task", False), str | None)
        if named and all(_is_number(row.get(f"masked_{block}")) for block in BLOCKS):
            masked.setdefault(row["task"], MaskedOfTask()).add(row)
        yield row


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
        waiting.append(
            {name: float(value) for name, value in row.items() if type(value) in (float, int) and math.isfinite(value)}
        )
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
    known: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row.items():
            known.setdefault(name, []).append(value)
    return {name: math.fsum(values) / len(values) for name, values in known.items()} | {"step": rows[-1]["step"]}
