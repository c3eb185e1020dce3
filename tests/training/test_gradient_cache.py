"""Gradient caching against its slow twins: the whole batch at once, and the same chunks with all their graphs kept."""

import math
from dataclasses import replace
from itertools import chain
from unittest import mock

import numpy as np
import pytest
import torch
from support.running import assert_same_run, gist, in_processes, kept_at_once, losses, metrics, training_of
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from gist_train.config.loading import load_config
from gist_train.training import loop
from gist_train.training.gradient_cache import cut
from gist_train.training.loop import NonFiniteError, dropout_seed, steps

pytestmark = pytest.mark.usefixtures("on_cpu")

STEPS = 3
LIMIT = 60
"""Tokens: a batch of 8 rows has some 300, so that there are five to six chunks a step."""
# A weight whose gradient is zero but for rounding, such as a key's bias, would move by the whole rate under the usual 1e-8.
CALM = {"lr": 1e-3, "eps": 1e-3}


@pytest.fixture
def config_of(write_config, make_model):
    """Writes a run of three steps; without dropout and clipping unless asked for."""

    def write(guide="store", *, family="bert", dropout=0.0, loss=None, batch_size=8, **training):
        options = {"batch_size": batch_size, "max_steps": STEPS, "precision": "float32", "grad_clip": None, **training}
        return write_config(
            model={"name": str(make_model(family, dropout=dropout))},
            training=options,
            optimizer=CALM,
            schedule={"type": "constant", "warmup_ratio": 0.0},
            loss={"temperature": 0.05, **(loss or {})},
            **({} if guide == "store" else {"guide": guide}),
        )

    return write


def count_reductions(counts, bucket):
    """DistributedDataParallel's own hook, counted."""
    counts.append(bucket.index())
    return allreduce_hook(None, bucket)


def trained(path, limit, count=STEPS):
    """What some steps give, with so many tokens per forward: records, gradients as they are applied, forwards, weights."""
    training, student, adamw = training_of(load_config(path))
    training = replace(training, max_tokens_per_forward=limit)
    named = dict(student.encoder.transformer.named_parameters())
    gradients, forwards, seeds, reductions = [], [], [], []
    adamw.register_step_pre_hook(
        lambda *_: gradients.append({name: p.grad.numpy().copy() for name, p in named.items() if p.grad is not None})
    )
    student.encoder.register_forward_pre_hook(
        lambda _, args: forwards.append((args[0].input_ids.shape[1], len(args[0].restore), torch.is_grad_enabled()))
    )
    student.encoder.register_forward_pre_hook(lambda *_: seeds.append(torch.initial_seed()))
    if training.accelerator.num_processes > 1:
        training.model.register_comm_hook(reductions, count_reductions)
    records = list(steps(training, 0, count))
    assert len(gradients) == count
    return {
        "loss": [record.loss for record in records],
        "grad_norm": [record.grad_norm for record in records],
        "masked": [list(record.masked.values()) for record in records],
        "tokens": [(record.tokens, record.computed_tokens) for record in records],
        "groups": [sorted(np.repeat(*np.array(record.groups).T[::-1]).tolist()) for record in records],
        "gradients": gradients,
        "weights": {name: p.detach().numpy().copy() for name, p in named.items()},
        "forwards": forwards,
        "seeds": seeds,
        "reductions": len(reductions),
    }


def assert_same_training(found, expected, tolerance=1e-5):
    """In loss, norm, masks and every weight's gradient of the first step; and in what came of them."""
    for key in ("loss", "grad_norm", "masked"):
        assert found[key][0] == pytest.approx(expected[key][0], rel=tolerance, abs=tolerance), key
        # From the second step on the weights are not quite the same, and 1 / temperature is 20.
        assert np.asarray(found[key]) == pytest.approx(np.asarray(expected[key]), rel=10 * tolerance, abs=10 * tolerance), key
    for ours, theirs, least, apart in (
        # Those of token types and biases sum over all tokens, in another order on other processors.
        (found["gradients"][0], expected["gradients"][0], 35, 10 * tolerance),
        (found["weights"], expected["weights"], 37, tolerance),
    ):
        assert len(ours) == len(theirs) >= least
        for name, values in theirs.items():
            assert np.abs(ours[name] - values).max() <= apart * max(1.0, float(np.abs(values).max())), name
    assert max(np.abs(values).max() for values in expected["gradients"][0].values()) > 1e-3


