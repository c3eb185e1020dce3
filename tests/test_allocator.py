"""How torch is told to hold memory, a GPU's and the host's: before it is imported, and only where the user says nothing."""

import os
import subprocess
import sys

import pytest
from support.running import gist

from gist_train import cli, environment

NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
WATCHED = """
import os, sys

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print("at the import:", os.environ.get("PYTORCH_ALLOC_CONF"))

sys.meta_path.insert(0, Watch())
from gist_train import cli, environment
cli.app = lambda **_: None
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


KERNELS = (environment.KERNELS, "DNNL_PRIMITIVE_CACHE_CAPACITY")


@pytest.fixture
def kernels_of(monkeypatch, write_config):
    """What oneDNN would be told by a training: `kernels_of("bf16", DNNL_...="7")`."""

    def told(precision, **environment):
        for name in KERNELS:
            monkeypatch.setenv(name, "")  # so that what is set is undone
            monkeypatch.delenv(name)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        found = []
        monkeypatch.setattr("gist_train.training_run.train_on", lambda *_, **__: found.append(dict(os.environ)) or 0)
        assert gist("train", write_config(training={"batch_size": 8, "max_steps": 2, "precision": precision})).code == 0
        return {name: found[0][name] for name in KERNELS if name in found[0]}

    return told


def test_few_kernels_are_kept(kernels_of):
    """Under bf16 each product of a layer is one; with fewer than these each would be made anew in every layer."""
    assert kernels_of("float32") == {environment.KERNELS: "4"}
    assert kernels_of("bf16") == {environment.KERNELS: "32"}


@pytest.mark.parametrize("name", KERNELS)
def test_the_users_own_number_of_kernels_stays(kernels_of, name):
    assert kernels_of("float32", **{name: "7"}) == {name: "7"}


GROWTH = r"""
import os, random, re, sys
os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] = sys.argv[1]
import torch
torch.set_num_threads(1)
draws = random.Random(0)
for _ in range(300):
    kept = [torch.zeros(draws.randint(500, 1500), 1024)]
    for layer in range(6):
        kept.append(torch.nn.functional.gelu(kept[-1][:-1]))
    del kept
print(int(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1]) // 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's heap is meant")
@pytest.mark.slow
def test_kernels_of_ever_new_sizes_make_a_process_grow():
    """What the number is for: with oneDNN's own, 1,024, this peaks at twice as much. If not, `keep_kernels` may go."""
    few, many = (
        int(subprocess.run([sys.executable, "-c", GROWTH, kept], capture_output=True, text=True, check=True).stdout)
        for kept in ("4", "1024")
    )
    assert few < 0.6 * many
