"""Commands beside a run's own: what a field is, and what runs here."""

import os
import platform
import re
from importlib.metadata import version

import pytest
from support.running import gist

from gist_train import bug_report
from gist_train.config.reference import all_paths, explained
from gist_train.version import __version__


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
    """`columns` is another thing to a table than to labelled texts, `sheet` is a workbook's alone, `dtype` is of all guides."""
    assert "where    source: xlsx" in gist("explain", "data.train[3].sheet").out
    ended = gist("explain", "data.train.columns")
    assert ended.out.count("data.train[].columns\n") >= 2
    assert "where    source: classification or texts" in ended.out
    assert "where" not in gist("explain", "guide.dtype").out


@pytest.mark.parametrize("field", [path for path in all_paths() if len(explained(path).inside) > 1])
def test_keys_of_several_kinds_are_listed_once(field):
    """The same list five times under one heading tells nobody which of them is that of his source."""
    _, *parts = " ".join(gist("explain", field).out.split()).split("Keys of ")
    headings, listed = zip(*(re.match(r"(\S+(?: \([^)]*\))?): (.*)", part).groups() for part in parts), strict=True)
    assert len({*headings}) == len({*listed}) == len(parts) > 1
    assert all(heading.endswith(")") for heading in headings[1:])  # of guides the first kind is the usual one, and has no name


def test_equal_keys_have_one_heading_with_all_their_kinds():
    """Which of the lists counts is decided by the kind of the source."""
    text = " ".join(gist("explain", "data.train.columns").out.split())
    assert "Keys of data.train[].columns (source: hub, jsonl, csv, xlsx or parquet): anchor, positive, negative, task" in text
    assert "Keys of data.train[].columns (source: classification): text, label" in text
    tasks = " ".join(gist("explain", "evaluation.tasks").out.split())
    assert "Keys of evaluation.tasks[] (type: sts, clustering, pair or triplet): type, name, on_bad_row" in tasks
    # All of one kind: what each of them is, and not the names alone.
    assert "Text before every anchor." in gist("explain", "data.train.prompts").out


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


def test_a_report_of_a_fault_has_what_is_asked_for(monkeypatch):
    """Without versions, hardware and settings the first answer to each report is a question."""
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "7")
    monkeypatch.setenv("HF_TOKEN", "hf_" + "aB3" * 10)
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef0123")
    ended = gist("--version", "--verbose")
    assert (ended.code, ended.err) == (0, "")
    lines = ended.out.splitlines()
    assert {f"gist-train {__version__}", f"Python {platform.python_version()}", f"torch {version('torch')}"} <= {*lines}
    assert "ONEDNN_PRIMITIVE_CACHE_CAPACITY=7" in lines
    assert {"HF_TOKEN=***", "WANDB_API_KEY=***"} <= {*lines}
    assert any(re.fullmatch(r"\d+ processors, [\d.]+ GiB of memory; torch uses \d+ threads", line) for line in lines)
    assert any(line.startswith("wandb ") for line in lines)
    assert not any(line.startswith(("ruff", "PATH=", "HOME=")) for line in lines)


def test_a_report_of_a_fault_has_what_the_user_set(monkeypatch):
    """What this program sets for its libraries would be taken for the user's doing, and is the same everywhere."""
    for name in (*os.environ,):
        if bug_report.SETTINGS.match(name):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    ended = gist("--version", "--verbose")
    assert "PYTORCH_ALLOC_CONF" in os.environ
    assert re.findall(r"^\w+=.*$", ended.out, re.MULTILINE) == ["HF_HUB_OFFLINE=1"]


DRIVERS = {
    "two GPUs": ("echo 570.1; echo 570.1", 10, ["NVIDIA driver: 570.1"]),
    "no driver": ("echo NVIDIA-SMI has failed; exit 9", 10, ["NVIDIA driver: unknown; NVIDIA-SMI has failed"]),
    "a driver that hangs": ("exec sleep 60", 0.2, ["NVIDIA driver: unknown; nvidia-smi does not answer"]),
    "no program": (None, 10, []),
}


@pytest.mark.parametrize("case", DRIVERS)
def test_a_report_of_a_fault_names_the_driver(monkeypatch, tmp_path, case):
    """Most GPUs that torch does not see have a driver that is too old for it; to find that out may never fail."""
    script, patience, lines = DRIVERS[case]
    if script is not None:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin" if script else str(tmp_path))  # sleep is in /bin
    monkeypatch.setattr(bug_report, "PATIENCE", patience)
    assert [line for line in bug_report.bug_report({}).splitlines() if "driver" in line] == lines


def test_the_version_alone_is_one_word():
    """Scripts read it."""
    assert gist("--version").out == f"{__version__}\n"
    assert gist("--version", "plan").out == f"{__version__}\n"


def test_verbose_goes_with_the_version():
    """Alone it does nothing, and a user who expects more words of a command would wait for them."""
    ended = gist("--verbose")
    assert (ended.code, ended.out) == (2, "")
    assert "fix       gist-train --version --verbose" in ended.err