def greedy(lengths, limit, packed):
    """Text after text, the longest first, each into the chunk at hand while there is room."""
    if (sum(lengths) if packed else max(lengths) * len(lengths)) <= limit:
        return [list(range(len(lengths)))]
    chunks = [[]]
    for text in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        together = [*chunks[-1], text]
        cost = sum(lengths[i] for i in together) if packed else lengths[together[0]] * len(together)
        if chunks[-1] and cost > limit:
            chunks.append([])
        chunks[-1].append(text)
    return chunks


@pytest.mark.parametrize("packed", [True, False])
def test_chunks_are_those_of_the_greedy_twin(packed):
    """A text that is lost or counted twice, and a chunk that is larger than what fits in memory."""
    draw = np.random.default_rng(0)
    many = 0
    for limit in (1, 7, 20, 64, 500):
        for _ in range(40):
            lengths = draw.integers(1, 30, draw.integers(1, 40))
            chunks = cut(lengths, limit, packed=packed)
            assert [chunk.tolist() for chunk in chunks] == greedy(lengths.tolist(), limit, packed)
            assert sorted(np.concatenate(chunks).tolist()) == list(range(len(lengths)))
            for chunk in chunks:
                tokens = lengths[chunk].sum() if packed else lengths[chunk].max() * len(chunk)
                assert tokens <= limit or len(chunk) == 1
            many += len(chunks) > 1
            assert [chunk.tolist() for chunk in cut(lengths, None, packed=packed)] == [list(range(len(lengths)))]
    assert many > 100


SAME = {
    "guided": ("store", {}, {}),
    "self": ("self", {}, {}),
    "unguided": (None, {"temperature": 0.3}, {"batch_size": 7}),
    "blocks": ("store", {"block_size": 3, "margin": -0.05}, {}),
    "dimensions": ("self", {"dimensions": [8, 32, 16], "dimension_weights": [0.5, 1.0, 2.0], "block_size": 3}, {}),
    "clipped": ("store", {}, {"grad_clip": 0.05}),
}


@pytest.mark.parametrize("case", SAME)
def test_a_cached_step_is_the_plain_one(config_of, case):
    """A gradient without the temperature, of another chunk's texts or clipped chunk by chunk still trains, only worse."""
    guide, loss, options = SAME[case]
    path = config_of(guide, loss=loss, **options)
    found, expected = trained(path, LIMIT), trained(path, None)
    assert_same_training(found, expected)
    assert (found["tokens"], found["groups"]) == (expected["tokens"], expected["groups"])
    assert [tokens for tokens, _, _ in expected["forwards"]] == [tokens for tokens, _ in expected["tokens"]]
    # Each chunk once without and once with a graph, and none larger than what fits in memory.
    assert all(tokens <= LIMIT or texts == 1 for tokens, texts, _ in found["forwards"])
    for graph in (False, True):
        assert sum(tokens for tokens, _, has in found["forwards"] if has == graph) == sum(t for t, _ in found["tokens"])
    assert len(found["forwards"]) >= 2 * STEPS * 4


def test_padding_is_counted_where_it_is_computed(config_of):
    """A DeBERTa is padded to the longest of a chunk: what fits in memory is what is computed, and the log says how much it is."""
    path = config_of(None, family="deberta-v2")
    found, expected = trained(path, LIMIT), trained(path, None)
    assert_same_training(found, expected)
    for (real, padded), (same, whole) in zip(found["tokens"], expected["tokens"], strict=True):
        assert same == real < padded < whole


