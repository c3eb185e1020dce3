"""Training on a GPU against training on the CPU, and that its steps wait for nothing."""

import os
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from unittest import mock

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from support.families import FAMILIES, texts_of, transformer_of
from support.running import QUIET, gist, losses, metrics, training_of

from gist_train.config.loading import load_config
from gist_train.memory import MemoryShortageError, naming_work
from gist_train.model.device import this_device
from gist_train.model.encoder import Encoder, pack
from gist_train.preparation import prepare_corpus
from gist_train.run_folder import Run
from gist_train.training.embedding import prepare_guide
from gist_train.training.loop import steps

DEVICE = torch.device("cuda")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]

STEPS = 4
LIMIT = 60
"""Tokens: a batch of 8 rows has some 300."""


@pytest.fixture(autouse=True)
def fresh():
    """Accelerate keeps the first device that it was asked for."""
    AcceleratorState._reset_state(reset_partial_state=True)
    torch._dynamo.reset()
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def config_of(write_config, make_model):
    """Writes a run without dropout unless asked for; heads of 16, as our own kernel of attention takes them, and flash too."""

    def write(precision, *, family="bert", dropout=0.0, loss=None, guide="store", data=None, **training):
        return write_config(
            model={"name": str(make_model(family, width=64, dropout=dropout))},
            training={"batch_size": 8, "max_steps": 12, "precision": precision, **training},
            optimizer={"lr": 1e-3, "eps": 1e-3},
            loss={"temperature": 0.05, **(loss or {})},
            **({} if guide == "store" else {"guide": guide}),
            **({} if data is None else {"data": data}),
        )

    return write


def on_the_cpu():
    AcceleratorState._reset_state(reset_partial_state=True)
    return mock.patch.dict(os.environ, {"ACCELERATE_USE_CPU": "true"})


def trained(path, limit=None):
    """Losses, norms and last weights of some steps."""
    AcceleratorState._reset_state(reset_partial_state=True)
    training, student, _ = training_of(load_config(path))
    records = list(steps(replace(training, max_tokens_per_forward=limit), 0, STEPS))
    return {
        "device": training.accelerator.device.type,
        "loss": losses(records, training.corpus),
        "grad_norm": [record.grad_norm for record in records],
        "masked": [list(record.masked.values()) for record in records],
        "scale": [record.loss_scale for record in records],
        "weights": {name: p.detach().cpu() for name, p in student.encoder.named_parameters()},
    }


@pytest.mark.parametrize(("block_size", "limit"), [(None, None), (5, LIMIT)])
@pytest.mark.parametrize("family", ["bert", "mpnet", "qwen3", "deberta-v2"])
def test_a_run_on_cuda_is_the_cpus(config_of, family, block_size, limit):
    """Another kernel for everything, and batches that are handed over by another thread: the numbers are the same."""
    path = config_of("float32", family=family, loss={"block_size": block_size})
    found = trained(path, limit)
    with on_the_cpu():
        expected = trained(path, limit)
    for key in ("loss", "grad_norm"):
        assert found[key] == pytest.approx(expected[key], rel=1e-3), key
    assert np.abs(np.subtract(found["masked"], expected["masked"])).max() < 0.02
    for name, weight in expected["weights"].items():
        assert (found["weights"][name] - weight).abs().max() < 1e-4, name
    assert (found["device"], expected["device"]) == (DEVICE.type, "cpu")


@pytest.mark.parametrize("limit", [None, LIMIT])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_run_in_half_precision_follows_the_cpus_in_float32(config_of, precision, limit):
    """A loss scale that is not divided out, or flash attention that sees a neighbour's tokens, is far outside of rounding."""
    path = config_of(precision)
    found = trained(path, limit)
    with on_the_cpu():
        expected = trained(config_of("float32"), limit)
    assert found["loss"] == pytest.approx(expected["loss"], rel=0.03)
    assert found["loss"] != expected["loss"]
    assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=0.1)
    assert set(found["scale"]) == ({2.0**16} if precision == "fp16" else {None})


