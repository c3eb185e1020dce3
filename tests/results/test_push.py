"""Pushing an export to the hub: what arrives, what is refused before any work, and that the token stands nowhere."""

import io
import logging
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from threading import Event
from unittest import mock

import pytest
from huggingface_hub import HfApi, ModelCard, constants
from rich.console import Console
from support.push_stub import TOKEN, push_hub
from support.running import QUIET, gist

from gist_train import progress
from gist_train.config.errors import UserError
from gist_train.results import push
from gist_train.results.push import check_push, planned_push, push_folder
from gist_train.run_folder import Run

pytestmark = pytest.mark.usefixtures("on_cpu")
TRAINING = {"batch_size": 8, "max_steps": 2, "precision": "float32"}
TRAINED: list[Path] = []


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub on loopback that this process pushes to, with a token in the environment."""
    with push_hub() as served:
        monkeypatch.setattr(constants, "ENDPOINT", served.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-login"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(time, "sleep", lambda _: None)  # the library waits 23 s in all between its tries
        yield served


@pytest.fixture
def run(write_config, tmp_path, tmp_path_factory):
    """A run with a checkpoint at step 2: trained once, copied for each test."""
    folder = tmp_path / "runs" / "run"
    if TRAINED:
        shutil.copytree(TRAINED[0], folder)
    else:
        assert gist("train", write_config(training=TRAINING)).code == 0
        TRAINED.append(shutil.copytree(folder, tmp_path_factory.mktemp("pushing") / "trained"))
    return folder


@pytest.fixture
def exported(tmp_path):
    """A folder in the shape of an export, with nothing in it that takes time to make."""
    folder = tmp_path / "export"
    (folder / "1_Pooling").mkdir(parents=True)
    (folder / "README.md").write_text("---\ngist_train: {run: small, step: 7}\n---\n\n# small\n")
    (folder / "modules.json").write_text("[]")
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 40)
    (folder / "1_Pooling" / "config.json").write_text("{}")
    return folder


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_export_arrives_byte_for_byte(run, tmp_path):
    """In a process of its own, as noisy as the library can be: files, card and privacy arrive, the token is on no channel."""
    with push_hub() as hub:
        told = {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        noise = {"HF_DEBUG": "1", "HF_HUB_VERBOSITY": "debug", "HF_HOME": str(tmp_path / "home")}
        command = [sys.executable, "-m", "gist_train", "export", str(run), "--push-to-hub", hub.repo_id, "--private"]
        environment = {**os.environ, **told, **noise}
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.strip() == str(run / "export")
    assert f"{hub.endpoint}/me/model/commit/{'1' * 40}" in ended.stderr
    assert hub.private
    assert hub.commits == ["gist-train export: run run, step 2"]
    assert hub.files == contents(run / "export")
    assert hub.files["model.safetensors"] == (Run(run).checkpoint(2) / "model.safetensors").read_bytes()
    assert hub.by_lfs == {"model.safetensors"}
    assert hub.verified == set(hub.lfs)
    card = ModelCard(hub.files["README.md"].decode())
    assert card.data["library_name"] == "sentence-transformers"
    assert 'SentenceTransformer("me/model")' in card.text
    # The token goes to the hub, and not to the store that the hub names for large files.
    sent = {path: authorization for _, path, authorization in hub.requests}
    assert {sent[path] for path in sent if "me/model" in path or path in ("/api/whoami-v2", "/api/repos/create")} == {
        f"Bearer {TOKEN}"
    }
    assert [sent[path] for path in sent if path.startswith("/lfs/")] == [None]
    assert TOKEN not in ended.stdout + ended.stderr
    assert [path for path, content in contents(run).items() if TOKEN.encode() in content] == []


def test_the_library_logs_no_token_at_debug_level(hub, exported, monkeypatch, caplog):
    """A version of the library that logged its headers would put the token into everybody's CI logs."""
    monkeypatch.setattr(constants, "HF_DEBUG", True)
    caplog.set_level(logging.DEBUG)
    for name in ("huggingface_hub", "httpx2", "httpcore2"):
        caplog.set_level(logging.DEBUG, logger=name)
    monkeypatch.setattr(logging.getLogger("huggingface_hub"), "propagate", True)
    check_push(hub.repo_id, None)
    assert push_folder(exported, hub.repo_id, private=None, console=QUIET).endswith("/commit/" + "1" * 40)
    assert "whoami-v2" in caplog.text  # it did log
    assert "curl" in caplog.text
    assert TOKEN not in caplog.text


