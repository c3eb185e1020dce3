"""Figures of a run on disk: evaluations.jsonl, one row per (step, task, metric), and the items that each is made of.

Step 0 is the student before training. A row also says how it was measured: figures of other lengths, dimensions or task files are
never compared.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from gist_train.config.evaluation import EvaluationConfig
from gist_train.data.files import json_lines, locked, sync, write_bytes, write_text
from gist_train.results.evaluation import Figure
from gist_train.results.metrics import Items

FIGURES = "evaluations.jsonl"
ITEMS = "evaluation-items"


@dataclass(frozen=True, slots=True)
class Terms:
    """What figures of two models must have in common besides the task to be compared."""

    max_length: int | None
    """Tokens that texts were cut to; None = as the model says."""
    truncate_dim: int | None
    """First numbers of an embedding that were kept; None = all."""

    @classmethod
    def of(cls, config: EvaluationConfig) -> "Terms":
        """Those that a config's figures are measured under."""
        return cls(config.max_length, config.truncate_dim)


def append_figures(
    run: Path,
    step: int,
    figures: Mapping[str, Figure],
    *,
    terms: Terms,
    normalized: bool,
    length: int,
    contents: Mapping[str, str],
    base: str | None = None,
) -> None:
    """Adds `figures` ("<task>/<metric>" -> figure) of `step` in one write, under a lock: writers never tear a line.

    Args:
        normalized: whether the model's embeddings have length 1.
        length: tokens that texts were cut to.
        contents: by task, `loaded_tasks.content_hash`.
        base: at step 0, the model's fingerprint: another base model may train in the same run folder later.
    """
    lines, items = [], dict[str, dict[str, Items]]()
    for key, figure in figures.items():
        task, metric = key.split("/", 1)
        row = {
            "step": step,
            "task": task,
            "metric": metric,
            "value": figure.value,
            "items": None if figure.items is None else len(figure.items),
            "normalized": normalized,
            "length": length,
            "max_length": terms.max_length,
            "truncate_dim": terms.truncate_dim,
            "content": contents[task],
            "base": base,
        }
        lines.append(json.dumps(row) + "\n")
        if figure.items is not None:
            items.setdefault(task, {})[metric] = figure.items
    path = run / FIGURES
    with locked(run):
        for task, of_metrics in items.items():  # before the rows that speak of them
            at = _items_path(run, step, task, terms)
            at.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(at, save(of_metrics, metadata={"content": contents[task]}))
        # A line that was cut short when the power went must not swallow the first of ours.
        torn = path.exists() and not path.read_bytes().endswith(b"\n")
        with path.open("a", encoding="utf-8") as file:
            file.write("\n" * torn + "".join(lines))
        sync(path)


def read_figures(
    run: Path, terms: Terms, contents: Mapping[str, str] | None = None, base: str | None = None
) -> dict[int, dict[str, float]]:
    """Step -> "<task>/<metric>" -> value, of the rows measured under `terms`; where a figure was measured twice, the later one.

    Args:
        contents: by task, the content whose figures count, no other task's; None: of each task, that of its latest row.
        base: fingerprint of the model whose figures count at step 0; None: that of the latest row.
    """
    rows = [row for row in _rows(run) if (row["max_length"], row["truncate_dim"]) == (terms.max_length, terms.truncate_dim)]
    counting = {row["task"]: row["content"] for row in rows} if contents is None else contents
    figures: dict[int, dict[str, float]] = {}
    bases = [row["base"] for row in rows if row["step"] == 0]
    base = base or next(reversed(bases), None)
    for row in rows:
        if counting.get(row["task"]) == row["content"] and (row["step"] > 0 or row["base"] == base):
            figures.setdefault(row["step"], {})[f"{row['task']}/{row['metric']}"] = row["value"]
    return figures


def read_items(run: Path, step: int, key: str, terms: Terms, content: str) -> Items | None:
    """The items of a figure; None where they are not there, or are those of another content."""
    task, metric = key.split("/", 1)
    try:
        with safe_open(_items_path(run, step, task, terms), framework="np") as items:
            if items.metadata() != {"content": content} or metric not in items.keys():  # noqa: SIM118
                return None
            found: Items = items.get_tensor(metric)
            return found if found.ndim in (1, 2) and len(found) and np.isfinite(found).all() else None
    except (OSError, SafetensorError):
        return None


def cut_figures(run: Path, step: int, aside: Path | None) -> None:
    """Leaves the figures up to `step`: of a run that goes back to it, the later ones are another trajectory's.

    Args:
        aside: where the later checkpoints went; the whole file is copied there.
    """
    path = run / FIGURES
    if not path.exists():
        return
    with locked(run):
        if aside is not None:
            shutil.copyfile(path, aside / FIGURES)
        kept = [line + "\n" for line, row in json_lines(path) if not (isinstance(row.get("step"), int) and row["step"] > step)]
        write_text(path, "".join(kept))


def _rows(run: Path) -> Iterator[dict[str, Any]]:
    """Rows of evaluations.jsonl that are whole and of our form, in order. Others were garbled, or are of another tool."""
    for _, row in json_lines(run / FIGURES):
        numbers = isinstance(row.get("step"), int) and isinstance(row.get("value"), int | float) and isfinite(row["value"])
        texts = all(isinstance(row.get(key), str) for key in ("task", "metric", "content"))
        if numbers and texts and row.keys() >= {"max_length", "truncate_dim", "base"}:
            yield row


def _items_path(run: Path, step: int, task: str, terms: Terms) -> Path:
    length, dimension = terms.max_length or "whole", terms.truncate_dim or "whole"
    return run / ITEMS / f"length-{length}-dimension-{dimension}" / f"step-{step:09d}-{task}.safetensors"