@pytest.mark.parametrize("limit", [None, LIMIT])
def test_a_compiled_run_is_the_plain_one(config_of, limit):
    """What inductor makes of the step: at once, and by chunks, twice each."""
    plain, compiled = trained(config_of("bf16"), limit), trained(config_of("bf16", compile=True), limit)
    assert compiled["loss"] == pytest.approx(plain["loss"], rel=0.02)
    assert compiled["grad_norm"] == pytest.approx(plain["grad_norm"], rel=0.1)
    assert compiled["loss"] != plain["loss"]


@pytest.mark.parametrize("compiled", [False, True])
def test_a_run_by_graphs_is_the_same_work_without(write_rows, triplets, config_of, monkeypatch, compiled):
    """With dropout: a graph that keeps the seed, the rate or the batch that it was recorded with trains on, only worse."""
    rows = [{**row, "positive": row["positive"][:1], "negative": [other["anchor"]]} for row, other in pairwise(triplets)]
    data = {"train": [{"source": "jsonl", "path": str(write_rows("with-negative.jsonl", rows))}]}

    def run():
        AcceleratorState._reset_state(reset_partial_state=True)
        path = config_of("bf16", dropout=0.1, cuda_graph=True, compile=compiled, data=data)
        training, student, _ = training_of(load_config(path))
        records = list(steps(training, 0, 12))
        weights = {name: p.detach().cpu() for name, p in student.encoder.named_parameters()}
        return losses(records, training.corpus), [record.grad_norm for record in records], weights

    replayed = mock.Mock(side_effect=torch.cuda.CUDAGraph.replay, autospec=True)
    with mock.patch.object(torch.cuda.CUDAGraph, "replay", lambda graph: replayed(graph)):
        found = run()
    assert replayed.call_count >= 3
    monkeypatch.setattr("gist_train.training.graphs.CudaRecorder", lambda: lambda work: work)
    torch._dynamo.reset()
    expected = run()
    assert found[0] == pytest.approx(expected[0], rel=5e-3)
    assert found[1] == pytest.approx(expected[1], rel=5e-2)
    for name, weight in expected[2].items():
        assert (found[2][name] - weight).abs().max() < 2e-3, name


@pytest.mark.parametrize("family", FAMILIES)
def test_dropout_does_not_ask_who_wants_a_gradient(family):
    """Gradient caching's first pass wants none. torch chooses a kernel of attention by that too, each with its own draws."""
    device = this_device()
    encoder = Encoder(transformer_of(family, dropout=0.25, hidden_size=32).to(device), pooling="mean", normalized=True).train()
    texts, vectors = pack(texts_of((3, 7, 7, 12, 30))).to(device), []
    for wanted in (False, True):
        torch.manual_seed(0)
        with torch.set_grad_enabled(wanted), torch.autocast("cuda", torch.bfloat16):
            vectors.append(encoder(texts).detach())
    torch.manual_seed(1)
    with torch.autocast("cuda", torch.bfloat16):
        others = encoder(texts)
    torch.testing.assert_close(*vectors, rtol=0.01, atol=0.01)
    assert (others - vectors[0]).abs().max() > 0.05  # there was dropout