def test_a_push_says_that_it_goes_on(hub, exported, monkeypatch):
    """An upload of gigabytes said nothing for an hour, as one that hangs does."""
    monkeypatch.setattr(progress, "EVERY", 0.05)
    real = HfApi.upload_folder

    def slowly(*given, **options):
        Event().wait(0.3)  # time.sleep is no wait here
        return real(*given, **options)

    monkeypatch.setattr(HfApi, "upload_folder", slowly)
    console = Console(file=io.StringIO())
    push_folder(exported, hub.repo_id, private=None, console=console)
    size = sum(len(content) for content in contents(exported).values()) / 1e6
    first, second, *_ = console.file.getvalue().splitlines()
    assert first == f"pushing 4 files, {size:.1f} MB, to {hub.repo_id}"
    assert second == f"{first}, 0 s so far"


def test_a_push_that_is_stopped_says_what_is_there(run, monkeypatch):
    """The folder was replaced by then: "as it was before" would send people to look for their old export."""
    monkeypatch.setattr(push, "check_push", mock.Mock())
    monkeypatch.setattr(push, "push_folder", mock.Mock(side_effect=KeyboardInterrupt))
    ended = gist("export", run, "--push-to-hub", "me/model")
    assert (ended.code, ended.out.strip()) == (130, str(run / "export"))
    assert "the new export if its path was printed" in ended.err


def test_an_earlier_export_gives_way(hub, exported):
    """ONNX weights of the model before would be read beside the new card; what its owner added is not ours to delete."""
    hub.exists = True
    hub.files = {
        ".gitattributes": b"*.onnx",
        "modules.json": b"old",
        "model-00001-of-00002.safetensors": b"old",
        "onnx/model.onnx": b"old",
        "2_Normalize/config.json": b"old",
        "1_Pooling/config.json": b"old",
        "LICENSE": b"mine",
        "pictures/curve.png": b"mine",
    }
    push_folder(exported, hub.repo_id, private=None, console=QUIET)
    kept = {".gitattributes": b"*.onnx", "LICENSE": b"mine", "pictures/curve.png": b"mine"}
    assert hub.files == {**contents(exported), **kept}
    assert hub.commits == ["gist-train export: run small, step 7"]


def test_a_repository_of_something_else_is_left_alone(hub, exported):
    """A slip of the finger in the name must not put a text model over somebody's picture model."""
    hub.exists, hub.files = True, {".gitattributes": b"", "README.md": b"", "unet/model.bin": b"mine"}
    with pytest.raises(UserError, match=r"unet/model\.bin"):
        push_folder(exported, hub.repo_id, private=None, console=QUIET)
    assert hub.commits == []
    assert hub.lfs == {}


def test_private_is_not_pushed_to_a_public_repository(hub, exported):
    """The hub ignores the wish for privacy at a repository that exists: the model would be public in silence."""
    hub.exists = True
    with pytest.raises(UserError, match="which is public"):
        push_folder(exported, hub.repo_id, private=True, console=QUIET)
    assert hub.lfs == {}
    assert hub.commits == []
    hub.private = True
    push_folder(exported, hub.repo_id, private=True, console=QUIET)
    assert hub.files == contents(exported)


@pytest.mark.parametrize("name", ["no-user", "a/b/c", "me/sp ace", "me/two--dashes", ""])
def test_a_bad_name_is_refused_before_any_work(hub, run, name):
    """After an hour of ONNX is too late to hear of it."""
    ended = gist("export", run, "--push-to-hub", name)
    assert ended.code == 2
    assert "--push-to-hub" in ended.err
    assert "fix" in ended.err
    assert hub.requests == []
    assert not (run / "export").exists()


def test_private_alone_is_refused(run):
    """Somebody who writes --private and no repository has forgotten something."""
    ended = gist("export", run, "--private")
    assert ended.code == 2
    assert "--push-to-hub" in ended.err
    assert not (run / "export").exists()


@pytest.mark.parametrize(
    ("token", "role", "said"),
    [
        (None, "write", "log in with"),
        ("hf_SomebodyElsesOldToken", "write", "does not know"),
        (TOKEN, "read", "only read"),
        (f"{TOKEN}\u00e9", "write", "ASCII"),
        (f"{TOKEN}\x01", "write", "ASCII"),
    ],
    ids=["none", "unknown", "read-only", "not ASCII", "control character"],
)
def test_a_token_that_will_not_do_is_refused_before_any_work(hub, run, monkeypatch, token, role, said):
    """Told before the export, without the token: the HTTP library's own error has it in its text."""
    hub.role = role
    monkeypatch.delenv("HF_TOKEN") if token is None else monkeypatch.setenv("HF_TOKEN", token)
    ended = gist("export", run, "--push-to-hub", hub.repo_id)
    assert ended.code == 2
    assert said in ended.err
    assert (token or TOKEN) not in ended.err + ended.out
    assert TOKEN not in ended.err + ended.out
    assert not (run / "export").exists()
    assert not hub.exists


