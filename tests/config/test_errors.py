"""What messages show of a value."""

from pathlib import Path

import pytest

from gist_train.config.errors import shown


def test_a_long_value_is_cut_and_a_path_is_not():
    """The end of a path is the file's name: cut away, a message named a folder that is full of files."""
    path = Path("/mnt") / ("a long folder/" * 20) / "rows.jsonl"
    assert shown(path) == f'"{path}"'
    assert shown(str(path)).endswith("…")
    assert len(shown(str(path))) == 80


@pytest.mark.parametrize(
    ("name", "text"), [("a  b", "a  b"), ("a\nb", "a\\nb"), ("\udce9", "\\udce9"), ("\x1b[31m", "\\x1b[31m"), ("é", "é")]
)
def test_a_path_stays_on_its_line(name, text):
    """A line break, or a terminal's own sign, in a file's name would write a message of its own."""
    assert shown(Path(name)) == f'"{text}"'
