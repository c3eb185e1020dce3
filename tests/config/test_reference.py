"""docs/config.md is the schema's, and names every key."""

import re

from conftest import ROOT

from gist_train.config.reference import page
from gist_train.config.schema import Config


def test_the_page_is_current():
    """A page from before a key changed tells people to write what is refused: run `python -m gist_train.config.reference`."""
    assert (ROOT / "docs" / "config.md").read_text(encoding="utf-8") == page()


def test_every_key_has_a_row_with_its_default_and_meaning():
    """A key that nobody can look up is one that nobody sets."""
    rows = {}
    for line in page().splitlines():
        if line.startswith("| `"):
            key, default, expected, about = (cell.strip() for cell in line.strip("| ").split(" | ", 3))
            rows.setdefault(key.strip("`"), []).append((default, expected, about))
    assert set(Config.model_fields) <= rows.keys()
    assert rows["loss.temperature"] == [
        ("`0.01`", "a number above 0", Config.model_fields["loss"].annotation.model_fields["temperature"].description)
    ]
    assert rows["training.precision"][0][:2] == ("`auto`", "auto, float32, float64, bf16 or fp16")
    assert len(rows["data.train[].path"]) == len(rows["data.train[].source"]) >= 5
    assert rows["evaluation.tasks[].name"][0][0] == "must be given"
    assert len(rows) > 90
    assert all(about for each in rows.values() for _, _, about in each)


def test_the_page_shows_all_that_it_says():
    """`<task>` in Markdown is a tag, and an empty pair of backticks no code: readers would see neither."""
    assert "`` " not in page()
    assert re.search(r"<(?!/?br)", page()) is None
    assert '"&lt;task>/&lt;metric>"' in page()


def test_no_two_headings_of_the_page_are_the_same():
    """A link leads to the first of them alone, and a reader can't tell whose keys the others are."""
    headings = [line for line in page().splitlines() if line.startswith("#")]
    assert len(headings) > 40
    assert [heading for heading in headings if headings.count(heading) > 1] == []