def test_a_batch_within_the_limit_is_not_cached(config_of):
    """Twice the forward passes for nothing; and a run whose batches all fit would have other bits than without the limit."""
    path = config_of(dropout=0.1)
    found, expected = trained(path, 10_000), trained(path, None)
    assert found["loss"] == expected["loss"]
    assert found["forwards"] == expected["forwards"]
    assert len(found["forwards"]) == STEPS
    assert all(np.array_equal(found["weights"][name], values) for name, values in expected["weights"].items())


def keep_graphs(step):
    """A stand-in for `encode` that forwards the same chunks under the same seeds, and keeps every graph."""

    def encode(model, texts, seeds):
        vectors = {}
        for number, (chunk, which) in enumerate(zip(texts.chunks, texts.which, strict=True)):
            torch.manual_seed(dropout_seed(42, step, 0, number))
            vectors.update(zip(which.tolist(), model(chunk), strict=True))
        assert len(seeds) == len(texts.chunks) > 3
        return torch.stack([vectors[text] for text in range(len(vectors))])

    return encode


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_dropout_is_the_same_in_both_forwards(config_of, precision, checkpointed):
    """The gradient of one draw, handed on through another: it points nearly the right way, and no loss ever shows it."""
    path = config_of(dropout=0.3, precision=precision, gradient_checkpointing=checkpointed)
    found = trained(path, LIMIT, 1)
    with mock.patch.multiple(loop, encode=keep_graphs(1), hand_on=lambda *_: None):
        expected = trained(path, LIMIT, 1)
    assert_same_training(found, expected, 1e-6)
    assert found["loss"] == expected["loss"]
    assert sum(graph for _, _, graph in expected["forwards"]) == len(expected["forwards"])
    assert trained(path, None, 1)["loss"] != pytest.approx(found["loss"], rel=1e-3)  # there was dropout


def test_chunks_have_draws_of_their_own(config_of):
    """One seed for all chunks would drop the same elements in every text of a place in its chunk."""
    training, student, _ = training_of(load_config(config_of(dropout=0.1)))
    seeds = []
    student.encoder.register_forward_pre_hook(lambda *_: seeds.append(torch.initial_seed()))
    record = next(steps(replace(training, max_tokens_per_forward=LIMIT), 6, 7))
    half = len(seeds) // 2
    assert seeds[:half] == seeds[half:] == [dropout_seed(42, 7, 0, chunk) for chunk in range(half)]
    assert record.tokens > 3 * LIMIT


def test_memory_grows_with_the_chunk_and_not_with_the_batch(config_of):
    """What autograd keeps at once: a chunk's graph that outlives its backward pass would make it a batch's again."""

    def peak(batch_size, limit):
        training, student, _ = training_of(load_config(config_of(batch_size=batch_size, loss={"block_size": 4})))
        training = replace(training, max_tokens_per_forward=limit)
        return kept_at_once(student.encoder, lambda: next(steps(training, 0, 1)))

    small, large = peak(8, 100), peak(48, 100)
    assert peak(48, None) > 4 * peak(8, None)
    assert large < 1.5 * small  # the embeddings themselves are kept whole
    assert peak(48, 400) > 2 * large


def test_no_update_follows_a_value_that_is_not_finite(config_of):
    """One chunk's NaN is the whole step's: nothing may be applied, and no gradient of it may wait for the next step."""
    training, student, _ = training_of(load_config(config_of()))
    running = steps(replace(training, max_tokens_per_forward=LIMIT), 0, STEPS)
    records = [next(running)]
    weights = {name: p.detach().clone() for name, p in student.encoder.named_parameters()}
    student.encoder.transformer.encoder.layer[0].output.dense.weight.register_hook(lambda gradient: gradient * math.inf)
    records.append(next(running))
    with pytest.raises(NonFiniteError, match="step 2"):
        losses(records, training.corpus)
    assert all(torch.equal(p, weights[name]) and p.grad is None for name, p in student.encoder.named_parameters())


