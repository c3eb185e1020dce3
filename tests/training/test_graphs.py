"""Steps by graphs against steps without. CUDA records them; here a graph is the plain work, over inputs that stay in place."""

from contextlib import ExitStack
from dataclasses import replace
from itertools import pairwise
from unittest import mock

import pytest
import torch
from support.flash import flash_stand_in
from support.running import gist, losses, training_of
from torch.nn.functional import dropout as torch_dropout

from gist_train.config.loading import load_config
from gist_train.training.gradient_cache import FINEST, filled_tokens
from gist_train.training.inputs import inputs_of
from gist_train.training.loop import steps

pytestmark = pytest.mark.usefixtures("on_cpu")
STEPS = 8


@pytest.fixture
def config_of(write_config, write_rows, make_model, triplets):
    """Writes a run of some steps without dropout, by graphs or not; each row has one negative."""
    rows = [{**row, "positive": row["positive"][:1], "negative": [other["anchor"]]} for row, other in pairwise(triplets)]
    data = {"train": [{"source": "jsonl", "path": str(write_rows("with-negative.jsonl", rows))}]}

    def write(graphs, *, family="bert", pooling="mean", **sections):
        options = {"batch_size": 8, "max_steps": STEPS, "precision": "float32", "cuda_graph": graphs}
        return write_config(
            **{
                "model": {"name": str(make_model(family, layers=1, dropout=0.0, pooling=pooling))},
                "training": options,
                "optimizer": {"lr": 1e-3, "eps": 1e-3},
                "loss": {"temperature": 0.05},
                "data": data,
                **sections,
            }
        )

    return write


def trained(path, *, most=64, limit=None):
    """Losses, last weights, the sizes of the batches and how many graphs were made of them."""
    recorded = []

    def record(work):
        recorded.append(work)
        return work

    with ExitStack() as stack:
        for name, stand_in in {
            "gist_train.model.attention._flash": flash_stand_in,
            "gist_train.model.dropout.dropout": torch_dropout,
            "gist_train.checks.check_graphs": lambda *_: None,
            "gist_train.training.graphs.CudaRecorder": lambda: record,
            "gist_train.training.graphs.MOST": most,
        }.items():
            stack.enter_context(mock.patch(name, stand_in))
        training, student, adamw = training_of(load_config(path))
        records = list(steps(replace(training, max_tokens_per_forward=limit), 0, STEPS))
    return {
        "loss": losses(records, training.corpus),
        "grad_norm": [record.grad_norm for record in records],
        "masked": [list(record.masked.values()) for record in records],
        "weights": {name: p.detach().clone() for name, p in student.encoder.transformer.named_parameters()},
        "rates": [group["lr"] for group in adamw.param_groups],
        "computed": [record.computed_tokens for record in records],
        "tokens": [record.tokens for record in records],
        "groups": [record.groups for record in records],
        "graphs": len(recorded),
        "parts": [record.clock.seconds() for record in records],
    }


def assert_same_training(found, expected):
    assert found["loss"] == pytest.approx(expected["loss"], rel=2e-5)
    assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=2e-3, abs=5e-6)  # some are small, and rounding is not
    assert found["masked"] == expected["masked"]
    for name, weight in expected["weights"].items():
        torch.testing.assert_close(found["weights"][name], weight, rtol=0, atol=1e-5)


@pytest.mark.parametrize("pooling", ["cls", "mean", "lasttoken"])
@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert"])
def test_graphs_train_as_steps_without(config_of, family, pooling):
    """A batch that a graph does not read, a text that fills up and is seen by a loss, or a rate that stays: all train on."""
    found, expected = (trained(config_of(graphs, family=family, pooling=pooling)) for graphs in (True, False))
    assert_same_training(found, expected)
    assert found["graphs"] >= 1
    assert expected["graphs"] == 0
    sizes = [filled_tokens(tokens, 64) for tokens in found["tokens"]]
    assert found["computed"] == sizes
    assert found["graphs"] == sum(sizes.count(size) > 1 for size in set(sizes))
    assert found["groups"] == expected["groups"]  # of real texts


