"""`where` of a source: what it takes, and that nothing else gets through."""

import pytest

from gist_train.config.conditions import Condition, UnlikeError


@pytest.mark.parametrize(
    ("text", "row", "holds"),
    [
        ("label == 1", {"label": 1}, True),
        ("label == 1", {"label": "1"}, True),
        ("label == 1", {"label": "1.0"}, True),
        ("label == 1", {"label": True}, True),
        ("label == 1", {"label": "true"}, True),
        ("label == 1", {"label": 0}, False),
        ("label == 1", {"label": ""}, False),
        ("label == 1", {}, False),
        ("label != 1", {"label": None}, True),
        ("score >= 0.8", {"score": 0.8}, True),
        ("score >= 0.8", {"score": "0.79"}, False),
        ("score >= 0.8", {"score": None}, False),
        ("0.2 < score < 0.8", {"score": 0.5}, True),
        ("0.2 < score < 0.8", {"score": 0.9}, False),
        ("score > -1", {"score": "-0.5"}, True),
        ('lang == "en"', {"lang": "en"}, True),
        ('lang in ["en", "de"]', {"lang": "de"}, True),
        ('lang not in ["en", "de"]', {"lang": "fr"}, True),
        ("label in [1, 2]", {"label": "2"}, True),
        ('"sale" in title', {"title": "for sale"}, True),
        ('"on" in title', {"title": None}, False),
        ('"on" not in title', {"title": None}, True),
        ('lang in "None"', {"lang": None}, False),
        ("clicked", {"clicked": "false"}, False),
        ("clicked", {"clicked": "true"}, True),
        ("clicked and not spam", {"clicked": True, "spam": False}, True),
        ("clicks > 0 or saved == true", {"clicks": "0", "saved": "True"}, True),
        ("lang == null", {"lang": None}, True),
        ("lang == null", {"lang": "en"}, False),
        ("`Is Duplicate?` == 1 and `b`==2", {"Is Duplicate?": 1, "b": 2}, True),
    ],
)
def test_conditions_of_rows(text, row, holds):
    """CSV has numbers and truths as text: a comparison that forgets it takes no row, or all."""
    assert Condition(text).holds(row) is holds


def test_the_columns_it_asks_for():
    """They must be there: a misspelt one would leave out every row."""
    assert Condition("`a b` == 1 and c > d or not e").columns == ["a b", "c", "d", "e"]


@pytest.mark.parametrize("text", ["score > 0.5", "score == 1"])
def test_a_number_that_is_none_is_a_bad_row(text):
    """Taken for a row that the condition leaves out, it would vanish without a word."""
    with pytest.raises(UnlikeError, match='"score" is not a number'):
        Condition(text).holds({"score": "good"})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "label =",
        "1 == 1",
        "label = 1",
        "label == 1; import os",
        "__import__('os').system('ls')",
        "label.real == 1",
        "rows[0] == 1",
        "label + 1 == 2",
        "[x for x in label]",
        "lambda: label",
        "label == f'{label}'",
        "label == (yield)",
        "label if label else 0",
        "(" * 500 + "label" + ")" * 500,
    ],
)
def test_all_else_is_refused(text):
    """A config may come from somebody else: it must not run code."""
    with pytest.raises(ValueError, match=r"condition|names no column"):
        Condition(text)
