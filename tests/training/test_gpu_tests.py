"""The tests of a GPU on a machine without one: what they call is there, and the check of a GPU runs them all."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu.tests import PLACES

TESTS = Path(__file__).parents[1]
NO_LONGER_THERE = ("AttributeError", "ImportError", "ModuleNotFoundError", "NameError", "TypeError")
"""What a test raises that calls what has another name or other arguments now."""


def files() -> list[Path]:
    """All test files with a test for a GPU, but for the kernels', which Triton has to run."""
    marked = [path for path in sorted(TESTS.rglob("test_*.py")) if "pytest.mark.gpu" in path.read_text(encoding="utf-8")]
    return [path for path in marked if path.name not in ("test_kernels.py", Path(__file__).name)]


def test_the_check_of_a_gpu_runs_them_all():
    """A new one beside the folders that the check names would never run."""
    folders = {path.parent.relative_to(TESTS.parent).as_posix() for path in files()}
    assert folders == set(PLACES)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="they run as they are where there is a GPU")
def test_what_they_call_is_there(tmp_path):
    """A GPU is lent for minutes: they would go by for a name that was changed weeks before."""
    command = [sys.executable, "-m", "pytest", "-p", "support.gpu_on_cpu", "-m", "gpu", "--override-ini=addopts=", "--tb=short"]
    command += ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", f"--basetemp={tmp_path / 'base'}", *map(str, files())]
    environment = {**os.environ, "PYTHONPATH": str(TESTS)}
    ended = subprocess.run(command, cwd=TESTS.parent, env=environment, capture_output=True, text=True, timeout=900)
    passed = re.search(r"(\d+) passed", ended.stdout)
    assert passed, ended.stdout[-2000:] + ended.stderr[-2000:]
    # Half of them need nothing of a GPU but that something can be put there.
    assert int(passed[1]) > 50
    raised = [line for line in ended.stdout.splitlines() if re.match(rf"E +({'|'.join(NO_LONGER_THERE)})\b", line)]
    assert not raised, "\n".join(raised)
