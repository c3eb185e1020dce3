"""docs/metrics.md: every key of a row, with what it is, what is usual and a red flag."""

import ast
import json
import re

import pytest
from conftest import ROOT
from support.running import gist

PAGE = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
ROWS = {line.split("`")[1]: line.strip("| ").split(" | ") for line in PAGE.splitlines() if line.startswith("| `")}
TRAINING = ROOT / "gist_train" / "training"


def written_where_asked_for():
    """Keys that a row has under some settings: those that runlog.py adds, and those of several processes."""
    added = re.findall(r'row\["(\w+)"\] = ', (TRAINING / "runlog.py").read_text(encoding="utf-8"))
    tree = ast.parse((TRAINING / "traffic.py").read_text(encoding="utf-8"))
    shared = [key.value for node in ast.walk(tree) if isinstance(node, ast.Dict) for key in node.keys]
    assert len(added) >= 5
    assert len(shared) == 4
    return {*added, *shared}


@pytest.mark.usefixtures("on_cpu")
def test_every_key_of_a_row_is_on_the_page(write_config, tmp_path):
    """A number whose meaning nobody can look up is one that nobody reads; one that is no longer written is looked for in vain."""
    training = {"batch_size": 8, "max_steps": 2, "precision": "float32"}
    assert gist("train", write_config(training=training)).code == 0
    lines = (tmp_path / "runs" / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 2
    assert {*json.loads(lines[0])} | written_where_asked_for() == {*ROWS}


def test_every_row_of_the_page_is_full():
    """A metric without a red flag tells nobody when to look."""
    for key, cells in ROWS.items():
        assert len(cells) == 4, key
        assert all(cell.strip() for cell in cells), key
