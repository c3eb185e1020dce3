"""Data sets through `datasets`: local folders in the published one's shape, and the hub's own interface on loopback."""

import errno
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.corpora import built
from support.hub_stub import hub

from gist_train.config.errors import Fault, UserError
from gist_train.config.schema import DataConfig
from gist_train.config.sources import ClassificationSource, Columns, HubSource, LabelColumns, Prompts
from gist_train.data.fingerprints import ContentHashes, corpus_fingerprint
from gist_train.data.rows import Labelled, Row
from gist_train.data.sources import read_labelled, read_rows

PUBLISHED = {
    "query": [" what is a cell ", "who wrote Emma"],
    "pos": ["the unit of life", "Jane Austen"],
    "neg": ["a prison room", "Emma Stone"],
    "task_name": ["bio", "books"],
    "query_instruct": ["Find: ", "Find: "],
    "pos_instruct": ["Doc: ", "Doc: "],
    "neg_instruct": ["Doc: ", "Doc: "],
}
"""The columns of avsolatorio/medi-data-mteb_avs_triplets."""
NONE = ("", "", "")
FIRST, SECOND = "1" * 40, "2" * 40


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """`datasets` copies what it reads: not into the cache of whoever runs the tests."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def parquet(columns: dict[str, list[Any]]) -> bytes:
    stream = io.BytesIO()
    pq.write_table(pa.table(columns), stream)
    return stream.getvalue()


def folder_of(tmp_path: Path, *shards: dict[str, list[Any]]) -> Path:
    folder = tmp_path / "triplets" / "data"
    folder.mkdir(parents=True)
    for number, columns in enumerate(shards):
        (folder / f"train-{number:05}-of-{len(shards):05}.parquet").write_bytes(parquet(columns))
    return folder.parent


@pytest.mark.parametrize("streaming", [False, True], ids=["copied", "streamed"])
def test_a_local_folder_in_the_published_shape(tmp_path, streaming):
    """The recipe's data: two shards in order, texts stripped, instructions dropped unless they are kept as prompts."""
    folder = folder_of(tmp_path, PUBLISHED, {key: values[::-1] for key, values in PUBLISHED.items()})
    source = HubSource(path=str(folder), streaming=streaming)
    cell = Row("what is a cell", ("the unit of life",), ("a prison room",), "bio", NONE)
    emma = Row("who wrote Emma", ("Jane Austen",), ("Emma Stone",), "books", NONE)
    assert list(read_rows(source, "data.train[0]")) == [cell, emma, emma, cell]
    kept = list(read_rows(source, "data.train[0]", keep_instructions=True))
    assert [row.prompts for row in kept] == [("Find: ", "Doc: ", "Doc: ")] * 4


def test_other_columns_tasks_and_lists_of_negatives(tmp_path):
    """sentence-transformers' names, several negatives, a task of its own: what users' data sets look like."""
    columns = {"anchor": ["a"], "positive": ["p"], "negatives": [["m", "n"]], "topic": ["t"]}
    folder = folder_of(tmp_path, columns)
    plain = Row("a", ("p",), ("m", "n"), "triplets", NONE)
    assert list(read_rows(HubSource(path=str(folder)), "w")) == [plain]
    source = HubSource(path=str(folder), columns=Columns(task="topic"), prompts=Prompts(anchor="q: "))
    assert list(read_rows(source, "w")) == [Row("a", ("p",), ("m", "n"), "t", ("q: ", "", ""))]


