"""Messages that could be of any length, and mistakes about folders and times: told in a screen, and never by a bare errno."""

import json
import re
from pathlib import Path

import pytest
import yaml
from support.running import gist

pytestmark = pytest.mark.usefixtures("on_cpu")
FAULT = re.compile(r"\S.*\n  found     .+\n  expected  .+\n  fix       .+")


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    """Where whole messages go."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


def test_a_hundred_thousand_columns_take_a_screen(write_config, tmp_path):
    """As a fault, as a note of what is not read, in a plan and in init: the first names and the number of the others."""
    names = [f"column_{i}" for i in range(100_000)]
    (tmp_path / "wide.csv").write_text(",".join(names) + "\n" + ",".join("x" * len(names)) + "\n")
    train = [{"source": "csv", "path": str(tmp_path / "wide.csv")}]
    wide = {"anchor": "a", "positive": "b", **dict.fromkeys(names, 1)}
    (tmp_path / "unread.jsonl").write_text((json.dumps(wide) + "\n") * 8)
    unread = [{"source": "jsonl", "path": str(tmp_path / "unread.jsonl")}]
    told = [
        gist("prepare", write_config(data={"train": train})),
        gist("prepare", write_config(data={"train": unread}, guide=None)),
        gist("plan", write_config(data={"train": unread}, guide=None)),
        gist("init", tmp_path / "wide.csv", "--to", tmp_path / "new.yaml"),
        gist("init", tmp_path / "wide.csv", "--columns", "anchor=a,positive=b", "--to", tmp_path / "new.yaml"),
    ]
    assert [ended.code for ended in told] == [2, 0, 0, 2, 2]
    for ended in told:
        assert len(ended.err.splitlines()) <= 40
        assert len(ended.err) + len(ended.out) < 8000, ended.err
    assert '"column_0", "column_1", ' in told[0].err
    assert '"column_19" and 99,980 more' in told[0].err
    assert "columns that are not read: column_0, " in told[1].err
    assert "column_19 and 99,980 more" in told[1].err


def test_what_is_longer_goes_into_a_file(write_config, temporary):
    """A hundred faults of a YAML: the first of them, and a file with all."""
    path = write_config()
    config = yaml.safe_load(path.read_text())
    config["data"]["train"] = [{"source": "jsonl", "path": f"https://anna:Sesame1@host/{i}", "wrong": i} for i in range(100)]
    path.write_text(yaml.safe_dump(config))
    ended = gist("prepare", path)
    assert ended.code == 2
    assert len(ended.err.splitlines()) <= 41
    (whole,) = temporary.iterdir()
    assert f"The whole message, 400 lines: {whole}\n" in ended.err
    faults = FAULT.findall(whole.read_text())
    assert len(faults) == 100
    assert ended.err.startswith(faults[0])
    assert "Sesame1" not in whole.read_text()


def test_a_disk_without_room_has_no_file_of_it(write_config, monkeypatch):
    """The message comes all the same."""
    path = write_config()
    config = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump(config | {f"wrong{i}": i for i in range(100)}))
    monkeypatch.setattr("gist_train.telling.NamedTemporaryFile", _no_room)
    ended = gist("prepare", path)
    assert ended.code == 2
    assert "... and 361 lines more\n" in ended.err


def _no_room(*_, **__):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("place", ["run", "run/checkpoints"])
@pytest.mark.parametrize("kind", ["a file", "a link to nothing"])
def test_a_run_folder_that_is_none_is_refused_first(write_config, tmp_path, place, kind):
    """Found out when the first checkpoint is written, an hour's steps would be lost."""
    there = tmp_path / "runs" / place
    there.parent.mkdir(parents=True)
    if kind == "a file":
        there.write_text("mine")
    else:
        there.symlink_to("/nowhere/at/all")
    ended = gist("train", write_config())
    assert ended.code == 2
    assert f"run folder {there}\n  found     {kind}\n" in ended.err
    assert "rows" not in ended.err
    assert there.is_symlink() or there.read_text() == "mine"


@pytest.mark.parametrize("timeout", ["inf", "nan", "0", "-1", "1e300", "2592001"])
def test_a_time_that_is_none_is_refused(write_config, timeout):
    """No process group takes it, and each says so otherwise."""
    ended = gist("train", write_config(), "--timeout", timeout)
    assert ended.code == 2
    assert "--timeout\n  found     " in ended.err
    assert "expected  1 to 2,592,000\n" in ended.err


def test_an_export_goes_into_no_file_and_no_dangling_link(write_config, tmp_path):
    """Nothing that is there is touched."""
    assert gist("train", write_config(guide=None, training={"batch_size": 8, "max_steps": 1, "precision": "float32"})).code == 0
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to("/nowhere/at/all")
    for to in ("file", "link", "file/inside"):
        ended = gist("export", tmp_path / "runs" / "run", "--to", tmp_path / to)
        assert ended.code == 2, ended.err
        assert re.match(rf"gist-train \S+: export run\n--to{FAULT.pattern[4:]}", ended.err), ended.err
    assert (tmp_path / "file").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []
    assert Path(tmp_path / "link").is_symlink()
