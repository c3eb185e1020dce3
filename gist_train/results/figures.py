"""evaluations.jsonl: one row per (step, task, metric) of a run. Step 0 is the student before training."""

import json
from pathlib import Path

from gist_train.data.files import locked

FIGURES = "evaluations.jsonl"


def append_figures(run: Path, step: int, figures: dict[str, float]) -> None:
    """Adds `figures` ("<task>/<metric>" -> fraction) of `step` in one write, under a lock: writers never tear a line."""
    lines = []
    for key, value in figures.items():
        task, metric = key.split("/", 1)
        lines.append(json.dumps({"step": step, "task": task, "metric": metric, "value": value}) + "\n")
    with locked(run), (run / FIGURES).open("a", encoding="utf-8") as file:
        file.write("".join(lines))


def read_figures(run: Path) -> dict[int, dict[str, float]]:
    """Step -> "<task>/<metric>" -> value; where a figure was measured twice, the later one."""
    figures: dict[int, dict[str, float]] = {}
    path = run / FIGURES
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            figures.setdefault(row["step"], {})[f"{row['task']}/{row['metric']}"] = row["value"]
    return figures
