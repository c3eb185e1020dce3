"""Float32 means float32, whatever was set before: TF32 rounds a similarity by a tenth of a logit, and no figure says so."""

import pytest
import torch
from support.running import gist

from gist_train.model.device import this_device
from gist_train.training.distributed import make_accelerator

pytestmark = pytest.mark.usefixtures("on_cpu")


def of_matmul() -> str:
    return torch.backends.cuda.matmul.fp32_precision


@pytest.fixture(autouse=True)
def put_back():
    """What the process had may not be read where both of torch's settings were used: it began whole."""
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("lowered", ["new", "old", "oldest"])
def test_tf32_is_turned_off_and_told(lowered):
    """Torch has three names for it: the environment's variable sets the last of them."""
    if lowered == "new":
        torch.backends.cuda.matmul.fp32_precision = "tf32"
    elif lowered == "old":
        torch.set_float32_matmul_precision("high")
    else:
        torch.backends.cuda.matmul.allow_tf32 = True
    assert of_matmul() == "tf32"
    _, note = make_accelerator("float32")
    assert of_matmul() == "ieee"
    assert torch.get_float32_matmul_precision() == "highest"
    assert note is not None
    assert "TF32 is off" in note
    assert make_accelerator("float32")[1] is None


def test_the_guide_and_the_judges_too():
    """`prepare` and `evaluate` make no accelerator: a store of the guide's would differ from machine to machine."""
    torch.set_float32_matmul_precision("medium")
    this_device()
    assert of_matmul() == "ieee"
    assert torch.backends.cudnn.allow_tf32 in (True, False)  # torch.export reads it, and fails where cuDNN's settings differ


@pytest.mark.parametrize("opened", [this_device, lambda: make_accelerator("float32")], ids=["device", "accelerator"])
def test_attention_of_one_kind(opened):
    """Under gradient caching a kernel that one of the two passes alone takes draws another dropout than the other's."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    opened()
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_both_notes(write_config, monkeypatch):
    """One that takes the other's place leaves a run in another precision than its launcher was told, without a word."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    torch.set_float32_matmul_precision("high")
    err = gist("train", write_config(training={"batch_size": 8, "max_steps": 1, "precision": "float32"})).err
    assert "no is used, not accelerate's bf16" in err
    assert "TF32 is off" in err
