"""Training with `compile: true` against training without. It needs CUDA: here its graphs run on a CPU, traced and not fused."""

from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from support.flash import flash_stand_in
from support.running import gist, in_processes, training_of
from torch.nn.functional import dropout as torch_dropout

from gist_train.config.errors import UserError
from gist_train.config.loading import load_config
from gist_train.config.training import TrainingConfig
from gist_train.model.attention import WIDEST_HEAD
from gist_train.model.compiled import CompiledEncoder
from gist_train.training.loop import steps
from gist_train.training.setup import check_graphs

pytestmark = pytest.mark.usefixtures("on_cpu")

STEPS = 3
LIMIT = 60
"""Tokens: a batch of 8 rows has some 300, so that there are five to six chunks a step."""


@pytest.fixture
def config_of(write_config, make_model):
    """Writes a run of three steps without clipping, compiled or not."""

    def write(compiled, *, family="bert", dropout=0.0):
        options = {"batch_size": 8, "max_steps": STEPS, "precision": "float32", "grad_clip": None, "compile": compiled}
        return write_config(
            model={"name": str(make_model(family, layers=1, dropout=dropout))},
            training=options,
            optimizer={"lr": 1e-3, "eps": 1e-3},
            schedule={"type": "constant", "warmup_ratio": 0.0},
            loss={"temperature": 0.05},
        )

    return write


def trained(path, limit=None, *, bucket_bytes=None):
    """Losses, norms and last weights of a run whose graphs, if it has any, run on the CPU; and how many parts they came in.

    Args:
        limit: tokens per forward.
        bucket_bytes: how many of its gradients DistributedDataParallel reduces at a time.
    """
    parts = []

    def counting(graph, inputs):
        parts.append(sum(node.op == "call_function" for node in graph.graph.nodes))
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    torch._dynamo.reset()
    with ExitStack() as stack:
        for name, stand_in in {
            "gist_train.model.attention._flash": flash_stand_in,
            "gist_train.model.dropout.dropout": torch_dropout,
            "gist_train.checks.check_graphs": lambda *_: None,
            "gist_train.training.setup.CompiledEncoder": partial(CompiledEncoder, backend=counting),
        }.items():
            stack.enter_context(mock.patch(name, stand_in))
        if bucket_bytes is not None:
            stack.enter_context(mock.patch.object(dist, "_DEFAULT_FIRST_BUCKET_BYTES", bucket_bytes))
        training, student, _ = training_of(load_config(path))
        if bucket_bytes is not None:
            training.model.bucket_bytes_cap = bucket_bytes
        records = list(steps(replace(training, max_tokens_per_forward=limit), 0, STEPS))
    return {
        "loss": [record.loss for record in records],
        "grad_norm": [record.grad_norm for record in records],
        "weights": {name: p.detach().numpy().copy() for name, p in student.encoder.transformer.named_parameters()},
        "parts": parts,
    }


def assert_same_training(found, expected):
    for key in ("loss", "grad_norm"):
        assert found[key] == pytest.approx(expected[key], rel=1e-4), key
    for name, values in expected["weights"].items():
        assert abs(found["weights"][name] - values).max() <= 1e-5, name


def test_it_trains_the_same(config_of):
    """Chunk by chunk, twice each, of all sizes: one graph for all of them. Several processes take theirs at once, below."""
    expected = trained(config_of(False), LIMIT)
    found = trained(config_of(True), LIMIT)
    assert_same_training(found, expected)
    assert (len(expected["parts"]), len(found["parts"])) == (0, 1)


@pytest.mark.slow
def test_dropout_is_the_same_in_both_forwards(config_of):
    """The gradient of one draw, handed on through another: it points nearly the right way, and no loss ever shows it."""
    path = config_of(True, dropout=0.3)
    with mock.patch("gist_train.training.loop.encode", encode_keeping_graphs), mock.patch("gist_train.training.loop.hand_on"):
        expected = trained(path, LIMIT)
    assert_same_training(trained(path, LIMIT), expected)
    assert expected["loss"] != pytest.approx(trained(config_of(False), LIMIT)["loss"], rel=1e-3)  # there was dropout