PROCESSES = {
    "uneven chunks": (2, 16, LIMIT, {}, {}),
    # Rank 0 has 3 rows and is within it, rank 1 has 4 and is not. At step 2, where DistributedDataParallel makes its buckets
    # anew, a rank that does not cache would ask for them before it gathers.
    "one rank within the limit": (2, 7, 300, {}, {}),
    "a rank without rows": (2, 1, 20, {"margin": -1.0}, {}),
    "three, blocks, clipped": (3, 16, LIMIT, {"block_size": 3, "margin": -0.05}, {"grad_clip": 0.1}),
}


@pytest.mark.parametrize("case", PROCESSES)
def test_processes_that_cache_are_one_that_does_not(config_of, case):
    """A gradient that is averaged where it should be summed, or reduced with every chunk: with unlike numbers of chunks the
    ranks would wait for each other for ever, with like ones they would pay for each."""
    processes, batch_size, limit, loss, training = PROCESSES[case]
    path = config_of(batch_size=batch_size, loss=loss, **training)
    expected = trained(path, None)
    found = [rank for _, rank in in_processes(processes, trained, path, limit)]
    for rank in found:
        assert_same_training(rank, expected)
        assert rank["reductions"] == STEPS  # one bucket holds all of the tiny model
    if case != "a rank without rows":  # it reads a text of which nothing is used
        assert all(rank["tokens"] == expected["tokens"] for rank in found)
        together = zip(*(rank["groups"] for rank in found), strict=True)
        assert [sorted(chain.from_iterable(of_step)) for of_step in together] == expected["groups"]
    forwards = [len(rank["forwards"]) for rank in found]
    assert sum(forwards) > 2 * STEPS * processes  # at least one rank had chunks
    for number, rank in enumerate(found):  # two ranks with one seed would drop the same elements
        drawn = {dropout_seed(42, step, number, chunk) for step in range(1, STEPS + 1) for chunk in range(20)}
        assert len(set(rank["seeds"])) * 2 == len(rank["seeds"])
        assert set(rank["seeds"]) < drawn
    if case == "one rank within the limit":
        assert [[sum(texts) <= limit for texts in rank["groups"]] for rank in found] == [[True] * STEPS, [False] * STEPS]
        assert all(number % 2 == 0 for number in forwards)
    else:
        assert len(set(forwards)) > 1


def test_a_cut_run_is_the_whole_one_and_may_go_on_in_less_memory(write_config, tmp_path):
    """Weights, moments and metrics bit for bit, dropout on: a chunk's draws may depend on nothing that came before. And whose
    machine is taken for a smaller one must not lose the run: the draws are others then, as with another number of processes."""
    sections = {"cache_dir": str(tmp_path / "cache"), "checkpoint": {"every": 3}}
    training = {"batch_size": 32, "max_steps": 6, "precision": "float32"}
    caching = {**training, "max_tokens_per_forward": 512}
    assert gist("train", write_config("whole", training=caching, **sections)).code == 0
    path = write_config("cut", training=caching, **sections)
    assert gist("train", path, "--set", "training.stop_at_step=3").code == 0
    ended = gist("train", path)
    assert "resuming from step 3" in ended.err
    whole, cut_in_two = tmp_path / "runs" / "whole", tmp_path / "runs" / "cut"
    assert_same_run(cut_in_two, whole, 6)

    assert gist("train", write_config("less", training={**training, "stop_at_step": 3}, **sections)).code == 0
    less = tmp_path / "runs" / "less"
    assert metrics(less)[0]["loss"] != metrics(whole)[0]["loss"]  # there are chunks, with other draws
    ended = gist("train", write_config("less", training=caching, **sections))
    assert "resuming from step 3" in ended.err
    assert [row["step"] for row in metrics(less)] == [1, 2, 3, 4, 5, 6]
