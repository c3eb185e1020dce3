"""Words: names that say what a thing is, and test names that fit a line."""

import ast
import re

from conftest import ROOT

RIDDLES = {"of", "told", "at"}
"""Variables of these names were messages, payloads, indices and candidates."""
LONGEST_TEST_NAME = 60


def trees(folder):
    for path in sorted((ROOT / folder).rglob("*.py")):
        yield path, ast.parse(path.read_text(encoding="utf-8"))


def test_variables_have_names_that_say_what_they_are():
    """A reader who has to look up what `told` is this time reads every function twice."""
    wrong = []
    for path, tree in trees("gist_train"):
        for node in ast.walk(tree):
            name = node.arg if isinstance(node, ast.arg) else node.id if isinstance(node, ast.Name) else None
            stored = isinstance(node, ast.arg) or (isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store))
            if stored and name in RIDDLES:
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}: {name}")
    assert wrong == []


def test_test_names_fit_a_line():
    """The docstring has the reason: a name that is a sentence is cut off in every report."""
    names = [
        (path.name, node.name)
        for path, tree in trees("tests")
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    ]
    assert len(names) > 800
    assert [name for name in names if len(name[1]) > LONGEST_TEST_NAME] == []


def test_the_labels_of_an_error_are_plain():
    """Four parts, in the words that the documentation uses for them."""
    text = (ROOT / "gist_train" / "config" / "errors.py").read_text(encoding="utf-8")
    assert re.findall(r"\\n  (\w+) ", text) == ["found", "expected", "fix"]
