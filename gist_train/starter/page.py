"""The user's own files -> a commented starter YAML: what each is good for is guessed, and the YAML says so."""

import json
import math
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from types import MappingProxyType

from jinja2 import Environment, PackageLoader, StrictUndefined

from gist_train.config.errors import Fault, UserError, listed, shown
from gist_train.config.evaluation import (
    HELD_OUT,
    HELD_OUT_LABELS,
    HELD_OUT_METRICS,
)
from gist_train.config.secrets import hidden
from gist_train.data.files import check_target, write_text
from gist_train.starter.files import data_files
from gist_train.starter.guessing import SAMPLED, GuessedFile, judged
from gist_train.starter.models import COST_OF_LARGE, LARGE, SMALL, length_for, read_by
from gist_train.starter.names import run_name, says_nothing, shards_together, task_of, test_word
from gist_train.starter.uses import Uses, labelled_faults, refuse_judged, uses_of
from gist_train.starter.yaml_text import as_written, comment, written

GUIDE_POOLING = {"WhereIsAI/UAE-Large-V1": "mean"}
"""Of a guide whose folder is not to decide it."""
BATCH_SIZE = 32
EPOCHS = 2
MOST_STEPS_APART, EVALUATIONS = 200, 5
"""Between two evaluations; and how many a short training has at least, for `select` to choose among."""
ROLES = (
    ({"anchor", "positive"}, {"negative", "task"}),
    ({"text", "label"}, set[str]()),
    ({"text1", "text2", "score"}, set[str]()),
)
"""What columns may be said to be: those needed, and those that may be left out."""
FEWEST_ROWS = 20
"""Of which any are held out."""
SHARES_HELD_OUT = (0.05, 0.1, 0.2)
ENOUGH_HELD_OUT, MOST_HELD_OUT = 100, 1000
"""Rows: among fewer every model finds the right text, with more each evaluation takes long."""


