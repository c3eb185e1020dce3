"""What `gist-train audit` finds: what may be wrong with the rows of a config, before and without any training."""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from numbers import Real
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console, RenderableType

from gist_train.auditing.looking import prepare_to_look, whole_data
from gist_train.auditing.masking import Masked, Masking, together
from gist_train.auditing.record import AuditRecord, Suspect, sources_of
from gist_train.config.errors import Fault, UserError, shown
from gist_train.config.schema import Config
from gist_train.config.secrets import without_secrets
from gist_train.config.suspects import KINDS
from gist_train.data.corpus import Corpus
from gist_train.data.opening import names_of_tables
from gist_train.model.pair_scores import Scores
from gist_train.progress import PagedResult, follow
from gist_train.suspects import lacking_kinds, row_scores
from gist_train.training.guides import StoredGuide, named_guide
from gist_train.training.step_context import SourceRules
from gist_train.version import __version__

EXAMPLES = 10
"""Worst rows of each kind that are kept."""


@dataclass(frozen=True, slots=True)
class Audit(PagedResult):
    """What was found."""

    config: Config
    corpus: Corpus
    files: list[list[str]]
    """By source, the files or data sets that rows of it are of."""
    guide: str
    """In words."""
    scores: dict[str, Scores]
    """(R,) by kind, the higher the worse."""
    thresholds: dict[str, float]
    """By kind, from which on a row is suspect."""
    masking: Masking | None
    """None where no guide's embeddings are stored, or the rows give no batch."""

    def page(self) -> RenderableType:
        """What `gist-train audit` prints."""
        from gist_train.auditing.page import audit_page

        return audit_page(self)

    def suspects(self, kind: str) -> NDArray[np.int64]:
        """Rows that are suspect, the worst first."""
        scores = self.scores[kind]
        rows = np.flatnonzero(scores >= self.thresholds[kind])
        return rows[np.argsort(-scores[rows], kind="stable")]

    def all_suspects(self) -> NDArray[np.int64]:
        """Ascending rows that are suspect in some way."""
        return np.unique(np.concatenate([self.suspects(kind) for kind in self.scores]))

    def suspect(self, kind: str, row: int) -> Suspect:
        """A row in words."""
        corpus = self.corpus
        file, number = self.files[int(corpus.source[row])][int(corpus.file[row])], int(corpus.number[row])
        of_row = [
            [corpus.text(int(i)) for i in flat[bounds[row] : bounds[row + 1]]]
            for flat, bounds in ((corpus.positive, corpus.positive_offsets), (corpus.negative, corpus.negative_offsets))
        ]
        anchor, task = corpus.text(int(corpus.anchor[row])), corpus.tasks[int(corpus.task[row])]
        return Suspect(kind, float(self.scores[kind][row]), task, file, number, anchor, *of_row)

    def lines(self) -> Iterator[Suspect]:
        """Every row and kind in which it is suspect, the worst of each kind first."""
        return (self.suspect(kind, int(row)) for kind in self.scores for row in self.suspects(kind))

    def record(self) -> AuditRecord:
        """Counts, thresholds and worst rows, and what would be masked; passwords and tokens in texts and paths hidden."""
        rows = self.corpus.row_count
        kinds = {
            kind: {
                "about": KINDS[kind].about,
                "score": KINDS[kind].score,
                "threshold": self.thresholds[kind],
                "rows": len(suspects := self.suspects(kind)),
                "share": len(suspects) / rows,
                "worst": [asdict(self.suspect(kind, int(row))) for row in suspects[:EXAMPLES]],
            }
            for kind in self.scores
        }
        masking = margins = None
        if self.masking is not None:
            of_margins = self.masking.by_task
            masking = [_masked(margin, task, one) for margin, by_task in of_margins.items() for task, one in by_task.items()]
            margins = [_masked(margin, None, together(by_task.values())) for margin, by_task in of_margins.items()]
        return AuditRecord.model_validate(
            without_secrets(
                {
                    "name": self.config.name,
                    "made": time.time(),
                    "gist_train": __version__,
                    "sources": sources_of(self.config),
                    "student": self.config.model.name,
                    "guide": self.guide,
                    "rows": rows,
                    "suspect_rows": len(self.all_suspects()),
                    "kinds": kinds,
                    "masking": masking,
                    "margins": margins,
                    "epoch_batches": None if self.masking is None else self.masking.epoch,
                }
            )
        )