def test_bad_rows_are_told_with_their_number(tmp_path):
    """A data set of millions with one empty text must say which."""
    columns = {**PUBLISHED, "pos": ["the unit of life", "  "]}
    found = list(read_rows(HubSource(path=str(folder_of(tmp_path, columns))), "data.train[1]"))
    assert isinstance(found[1], Fault)
    assert found[1].where.startswith("data.train[1]: ")
    assert found[1].where.endswith('triplets, row 2: "pos" is empty')


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"split": "dev"}, "dev"),
        ({"subset": "en"}, "en"),
        ({"columns": Columns(negative="hard")}, "no column for negative"),
        ({"path": "nobody/nothing"}, "nobody/nothing"),
    ],
    ids=["split", "subset", "column", "id"],
)
def test_what_is_not_there_is_told(tmp_path, settings, said):
    """A slip in the YAML ends with exit code 2 and no traceback of three libraries."""
    folder = folder_of(tmp_path, PUBLISHED)
    with pytest.raises(UserError) as caught:
        list(read_rows(HubSource(**{"path": str(folder), **settings}), "data.train[0]"))
    assert caught.value.faults[0].where.startswith("data.train[0]")
    assert said in str(caught.value)


def test_an_empty_folder_is_refused(tmp_path):
    """Nothing to train on."""
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="can't be read"):
        list(read_rows(HubSource(path=str(tmp_path / "empty")), "w"))


def test_labelled_texts_of_a_folder(tmp_path):
    """The MTEB classification sets: numbers as labels, and another name of the label."""
    folder = folder_of(tmp_path, {"text": ["a", "b"], "label": [0, 7], "label_text": ["x", "y"]})
    source = ClassificationSource(path=str(folder), task="mteb-x-avs_triplets")
    assert list(read_labelled(source, "w")) == [Labelled("a", "0", source.task), Labelled("b", "7", source.task)]
    named = ClassificationSource(path=str(folder), columns=LabelColumns(label="label_text"))
    assert [row.label for row in read_labelled(named, "w")] == ["x", "y"]


def test_the_fingerprint_of_a_folder_is_its_content(tmp_path):
    """A shard that changed must not find the corpus of the old one; a folder that moved must find its own."""
    folder = folder_of(tmp_path, PUBLISHED)

    def found(path: Path) -> str:
        data = DataConfig(train=[HubSource(path=str(path))])
        return corpus_fingerprint(data, ContentHashes(tmp_path / "no" / "hashes.json"), {})

    first = found(folder)
    (tmp_path / "elsewhere").mkdir()
    folder = folder.rename(tmp_path / "elsewhere" / folder.name)
    assert found(folder) == first
    (folder / "data" / "train-00000-of-00001.parquet").write_bytes(parquet({**PUBLISHED, "neg": ["x", "y"]}))
    assert found(folder) != first


def test_a_changed_shard_is_read_anew_whatever_its_times(tmp_path):
    """rsync and tar set times back: a copy that goes by them would put the old rows under the new fingerprint."""
    folder = folder_of(tmp_path, PUBLISHED)
    shard = folder / "data" / "train-00000-of-00001.parquet"
    os.utime(shard, (1, 1))
    assert len(list(read_rows(HubSource(path=str(folder)), "w"))) == 2
    shard.write_bytes(parquet({**PUBLISHED, "neg": ["x", "y"]}))
    os.utime(shard, (1, 1))
    assert [row.negatives for row in read_rows(HubSource(path=str(folder)), "w")] == [("x",), ("y",)]


def test_what_tools_keep_beside_the_data_is_no_part_of_it(tmp_path):
    """A git fetch in the folder, or the hub's client noting its downloads, must not build the corpus anew."""
    folder = folder_of(tmp_path, PUBLISHED)
    data = DataConfig(train=[HubSource(path=str(folder))])
    first = corpus_fingerprint(data, ContentHashes(tmp_path / "no" / "hashes.json"), {})
    (folder / ".cache" / "huggingface").mkdir(parents=True)
    (folder / ".cache" / "huggingface" / "x.metadata").write_text("1")
    assert corpus_fingerprint(data, ContentHashes(tmp_path / "no" / "hashes.json"), {}) == first


def test_a_full_disk_is_no_fault_of_the_data_set(tmp_path, monkeypatch):
    """Sent to check their spelling, a user would not look at the disk."""
    import datasets

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(datasets, "load_dataset", full)
    with pytest.raises(OSError, match="No space left"):
        list(read_rows(HubSource(path=str(folder_of(tmp_path, PUBLISHED))), "w"))


