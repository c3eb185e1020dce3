"""scripts/their_loss_tests.py puts our loss where tests take theirs. Their tests need a checkout, which is not here."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT

TEST = """
import pytest
import torch
from sentence_transformers.sentence_transformer.losses import {loss}

@pytest.fixture
def simulate_rank1_world2():
    pass

def test_the_loss_is_ours(simulate_rank1_world2):
    assert {loss}.__module__.split(".")[0] != "sentence_transformers"
    torch.manual_seed(0)  # of four rows, a draw may leave no candidate, and a loss of 0
    vectors = [{{"sentence_embedding": torch.nn.functional.normalize(torch.randn(4, 8), dim=1)}} for _ in range(2)]
    loss = _make_loss(0.1)(vectors, None)
    assert loss.isfinite() and loss > 0
"""


@pytest.mark.slow
def test_ours_stand_in_the_place_of_theirs(tmp_path):
    """Its fixture, what it makes and what it reaches for in our modules: a name that has gone would show here first."""
    folder = tmp_path / "tests" / "sentence_transformer" / "losses"
    folder.mkdir(parents=True)
    for name, loss in (("test_gist_embed.py", "GISTEmbedLoss"), ("test_cached_gist_embed.py", "CachedGISTEmbedLoss")):
        (folder / name).write_text(TEST.format(loss=loss))
    command = [sys.executable, str(ROOT / "scripts" / "their_loss_tests.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed" in done.stdout
