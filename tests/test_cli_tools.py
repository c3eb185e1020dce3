"""Commands beside a run's own: what a field is."""

import os

import pytest
from support.running import gist

from gist_train.cli_tools import _paths


@pytest.fixture(autouse=True)
def eighty_columns(monkeypatch):
    """A screen of 80 columns."""
    monkeypatch.setitem(os.environ, "COLUMNS", "80")


def test_a_field_is_explained():
    """What it is, what it may be and what it is by default: else a reader has to search a page of 800 lines."""
    ended = gist("explain", "training.batch_size")
    assert (ended.code, ended.err) == (0, "")
    lines = [line.strip() for line in ended.out.splitlines()]
    assert lines[:2] == ["training.batch_size", "Triplets per optimizer step over all processes."]
    assert "default  16" in lines
    assert "allowed  a whole number of at least 1" in lines


def test_brackets_of_a_default_are_shown():
    """As markup of a terminal they would vanish, and with them the default."""
    assert "[0.9, 0.999]" in gist("explain", "optimizer.betas").out
    assert "[0.9, 0.999]" in gist("explain", "optimizer").out


def test_a_section_lists_its_keys():
    """Who knows the section looks for the name of the key."""
    ended = gist("explain", "checkpoint")
    assert all(f"\n  {key} " in ended.out for key in ("every", "keep_last", "keep_every"))
    top = gist("explain")
    assert all(f"\n  {key} " in top.out for key in ("name", "model", "guide", "data", "tracking"))
    assert max(map(len, (ended.out + top.out).splitlines())) <= 80


def test_a_field_that_several_have_says_where():
    """`columns` is another thing to a table than to labelled texts, and `sheet` is a workbook's alone."""
    assert "where    source: xlsx" in gist("explain", "data.train[3].sheet").out
    ended = gist("explain", "data.train.columns")
    assert ended.out.count("data.train[].columns\n") >= 2
    assert "source: classification" in ended.out


@pytest.mark.parametrize(
    ("name", "meant"),
    [("loss.margn", "loss.margin"), ("margin", "loss.margin"), ("learning_rate", "optimizer.lr"), ("xyzzy", "lists the keys")],
)
def test_an_unknown_field_names_the_nearest(name, meant):
    """A typo, a name without its section, and other packages' names."""
    ended = gist("explain", name)
    assert (ended.code, ended.out) == (2, "")
    assert meant in ended.err
    assert f'"{name}"' in ended.err


def test_a_shell_completes_fields():
    """Of some hundred names nobody knows all."""
    assert _paths("loss.mar") == ["loss.margin", "loss.margin_strategy"]
    assert "data.train.path" in _paths("data.")
    assert len(_paths("")) > 90