CASES = {
    "float32": ("float32", None, {}),
    "bf16, flash attention": ("bf16", None, {}),
    "fp16 and a loss scale": ("fp16", None, {}),
    "blocks": ("bf16", None, {"loss": {"block_size": 5}}),
    "dimensions and hard negatives in blocks": (
        "bf16",
        None,
        {"loss": {"block_size": 5, "dimensions": [32, 8], "negatives": "hard"}},
    ),
    "chunks": ("bf16", LIMIT, {}),
    "the student's own guide": ("bf16", None, {"guide": "self"}),
    "no guide": ("bf16", None, {"guide": None}),
    "MPNet": ("bf16", None, {"family": "mpnet"}),
    "RoBERTa": ("bf16", None, {"family": "roberta"}),
    "a decoder": ("bf16", None, {"family": "qwen3"}),
    "compiled": ("bf16", None, {"compile": True}),
    "compiled, chunks": ("bf16", LIMIT, {"compile": True}),
    "a graph": ("bf16", None, {"cuda_graph": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_steps_wait_for_nothing(config_of, case):
    """One value that is asked for, or one copy from memory that is not page-locked, and the GPU idles while Python catches up."""
    precision, limit, options = CASES[case]
    training, _, _ = training_of(load_config(config_of(precision, dropout=0.1, **options)))
    running = steps(replace(training, max_tokens_per_forward=limit), 0, 9)
    records = [next(running) for _ in range(3)]  # the first ones set up what the others find
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        records += [next(running) for _ in range(5)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert np.isfinite(losses([*records, *running], training.corpus)).all()


def test_the_check_above_finds_what_waits():
    """It proves nothing where a wait goes unseen."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchronizing"):
            torch.ones(1, device=DEVICE).item()
        with pytest.raises(RuntimeError, match="synchronizing"):
            torch.ones(1, device=DEVICE).new_tensor([1.0, 2.0])
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    "training", [{"precision": "float32"}, {"precision": "fp16"}, {"precision": "bf16", "compile": True, "cuda_graph": True}]
)
def test_a_run_goes_on_from_its_checkpoint(write_config, tmp_path, training):
    """The copy, made while the next step runs, must be of this one; and seeds alone decide dropout after a resume too."""
    sections = {"training": {"batch_size": 8, "max_steps": 8, **training}, "cache_dir": str(tmp_path / "cache")}
    assert gist("train", write_config("whole", **sections)).code == 0
    path = write_config("cut", **sections)
    assert gist("train", path, "--set", "training.stop_at_step=4").code == 0
    assert "resuming from step 4" in gist("train", path).err
    whole, cut = (metrics(tmp_path / "runs" / name) for name in ("whole", "cut"))
    assert Run(tmp_path / "runs" / "cut").saved_steps() == Run(tmp_path / "runs" / "whole").saved_steps()
    # Flash attention adds up its gradients in no fixed order.
    assert [row["loss"] for row in cut] == pytest.approx([row["loss"] for row in whole], rel=2e-2)


def test_the_guides_pass_is_the_cpus(config_of, tmp_path):
    """Batches are computed while others are fetched: a store of embeddings that had not arrived is wrong for good."""

    def embeddings(name):
        AcceleratorState._reset_state(reset_partial_state=True)
        config = load_config(config_of("float32"), [f"cache_dir={tmp_path / name}"])
        device = this_device()
        corpus = prepare_corpus(config, device, QUIET)
        return prepare_guide(config, corpus, device, QUIET).anchor.embeddings(np.arange(corpus.text_count, dtype=np.int32))

    found = embeddings("there")
    with on_the_cpu():
        expected = embeddings("here")
    assert len(found) > 100
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_float32_is_multiplied_whole():
    """What torch's settings say is one thing, what the GPU does another."""
    torch.set_float32_matmul_precision("high")
    this_device()
    torch.manual_seed(0)
    x, y = (torch.randn(512, 512, device=DEVICE) for _ in range(2))
    exact = x.double() @ y.double()
    assert ((x @ y).double() - exact).abs().max() < 1e-5 * exact.abs().max()


def test_segments_expand():
    """Torch says nothing where it can't have them, or was told too late."""
    code = (
        "from gist_train import cli; cli.app = lambda **_: None; cli.main(); import torch; x = torch.zeros(9, device='cuda');"
        "print(all(segment['is_expandable'] for segment in torch.cuda.memory_snapshot()))"
    )
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    ended = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert ended.stdout.splitlines()[-1:] == ["True"], ended.stderr


def test_the_gpus_memory_that_runs_out_is_told():
    """What torch raises there has a class and words of its own."""
    with pytest.raises(MemoryShortageError, match=r"asked for .+ GiB, on the GPU\n"), naming_work(lambda: ("the work", [])):
        torch.empty(1 << 45, device="cuda")