def _masked(margin: float, task: str | None, one: Masked) -> dict[str, Any]:
    shares = {
        f"masked_{block}": one.masked[block] / one.candidates[block] if one.candidates[block] else None for block in one.masked
    }
    counts = {"batches": one.batches, "rows": one.rows, "rows_without_candidates": one.bare}
    return {"margin": margin, "task": task, **counts, "masked": one.share, **shares}


def audit(
    config: Config, device: torch.device, console: Console, *, margins: Sequence[float] = (), thresholds: Mapping[str, float]
) -> Audit:
    """Looks at all usable rows of the files of `config`, those too that training holds out or drops.

    Args:
        margins: besides loss.margin, under which it is counted what the guide would mask.
        thresholds: by kind, in place of the usual ones; as `check_asked` passes them, like margins.

    Raises:
        UserError: data or models are not what the config says.
    """
    config = whole_data(config)
    by, plan = prepare_to_look(config, device, console)
    scores = row_scores(by, KINDS, console)
    masking = None
    if isinstance(by.guide, StoredGuide) and plan is not None:
        asked = dict.fromkeys([config.loss.margin, *margins])
        rules = SourceRules.of(config.data.train)
        masking = Masking(by.corpus, plan, by.guide, config.loss, rules, list(asked))
        follow(masking.look(), "masking batches", masking.batches, console)
    usual = {kind: KINDS[kind].threshold for kind in scores}
    guide = named_guide(config, by.guide)
    files = [names_of_tables(source, f"data.train[{index}]") for index, source in enumerate(config.data.train)]
    return Audit(config, by.corpus, files, guide, scores, {**usual, **thresholds}, masking)


def read_margins(written: str) -> list[float]:
    """The numbers of `--margins`; UserError where one is none."""
    return [_number(one, "--margins") for one in written.split(",") if one.strip()]


def read_numbers(written: Sequence[str], option: str) -> dict[str, float]:
    """NAME=NUMBER, of an option that may be repeated; UserError where one is none."""
    numbers = {}
    for one in written:
        name, equals, number = one.partition("=")
        if not equals:
            raise UserError(Fault(option, shown(one), "a kind and a number", f"write {option} {next(iter(KINDS))}=0.05, say"))
        numbers[name.strip()] = _number(number, f"{option} {name.strip()}")
    return numbers


def _number(written: str, option: str) -> float:
    try:
        return float(written)
    except ValueError:
        raise UserError(Fault(option, f'"{written}"', "a number", "write a number such as 0.05")) from None


def check_asked(
    config: Config,
    margins: Sequence[float],
    thresholds: Mapping[str, float],
    *,
    names: tuple[str, str] = ("--margins", "--threshold"),
) -> None:
    """What is refused of an audit before any work.

    Args:
        names: of both, in messages.

    Raises:
        UserError: a number that is not finite, a kind that there is not or that needs a guide where there is none, or a threshold
            below those that find anything more.
    """
    faults = [Fault(names[0], shown(one), "finite numbers", "write a number such as 0.05") for one in margins if not _finite(one)]
    usual = {kind: one for kind, one in KINDS.items() if kind not in lacking_kinds(config)}
    for kind, number in thresholds.items():
        where, found = f"{names[1]} {kind}", shown(number)
        if kind not in usual:
            expected = f"a kind among {', '.join(usual)}"
            needs = ", which needs a guide that this config has not" if kind in KINDS else ""
            faults.append(Fault(names[1], f'"{kind}"{needs}', expected, "name one of these"))
        elif not _finite(number):
            faults.append(Fault(where, found, "a finite number", f"write a number such as {usual[kind].threshold:g}"))
        elif (least := usual[kind].least) is not None and number < least:
            expected = f"{least:g} or more: rows that are less alike are not compared"
            faults.append(Fault(where, found, expected, "raise it, or leave it out"))
    if faults:
        raise UserError(*faults)


def _finite(number: object) -> bool:
    return isinstance(number, Real) and math.isfinite(number)
