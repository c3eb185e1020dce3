"""SentenceTransformerTrainer with our loss and packed models: what it trains, resumes, and shares among processes."""

from unittest import mock

import numpy as np
import pytest
import torch
from datasets import DatasetDict
from sentence_transformers import SentenceTransformerTrainer
from sentence_transformers.base.sampler import MultiDatasetBatchSamplers
from sentence_transformers.sentence_transformer.losses import GISTEmbedLoss, MatryoshkaLoss
from support.running import in_processes
from support.trainers import arguments, columns_of, dataset_of, loss_and_gradients, opened, their_cached_loss, trained

from gist_train import GuidedContrastiveLoss, UserError, guided_contrastive_loss, pack
from gist_train.data.corpus import text_hashes
from gist_train.inside import trainer_loss
from gist_train.model.whole import WholeModel

pytestmark = pytest.mark.usefixtures("on_cpu")
STEPS, ROWS = 3, 24


@pytest.fixture
def folders(make_model):
    """Of a student without dropout, and of a guide with a tokenizer of its own."""
    return make_model(dropout=0.0), make_model(width=48, layers=1, cased=True, vocabulary=300, seed=1)


def assert_same_weights(found, expected, before):
    """And that they moved."""
    assert found.keys() == expected.keys()
    assert max(float((expected[name] - before[name]).abs().max()) for name in before) > 1e-4
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-4, atol=2e-5, msg=name)


@pytest.mark.parametrize("columns", [2, 4])
def test_it_trains_as_theirs(folders, tmp_path, columns):
    """The same weights after some steps, plain, in mini-batches and packed, from one data set; and the texts of an evaluation."""
    student, guide = folders
    data, guide = dataset_of(columns_of(ROWS, columns)), opened(guide, training=False)
    before = opened(student).state_dict()
    model = opened(student)
    theirs = GISTEmbedLoss(model, guide) if columns == 2 else their_cached_loss(model, guide)
    expected = trained(model, theirs, data, arguments(tmp_path))
    for cut, packed in (({}, False), ({"mini_batch_num_tokens": 50}, False), ({"mini_batch_size": 3}, True), ({}, True)):
        model = opened(student)
        model = pack(model) if packed else model
        loss = GuidedContrastiveLoss(model, guide, cache_dir=tmp_path / "cache", **cut)
        found = trained(model, loss, data, arguments(tmp_path, eval_strategy="steps", eval_steps=2), eval_dataset=data)
        assert_same_weights(found, expected, before)


def test_two_data_sets_and_matryoshka(folders, tmp_path, monkeypatch):
    """Pairs of one data set and triplets of another, each text read by the guide once in two epochs, inside MatryoshkaLoss."""
    student, guide = folders
    columns = columns_of(40, 3)
    sets = {"pairs": dataset_of([column[:16] for column in columns[:2]]), "triplets": dataset_of([c[16:32] for c in columns])}
    options = {"max_steps": -1, "num_train_epochs": 2, "multi_dataset_batch_sampler": MultiDatasetBatchSamplers.ROUND_ROBIN}
    args = arguments(tmp_path, prompts={"anchor": "query: "}, **options)
    seen, embed = [], WholeModel.embed
    monkeypatch.setattr(WholeModel, "embed", lambda self, texts, size: seen.extend(texts) or embed(self, texts, size))
    results = []
    for theirs in (True, False):
        model, frozen = opened(student), opened(guide, training=False)
        before = {name: weight.clone() for name, weight in model.state_dict().items()}
        inner = GISTEmbedLoss(model, frozen) if theirs else GuidedContrastiveLoss(model, frozen, cache_dir=tmp_path / "cache")
        loss = MatryoshkaLoss(model, inner, [32, 16])
        results.append(trained(model, loss, DatasetDict(sets), args))
    assert_same_weights(results[1], results[0], before)
    assert len(seen) == len({*seen}) == len({text for data in sets.values() for c in data.column_names for text in data[c]})
    seen.clear()
    loss = GuidedContrastiveLoss(model, frozen, cache_dir=tmp_path / "exact")
    args.dataloader_num_workers = 1
    trained(model, {"pairs": loss, "triplets": loss}, DatasetDict(sets), args, data_collator=loss.collator(args))
    assert {*seen} == {text for data in sets.values() for column in data.column_names for text in data[column]}


def test_the_optimizer_has_none_of_the_guide(folders, tmp_path):
    """Weights of a guide in an optimizer decay, and their moments take the room of two models."""
    student, guide = folders
    model = opened(student)
    loss = GuidedContrastiveLoss(model, opened(guide, training=False), cache_dir=tmp_path)
    trainer = SentenceTransformerTrainer(model, arguments(tmp_path), train_dataset=dataset_of(columns_of(ROWS, 2)), loss=loss)
    trainer.train()
    moved = {id(weight) for group in trainer.optimizer.param_groups for weight in group["params"]}
    assert moved <= {id(weight) for weight in model.parameters()}
    assert len(moved) > 10


