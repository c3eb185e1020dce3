"""What is done with each file: it trains, or it judges, or it is left out and listed."""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from gist_train.config.errors import Fault, UserError, shown
from gist_train.config.evaluation import (
    ClassificationTask,
    RetrievalTask,
    StsTask,
)
from gist_train.starter.guessing import GuessedFile
from gist_train.starter.names import folders, free_name, set_of, task_of, test_word
from gist_train.starter.yaml_text import as_written, written

METRICS = {"sts": StsTask.METRICS, "classification": ClassificationTask.METRICS, "retrieval": RetrievalTask.METRICS}


@dataclass(frozen=True, slots=True)
class Judge:
    """What an evaluation task is made of."""

    type: str
    """sts, classification or retrieval."""
    path: str
    """The file that judges, or a folder of documents, queries and judgements."""
    file: GuessedFile | None = None
    """The same, where it is a file."""
    fitted: GuessedFile | None = None
    """The file that a classifier of labelled texts is fitted on."""
    split: str = "test"
    """Whose queries and judgements of a folder are taken."""

    @property
    def metric(self) -> str:
        """What a checkpoint is chosen by."""
        return METRICS[self.type][0]


@dataclass(frozen=True, slots=True)
class Uses:
    """What is done with each of the files."""

    train: list[GuessedFile]
    tasks: dict[str, Judge]
    """By name."""
    left_out: list[tuple[str, str]]
    """Files, and why they do nothing."""


def uses_of(guessed: Sequence[GuessedFile], judges: Sequence[Judge]) -> Uses:
    """Files whose names say test judge, a labelled one beside its training file; they train only where there are no others."""
    given = [one for one in guessed if one.use != "scored"]
    train = [one for one in given if not test_word(one)] or given
    tasks: dict[str, Judge] = {}
    for judge in judges:
        tasks[free_name(Path(os.path.abspath(os.path.expanduser(judge.path))).name, tasks)] = judge
    for one in guessed:
        if one.use == "scored":
            tasks[free_name(task_of(one), tasks)] = Judge("sts", one.sample.path, one)
    left_out: list[tuple[str, str]] = []
    held_out = [(one, _fitted_on(one, train)) for one in given if one not in train]
    for one, fitted in sorted(held_out, key=_judging_order):  # so the best judge of a training file comes first
        better = next((judge for judge in tasks.values() if fitted is not None and judge.fitted is fitted), None)
        if one.use == "pairs":
            tasks[free_name(task_of(one), tasks)] = Judge("retrieval", one.sample.path, one)
        elif one.use == "medi":
            left_out.append((one.sample.path, "a file in MEDI's format judges nothing"))
        elif fitted is None:
            left_out.append((one.sample.path, "no file above has its columns and labels"))
        elif better is not None:
            left_out.append((one.sample.path, f"{Path(better.path).name} judges in its place"))
        else:
            tasks[free_name(set_of(one), tasks)] = Judge("classification", one.sample.path, one, fitted)
    return Uses(train, tasks, left_out)


def refuse_judged(one: GuessedFile) -> None:
    """Raises UserError where a column judges the pairs: which of them belong together, the user must say."""
    if one.where is None:
        return
    keys = [
        f"source: {one.sample.source}",
        f"path: {written(one.sample.path)}",
        *as_written(one),
        f"where: {written(one.where)}",
    ]
    line = f"- {{{', '.join(keys)}}}"
    found = f"pairs beside a column that judges them; they seem to belong together where {one.where}"
    fix = f"check that, leave the file out here and write into the YAML: {line}"
    raise UserError(Fault(one.sample.path, found, "pairs of texts that belong together", fix))


def _fitted_on(one: GuessedFile, train: Iterable[GuessedFile]) -> GuessedFile | None:
    """The training file that a classifier judged by `one` is fitted on: of its columns, with labels that it has too."""
    fit = [other for other in train if other.use == one.use == "labelled" and other.roles == one.roles]
    fit = [other for other in fit if labels(other) & labels(one) and _written_alike(other, one)]
    return max(fit, key=lambda other: (set_of(other) == set_of(one), folders(other)[0] == folders(one)[0]), default=None)


def _written_alike(one: GuessedFile, other: GuessedFile) -> bool:
    """Whether a task can name both: it says once how its files are written."""
    return (one.sample.delimiter, one.sample.header) == (other.sample.delimiter, other.sample.header)


def _judging_order(judge: tuple[GuessedFile, GuessedFile | None]) -> tuple[bool, bool]:
    """False, which is first: of a file called like its training file, and of a test file before dev and the like."""
    one, fitted = judge
    return fitted is None or set_of(fitted) != set_of(one), test_word(one) != "test"


def labels(one: GuessedFile) -> set[str]:
    return set(map(str, one.sample.values(one.roles["label"])))


def labelled_faults(one: GuessedFile, guide: str | None) -> Iterator[Fault]:
    """Why triplets can't be mined from the labelled texts of a file."""
    if guide in (None, "self"):
        unmined = "labelled texts, and no guide that triplets could be mined with"
        yield Fault(one.sample.path, unmined, "a guide model beside labelled texts", "name one: --guide")
    given = sorted(labels(one))
    if one.sample.whole and len(given) == 1:
        found = f"only {shown(given[0])} under {shown(one.roles['label'])}"
        yield Fault(one.sample.path, found, "two labels or more", "add rows of another class: negatives are of these")
