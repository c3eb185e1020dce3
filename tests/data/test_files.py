"""Files that are whole or do not exist, and one writer at a time."""

import json
import os
import stat
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from gist_train.config.errors import UserError
from gist_train.data import files
from gist_train.data.files import read_json, whole_folder, write_json, write_text
from gist_train.data.leases import held, locked


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_whole_folder(tmp_path):
    """The target is not there while it is filled, and holds everything, subfolders too, once the block has ended."""
    target = tmp_path / "parents" / "are" / "made"
    with whole_folder(target) as partial:
        (partial / "a").write_text("1")
        (partial / "sub").mkdir()
        (partial / "sub" / "b").write_text("2")
        assert not target.exists()
        assert partial.parent == target.parent  # a rename over file systems is a copy, and not atomic
    assert (target / "a").read_text() + (target / "sub" / "b").read_text() == "12"
    assert names(target.parent) == ["made"]


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_modes_follow_the_umask(tmp_path, umask):
    """safetensors writes files for their owner alone: a colleague could read a checkpoint but for its weights."""
    before = os.umask(umask)
    try:
        with whole_folder(tmp_path / "new") as partial:
            (partial / "sub").mkdir()
            save_file({"a": np.zeros(1)}, partial / "sub" / "a.safetensors")
        write_text(tmp_path / "text", "a")
    finally:
        os.umask(before)
    for path in (tmp_path / "new" / "sub" / "a.safetensors", tmp_path / "text"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask


def test_no_link_is_followed(tmp_path):
    """In a folder that others may write to, a link of a name that can be foretold would have any file of ours overwritten."""
    victim = tmp_path / "victim"
    victim.write_text("precious")
    links = [tmp_path / f".f.txt.{os.getpid()}", tmp_path / ".lock", tmp_path / "run.lock", tmp_path / ".new.partial"]
    for link in links:
        link.symlink_to(victim)

    def write():
        write_text(tmp_path / "f.txt", "a")

    def lock():
        with locked(tmp_path):
            pass

    def hold():
        with held(tmp_path / "run.lock"):
            pass

    def fill():
        with whole_folder(tmp_path / "new"):
            pass

    for function, link in zip((write, lock, hold, fill), links, strict=True):
        with pytest.raises(UserError, match="a link") as caught:
            function()
        assert link.name in str(caught.value)
        assert victim.read_text() == "precious"


def test_all_is_on_the_disk_before_the_name(tmp_path, monkeypatch):
    """A folder that gets its name before its bytes are synced is empty files after a power cut, and counts as whole."""
    target = tmp_path / "target"
    synced: list[tuple[str, bool]] = []
    real = files.sync
    monkeypatch.setattr(files, "sync", lambda path: (synced.append((path.name, target.exists())), real(path)))
    with whole_folder(target) as partial:
        (partial / "sub").mkdir()
        (partial / "sub" / "b").write_text("2")
    assert [name for name, named in synced if not named] == ["b", "sub", ".target.partial"]
    assert [name for name, named in synced if named] == [tmp_path.name]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, GeneratorExit])
def test_whole_folder_leaves_nothing_on_an_error(tmp_path, error):
    """A part that stays behind fills the disk, one that gets the name is taken for whole."""

    def fill() -> None:
        with whole_folder(tmp_path / "target") as partial:
            (partial / "a").write_text("1")
            raise error

    with pytest.raises(error):
        fill()
    assert names(tmp_path) == []


def test_whole_folder_leaves_nothing_when_the_disk_fails(tmp_path, monkeypatch):
    """The last write can fail too: then the target must not be there."""

    def fail(_: Path) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(files, "sync", fail)
    with pytest.raises(OSError, match="no space"), whole_folder(tmp_path / "target") as partial:
        (partial / "a").write_text("1")
    assert names(tmp_path) == []


def test_leftovers_of_a_killed_process_are_replaced(tmp_path):
    """A process that was killed runs no clean-up: what it left must not end up in the folder of the next."""
    killed = whole_folder(tmp_path / "target")
    (killed.__enter__() / "old").write_text("half")
    with whole_folder(tmp_path / "target") as partial:
        assert names(partial) == []
        (partial / "new").write_text("whole")
    assert names(tmp_path / "target") == ["new"]


def test_an_existing_folder_is_refused(tmp_path):
    """Checkpoints and corpora never change once they are there."""
    target = tmp_path / "target"
    target.mkdir()
    (target / "a").write_text("1")
    with pytest.raises(FileExistsError), whole_folder(target):
        pytest.fail("the block must not run")
    assert names(tmp_path) == ["target"]
    assert (target / "a").read_text() == "1"


@pytest.mark.parametrize("function", ["sync", "replace", "write"])
def test_write_text_is_atomic(tmp_path, monkeypatch, function):
    """Whatever fails, a reader finds the old file whole."""
    path = tmp_path / "file"
    write_text(path, "old")

    def fail(*_: object, **__: object) -> None:
        raise OSError("no space left")

    if function == "sync":
        monkeypatch.setattr(files, "sync", fail)
    elif function == "replace":
        monkeypatch.setattr(Path, "replace", fail)
    else:
        monkeypatch.setattr(files, "_opened", fail)
    with pytest.raises(OSError, match="no space"):
        write_text(path, "new, and longer")
    assert path.read_text() == "old"
    monkeypatch.undo()
    write_text(path, "new, and longer")
    assert path.read_text() == "new, and longer"
    assert [name for name in names(tmp_path) if not name.startswith(".")] == ["file"]


def test_text_is_synced_before_it_is_renamed(tmp_path, monkeypatch):
    """Renamed first, the file is empty after a power cut."""
    seen: list[str] = []
    monkeypatch.setattr(files, "sync", lambda path: seen.append(path.name if path.is_file() else f"folder {sorted(names(path))}"))
    write_text(tmp_path / "file", "text")
    assert seen[0].startswith(".file.")
    assert seen[1:] == ["folder ['file']"]


def test_json_round_trip(tmp_path):
    """People read these files: other scripts stand as they are, and a line ends the file."""
    value = {"name": "Zürich 日本", "list": [1, 2.5, None, True]}
    write_json(tmp_path / "a.json", value)
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert read_json(tmp_path / "a.json") == json.loads(text) == value
    assert "日本" in text
    assert text.endswith("}\n")
