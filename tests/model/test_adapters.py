"""Low-rank adapters: what they compute and learn, and that checkpoints hold them and exports do not.

Legend: N texts, D the width of an embedding.
"""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from support.families import PACKED_FAMILIES, transformer_of
from support.running import gist
from torch import nn

from gist_train.config.errors import UserError
from gist_train.config.loading import load_config
from gist_train.config.models import LoraConfig, ModelConfig
from gist_train.model.adapters import adapted, adapter_weights, add_adapters, merge_adapters
from gist_train.model.encoder import pack
from gist_train.model.loading import load_student
from gist_train.run_folder import Run

peft = pytest.importorskip("peft", reason="peft (extra lora) is not installed")
pytestmark = pytest.mark.usefixtures("on_cpu")

TEXTS = ["what is my balance", "block the card", "how long does a transfer to another country take", "hi"]
DECODER = {"lora": {"rank": 4, "alpha": 8}, "max_length": 48}


def student_of(folder, **lora):
    student = load_student(ModelConfig(name=str(folder), lora=LoraConfig(rank=3, alpha=6, **lora)))
    with torch.no_grad():  # B begins as zeros, under which nothing could go wrong
        random = torch.Generator().manual_seed(1)
        for weight in adapter_weights(student.encoder.transformer).values():
            weight.copy_(0.3 * torch.randn(weight.shape, generator=random))
    return student


def embeddings(student):
    return student.encoder(pack(student.tokens(TEXTS)))


