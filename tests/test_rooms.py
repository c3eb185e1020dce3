"""The rooms: imports go down the list, and what is to be pure stays so."""

import ast
import subprocess
import sys

import pytest
from conftest import ROOT

ROOMS = ("config", "data", "model", "training", "results")
PURE = ("model.loss", "data.batches", "training.schedule", "data.mining", "results.selection")
HEAVY = ("transformers", "accelerate", "datasets")


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
    for number, room in enumerate(ROOMS):
        for path in sorted((ROOT / "gist_train" / room).glob("*.py")):
            for module in imported(path):
                seen += 1
                part = [*module.split("."), ""][1]
                # gist_train itself gives its version; any other file beside the rooms joins them.
                expected = part in ROOMS[: number + 1] or part == ""
                wrong += [] if expected else [f"{room}/{path.name} imports {module}"]
    assert wrong == []
    assert seen > 150


@pytest.mark.parametrize("name", PURE)
def test_pure_modules_import_nothing_heavy(name):
    """They are the mathematics: what they give must not depend on a trainer's, a launcher's or a reader's version."""
    code = f"import sys, gist_train.{name}; print([name for name in {HEAVY} if name in sys.modules])"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert (ended.stdout.strip(), ended.returncode) == ("[]", 0), ended.stderr
