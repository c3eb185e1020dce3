"""docs/troubleshooting.md: what it quotes is what the program says."""

import ast
import re

from conftest import ROOT

PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
QUOTED = [row for line in PAGE.splitlines() if line.startswith("| `") for row in re.findall(r"`([^`]+)`", line.split(" | ")[0])]


def texts():
    """Every text of the package that is no docstring, with ... for what is put in."""
    for path in sorted((ROOT / "gist_train").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        left_out = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        left_out |= {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
        for node in ast.walk(tree):
            if id(node) in left_out:
                continue
            if isinstance(node, ast.JoinedStr):
                yield "".join(part.value if isinstance(part, ast.Constant) else "..." for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield re.sub(r"%[sd]", "...", node.value)


def test_every_message_is_one_of_the_program():
    """A reader looks for the very words on their screen: a message that was reworded is found no more."""
    said = [" ".join(text.split()) for text in texts()]
    assert len(said) > 1000
    assert len(QUOTED) > 50
    missing = []
    for quoted in QUOTED:
        pieces = [re.escape(piece) for piece in quoted.split("...") if piece]
        pattern = re.compile(".*".join(pieces))
        missing += [] if any(pattern.search(text) for text in said) else [quoted]
    assert missing == []


def test_a_message_that_is_not_there_is_found_out():
    """The pieces of a quotation must stand in one text, in their order."""
    said = [" ".join(text.split()) for text in texts()]
    assert not any(re.search("a word that nobody.*says", text) for text in said)
    assert any(re.search("an unknown key, ", text) for text in said)
