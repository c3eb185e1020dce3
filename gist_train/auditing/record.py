"""What an audit found, as a file: what its page and a run's report show of it."""

from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gist_train.config.errors import Fault, UserError
from gist_train.config.schema import Config
from gist_train.config.secrets import without_secrets
from gist_train.data.files import read_json, write_json
from gist_train.run_folder import Run


@dataclass(frozen=True, slots=True)
class Suspect:
    """A row that may be bad in one way."""

    kind: str
    score: float
    task: str
    source: str
    """The file, or the data set."""
    row: int
    """In it, counted from 1 as in messages: of CSV without the header, of JSONL the line."""
    anchor: str
    positives: list[str]
    negatives: list[str]


class _Part(BaseModel):
    """A part of the file: what is read of it is checked, since people edit files."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)


class KindFound(_Part):
    """What is suspect in one way."""

    about: str
    """What it says of a row, in words."""
    score: str
    """What the number is."""
    threshold: float
    """From which on a row is suspect."""
    rows: int
    share: float
    """Of all rows."""
    worst: list[Suspect]
    """The worst first."""


class MaskedShares(_Part):
    """What the guide would mask of the batches of a task, or of all, under one margin; shares of candidates."""

    margin: float
    task: str | None
    """None for all of them together."""
    batches: int
    rows: int
    rows_without_candidates: int
    masked: float
    """Of all candidates."""
    masked_ap: float | None
    """Of positives against anchors; None where there was no candidate, here as in the other blocks."""
    masked_an: float | None
    """Of negatives against anchors."""
    masked_aa: float | None
    """Of anchors against anchors."""
    masked_pp: float | None
    """Of positives against positives."""

    @property
    def bare(self) -> float:
        """Share of the rows that are left without a candidate."""
        return self.rows_without_candidates / max(1, self.rows)

    def block(self, name: str) -> float | None:
        """The share of one of `BLOCKS`."""
        return {"ap": self.masked_ap, "an": self.masked_an, "aa": self.masked_aa, "pp": self.masked_pp}[name]


class AuditRecord(_Part):
    """What was found."""

    name: str
    """Of the config."""
    made: float
    """Seconds since 1970."""
    gist_train: str
    """Version."""
    sources: list[dict[str, Any]]
    """`data.train`."""
    student: str
    guide: str
    rows: int = Field(ge=1)
    suspect_rows: int
    """Suspect in some way."""
    kinds: dict[str, KindFound]
    masking: list[MaskedShares] | None
    """By margin and task; None where no guide's embeddings are stored, or the rows give no batch. loss.margin is the first."""
    margins: list[MaskedShares] | None
    """By margin, all tasks together."""
    epoch_batches: int | None = None
    """Batches of the first epoch, of which `masking` has some or all; None where it has none, or in an older file."""

    @property
    def by_frequency(self) -> list[str]:
        """Kinds that have rows, the most frequent first."""
        return sorted((kind for kind, one in self.kinds.items() if one.rows), key=lambda kind: -self.kinds[kind].rows)

    @property
    def unseen(self) -> list[str]:
        """Kinds that no row is of."""
        return [kind for kind, one in self.kinds.items() if not one.rows]

    def by_task(self) -> list[list[MaskedShares]]:
        """Of each task its line under each margin, the task of most batches first."""
        tasks: dict[str | None, list[MaskedShares]] = {}
        for line in self.masking or ():
            tasks.setdefault(line.task, []).append(line)
        return sorted(tasks.values(), key=lambda lines: -lines[0].batches)

    def of_data(self, config: Config) -> bool:
        """Whether a config trains on the files that were looked at, read in the same way."""
        return sources_of(config) == self.sources


def sources_of(config: Config) -> list[dict[str, Any]]:
    """`data.train` as an audit's file has it: passwords and tokens hidden."""
    sources: list[dict[str, Any]] = without_secrets([source.model_dump(mode="json") for source in config.data.train])
    return sources


def write_audit(run: Run, record: AuditRecord) -> None:
    """Keeps it beside the run's folder, which an audit does not begin."""
    run.audit.parent.mkdir(parents=True, exist_ok=True)
    write_json(run.audit, record.model_dump(mode="json"))


def read_audit(run: Run) -> AuditRecord | None:
    """What the last audit of the run's config found; None where there was none.

    Raises:
        UserError: the file can't be read.
    """
    if not run.audit.exists():
        return None
    try:
        return AuditRecord.model_validate(read_json(run.audit))
    except (OSError, ValueError, ValidationError):
        expected, fix = "what gist-train audit writes", "delete it, or run gist-train audit again"
        raise UserError(Fault(str(run.audit), "a file that can't be read", expected, fix)) from None
