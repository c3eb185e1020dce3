"""Every block of code in README and docs/ runs, in a folder with small models and files, or says why it can't.

`<!-- not run: why -->` on the line before a block says so. Such a block is read all the same, by bash, Python or the schema,
and its commands and options are looked up. A new page is run without a word here; files and models that it names go into
`prepare` of tests/support/blocks.py.
"""

import contextlib
import glob
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import typer
import yaml
from support.blocks import BASE, PAGES, ROOT, Block, blocks, commands, prepare
from support.running import gist

from gist_train.cli import app
from gist_train.config.errors import UserError
from gist_train.config.loading import load_config
from gist_train.config.schema import DataConfig
from gist_train.data.rows import Labelled, Row
from gist_train.data.sources import read_labelled, read_rows

pytestmark = pytest.mark.usefixtures("on_cpu")
COMMANDS = typer.main.get_command(app).commands
RUN = ("sh", "yaml", "json", "python")
WITH_BLOCKS = [page for page in PAGES if any(block.language in RUN for block in blocks(page))]


def named(page):
    return str(page.relative_to(ROOT))


@pytest.fixture(scope="session")
def prepared(tmp_path_factory, make_model):
    folder = tmp_path_factory.mktemp("blocks") / "prepared"
    folder.mkdir()
    prepare(folder, make_model)
    return folder


@pytest.fixture
def place(prepared, tmp_path, monkeypatch):
    """A copy of the prepared folder, which the test runs in."""
    folder = shutil.copytree(prepared, tmp_path / "place", symlinks=True)
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize("page", WITH_BLOCKS, ids=named)
def test_the_blocks_of_a_page_run(page, place):
    """What a page says to type and is refused costs a reader the trust in all other pages."""
    todo = [block for block in blocks(page) if block.language in RUN]
    if any("gist-train init" in block.text for block in todo):  # which writes the YAML itself
        (place / "my.yaml").unlink()
        shutil.rmtree(place / "runs")
    names = {"__name__": "__main__"}  # which a page's blocks of Python have in common, as in a notebook
    for block in todo:
        run(block, names)


def run(block, names):
    if block.language == "python":
        run_python(block, names)
    else:
        {"sh": run_shell, "yaml": run_yaml, "json": run_json}[block.language](block)


def run_shell(block):
    checked = subprocess.run(["bash", "-n"], input=block.text, capture_output=True, text=True, timeout=20)
    assert checked.returncode == 0, f"{block}: {checked.stderr}"
    for line in commands(block.text):
        assert unknown_words(line) == [], f"{block}: {line}"
    if block.why_not:
        return
    for line in commands(block.text):
        program, *words = line
        words = [path for word in words for path in (sorted(glob.glob(word)) or [word])]
        if program == "gist-train":
            ended = gist(*words)
            assert ended.code == 0, f"{block}: {line}\n{ended.err}"
        else:
            assert program == "python", f"{block}: {line}: say above why it is not run"
            ended = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=100)
            assert ended.returncode == 0, f"{block}: {line}\n{ended.stderr}"


def run_yaml(block):
    given = list(yaml.safe_load_all(block.text))
    if block.why_not and "no YAML of a run" in block.why_not:
        return
    (given,) = given
    config = given if {"name", "model", "data"} <= given.keys() else {"name": "fragment", **BASE, **given}
    first = re.match(r"# (\S+\.yaml)\n", block.text)
    path = Path(first[1] if first else "block.yaml")
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    load_config(path)
    if not block.why_not:
        ended = gist("plan", path)
        assert ended.code == 0, f"{block}:\n{ended.err}"


def run_json(block):
    for line in block.text.splitlines():
        given = json.loads(line)
        if block.why_not:
            continue
        Path("block.jsonl").write_text(line + "\n", encoding="utf-8")
        source = {"source": "classification" if "label" in given else "jsonl", "path": "block.jsonl"}
        source |= {"scores": "texts"} if "pos_scores" in given else {}
        (one,) = DataConfig.model_validate({"train": [source]}).train
        read = read_labelled if "label" in given else read_rows
        (row,) = read(one, str(block))
        assert isinstance(row, (Row, Labelled)), f"{block}: {row}"


def run_python(block, names):
    code = compile(block.text, str(block), "exec")
    if not block.why_not:
        with contextlib.redirect_stdout(sys.stderr):
            exec(code, names)


