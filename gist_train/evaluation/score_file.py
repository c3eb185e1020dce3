"""Scores of a run on disk: evaluations.jsonl, one row per (step, task, metric), and the items that each is made of.

Step 0 is the student before training. A row also says how it was measured: scores of other lengths, dimensions or task files are
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
from gist_train.data.files import append_text, json_lines, locked, sync, write_bytes, write_text
from gist_train.evaluation.metrics import Items, Score
from gist_train.run_folder import Run


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
        torn = path.exists() and not path.read_bytes().endswith(b"\n")
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
    rows = [row for row in _rows(run) if (row["max_length"], row["truncate_dim"]) == (terms.max_length, terms.truncate_dim)]
    counting = {row["task"]: row["content"] for row in rows} if contents is None else contents
    scores: dict[int, dict[str, float]] = {}
    bases = [row["base"] for row in rows if row["step"] == 0]
    base = base or next(reversed(bases), None)
    for row in rows:
        if counting.get(row["task"]) == row["content"] and (row["step"] > 0 or row["base"] == base):
            scores.setdefault(row["step"], {})[f"{row['task']}/{row['metric']}"] = row["value"]
    return scores


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


def _rows(run: Run) -> Iterator[dict[str, Any]]:
    """Rows of evaluations.jsonl that are whole and of our form, in order. Others were garbled, or are of another tool."""
    for _, row in json_lines(run.evaluations):
        numbers = isinstance(row.get("step"), int) and isinstance(row.get("value"), int | float) and isfinite(row["value"])
        texts = all(isinstance(row.get(key), str) for key in ("task", "metric", "content"))
        if numbers and texts and row.keys() >= {"max_length", "truncate_dim", "base"}:
            yield row
