"""evaluations.jsonl: one row per (step, task, metric) of a run. Step 0 is the student before training."""

import json
from pathlib import Path

from gist_train.data.files import locked, sync

FIGURES = "evaluations.jsonl"


def append_figures(run: Path, step: int, figures: dict[str, float]) -> None:
    """Adds `figures` ("<task>/<metric>" -> fraction) of `step` in one write, under a lock: writers never tear a line."""
    lines = []
    for key, value in figures.items():
        task, metric = key.split("/", 1)
        lines.append(json.dumps({"step": step, "task": task, "metric": metric, "value": value}) + "\n")
    path = run / FIGURES
    with locked(run):
        # A line that was cut short when the power went must not swallow the first of ours.
        torn = path.exists() and not path.read_bytes().endswith(b"\n")
        with path.open("a", encoding="utf-8") as file:
            file.write("\n" * torn + "".join(lines))
        sync(path)


def read_figures(run: Path) -> dict[int, dict[str, float]]:
    """Step -> "<task>/<metric>" -> value; where a figure was measured twice, the later one."""
    figures: dict[int, dict[str, float]] = {}
    path = run / FIGURES
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except ValueError:  # cut short when the power went
                continue
            figures.setdefault(row["step"], {})[f"{row['task']}/{row['metric']}"] = row["value"]
    return figures
