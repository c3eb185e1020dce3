"""How torch is told to hold a GPU's memory: before it is imported, and only where the user says nothing."""

import subprocess
import sys

import pytest

from gist_train import cli

NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
WATCHED = """
import os, sys

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print("at the import:", os.environ.get("PYTORCH_ALLOC_CONF"))

sys.meta_path.insert(0, Watch())
from gist_train import cli
cli.app = lambda args: None
cli.main()
import torch
print("in torch:", torch._C._accelerator_getAllocatorSettings())
"""


@pytest.fixture
def nothing_set(monkeypatch):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.skipif(sys.platform != "linux", reason="torch can't elsewhere")
@pytest.mark.usefixtures("nothing_set")
def test_segments_expand():
    """Set after torch has read it, it does nothing, and nothing says so."""
    ended = subprocess.run([sys.executable, "-c", WATCHED], capture_output=True, text=True, timeout=120, check=True)
    told = sorted(set(ended.stdout.splitlines()))  # others look for torch before it is imported
    assert told == ["at the import: expandable_segments:True", "in torch: expandable_segments:True"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("nothing_set")
def test_the_users_own_word_stays(monkeypatch, name):
    """Torch reads these names in an order of its own: a second one beside the user's would win over it, or lose."""
    monkeypatch.setenv(name, "max_split_size_mb:128")
    monkeypatch.setattr(cli, "app", lambda **_: None)
    cli.main()
    assert {other: cli.os.environ.get(other) for other in NAMES} == {**dict.fromkeys(NAMES), name: "max_split_size_mb:128"}
