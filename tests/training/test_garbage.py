"""Files of a run folder and of the cache that hold garbage: told in words or made anew, and never a traceback."""

import shutil

import pytest
from support.running import gist

pytestmark = pytest.mark.usefixtures("on_cpu")
GARBAGE = {"nested": "[" * 100_000, "cut": '{"a": ', "another kind": "[1, 2]", "binary": "\udcff\udcfe\x00", "empty": ""}
RARE = ("binary", "empty")
"""Kinds that take the way of a file that is cut."""
FILES = (
    "run/run.json",
    "run/config.yaml",
    "run/selected.json",
    "run/early-stop.json",
    "run/ended.json",
    "run/evaluations.jsonl",
    "run/metrics.jsonl",
    ".cache/content-hashes.json",
    ".cache/corpora/*/meta.json",
    ".cache/corpora/*/manifest.json",
    ".cache/corpora/*/tokens/*/meta.json",
    ".cache/guides/*/meta.json",
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Where a finished, evaluated and selected run is kept."""
    return tmp_path_factory.mktemp("whole") / "runs"


@pytest.fixture
def config(write_config, write_pairs, tmp_path, whole):
    """The config of such a run, whose folders are there."""
    evaluation = {**write_pairs(["one", "two"]), "every": 2, "stop_after": 9}
    path = write_config(
        training={"batch_size": 8, "max_steps": 4, "precision": "float32"},
        checkpoint={"every": 2},
        evaluation=evaluation,
        selection={"metric": "pairs/spearman"},
    )
    if not whole.exists():
        for command in ("train", "select"):
            assert gist(command, path).code == 0
        shutil.copytree(tmp_path / "runs", whole)
    else:
        shutil.copytree(whole, tmp_path / "runs")
    return path


@pytest.mark.parametrize(
    "garbage", ["nested", "cut", "another kind", *(pytest.param(one, marks=pytest.mark.slow) for one in RARE)]
)
@pytest.mark.parametrize("file", FILES)
def test_garbage_is_told_and_never_a_traceback(config, tmp_path, file, garbage):
    """Who copies a run over a network gets such files, and needs to know which one it is."""
    paths = list((tmp_path / "runs").glob(file)) or [tmp_path / "runs" / file]
    paths[0].write_bytes(GARBAGE[garbage].encode("utf-8", "surrogateescape"))
    for words in (("train", config), ("evaluate", tmp_path / "runs" / "run"), ("select", config), ("export", config)):
        ended = gist(*words)
        assert "Traceback" not in ended.err, (words[0], ended.err[-2000:])
        assert ended.code in (0, 2), (words[0], ended.code, ended.err[-2000:])
        if ended.code == 2:
            assert paths[0].name in ended.err or str(paths[0].parent) in ended.err, (words[0], ended.err[-2000:])