def unknown_words(words):
    """What follows gist-train on a line, behind a launcher or in quotes too, and is none of its commands or options."""
    words = " ".join(words).split()
    behind = next((i for i, word in enumerate(words, 1) if word in ("gist-train", "gist_train")), len(words))
    command, *rest = [*words[behind:], "--help"]
    if command not in COMMANDS:
        return [] if command.startswith("-") else [command]
    options = {option for one in COMMANDS[command].params for option in (*one.opts, *one.secondary_opts)} | {"--help"}
    return [word for word in rest if word.startswith("--") and word.split("=")[0] not in options]


MISSPELT = {
    "command": ("sh", "gist-train trian my.yaml"),
    "option": ("sh", "gist-train plan my.yaml --mesure"),
    "file": ("sh", "gist-train plan mine.yaml"),
    "module": ("sh", "python -m benchmarks.ablaton"),
    "program": ("sh", "gist-trian plan my.yaml"),
    "quote": ("sh", "gist-train plan 'my.yaml"),
    "key": ("yaml", "training: {batch_sise: 8}"),
    "value": ("yaml", "data: {train: [{source: jsonl, path: nowhere.jsonl}]}"),
    "column": ("json", '{"anchr": "a", "positive": "b"}'),
    "name": ("python", "load_confg('my.yaml')"),
}


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize(("language", "text"), MISSPELT.values(), ids=MISSPELT)
def test_a_misspelt_block_is_refused(language, text):
    """If any block passes, then all do, and the test above says nothing."""
    with pytest.raises((AssertionError, UserError, NameError)):
        run(Block(ROOT / "README.md", 1, language, text + "\n", None), {})


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("name", ["command", "option", "quote", "key"])
def test_a_block_that_is_not_run_is_read(name):
    """A line for a cluster is typed where a mistake costs the most."""
    language, text = MISSPELT[name]
    with pytest.raises((AssertionError, UserError)):
        run(Block(ROOT / "README.md", 1, language, text + "\n", "no cluster"), {})


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_no_block_is_overlooked(page):
    """A fence that is indented, or a reason that stands away from its block, would be passed by without a word."""
    text = page.read_text(encoding="utf-8")
    assert len(re.findall(r"^\s*(?:```|~~~)", text, re.MULTILINE)) == 2 * len(blocks(page))
    assert text.count("<!-- not run") == len([block for block in blocks(page) if block.why_not])


def test_the_quickstart_of_a_checkout_runs(place):
    """The first thing that anybody types: its commands, on a small model and for one epoch."""
    script = (ROOT / "scripts" / "quickstart.sh").read_text(encoding="utf-8")
    lines = re.findall(r"^\.venv/bin/gist-train (.*?)(?: > /dev/null)?$", script, re.MULTILINE)
    assert [line.split()[0] for line in lines] == ["train", "evaluate", "export"]
    for line in lines:
        words = shlex.split(line.replace("$model", "sentence-transformers/all-MiniLM-L6-v2"))
        ended = gist(*words, *(["--set", "training.epochs=1"] if words[0] == "train" else []))
        assert ended.code == 0, ended.err
    assert (place / "runs" / "quickstart" / "export" / "modules.json").exists()


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_a_block_that_is_not_run_says_what_is(page):
    """A reason that names a test which is gone is none."""
    for block in blocks(page):
        for path in re.findall(r"tests/[\w/.]+\.py", block.why_not or ""):
            assert (ROOT / path).exists(), f"{block}: {path}"
        typed = block.language == "text" and re.search(r"^(?:\$ |gist-train |python )", block.text, re.MULTILINE)
        assert not typed or page.name == "cli.md", f"{block}: a block of text that is to be typed is run by nobody"


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_commands_within_text_can_be_typed(page):
    """`gist-train select --best` in a sentence is copied as often as a block is."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for span in re.findall(r"`([^`]+)`", text):
        words = span.split()
        if words[:1] == ["gist-train"] and words[1:2] != ["COMMAND"]:
            assert unknown_words(words) == [], span


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_extras_that_pages_name_exist(page):
    """pip warns of an extra that is not there, and installs nothing."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = re.findall(r"gist-train\[(\w+)\]", page.read_text(encoding="utf-8"))
    assert [extra for extra in extras if extra not in project["optional-dependencies"]] == []
