"""The example files of docs/data/: each line there reads its file, and all hold the same rows."""

import re
from pathlib import Path

import pytest
import yaml
from support.running import gist

from gist_train.config.errors import UserError
from gist_train.config.schema import DataConfig
from gist_train.data.judging import WATCHED
from gist_train.data.rows import ALIASES
from gist_train.data.sources import read_labelled, read_rows
from gist_train.starter.page import starter_yaml

ROOT = Path(__file__).parents[2]
PAGES = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs" / "data").glob("*.md"))]
TRAIN = [
    DataConfig.model_validate(yaml.safe_load(block)["data"]).train
    for page in PAGES
    for block in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
]
SOURCES = [one for train in TRAIN for one in train if one.path.startswith("examples/rows/")]
OURS = next(one for one in SOURCES if one.path.endswith("/rows.jsonl"))
WITHOUT = {"llamaindex.json": 0, "spreadsheet.csv": 0, "nli.csv": 0, "clicks.csv": 0, "triples.tsv": 1, "medi.json": 1}
"""Files that hold less than the two negatives of a row."""
OF_ROWS = [pytest.param(one, id=Path(one.path).name) for one in SOURCES if one.source != "classification"]


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("source", OF_ROWS)
def test_each_example_holds_the_same_rows(source):
    """A line of the page that reads something else than it says would be copied into many configs."""
    rows, own = ([row for row in read_rows(one, "it") if row is not None] for one in (source, OURS))
    kept = WITHOUT.get(Path(source.path).name, 2)
    assert [(row.anchor, row.positives, row.negatives) for row in rows] == [
        (row.anchor, row.positives, row.negatives[:kept]) for row in own
    ]
    assert len(rows) == 3


@pytest.mark.parametrize(
    "source", [pytest.param(one, id=Path(one.path).name) for one in SOURCES if one.source == "classification"]
)
def test_the_labelled_examples(source):
    """They are read by other means."""
    assert [row.label for row in read_labelled(source, "it")] == ["account", "account", "parcel", "parcel"]


def test_the_pages_name_every_example_and_column():
    """A file or name that the pages leave out is one that nobody finds."""
    assert {Path(one.path).name for one in SOURCES} == {file.name for file in (ROOT / "examples" / "rows").iterdir()}
    for key, names in ALIASES.items():
        (line,) = [line for page in PAGES for line in page.splitlines() if line.startswith(f"| {key} |")]
        assert [name for name in names if f"`{name}`" not in line] == []
    assert [name for name in ("label", "gold_label", "score", "clicks") if name not in WATCHED] == []


def test_init_writes_the_lines_of_the_pages():
    """What a user is told to copy and what `init` writes must not be two answers."""
    judged = [one for one in SOURCES if one.source != "classification" and one.source != "medi" and one.where]
    for source in judged:
        with pytest.raises(UserError, match="where: ") as caught:
            starter_yaml([Path(source.path)], model="a/b", guide="a/c", to=Path("x.yaml"))
        (written,) = yaml.safe_load(str(caught.value).split("into the YAML: ")[1])
        assert DataConfig.model_validate({"train": [written]}).train == [source]
    files = [Path(one.path) for one in SOURCES if Path(one.path).suffix and one not in judged]
    text = starter_yaml(files, model="a/b", guide="a/c", to=Path("x.yaml"))
    written = {one.path: one for one in DataConfig.model_validate(yaml.safe_load(text)["data"]).train}
    for source in SOURCES:
        if source.path in written:
            update = {"task": None} | ({"sheet": source.sheet} if source.source == "xlsx" else {})  # it takes the first one
            assert written.pop(source.path).model_copy(update=update) == source
    assert written == {}


@pytest.mark.usefixtures("on_cpu")
def test_other_tools_rows_give_the_losses_of_ours(tmp_path, write_config):
    """FlagEmbedding's, Tevatron's and mined rows train as the same rows in our format do, to the last digit."""
    losses = {}
    for name in (
        "rows.jsonl",
        "array.json",
        "rows.parquet",
        "mined.csv",
        "lists.csv",
        "flagembedding.jsonl",
        "tevatron.jsonl",
        "workbook.xlsx",
    ):
        (source,) = [one for one in SOURCES if Path(one.path).name == name]
        one = {"source": source.source, "path": str(ROOT / source.path), "task": "t"}
        training = {"batch_size": 3, "max_steps": 2}
        ended = gist("train", write_config(name, data={"train": [one]}, training=training))
        assert ended.code == 0, ended.err
        losses[name] = re.findall(r'"loss": ([\d.]+)', (tmp_path / "runs" / name / "metrics.jsonl").read_text())
    assert len(losses["rows.jsonl"]) == 2
    assert set(map(tuple, losses.values())) == {tuple(losses["rows.jsonl"])}
