"""What a step reads: made ahead, dealt evenly, the same whoever makes it."""

import heapq
import inspect

import numpy as np
import pytest
import torch
from support.running import training_of

from gist_train.config.loading import load_config
from gist_train.config.losses import DistillationConfig, LossConfig
from gist_train.model.distillation import distillation_loss
from gist_train.model.loss import guided_contrastive_loss
from gist_train.model.scores import score_loss
from gist_train.training.distributed import share
from gist_train.training.inputs import LossInputs, deal, inputs_of

pytestmark = pytest.mark.usefixtures("on_cpu")


def loads(tokens, order, ranks):
    return [int(tokens[order[slice(*share(len(tokens), rank, ranks))]].sum()) for rank in range(ranks)]


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_ranks_get_as_many_tokens_each(ranks):
    """Ranks wait for the one with the most tokens: as rows come, that one has an eighth more than its share, or a third."""
    draw = np.random.default_rng(0)
    dealt, as_they_come = [], []
    for _ in range(50):
        tokens = np.minimum(draw.lognormal(4.5, 0.8, 16 * ranks).astype(np.int64) + 3, 1536)
        order = deal(tokens, ranks)
        assert sorted(order.tolist()) == list(range(len(tokens)))
        mean = tokens.sum() / ranks
        dealt.append(max(loads(tokens, order, ranks)) / mean)
        as_they_come.append(max(loads(tokens, np.arange(len(tokens)), ranks)) / mean)
    assert np.mean(dealt) < 1.03
    assert np.mean(as_they_come) > 1.1


def test_rows_keep_their_order_and_ranks_their_counts():
    """Rows that do not divide, and fewer rows than ranks."""
    for count, ranks in ((7, 3), (1, 4), (2, 3), (5, 5)):
        order = deal(np.arange(count)[::-1] + 1, ranks)
        assert sorted(order.tolist()) == list(range(count))
        for rank in range(ranks):
            own = order[slice(*share(count, rank, ranks))].tolist()
            assert own == sorted(own)
    assert heapq.nsmallest(1, deal(np.array([4, 4, 4, 4]), 2)) == [0]


def test_inputs_are_a_function_of_the_step(write_config, make_model):
    """A thread makes them one step ahead: what was made before must not matter."""
    path = write_config(
        model={"name": str(make_model())}, training={"batch_size": 8, "max_steps": 6}, schedule={"warmup_ratio": 0.0}
    )
    training, _, _ = training_of(load_config(path))
    once = [inputs_of(training, step) for step in (1, 2, 3)]
    again = [inputs_of(training, step) for step in (3, 1, 2)]
    for a, b in zip(once, [again[1], again[2], again[0]], strict=True):
        assert a.rows.tolist() == b.rows.tolist()
        assert a.texts.groups == b.texts.groups
        for pack, twin in zip(a.texts.chunks, b.texts.chunks, strict=True):
            assert torch.equal(pack.input_ids, twin.input_ids)
        for name, tensor in a.loss.by_name().items():
            assert (tensor is None and b.loss.by_name()[name] is None) or torch.equal(tensor, b.loss.by_name()[name]), name
    assert once[0].loss.guide_anchor is not None
    assert {a.rows.tolist()[0] for a in once} != {once[0].rows.tolist()[0]}
    moved = once[0].each(lambda x: x + 1)
    assert torch.equal(moved.loss.guide_anchor, once[0].loss.guide_anchor + 1)
    assert torch.equal(moved.texts.chunks[0].restore, once[0].texts.chunks[0].restore + 1)


def test_the_loss_is_given_what_it_asks_for():
    """A name of its own here would be an argument that the loss does not have, an hour into a run where it is on."""
    asked = inspect.signature(guided_contrastive_loss).parameters
    texts = {"anchor", "positive", "negative", "rows", *LossInputs().by_name()}
    options = LossConfig.model_fields.keys() - {"mask_duplicates", "weight"}
    assert texts | options | {"guide_widths"} == asked.keys()  # which come with votes
    asked = inspect.signature(distillation_loss).parameters
    options = DistillationConfig.model_fields.keys() - {"weight", "regression", "scores", "score_temperature"}
    shared = options | {"block_size", "dimensions", "dimension_weights"}
    assert (texts - {"labels", "negative_labels"}) | shared == asked.keys()
    asked = inspect.signature(score_loss).parameters
    texts = {"anchor", "positive", "negative", "rows", "positive_scores", "negative_scores", "negative_rows"}
    assert texts | {"temperature", "score_temperature", "dimensions", "dimension_weights"} == asked.keys()