def test_a_corpus_of_a_data_set(tmp_path):
    """From the folder to the rows that are trained on."""
    corpus = built(tmp_path / "corpus", DataConfig(train=[HubSource(path=str(folder_of(tmp_path, PUBLISHED)))]))
    assert [corpus.text(i) for i in corpus.anchor] == ["what is a cell", "who wrote Emma"]
    assert corpus.tasks == ["bio", "books"]
    assert corpus.meta["origins"] == [{"name": "triplets", "commit": None}]  # not the way to it


ASK = """
import json, sys
from pathlib import Path
from gist_train.config.errors import UserError
from gist_train.config.schema import DataConfig
from gist_train.config.sources import HubSource
from gist_train.data.fingerprints import ContentHashes, corpus_fingerprint
from gist_train.data.sources import read_rows
source = HubSource(**json.loads(sys.argv[1]))
try:
    print(corpus_fingerprint(DataConfig(train=[source]), ContentHashes(Path("hashes.json")), {}))
    print(json.dumps([row.anchor for row in read_rows(source, "data.train[0]")]))
except UserError as error:
    print(error)
"""


def asked(tmp_path: Path, endpoint: str, **settings: Any) -> list[str]:
    """Fingerprint and anchors of a data set of the hub at `endpoint`, or the lines of the error, in a process of its own."""
    offline = {"HF_HUB_OFFLINE": "1"} if endpoint == "" else {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": endpoint}
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), **offline}
    command = [sys.executable, "-c", ASK, json.dumps({"path": "me/triplets", **settings})]
    ended = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.splitlines()


@pytest.mark.slow
def test_a_revision_is_pinned(tmp_path):
    """Main moves on: a run that names a commit must read that commit's rows, also offline from the cache, and one that names
    none the newest; the corpora of the two are not the same."""
    file = "data/train-00000-of-00001.parquet"
    old, new = parquet(PUBLISHED), parquet({key: values[:1] for key, values in PUBLISHED.items()})
    with hub("me/triplets", {FIRST: {file: old}, SECOND: {file: new}}) as (endpoint, requests):
        pinned = asked(tmp_path, endpoint, revision=FIRST)
        assert json.loads(pinned[1]) == ["what is a cell", "who wrote Emma"]
        assert not any(SECOND in path or path.endswith("/main") for path in requests)
        newest = asked(tmp_path, endpoint)
        assert json.loads(newest[1]) == ["what is a cell"]
        assert newest[0] != pinned[0]
        assert asked(tmp_path, endpoint, revision=SECOND) == newest
        assert asked(tmp_path, endpoint, revision=SECOND, streaming=True) == newest
        unknown = asked(tmp_path, endpoint, revision="v9")
        assert unknown[0] == "data.train[0].path"
        assert any(line.startswith("  fix") for line in unknown)
    # The server is gone: nobody answers there any more.
    assert asked(tmp_path, endpoint, revision="v9")[0] == "data.train[0].path"
    assert asked(tmp_path, "", revision=FIRST) == pinned
    assert asked(tmp_path, "", revision=SECOND) == newest


@pytest.mark.slow
def test_a_copy_is_enough_where_the_hub_fails(tmp_path):
    """Asked for without a commit: what the hub said of the name last time is kept with the copy."""
    commits = {FIRST: {"data/train-00000-of-00001.parquet": parquet(PUBLISHED)}}
    with hub("me/triplets", commits) as (endpoint, _):
        expected = asked(tmp_path, endpoint)
        assert json.loads(expected[1]) == ["what is a cell", "who wrote Emma"]
    with hub("me/triplets", commits, fault=500) as (endpoint, _):
        assert asked(tmp_path, endpoint) == expected
    with hub("me/triplets", commits, fault="half") as (endpoint, requests):  # as a hub that is silent
        assert asked(tmp_path, endpoint) == expected
    assert requests.count("/api/datasets/me/triplets") == 1
    assert [path for path in requests if "resolve" in path] == []
    assert asked(tmp_path, "") == expected
    assert asked(tmp_path, "", revision="v9")[0] == "data.train[0].path"