@pytest.mark.parametrize("family", PACKED_FAMILIES)
def test_an_adapted_model_is_the_merged_one(family, make_model):
    """In value and in what the adapters learn: of a matrix W + s B A, A learns s B^T dW and B learns s dW A^T."""
    folder = make_model(family=family, dropout=0.0, layers=2)
    live, whole = student_of(folder), student_of(folder)
    for model in (live, whole):
        model.encoder.double().train()
    merge_adapters(whole.encoder.transformer)
    assert adapted(live.encoder.transformer)
    assert not adapted(whole.encoder.transformer)
    whole.encoder.transformer.requires_grad_(True)
    weight = torch.randn(len(TEXTS), live.width, generator=torch.Generator().manual_seed(2))
    outs = [embeddings(model) for model in (live, whole)]
    torch.testing.assert_close(*outs, rtol=1e-7, atol=1e-7)
    for out in outs:
        (out * weight).sum().backward()
    dense = dict(whole.encoder.transformer.named_parameters())
    adapters = {name: module for name, module in live.encoder.transformer.named_modules() if hasattr(module, "lora_A")}
    assert adapters
    for name, module in adapters.items():
        a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
        slope = dense[f"{name}.weight"].grad
        torch.testing.assert_close(a.grad, 2 * b.T @ slope, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(b.grad, 2 * slope @ a.T, rtol=1e-6, atol=1e-9)
        assert module.get_base_layer().weight.grad is None


def test_at_first_nothing_is_changed_and_all_commands_agree(make_model):
    folder = make_model(family="qwen3", pooling="lasttoken")
    plain, first, second = (load_student(ModelConfig(name=str(folder), lora=lora)) for lora in (None, LoraConfig(), LoraConfig()))
    assert np.array_equal(plain.encode(TEXTS), first.encode(TEXTS))
    assert first.fingerprint() == second.fingerprint()
    trained = [name for name, weight in first.encoder.transformer.named_parameters() if weight.requires_grad]
    assert trained
    assert all(".lora_" in name for name in trained)


def test_targets_are_named_by_their_last_part(make_model):
    folder = make_model(family="llama", layers=2)
    student = student_of(folder, targets=["q_proj", "v_proj"])
    names = {name.split(".")[-3] for name in adapter_weights(student.encoder.transformer)}
    assert names == {"q_proj", "v_proj"}
    with pytest.raises(UserError) as caught:
        student_of(folder, targets=["q_proj", "query"])
    assert "query" in str(caught.value)
    assert "q_proj" in str(caught.value)


def test_a_run_with_adapters(make_model, write_config, write_pairs, tmp_path):
    """Killed or not, the same bits; checkpoints that peft reads; an export without peft."""
    folder = make_model(family="qwen3", pooling="lasttoken", layers=2)
    sections = {
        "model": {"name": str(folder), **DECODER},
        "training": {"batch_size": 8, "max_steps": 6, "precision": "float32"},
        "optimizer": {"lr": 1e-2},
        "checkpoint": {"every": 3, "keep_last": 10},
        "evaluation": {**write_pairs(["a pair", "another", "a third", "and a fourth"]), "every": 3},
    }
    whole, broken = (str(write_config(name, **sections)) for name in ("whole", "broken"))
    assert gist("train", whole).code == 0
    for settings in (["training.stop_at_step=3"], []):
        ended = gist("train", broken, *[word for setting in settings for word in ("--set", setting)])
        assert ended.code == 0, ended.err
    run, other = (Run.of(load_config(path)) for path in (whole, broken))
    for name in ("adapter_model.safetensors", "training_state.safetensors"):
        assert (run.checkpoint(6) / name).read_bytes() == (other.checkpoint(6) / name).read_bytes()
    assert not (run.checkpoint(6) / "model.safetensors").exists()
    evaluated = gist("evaluate", run.folder, "--steps", "3,6")
    assert evaluated.code == 0, evaluated.err
    exported = gist("export", run.folder, "--to", tmp_path / "export")
    assert exported.code == 0, exported.err
    names = load_file(tmp_path / "export" / "model.safetensors").keys()
    assert not any("lora" in name for name in names)
    by_export = SentenceTransformer(str(tmp_path / "export"), device="cpu").encode(TEXTS)
    by_peft = SentenceTransformer(str(run.checkpoint(6)), device="cpu").encode(TEXTS)
    np.testing.assert_allclose(by_export, by_peft, rtol=0, atol=1e-5)
    base = SentenceTransformer(str(folder), device="cpu").encode(TEXTS)
    assert np.abs(by_export - base).max() > 1e-3
    averaged = gist("select", run.folder, "--metric", "pairs/spearman", "--average", "2")
    assert averaged.code == 0, averaged.err
    other_scale = gist("evaluate", whole, "--steps", "3", "--set", "model.lora.alpha=16", "--set", "evaluation.max_length=32")
    assert other_scale.code == 2
    assert "alpha" in other_scale.err
    refuse_another_base(run, folder, whole)
    again = gist("train", whole, "--set", "model.lora.rank=8", "--set", "training.max_steps=7")
    assert again.code == 2
    assert "model.lora.rank" in again.err


def refuse_another_base(run, folder, path):
    """A branch of the hub that moved, or a folder that was written again: the adapters fit other weights by their shapes."""
    weights = folder / "model.safetensors"
    kept = weights.read_bytes()
    changed = load_file(weights)
    save_file({name: 1.01 * weight for name, weight in changed.items()}, weights, metadata={"format": "pt"})
    try:
        for words in (("evaluate", run.folder, "--steps", "3", "--set", "evaluation.max_length=24"), ("export", run.folder)):
            ended = gist(*words)
            assert ended.code == 2, words
            assert "adapters of other weights" in ended.err
        resumed = gist("train", path, "--set", "training.stop_at_step=6")
        assert resumed.code == 2
        assert "another base" in resumed.err
    finally:
        weights.write_bytes(kept)


def test_adapters_and_graphs_are_not_mixed(make_model, write_config):
    path = write_config(model={"name": str(make_model()), "lora": {}})
    for key in ("compile", "cuda_graph"):
        with pytest.raises(UserError, match=f"training\\.{key}"):
            load_config(path, [f"training.{key}=true"])


def test_without_peft_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(UserError, match=r"gist-train\[lora\]"):
        add_adapters(transformer_of("bert"), LoraConfig(rank=3, alpha=6))


def test_a_frozen_weight_is_not_copied(make_model):
    """Of a model of billions a second copy in host memory would be the largest thing there."""
    from gist_train.training.checkpoint_writer import HostCopy
    from gist_train.training.update import UpdateState

    student = student_of(make_model(family="llama", layers=1))
    optimizer = torch.optim.AdamW([p for p in student.encoder.parameters() if p.requires_grad])
    copied = HostCopy(student, optimizer, UpdateState()).student.encoder.transformer
    for name, weight in student.encoder.transformer.named_parameters():
        same = dict(copied.named_parameters())[name].data_ptr() == weight.data_ptr()
        assert same == (not weight.requires_grad), name
        assert isinstance(weight, nn.Parameter)