def test_it_is_the_rows_of_the_step_that_a_graph_reads(config_of):
    """What is copied to a graph is all that a step reads: ids, the guide's vectors, labels, whose negatives are whose."""
    (source,) = load_config(config_of(True)).data.train
    data = {"train": [{**source.model_dump(exclude_unset=True), "in_batch_negatives": False}]}
    found, expected = (trained(config_of(graphs, data=data)) for graphs in (True, False))
    assert_same_training(found, expected)
    assert found["graphs"] >= 1


def test_sizes_beyond_the_most_run_without(config_of):
    """Each graph takes memory: a thousand sizes would take all of it."""
    found, expected = trained(config_of(True), most=1), trained(config_of(False))
    assert_same_training(found, expected)
    assert found["graphs"] <= 1


def test_batches_in_chunks_run_without(config_of):
    """Gradient caching encodes twice in as many chunks as there are: no size is like another."""
    found, expected = (trained(config_of(graphs), limit=60) for graphs in (True, False))
    assert_same_training(found, expected)
    assert found["graphs"] == 0


def test_where_the_time_goes_is_told_as_one(config_of):
    """Forward and backward have no ends in a graph: zeros must not pass for measurements."""
    first, *_, last = trained(config_of(True))["parts"]
    assert last["graph"] > 0
    assert first["graph"] > 0
    assert last["forward"] == last["backward"] == last["optimizer"] == 0
    assert trained(config_of(False))["parts"][-1]["graph"] == 0


def test_the_rate_stands_on_the_device(config_of):
    """A graph reads it from there: a number of Python's would be that of the step that was recorded."""
    rates = trained(config_of(True))["rates"]
    assert all(isinstance(rate, torch.Tensor) for rate in rates)
    training, _, _ = training_of(load_config(config_of(False)))
    assert [rate.item() for rate in rates] == pytest.approx([training.schedule.learning_rate(STEPS - 1)] * len(rates), rel=1e-6)


@pytest.mark.parametrize("longest", [16, 512])
def test_totals_are_few_and_the_text_that_fills_is_short(longest):
    """A text longer than attention was told would be cut; a total for each batch would be a graph for each."""
    for tokens in range(1, 20_000, 7):
        total = filled_tokens(tokens, longest)
        assert tokens < total <= tokens + longest
        assert total - tokens <= max(FINEST, tokens / 8)
        assert filled_tokens(total - 1, longest) == total
    assert len({filled_tokens(tokens, 512) for tokens in range(1000, 4000)}) <= 20


def test_a_filled_batch_says_so(config_of):
    """Padding that is computed is told: the share in metrics.jsonl is of what the GPU did."""
    with mock.patch("gist_train.checks.check_graphs", return_value=None):
        training, _, _ = training_of(load_config(config_of(True)))
    inputs = inputs_of(training, 1)
    assert inputs.texts.filled
    assert inputs.computed_tokens == inputs.tokens + inputs.texts.filling == inputs.texts.chunks[0].input_ids.shape[1]


def test_it_is_refused_without_cuda(config_of):
    """On a CPU there is nothing to gain, and nothing that records."""
    ended = gist("train", config_of(True))
    assert ended.code == 2
    assert "training.cuda_graph" in ended.err
    assert "CUDA from Ampere on" in ended.err


def test_it_is_refused_with_gradient_checkpointing(write_config):
    """What is computed again asks the host for the state of dropout, which a graph can't."""
    ended = gist("plan", write_config(training={"max_steps": 2, "cuda_graph": True, "gradient_checkpointing": True}))
    assert ended.code == 2
    assert "training.cuda_graph" in ended.err
    assert "gradient_checkpointing to false" in ended.err