def encode_keeping_graphs(model, texts, seeds):
    """The slow twin of gradient caching: each chunk is encoded once, and all their graphs are kept."""
    parts = []
    for chunk, seed in zip(texts.chunks, seeds, strict=True):
        torch.manual_seed(seed)
        parts.append(model(chunk))
    return torch.cat(parts)[torch.cat(texts.which).argsort()]


@pytest.mark.slow
def test_several_processes(config_of):
    """DistributedDataParallel has the graph cut where its buckets of gradients end, so that one is reduced while the next is
    computed: parts that are handed sizes as symbols, in the forward pass and back."""
    expected = trained(config_of(False))
    path = config_of(True)
    for _, found in in_processes(2, partial(trained, bucket_bytes=8_000), path):
        assert_same_training(found, expected)
        assert len(found["parts"]) > 2


@pytest.mark.parametrize("command", [["train"], ["plan", "--measure"]])
def test_it_is_refused_on_a_cpu(config_of, command):
    """There is nothing that it would gain there. A plan for another machine may be made."""
    path = config_of(True)
    ended = gist(*command, path)
    assert ended.code == 2
    assert "training.compile\n  found     true, on cpu in float32, with attention heads of 8 dimensions\n" in ended.err
    assert gist("plan", path).code == 0


@pytest.mark.parametrize("family", ["mpnet", "deberta-v2"])
def test_it_is_refused_for_families_without_flash_attention(config_of, family):
    """Their attention needs more than borders: compiled, it would be another's."""
    ended = gist("train", config_of(True, family=family))
    assert ended.code == 2
    assert f"training.compile\n  found     true, and a model of the family {family}\n" in ended.err


def test_it_is_refused_with_gradient_checkpointing(write_config):
    """Two answers to what is computed again: neither would be followed wholly."""
    ended = gist("plan", write_config(training={"max_steps": 2, "compile": True, "gradient_checkpointing": True}))
    assert ended.code == 2
    assert "training.compile" in ended.err
    assert "gradient_checkpointing to false" in ended.err


def test_a_run_keeps_to_it(config_of):
    """Other draws of dropout, and other rounding: as with precision, a run that changes in the middle is nobody's twin."""
    path = config_of(False)
    assert gist("train", path, "--set", "training.stop_at_step=1").code == 0
    ended = gist("train", path, "--set", "training.compile=true")
    assert ended.code == 2
    assert "training.compile\n  found     true\n  expected  false, as in" in ended.err


@pytest.mark.parametrize("switch", ["compile", "cuda_graph"])
def test_the_widest_head_that_is_told_is_the_widest_that_runs(monkeypatch, switch):
    """A user whose heads are as wide as the message allows, and who is refused with that very message, can only give up."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    config = TrainingConfig(**{switch: True})
    here = torch.device("cuda"), "bf16", 1

    def student(width):
        transformer = SimpleNamespace(config=SimpleNamespace(model_type="bert"))
        return SimpleNamespace(encoder=SimpleNamespace(compiles=True, head_width=width, transformer=transformer))

    check_graphs(config, student(WIDEST_HEAD), *here)
    with pytest.raises(UserError, match=f"training.{switch}(.|\n)*heads of {WIDEST_HEAD + 8} (.|\n)*up to {WIDEST_HEAD}\n"):
        check_graphs(config, student(WIDEST_HEAD + 8), *here)


def test_a_graph_is_for_one_process(monkeypatch):
    """What ranks send each other is no part of a graph: two would train two models."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    here = torch.device("cuda"), "bf16", 2
    transformer = SimpleNamespace(config=SimpleNamespace(model_type="bert"))
    student = SimpleNamespace(encoder=SimpleNamespace(compiles=True, head_width=64, transformer=transformer))
    check_graphs(TrainingConfig(compile=True), student, *here)
    with pytest.raises(UserError, match=r"training.cuda_graph(.|\n)*2 processes"):
        check_graphs(TrainingConfig(cuda_graph=True), student, *here)
