"""The loss and packed models of their trainer on a GPU, against the same on the CPU."""

import pytest
import torch
from support.trainers import arguments, assert_same, columns_of, dataset_of, loss_and_gradients, opened

from gist_train import GuidedContrastiveLoss, pack, unpack

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]
ROWS = 24


@pytest.fixture
def folders(make_model):
    """Of a student with heads of 16, as our own kernel of attention takes them, and of a guide with another tokenizer."""
    return make_model(width=64, dropout=0.0), make_model(width=48, layers=1, cased=True, vocabulary=300, seed=1)


@pytest.mark.parametrize("cut", [None, 5])
def test_loss_and_gradients_are_those_of_the_cpu(folders, tmp_path, cut):
    """Plain, and packed; the guide is run on the device of the model."""
    student, guide = folders
    columns, results = columns_of(ROWS, 3), {}
    for name, device, packed in (("cpu", "cpu", False), ("gpu", "cuda", False), ("packed", "cuda", True)):
        model = opened(student).to(device)
        model = pack(model) if packed else model
        guide_model = opened(guide, training=False).to(device)
        loss = GuidedContrastiveLoss(model, guide_model, 0.05, cache_dir=tmp_path / name, mini_batch_size=cut)
        value, gradients = loss_and_gradients(loss, model, columns)
        results[name] = value, {key: gradient.cpu() for key, gradient in gradients.items()}
    for name in ("gpu", "packed"):
        assert_same(results[name], results["cpu"], 1e-4)


def test_packed_embeddings_are_those_of_the_padded_model(folders):
    """In bfloat16 too, whose packed attention is another kernel."""
    texts = [text for column in columns_of(ROWS, 3) for text in column]
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 3e-2)):
        model = opened(folders[0], training=False).to("cuda", dtype)
        padded = torch.from_numpy(model.encode(texts, normalize_embeddings=True)).float()
        packed = torch.from_numpy(pack(model).encode(texts, normalize_embeddings=True)).float()
        assert float((packed - padded).abs().max()) < tolerance
        unpack(model)


@pytest.mark.parametrize("precision", [{}, {"bf16": True}])
def test_their_trainer_trains(folders, tmp_path, precision):
    """Some steps of the whole: collator, guide on the device, packed student, autocast."""
    from sentence_transformers import SentenceTransformerTrainer

    model = pack(opened(folders[0]).to("cuda"))
    before = {name: weight.detach().clone() for name, weight in model.state_dict().items()}
    loss = GuidedContrastiveLoss(model, opened(folders[1], training=False), cache_dir=tmp_path / "cache")
    args = arguments(tmp_path, use_cpu=False, **precision)
    data = dataset_of(columns_of(ROWS, 3))
    SentenceTransformerTrainer(model, args, train_dataset=data, loss=loss, data_collator=loss.collator(args)).train()
    moved = {name: float((weight - before[name]).abs().max()) for name, weight in model.state_dict().items()}
    assert max(moved.values()) > 1e-4
    assert all(weight.isfinite().all() for weight in model.state_dict().values())
    loss.guide.stores[0].write()
    assert len(loss.guide.stores[0].store) == 3 * ROWS
