"""`gist-train cache`: what lies in a cache, since when nobody used it, and how it is cleared without harm to what runs."""

import json
import os
import time
from pathlib import Path

import pytest
from support.running import exit_code_of, gist

from gist_train import training_run
from gist_train.config.errors import UserError
from gist_train.data.caches import cached, clear, in_use
from gist_train.data.leases import Lease, locked

pytestmark = pytest.mark.usefixtures("on_cpu")
DAY = 86_400


@pytest.fixture
def cache(write_config, tmp_path) -> Path:
    """The cache of a run that was prepared, used ten days ago."""
    assert gist("prepare", write_config()).code == 0
    folder = tmp_path / "runs" / ".cache"
    for entry in cached(folder):
        os.utime(entry.folder, (time.time() - 10 * DAY,) * 2)
    return folder


def listed(where: Path, *words: object) -> list[dict[str, object]]:
    ended = gist("cache", where, *words, "--json")
    assert ended.code == 0, ended.err
    return json.loads(ended.out)["entries"]


def test_corpora_and_stores_are_listed_by_size(cache, tmp_path):
    """A disk is full, and nobody knows of what."""
    entries = listed(tmp_path / "run.yaml")
    assert {entry["kind"] for entry in entries} == {"corpus", "guide store"}
    sizes = [entry["bytes"] for entry in entries]
    assert sizes == sorted(sizes, reverse=True)
    for entry in entries:
        assert Path(entry["folder"]).parent.parent == cache
        files = [path for path in Path(entry["folder"]).rglob("*") if path.is_file()]
        assert entry["bytes"] == sum(path.stat().st_size for path in files) > 0
        assert entry["used"] == pytest.approx(time.time() - 10 * DAY, abs=60)
    about = {entry["kind"]: entry["about"] for entry in entries}
    assert about["corpus"] == "96 rows of rows.jsonl"
    assert "texts by /" in about["guide store"]
    table = gist("cache", tmp_path / "runs").out
    assert all(entry["name"][:8] in table for entry in entries)
    assert ": 2 found, " in table


def test_a_run_that_reads_a_corpus_uses_it(cache, write_config):
    """By the time that it was made, what is used every day would be cleared first."""
    assert listed(cache, "--unused-for", 9) == listed(cache)
    assert gist("plan", write_config()).code == 0
    assert listed(cache, "--unused-for", 9) == []


def test_what_is_cleared_is_made_anew(cache, write_config):
    """A cache is a saving: no run depends on it."""
    corpus = next(entry for entry in listed(cache) if entry["kind"] == "corpus")
    ended = gist("cache", cache, "--clear", corpus["name"][:6])
    assert (ended.code, ended.out) == (0, "")
    assert f"corpus {corpus['name']}" in ended.err
    assert "are free again" in ended.err
    assert not Path(corpus["folder"]).exists()
    assert [entry["kind"] for entry in listed(cache)] == ["guide store"]
    assert listed(cache, "--unused-for", 11, "--clear", "all") == []  # nothing is so old
    assert len(listed(cache)) == 1
    assert listed(cache, "--clear", "all") == []
    assert sorted(path for path in cache.rglob("*") if path.is_dir()) == [cache / "corpora", cache / "guides"]
    assert gist("prepare", write_config()).code == 0
    assert len(listed(cache)) == 2


def test_what_a_training_reads_is_left(cache):
    """Its files are mapped into memory, and a resume reads them again."""
    corpus, store = sorted(cached(cache), key=lambda entry: entry.kind)
    with in_use(cache, [corpus.folder]):
        ended = gist("cache", cache, "--clear", corpus.name)
        assert (ended.code, ended.out) == (2, "")
        assert f"{corpus.name}, in use by process {os.getpid()} on " in ended.err
        ended = gist("cache", cache, "--clear", "all")
        assert ended.code == 0
        assert f"left, in use by process {os.getpid()} on " in ended.err
        assert [entry.folder for entry in cached(cache)] == [corpus.folder]
    assert not store.folder.exists()
    assert next(iter(cached(cache))).used == pytest.approx(time.time(), abs=60)
    assert gist("cache", cache, "--clear", "all").code == 0
    assert cached(cache) == []


def test_a_training_says_what_it_reads(cache, write_config, monkeypatch):
    """Else nothing tells that its corpus, which it has open for days, is needed."""
    drive, seen = training_run._drive, []

    def looked(*given):
        seen.extend(entry.holder.process for entry in cached(cache))
        return drive(*given)

    monkeypatch.setattr(training_run, "_drive", looked)
    assert gist("train", write_config(), "--set", "training.max_steps=1").code == 0
    assert seen == [os.getpid()] * 2
    assert [entry.holder for entry in cached(cache)] == [None, None]


@pytest.mark.parametrize("place", ["corpora/.NAME.lock", "corpora/NAME/tokens/.claim-1", "corpora/NAME/.lock"])
def test_what_is_being_made_is_left(cache, place):
    """Whoever builds it would write into a folder that is gone."""
    (corpus,) = [entry for entry in cached(cache) if entry.kind == "corpus"]
    lease = Lease(cache / place.replace("NAME", corpus.name))
    try:
        (seen,) = [entry for entry in cached(cache) if entry.kind == "corpus"]
        assert seen.holder is not None
        assert seen.holder.process == os.getpid()
        assert gist("cache", cache, "--clear", corpus.name).code == 2
        assert corpus.folder.exists()
    finally:
        lease.release()
    clear(corpus)
    assert not corpus.folder.exists()


def test_who_took_it_since_it_was_listed_keeps_it(cache):
    """Between the list and the deletion another process may have begun."""
    (corpus,) = [entry for entry in cached(cache) if entry.kind == "corpus"]
    with locked(corpus.folder.parent, f".{corpus.name}.lock"), pytest.raises(UserError, match="in use by process"):
        clear(corpus)
    assert corpus.folder.exists()


def hold_and_die(cache: Path) -> None:
    with in_use(cache, [entry.folder for entry in cached(cache)]):
        os._exit(9)


def test_what_a_dead_process_read_is_cleared(cache):
    """Else a crash would keep its corpus for ever."""
    assert exit_code_of(hold_and_die, cache) == 9
    assert len(list(cache.glob(".claim-*"))) == 1
    assert [entry.holder for entry in cached(cache)] == [None, None]


def test_what_killed_processes_left_is_listed_too(cache):
    """Half a corpus may be as large as a whole one, and no run looks at it again once the data changed."""
    left = cache / "corpora" / f".{'a' * 32}.partial"
    left.mkdir()
    (left / "texts.utf8").write_bytes(b"x" * 5000)
    entry = next(entry for entry in cached(cache) if entry.kind == "unfinished")
    assert (entry.folder, entry.bytes, entry.name) == (left, 5000, f"{'a' * 32}.partial")
    assert gist("cache", cache, "--clear", "aaaa").code == 0
    assert not left.exists()


def test_a_name_that_is_nobodys_deletes_nothing(cache):
    """A typo beside a right name: all is said, and nothing is half done."""
    corpus = next(entry for entry in cached(cache) if entry.kind == "corpus")
    ended = gist("cache", cache, "--clear", corpus.name, "--clear", "xyz")
    assert ended.code == 2
    assert '"xyz"' in ended.err
    assert corpus.folder.exists()


def test_a_folder_without_a_cache_is_refused(tmp_path):
    """An empty list would read as an empty cache."""
    ended = gist("cache", tmp_path)
    assert ended.code == 2
    assert "which has no cache" in ended.err
