"""The rooms: imports go down the list, what is to be pure stays so, and a run's files are named in one place."""

import ast
import re
import subprocess
import sys

import pytest
from conftest import ROOT

FLOORS = (
    "version",
    "citations",
    "config",
    "run_folder",
    "pulse",
    "environment",
    "progress",
    "memory",
    "telling",
    "bug_report",
    "data",
    "model",
    "evaluation",
    "training",
    "inside",
    "checks",
    "hard_negatives",
    "suspects",
    "preparation",
    "results",
    "planning",
    "pages",
    "auditing",
    "reporting",
    "starter",
    "milestones",
    "training_run",
    "api",
    "commands",
    "cli",
    "__main__",
)
"""Rooms, and the files beside them. Each may use itself and those above it."""
PURE = (
    "model.loss",
    "model.distillation",
    "model.negatives",
    "data.batches",
    "data.cells",
    "training.schedule",
    "data.mining",
    "results.ranking",
)
HEAVY = ("transformers", "accelerate", "datasets")
PACKAGE = ROOT / "gist_train"


def imported(path):
    """Modules of gist_train that a file imports, in functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("gist_train"):
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names if name.name.startswith("gist_train"))


def test_imports_go_down_the_list():
    """A room that uses one below it makes a circle of two rooms: neither can be read, tested or moved alone."""
    seen, wrong = 0, []
    for path in sorted(PACKAGE.rglob("*.py")):
        own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if own == "__init__":  # the public face, which has a test of its own
            continue
        assert own in FLOORS, f"{own} has no place in the list of rooms: give it one"
        for module in imported(path):
            seen += 1
            part = [*module.split("."), ""][1]
            expected = part in FLOORS[: FLOORS.index(own) + 1]
            wrong += [] if expected else [f"{path.relative_to(PACKAGE)} imports {module}"]
    assert wrong == []
    assert seen > 300


def test_files_of_a_run_are_named_in_one_place():
    """Two places that name one file drift apart: `select` then looks for what `train` no longer writes."""
    names = re.findall(
        r'"([\w.-]+\.(?:json|jsonl|yaml|safetensors|txt))"', (PACKAGE / "run_folder.py").read_text(encoding="utf-8")
    )
    assert {"run.json", "config.yaml", "metrics.jsonl", "selected.json", "manifest.json"} <= {*names}
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        strings = {node.value for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Constant)}
        wrong += [f"{path.relative_to(PACKAGE)}: {name}" for name in names if name in strings and path.name != "run_folder.py"]
    assert wrong == []


@pytest.mark.parametrize("name", PURE)
def test_pure_modules_import_nothing_heavy(name):
    """They are the mathematics: what they give must not depend on a trainer's, a launcher's or a reader's version."""
    code = f"import sys, gist_train.{name}; print([name for name in {HEAVY} if name in sys.modules])"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert (ended.stdout.strip(), ended.returncode) == ("[]", 0), ended.stderr
