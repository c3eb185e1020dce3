"""Scores of a run on disk: evaluations.jsonl, one row per (step, task, metric), and the items that each is made of.

Step 0 is the student before training. A row also says how it was measured: scores of other lengths, dimensions or task files are
never compared.
"""

import json
import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from math import isfinite
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from gist_train.config.evaluation import EvaluationConfig
from gist_train.data.files import append_text, json_lines, json_row, lines_from_the_end, sync, write_bytes, write_text
from gist_train.data.leases import locked
from gist_train.evaluation.metrics import Items, Score
from gist_train.run_folder import Run

LOOKED_AT = 4096
"""Bytes at the end of what was read of a file, by which it is known again."""


@dataclass(frozen=True, slots=True)
class Terms:
    """What scores of two models must have in common besides the task to be compared."""

    max_length: int | None
    """Tokens that texts were cut to; None = as the model says."""
    truncate_dim: int | None
    """Dimensions of an embedding that were kept; None = all."""

    @classmethod
    def of(cls, config: EvaluationConfig) -> "Terms":
        """Those that a config's scores are measured under."""
        return cls(config.max_length, config.truncate_dim)


def append_scores(
    run: Run,
    step: int,
    scores: Mapping[str, Score],
    *,
    terms: Terms,
    normalized: bool,
    length: int,
    contents: Mapping[str, str],
    base: str | None = None,
) -> None:
    """Adds `scores` ("<task>/<metric>" -> score) of `step` in one write, under a lock: writers never tear a line.

    Args:
        normalized: whether the model's embeddings have length 1.
        length: tokens that texts were cut to.
        contents: by task, `tasks.content_hash`.
        base: at step 0, the model's fingerprint: another base model may train in the same run folder later.
    """
    lines, items = [], dict[str, dict[str, Items]]()
    for key, score in scores.items():
        task, metric = key.split("/", 1)
        row = {
            "step": step,
            "task": task,
            "metric": metric,
            "value": score.value,
            "items": None if score.items is None else len(score.items),
            "normalized": normalized,
            "length": length,
            "max_length": terms.max_length,
            "truncate_dim": terms.truncate_dim,
            "content": contents[task],
            "base": base,
        }
        lines.append(json.dumps(row) + "\n")
        if score.items is not None:
            items.setdefault(task, {})[metric] = score.items
    path = run.evaluations
    with locked(run.folder):
        for task, of_metrics in items.items():  # before the rows that speak of them
            items_path = run.items(step, task, terms.max_length, terms.truncate_dim)
            items_path.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(items_path, save(of_metrics, metadata={"content": contents[task]}))
        # A line that was cut short when the power went must not swallow the first of ours.
        torn = path.exists() and next(lines_from_the_end(path))[1] != b""
        append_text(path, "\n" * torn + "".join(lines))
        sync(path)


def read_scores(
    run: Run, terms: Terms, contents: Mapping[str, str] | None = None, base: str | None = None
) -> dict[int, dict[str, float]]:
    """Step -> "<task>/<metric>" -> value, of the rows measured under `terms`; where a score was measured twice, the later one.

    Args:
        contents: by task, the content whose scores count, no other task's; None: of each task, that of its latest row.
        base: fingerprint of the model whose scores count at step 0; None: that of the latest row.
    """
    rows = _rows_under(run, terms)
    counting = contents_of(run, terms) if contents is None else contents
    scores: dict[int, dict[str, float]] = {}
    bases = [row.base for row in rows if row.step == 0]
    base = base or next(reversed(bases), None)
    for row in rows:
        if counting.get(row.task) == row.content and (row.step > 0 or row.base == base):
            scores.setdefault(row.step, {})[row.key] = row.value
    return scores


def contents_of(run: Run, terms: Terms) -> dict[str, str]:
    """By task, the content that its latest row under `terms` was measured on."""
    return {row.task: row.content for row in _rows_under(run, terms)}


def _rows_under(run: Run, terms: Terms) -> list["_Row"]:
    return [row for row in _rows(run.evaluations) if row.terms == (terms.max_length, terms.truncate_dim)]


def read_items(run: Run, step: int, key: str, terms: Terms, content: str) -> Items | None:
    """The items of a score; None where they are not there, or are those of another content."""
    task, metric = key.split("/", 1)
    try:
        with safe_open(run.items(step, task, terms.max_length, terms.truncate_dim), framework="np") as file:
            if file.metadata() != {"content": content} or metric not in file.keys():  # noqa: SIM118
                return None
            items: Items = file.get_tensor(metric)
            return items if items.ndim in (1, 2) and len(items) and np.isfinite(items).all() else None
    except (OSError, SafetensorError):
        return None


def cut_scores(run: Run, step: int, aside: Path | None) -> None:
    """Leaves the scores up to `step`: of a run that goes back to it, the later ones are another trajectory's.

    Args:
        aside: where the later checkpoints went; the whole file is copied there.
    """
    path = run.evaluations
    if not path.exists():
        return
    with locked(run.folder):
        if aside is not None:
            shutil.copyfile(path, aside / path.name)
        kept = [line + "\n" for line, row in json_lines(path) if not (isinstance(row.get("step"), int) and row["step"] > step)]
        write_text(path, "".join(kept))


class _Row(NamedTuple):
    """A row of evaluations.jsonl."""

    step: int
    task: str
    key: str
    """<task>/<metric>."""
    value: float
    content: str
    terms: tuple[Any, Any]
    base: Any


@dataclass(slots=True)
class _Read:
    """What has been read of a file that grows at its end."""

    inode: int = -1
    end: int = 0
    """Bytes of it, whole lines."""
    last: bytes = b""
    """The last of these, by which a file that was written anew is told."""
    rows: list[_Row] = field(default_factory=list)
    lock: Lock = field(default_factory=Lock)
    """Retention reads in the thread that writes checkpoints."""


@cache
def _read_of(path: Path) -> _Read:  # noqa: ARG001  (of which there is one)
    return _Read()


def _rows(path: Path) -> list[_Row]:
    """Rows of evaluations.jsonl that are whole and of our form, in order. Others were garbled, or are of another tool.

    Asked at each checkpoint of a long run: what this process has read of the file is not read again.
    """
    read = _read_of(path)
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return []
    with file, read.lock:
        inode = os.fstat(file.fileno()).st_ino
        file.seek(max(0, read.end - len(read.last)))
        if inode != read.inode or file.read(len(read.last)) != read.last:
            read.inode, read.end, read.last = inode, 0, b""
            read.rows.clear()
            file.seek(0)
        for line in file:
            row = _row(json_row(line.decode(errors="replace")))
            if not line.endswith(b"\n"):  # being written, torn, or of an editor: it counts if it is whole, and is read again
                return [*read.rows, row] if row is not None else list(read.rows)
            read.end, read.last = read.end + len(line), (read.last + line)[-LOOKED_AT:]
            if row is not None:
                read.rows.append(row)
        return list(read.rows)


def _row(row: dict[str, Any] | None) -> _Row | None:
    if row is None or not row.keys() >= {"max_length", "truncate_dim", "base"}:
        return None
    numbers = isinstance(row.get("step"), int) and isinstance(row.get("value"), int | float) and isfinite(row["value"])
    if not numbers or not all(isinstance(row.get(key), str) for key in ("task", "metric", "content")):
        return None
    task, key, content = map(sys.intern, (row["task"], f"{row['task']}/{row['metric']}", row["content"]))
    return _Row(row["step"], task, key, row["value"], content, (row["max_length"], row["truncate_dim"]), row["base"])