def starter_yaml(
    files: Sequence[Path], *, model: str, guide: str | None, to: Path, columns: Mapping[str, str] = MappingProxyType({})
) -> str:
    """A commented YAML that trains `model` on `files`, as `load_config` accepts it; a folder means its data files.

    Args:
        model: hub id or local folder of the student.
        guide: hub id or local folder, "self" for the student's own similarities, None for no guide.
        columns: what the user says of the columns of files that have all of these: anchor, positive, text, label, ... -> column.
        to: where the YAML will be: the commands in it name that file, and the run is called like it.

    Raises:
        UserError: all files that are missing, empty, of an unknown kind, or without columns that could be trained on.
    """
    uses = _guessed_uses(files, guide, columns)
    length, held_out = length_for(uses.train), _rows_held_out(uses)
    batch_size = _batch_size(uses, held_out)
    environment = Environment(
        loader=PackageLoader("gist_train", "starter"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"yaml": written, "comment": comment}
    return environment.get_template("init.yaml.jinja").render(
        name=run_name(to),
        here=comment(shlex.quote(str(to)), 1000),
        model=model,
        guide=guide,
        pooling=GUIDE_POOLING.get(guide or ""),
        uses=uses,
        task_of=task_of,
        as_written=as_written,
        metric=next((f"{name}/{judge.metric}" for name, judge in uses.tasks.items()), _held_out_metric(uses, held_out)),
        held_out=held_out,
        says_nothing=says_nothing,
        test_word=test_word,
        larger=LARGE if (model, guide) == SMALL else None,
        cost_of_larger=COST_OF_LARGE,
        max_length=read_by(model, length),
        guide_max_length=None if guide is None else read_by(guide, length),
        on_bad_row="skip" if any(one.unusable for one in uses.train) else "fail",
        batch_size=batch_size,
        epochs=EPOCHS,
        every=_steps_apart(uses, held_out, batch_size),
    )


def _guessed_uses(files: Sequence[Path], guide: str | None, columns: Mapping[str, str]) -> Uses:
    """What is done with each file; UserError as `starter_yaml`."""
    faults: list[Fault] = []
    guessed: list[GuessedFile] = []
    of_folders: list[Fault] = []
    named, judges = data_files(files, faults)
    for path in named:
        try:
            one = judged(path, columns)
            refuse_judged(one)
            guessed.append(one)
        except UserError as error:  # a file that was named must be of use; of a folder the others may be
            (faults if path in files else of_folders).extend(error.faults)
    uses = uses_of(shards_together(guessed), judges)
    if uses.train:
        uses.left_out.extend((fault.where, f"{fault.found}; {fault.fix}") for fault in of_folders)
    else:
        faults += of_folders
    faults += [fault for one in uses.train if one.use == "labelled" for fault in labelled_faults(one, guide)]
    if not uses.train and not faults:
        scored, expected = (
            "pairs with a score: they judge a model and train none",
            "a file beside it, of pairs that belong together",
        )
        fix = "name such a file too, or keep the pairs of a high score"
        faults += [Fault(one.sample.path, scored, expected, fix) for one in guessed]
        judging = "documents, queries and judgements: they judge a model and train none"
        faults += [Fault(judge.path, judging, expected, "name such a file too") for judge in judges]
    if columns and not faults and not any(set(columns.values()) <= {*one.sample.columns} for one in guessed):
        there = listed(map(shown, dict.fromkeys(chain(*(one.sample.columns for one in guessed)))))
        found = f"{', '.join(map(shown, columns.values()))}, which no file has; columns: {there}"
        faults.append(Fault("--columns", found, "columns that one of the files has", "correct the names"))
    if faults:
        raise UserError(*faults)
    return uses


def named_columns(given: str) -> dict[str, str]:
    """`anchor=search_term,positive=clicked_doc` as role -> column.

    Raises:
        UserError: no such role, or not those of pairs, of labelled texts or of scored pairs.
    """
    parts = re.split(r"(?:^|,)\s*(\w+)=", given)
    named = {role: column.strip() for role, column in zip(parts[1::2], parts[2::2], strict=True)}
    known = any(needed <= named.keys() <= needed | more for needed, more in ROLES)
    if parts[0].strip() or not known or not all(named.values()):
        expected = "anchor=...,positive=... (and negative, task), text=...,label=..., or text1=...,text2=...,score=..."
        raise UserError(Fault("--columns", shown(given), expected, "say what each column is, with commas and no spaces between"))
    return named


def write_starter(to: Path, text: str, *, force: bool = False) -> None:
    """Writes `text` to `to`, whole or not at all; UserError where something is there, or there is no such folder, or
    a password in a path.

    Args:
        force: whether a file that is there is replaced.
    """
    if os.path.lexists(to) and not (force and to.is_file()):
        fix = "name another file, or add --force to replace it"
        raise UserError(Fault("--to", f"{shown(to)}, which exists", "a new file", fix))
    check_target("--to", to)
    if secret := next((line.strip() for line in text.splitlines() if hidden(line) != line), None):
        fix = "rename the file or folder, or write the YAML by hand with ${NAME} in the place of the secret"
        raise UserError(Fault("the YAML's line", secret, "no password and no token, which a YAML would keep", fix))
    write_text(to, text)


def _rows_held_out(uses: Uses) -> float | int | None:
    """What `evaluation.held_out` is to be where no file judges: a share, the less the more rows; None where there are too few."""
    rows = sum(map(_estimated_rows, uses.train))
    if uses.tasks or rows < FEWEST_ROWS:
        return None
    share = next((share for share in SHARES_HELD_OUT if share * rows >= ENOUGH_HELD_OUT), SHARES_HELD_OUT[-1])
    return MOST_HELD_OUT if share * rows > MOST_HELD_OUT else share


def _estimated_rows(one: GuessedFile) -> int:
    """Its rows; of a file that was not read to its end by its size, in which a row is as long as those looked at."""
    if one.sample.whole:
        return len(one.sample.rows)
    path = Path(os.path.expanduser(one.sample.path))
    size = sum(part.stat().st_size for part in ([path] if path.exists() else path.parent.glob(path.name)))
    return max(SAMPLED, size * len(one.sample.rows) // max(1, len(json.dumps(one.sample.rows, default=str))))


def _batch_size(uses: Uses, held_out: float | int | None) -> int:
    """A power of 2 of which the rows that are not held out give one whole batch."""
    rows = sum(one.usable for one in uses.train)
    rows -= math.ceil(rows * held_out) if isinstance(held_out, float) else 0  # a number is held out of many rows only
    return min(BATCH_SIZE, 1 << int(math.log2(max(1, rows))))


def _steps_apart(uses: Uses, held_out: float | int | None, batch_size: int) -> int:
    """Steps between two evaluations, and between two checkpoints."""
    rows = sum(map(_estimated_rows, uses.train))
    rows -= math.ceil(rows * held_out) if isinstance(held_out, float) else held_out or 0
    return max(1, min(MOST_STEPS_APART, EPOCHS * rows // batch_size // EVALUATIONS))


def _held_out_metric(uses: Uses, held_out: float | int | None) -> str | None:
    if held_out is None:
        return None
    name = HELD_OUT_LABELS if all(one.use == "labelled" for one in uses.train) else HELD_OUT
    return f"{name}/{HELD_OUT_METRICS[name][0]}"
