"""A training that teaches nothing: refused where the config makes it certain, said where the data do."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.running import gist, metrics

from gist_train.config.errors import UserError
from gist_train.config.loading import load_config
from gist_train.model.loss import BLOCKS
from gist_train.training.teaching import ZEROS_IN_A_ROW, Teaching

pytestmark = pytest.mark.usefixtures("on_cpu")
SHORT = {"batch_size": 8, "max_steps": 4, "precision": "float32"}


def said(ended, what):
    return [line for line in ended.err.splitlines() if what in line]


@pytest.mark.parametrize("guide", [True, False])
def test_rows_that_are_all_equal_are_told(write_config, write_rows, tmp_path, guide):
    """Exit code 0, "done" and an export with a card, of a model that no step had touched."""
    source = {"source": "jsonl", "path": str(write_rows("equal.jsonl", [{"anchor": "a", "positive": "p"}] * 80))}
    sections = {} if guide else {"guide": None}
    ended = gist("train", write_config(data={"train": [source]}, training=SHORT, **sections))
    assert ended.code == 0
    assert {row["loss"] for row in metrics(tmp_path / "runs" / "run")} == {0.0}
    (line,) = said(ended, "warning: ")
    assert line.startswith("warning: step 1: no candidate is left in the batch")
    assert ("the guide takes them for positives" in line) == guide
    assert said(ended, "these taught little or nothing: in 4 of 4 steps no candidate was left")


def test_a_training_that_teaches_is_silent(write_config):
    """A warning at every training is none."""
    ended = gist("train", write_config(training=SHORT))
    assert not said(ended, "warning") + said(ended, "taught little")


def test_a_guide_that_masks_nearly_all_is_told(write_config):
    """A margin of another guide's scale leaves a candidate in twenty, and the loss falls nicely."""
    ended = gist("train", write_config(training=SHORT, loss={"margin": 1.2}))
    (line, *others) = said(ended, "warning: ")
    assert "the guide takes them for positives (loss.margin: 1.2)" in line
    assert len(others) <= 1  # nearly all at one step, all at another
    assert said(ended, "these taught little or nothing")


def test_each_kind_is_said_once_and_all_are_counted(write_config):
    """A line a step would bury the losses."""
    teaching = Teaching(load_config(write_config()))

    def step(number, loss, masked, candidates):
        of_blocks = {f"masked_{block}": masked / len(BLOCKS) for block in BLOCKS}
        teaching.add(number, {"loss": loss, **of_blocks, **{f"candidates_{block}": candidates / len(BLOCKS) for block in BLOCKS}})

    step(1, 0.5, 94, 100)
    assert (teaching.notes(), teaching.summary()) == ([], None)
    step(2, 0.1, 96, 100)
    assert "96.0% of 100 candidates are masked" in teaching.notes()[0]
    for number in range(3, 3 + ZEROS_IN_A_ROW):
        step(number, 0.0, 100 if number % 2 else 0, 100 if number % 2 else 0)
    notes = teaching.notes()
    assert len(notes) == 2
    assert f"step {2 + ZEROS_IN_A_ROW}: the loss was exactly 0 for {ZEROS_IN_A_ROW} steps" in notes[1]
    assert teaching.notes() == []
    assert teaching.summary() == (
        f"these taught little or nothing: in {ZEROS_IN_A_ROW} of {2 + ZEROS_IN_A_ROW} steps no candidate was left; "
        f"in 1 of {2 + ZEROS_IN_A_ROW} steps over 95% of the candidates were masked"
    )


@pytest.mark.parametrize("margin", [1e30, 2.5, -3.0])
def test_a_margin_that_no_similarity_can_pass_is_refused(write_config, margin):
    """It is certain before anything is read; a relative one may be any number."""
    with pytest.raises(UserError, match=r"loss\.margin(.|\n)*from -2 to 2"):
        load_config(write_config(loss={"margin": margin}))
    load_config(write_config(loss={"margin": margin, "margin_strategy": "relative"}))


@pytest.mark.parametrize("command", ["plan", "train"])
def test_batches_of_one_pair_are_refused(write_config, write_rows, command):
    """There is no other row, and the row has no negative."""
    rows = [{"anchor": f"a {n}", "positive": f"p {n}"} for n in range(9)]
    source = {"source": "jsonl", "path": str(write_rows("pairs.jsonl", rows))}
    ended = gist(command, write_config(data={"train": [source]}, training={**SHORT, "batch_size": 1}))
    assert (ended.code, "training.batch_size" in ended.err) == (2, True)
    source["path"] = str(write_rows("triplets.jsonl", [{**row, "negative": "n"} for row in rows]))
    assert gist(command, write_config(data={"train": [source]}, training={**SHORT, "batch_size": 1})).code == 0


@pytest.mark.parametrize("command", ["plan", "train"])
def test_a_student_that_is_not_finite_is_refused_by_tensor(write_config, tmp_path, command):
    """ "Step 1: loss nan; lower the learning rate" sends the user to the wrong place."""
    path = write_config()
    config = load_config(path)
    weights = tmp_path / "broken"
    shutil.copytree(config.model.name, weights)
    tensors = load_file(weights / "model.safetensors")
    name = next(name for name in tensors if name.endswith("attention.self.query.weight"))
    tensors[name][0, :3] = torch.nan
    save_file(tensors, weights / "model.safetensors", metadata={"format": "pt"})
    ended = gist(command, path, "--set", f"model.name={weights}")
    assert ended.code == 2
    assert "attention.self.query.weight with 3 of" in ended.err


def test_a_soft_mask_leaves_something(write_config):
    """Weights below a half count as masked, but teach: that no candidate is left would be untrue."""
    ended = gist("train", write_config(training=SHORT, loss={"mask": "soft", "margin": 1.2, "softness": 0.5}))
    assert not said(ended, "no candidate is left") + said(ended, "no candidate was left")
    assert said(ended, "half of its weight left")