def test_their_checkpoint_resumes(folders, tmp_path):
    """A training that goes on from step 2 ends where one that never stopped does; the store goes on too."""
    student, guide = folders
    data = dataset_of(columns_of(32, 3))

    def run(folder, **options):
        model = pack(opened(student))
        loss = GuidedContrastiveLoss(model, opened(guide, training=False), mini_batch_size=4, cache_dir=tmp_path / "cache")
        args = arguments(tmp_path / folder, max_steps=4, save_strategy="steps", save_steps=2)
        trainer = SentenceTransformerTrainer(model, args, train_dataset=data, loss=loss)
        trainer.train(**options)
        return {name: weight.clone() for name, weight in model.state_dict().items()}

    whole = run("run")
    resumed = run("run", resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert_same_weights(resumed, whole, opened(student).state_dict())


UNEQUAL = ((5, 2), (3, 1))
"""Of each process (rows, columns of negatives)."""
CUTS = (None, 2) if trainer_loss.WAITS_ONCE else (None,)
"""Rows of a mini-batch; processes that wait for each other at each of them have to have as many."""


def shared_step(folders, cache, work):
    """What a process of two does: a batch over processes whose rows and columns differ, and a training."""
    import torch.distributed as dist
    from accelerate import Accelerator
    from torch.nn.parallel import DistributedDataParallel

    Accelerator(cpu=True)
    student, guide = folders
    rank, model, frozen = dist.get_rank(), opened(student), opened(guide, training=False)
    rows, negatives = UNEQUAL[rank]
    mine = [column[5 * rank : 5 * rank + rows] for column in columns_of(8, 2 + negatives)]
    found = {}
    for cut in CUTS:
        options = {"mini_batch_size": cut, "gather_across_devices": True, "cache_dir": cache, "temperature": 0.05}
        loss = GuidedContrastiveLoss(model, frozen, distillation={"weight": 0.5}, **options)
        # As their trainer has it.
        loss.model = DistributedDataParallel(model, find_unused_parameters=True, broadcast_buffers=False)
        if cut:
            with mock.patch.object(trainer_loss, "WAITS_ONCE", False), pytest.raises(UserError, match=r"6\.2 or newer"):
                loss_and_gradients(loss, model, mine)
        value, gradients = loss_and_gradients(loss, model, mine)
        found[cut] = value, {name: gradient.numpy() for name, gradient in gradients.items()}
    model = opened(student)
    loss = GuidedContrastiveLoss(model, frozen, gather_across_devices=True, cache_dir=cache)
    args = arguments(work, per_device_train_batch_size=4, ddp_find_unused_parameters=True)
    weights = trained(model, loss, dataset_of(columns_of(ROWS, 3)), args)
    return found, {name: weight.numpy() for name, weight in weights.items()}


def test_two_processes_are_one_batch(folders, tmp_path):
    """Rows of two processes contrast with one another, anchors too, as if one had them all: in loss, gradients and a training."""
    student, guide = folders
    found = [result for _, result in in_processes(2, shared_step, folders, tmp_path / "cache", tmp_path / "work")]
    model, frozen = opened(student), opened(guide, training=False)
    sides = [[], [], []]
    for rank, (rows, negatives) in enumerate(UNEQUAL):
        columns = [column[5 * rank : 5 * rank + rows] for column in columns_of(8, 2 + negatives)]
        for side, texts in zip(sides, (columns[0], columns[1], [text for c in columns[2:] for text in c]), strict=True):
            side.extend(texts)
    names = ("anchor", "positive", "negative")
    decoded = [model.tokenizer.batch_decode(model.preprocess(side)["input_ids"], skip_special_tokens=True) for side in sides]
    given = {f"guide_{name}": torch.from_numpy(frozen.encode(side)) for name, side in zip(names, decoded, strict=True)}
    hashes = [text_hashes(side)[:, :8].copy().view(np.int64)[:, 0] for side in decoded]
    given |= {f"{name}_ids": torch.from_numpy(side) for name, side in zip(names, hashes, strict=True)}
    given |= {name: model(model.preprocess(side))["sentence_embedding"] for name, side in zip(names, sides, strict=True)}
    from gist_train.model.distillation import distillation_loss

    whole = guided_contrastive_loss(**given, temperature=0.05).loss + 0.5 * distillation_loss(**given).loss
    whole.backward()
    expected = {name: weight.grad.numpy() for name, weight in model.named_parameters() if weight.grad is not None}
    for cut in CUTS:
        assert sum(batches[cut][0] for batches, _ in found) / 2 == pytest.approx(whole.item(), abs=1e-5)
        for batches, _ in found:
            assert batches[cut][1].keys() == expected.keys()
            for name, gradient in expected.items():
                np.testing.assert_allclose(batches[cut][1][name], gradient, rtol=1e-4, atol=2e-5, err_msg=name)
    model = opened(student)
    loss = GuidedContrastiveLoss(model, frozen, cache_dir=tmp_path / "cache")
    alone = trained(model, loss, dataset_of(columns_of(ROWS, 3)), arguments(tmp_path))
    for _, weights in found:
        together = {name: torch.from_numpy(weight) for name, weight in weights.items()}
        assert_same_weights(together, alone, opened(student).state_dict())
