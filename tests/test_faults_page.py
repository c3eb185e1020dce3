"""docs/faults.md: every fault that it promises something of has a test, and that test is there."""

import ast
import re

from conftest import ROOT

ROW = re.compile(r"^\| .+ \| .+ \| `(tests/[\w/]+\.py)::(test_\w+)` \|$")


def test_each_fault_has_its_test():
    """A promise whose test was renamed or deleted is one that nobody keeps."""
    lines = (ROOT / "docs" / "faults.md").read_text(encoding="utf-8").splitlines()
    rows = [line for line in lines if line.startswith("| ") and not line.startswith("| fault ")]
    assert len(rows) >= 25
    for row in rows:
        match = ROW.match(row)
        assert match, row
        tree = ast.parse((ROOT / match[1]).read_text(encoding="utf-8"))
        assert match[2] in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, row
