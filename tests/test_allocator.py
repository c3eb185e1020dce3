"""How torch is told to hold memory, a GPU's and the host's: before it is imported, and only where the user says nothing."""

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
            print("kernels:", os.environ.get("ONEDNN_PRIMITIVE_CACHE_CAPACITY"))

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
    assert told == ["at the import: expandable_segments:True", "in torch: expandable_segments:True", "kernels: 32"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("nothing_set")
def test_the_users_own_word_stays(monkeypatch, name):
    """Torch reads these names in an order of its own: a second one beside the user's would win over it, or lose."""
    monkeypatch.setenv(name, "max_split_size_mb:128")
    monkeypatch.setattr(cli, "app", lambda **_: None)
    cli.main()
    assert {other: cli.os.environ.get(other) for other in NAMES} == {**dict.fromkeys(NAMES), name: "max_split_size_mb:128"}


@pytest.mark.parametrize("name", ["ONEDNN_PRIMITIVE_CACHE_CAPACITY", "DNNL_PRIMITIVE_CACHE_CAPACITY"])
def test_the_users_own_number_of_kernels_stays(monkeypatch, name):
    for other in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "DNNL_PRIMITIVE_CACHE_CAPACITY"):
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, "7")
    monkeypatch.setattr(cli, "app", lambda **_: None)
    cli.main()
    kept = {other: cli.os.environ.get(other) for other in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "DNNL_PRIMITIVE_CACHE_CAPACITY")}
    assert {key: value for key, value in kept.items() if value is not None} == {name: "7"}


GROWTH = """
import os, random, resource, sys
os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] = sys.argv[1]
import torch
torch.set_num_threads(1)
draws = random.Random(0)
for _ in range(150):
    tokens = draws.randint(500, 1500)
    kept = [torch.nn.functional.gelu(torch.zeros(tokens + n, 1024)) for n in range(6)]
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's heap is meant")
def test_kernels_of_ever_new_sizes_make_a_process_grow():
    """What the number is for: with oneDNN's own, 1,024, this peaks at twice as much. If not, `_keep_few_primitives` may go."""
    few, many = (
        int(subprocess.run([sys.executable, "-c", GROWTH, kept], capture_output=True, text=True, check=True).stdout)
        for kept in ("32", "1024")
    )
    assert few < 0.75 * many