@pytest.mark.parametrize(
    ("failing", "code", "said"),
    [
        ({"/api/repos/create": 403, "/api/models": 403}, 2, "write permission"),
        ({"/api/repos/create": 404}, 2, "not there"),
        ({"/preupload/": 500}, 1, "HTTP 500"),
        ({"/lfs/": 503}, 1, "HTTP 503"),
        ({"/commit/": 500}, 1, "HTTP 500"),
        ({"/commit/": 403}, 2, "write permission"),
    ],
    ids=["create 403", "create 404", "preupload 500", "large file 503", "commit 500", "commit 403"],
)
def test_what_the_hub_refuses_is_told_in_words(hub, run, failing, code, said):
    """One message without traceback and without the token that the server sent back; the export stays for another try."""
    hub.failing = failing
    ended = gist("export", run, "--push-to-hub", hub.repo_id)
    assert ended.code == code
    assert said in ended.err
    assert str(run / "export") in ended.err
    assert TOKEN not in ended.err + ended.out
    assert "Traceback" not in ended.err
    assert ended.out.strip() == str(run / "export")
    assert (run / "export" / "modules.json").exists()
    assert hub.commits == []


@pytest.mark.parametrize("status", [None, 500])
def test_a_hub_that_is_not_there(hub, run, monkeypatch, status):
    """Nobody listens, or only an error page: a failure (1) and no fault of the user's (2), told before any work."""
    if status is None:
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    else:
        hub.failing = {"whoami": status}
    ended = gist("export", run, "--push-to-hub", hub.repo_id)
    assert ended.code == 1
    assert constants.ENDPOINT in ended.err
    assert len(ended.err.strip().splitlines()) == 2  # the first says what began
    assert TOKEN not in ended.err
    assert not (run / "export").exists()


def test_offline_is_told(hub, run, monkeypatch):
    """HF_HUB_OFFLINE in a shell's profile is easily forgotten."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    ended = gist("export", run, "--push-to-hub", hub.repo_id)
    assert ended.code == 2
    assert "HF_HUB_OFFLINE" in ended.err


def test_the_librarys_default_way_of_uploading(hub, exported, monkeypatch):
    """With hf_xet, which set-up installs, the library uploads in stages of its own: files arrive, errors keep their words.

    A server of the xet protocol is beyond this suite: the stub names all files small ones here.
    """
    pytest.importorskip("hf_xet")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    (exported / "model.safetensors").rename(exported / "model.json")
    assert push_folder(exported, hub.repo_id, private=None, console=QUIET).endswith("/commit/" + "1" * 40)
    assert hub.files == contents(exported)
    hub.files["onnx/model.onnx"] = b"old"
    push_folder(exported, hub.repo_id, private=None, console=QUIET)
    assert hub.files == contents(exported)
    hub.failing = {"/commit/": 403}
    with pytest.raises(UserError, match="write permission") as told:
        push_folder(exported, hub.repo_id, private=None, console=QUIET)
    assert TOKEN not in str(told.value)


def test_a_dry_run_sends_nothing(hub, run):
    """People look first what will be seen by everybody: names, sizes, what goes; and a bad token is told before any work."""
    ended = gist("export", run, "--push-to-hub", hub.repo_id, "--dry-run")
    assert ended.code == 0, ended.err
    files = contents(run / "export")
    assert f"would push to a new repository, {hub.repo_id}: {len(files)} files" in ended.err
    for name, content in files.items():
        assert f"{len(content):,} bytes  {name}" in ended.err
    assert (hub.files, hub.commits) == ({}, [])
    assert gist("export", run, "--push-to-hub", hub.repo_id, "--private").code == 0
    again = gist("export", run, "--push-to-hub", hub.repo_id, "--dry-run")
    assert f"would push to the private repository {hub.repo_id}" in again.err
    assert len(hub.commits) == 1
    alone = gist("export", run, "--dry-run")
    assert (alone.code, "--push-to-hub" in alone.err) == (2, True)


def test_a_dry_run_names_what_would_go(hub, exported):
    """Weights of an earlier export are deleted: who keeps them there should read it before."""
    hub.files, hub.exists = {"modules.json": b"[]", "pytorch_model.bin": b"old", "notes.txt": b"mine"}, True
    planned = planned_push(exported, hub.repo_id, private=None)
    assert planned.deletes == ["pytorch_model.bin"]
    assert "would delete            pytorch_model.bin" in str(planned)
    with pytest.raises(UserError, match="which is public"):
        planned_push(exported, hub.repo_id, private=True)
