"""What a plan says of tokens, memory and disk, against what a training really reads, keeps and leaves on the disk."""

from typing import Any

import numpy as np
import pytest
import torch
from support.families import transformer_of
from support.running import gist, kept_at_once, training_of
from transformers import BertConfig, BertModel

from gist_train.config.loading import load_config
from gist_train.model.dropout import use_cheap_dropout
from gist_train.model.encoder import Encoder, pack
from gist_train.model.loading import load_finished
from gist_train.model.loss import guided_contrastive_loss
from gist_train.planning.estimates import EpochTokens, checkpoint_bytes, checkpoints_kept, epoch_tokens, memory
from gist_train.run_folder import Run
from gist_train.training.gradient_cache import cut
from gist_train.training.loop import steps

pytestmark = pytest.mark.usefixtures("on_cpu")
PROMPTS = {"anchor": "query: ", "positive": "answer: "}


@pytest.mark.parametrize("batching", ["reference", "task", "mixed"])
@pytest.mark.parametrize("prompts", [None, PROMPTS], ids=["no prompts", "prompts"])
def test_tokens_are_those_of_the_batches(write_config, batching, prompts):
    """Rows with 0 to 3 negatives: an offset that slips by one batch gives figures that look just as good."""
    path = write_config()
    source = load_config(path).data.train[0].path
    data = {"train": [{"source": "jsonl", "path": source, "prompts": prompts}], "batching": batching}
    training, student, _ = training_of(load_config(write_config(data=data, guide=None)))
    found = epoch_tokens(training.corpus, training.tokens, training.plan, 0, student.max_length)
    real, pairs, counts, tops, longest, texts = [], [], [], [], 0, 0
    for step in range(1, training.plan.steps_per_epoch + 1):
        rows = training.plan.batch(step)
        batch = training.corpus.batch(rows, training.plan.positives(rows, 0))
        columns = [
            [len(ids) for ids in training.tokens.of(views)]
            for views in (batch.anchor_views, batch.positive_views, batch.negative_views)
        ]
        real.append(sum(map(sum, columns)))
        pairs.append(sum(length**2 for column in columns for length in column))
        counts.append(sum(map(len, columns)))
        tops.append(max(length for column in columns for length in column))
        longest += sum(len(column) * max(column, default=0) for column in columns)
        texts += sum(map(len, columns))
    assert found.by_step.tolist() == real
    assert found.pairs_by_step.tolist() == pairs
    assert (found.texts_by_step.tolist(), found.longest_by_step.tolist()) == (counts, tops)
    assert found.padded_to_longest == longest
    assert found.padded_to_max == texts * student.max_length
    assert found.real == sum(real) < longest < found.padded_to_max
    assert [record.tokens for record in steps(training, 0, 3)] == real[:3]


def size_of(family: str, width: int, layers: int) -> dict[str, int]:
    """Settings of a model with as wide an inner layer as the family's models have."""
    if family == "distilbert":
        return {"dim": width, "hidden_dim": 4 * width, "layers": layers}
    share = {"modernbert": 1.5, "mistral": 3.5, "qwen3": 3}.get(family, 4)
    return {"hidden_size": width, "intermediate_size": int(share * width), "layers": layers}


@pytest.mark.parametrize(
    ("family", "width", "length", "texts", "layers"),
    [
        ("bert", 128, 8, 64, 3),
        ("bert", 128, 40, 16, 2),
        ("bert", 256, 24, 24, 4),
        ("mpnet", 128, 24, 16, 2),
        ("distilbert", 128, 24, 16, 2),
        ("modernbert", 128, 24, 16, 4),
        ("mistral", 128, 24, 16, 2),
        ("qwen3", 128, 24, 16, 2),
    ],
)
def test_activations_are_what_autograd_keeps(family, width, length, texts, layers):
    """An estimate that is off by half sends a user to a GPU that is too small, or keeps them from one that would do."""
    wide = {"head_dim": width // 2} if family == "qwen3" else {}
    model = transformer_of(
        family, **size_of(family, width, layers), max_position_embeddings=100, vocab_size=500, dropout=0.1, **wide
    )
    model.train()
    use_cheap_dropout(model, None)
    encoder = Encoder(model, pooling="mean", normalized=True)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        encoder(pack([np.arange(length)] * texts))
    measured = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    lengths = np.full(texts, length)
    epoch = EpochTokens(
        lengths, np.array([lengths.sum()]), np.array([(lengths**2).sum()]), np.array([texts]), np.array([length]), 0, 0
    )
    estimated = memory(encoder, epoch, 0, 1, half=False, dense=True).activations
    assert estimated == pytest.approx(measured, rel=0.1)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable.:FutureWarning")
def test_less_is_kept_where_it_is_computed_again():
    """A quarter of the batch at a time keeps a quarter, and a layer that is computed again its input only: a plan that does not
    know it would send a user to a larger GPU for the very batch that these switches are for."""
    length, texts, layers = 24, 32, 4
    config = BertConfig(vocab_size=500, hidden_size=128, intermediate_size=512, num_hidden_layers=layers, num_attention_heads=4)
    model = BertModel(config, add_pooling_layer=False).train()
    use_cheap_dropout(model, None)
    encoder = Encoder(model, pooling="mean", normalized=True)
    epoch = EpochTokens(*(np.array([n]) for n in (length, texts * length, texts * length**2, texts, length)), 0, 0)

    def estimated(**options: Any) -> int:
        return memory(encoder, epoch, 0, 1, half=False, dense=True, **options).activations

    def kept(count: int) -> int:
        return kept_at_once(encoder, lambda: encoder(pack([np.arange(length)] * count)))

    limit = texts * length // 4 + 7
    assert len(cut(np.full(texts, length), limit, packed=True)[0]) == texts // 4
    whole = kept(texts)
    assert estimated(limit=limit) == pytest.approx(kept(texts // 4), rel=0.1)
    assert estimated(limit=texts * length) == estimated()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    inputs = kept(texts)  # all but the one layer that is at work in the backward pass
    assert estimated(checkpointed=True) == pytest.approx(inputs + whole / layers, rel=0.1)
    assert estimated(checkpointed=True) < estimated() / 2


def test_a_further_dimension_keeps_one_number_a_pair(make_model):
    """Four dimensions taken for four whole losses would send a user to a GPU that they don't need."""
    rows, dimensions = 256, [8, 4, 2]
    pairs = 4 * rows * rows

    def kept(of: list[int]) -> int:
        """Bytes from forward to backward."""
        random = torch.Generator().manual_seed(0)
        vectors = [torch.randn(rows, 8, generator=random, requires_grad=True) for _ in range(3)]
        guides = dict.fromkeys(("guide_anchor", "guide_positive", "guide_negative"))
        storages: dict[int, torch.Tensor] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            return storages.setdefault(tensor.untyped_storage().data_ptr(), tensor)

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = guided_contrastive_loss(*vectors, **guides, dimensions=of).loss
        assert loss.requires_grad
        return sum(tensor.untyped_storage().nbytes() for tensor in storages.values())

    measured = kept(dimensions) - kept(dimensions[:1])
    student = load_finished(str(make_model()))
    epoch = EpochTokens(*(np.array([8]) for _ in range(5)), 8, 8)
    three, one = (memory(student.encoder, epoch, pairs, count, half=False, dense=True).activations for count in (3, 1))
    assert three - one == pytest.approx(measured, rel=0.1)


def test_weights_gradients_and_moments_are_counted(write_config):
    """Four bytes each, the moments twice; what is not trained has neither gradient nor moments."""
    training, student, adamw = training_of(load_config(write_config(guide=None)))
    list(steps(training, 0, 1))
    epoch = epoch_tokens(training.corpus, training.tokens, training.plan, 0, 64)
    used = memory(student.encoder, epoch, 0, 1, half=False, dense=True)
    assert used.weights == sum(p.numel() * 4 for p in student.encoder.parameters())
    assert used.moments == sum(x.nbytes for state in adamw.state.values() for x in state.values() if x.ndim)
    assert used.gradients * 2 == used.moments
    half = memory(student.encoder, epoch, 0, 1, half=True, dense=False)
    assert half.weights == used.weights * 1.5
    assert half.activations < used.activations / 2


@pytest.mark.parametrize(
    ("checkpoint", "selection", "evaluated", "stop"),
    [
        ({"every": 2, "keep_last": 2}, {}, 0, 12),
        ({"every": 3, "keep_last": 1, "keep_every": 6}, {}, 0, 11),
        ({"every": 1, "keep_last": 1}, {"around": 5, "window": 2}, 0, 12),
        ({"every": 5, "keep_last": 2}, {"around": 4, "window": 3}, 3, 11),
    ],
)
def test_kept_checkpoints_are_those_that_a_run_leaves(write_config, checkpoint, selection, evaluated, stop):
    """The rule of retention stands once; a plan that counts by another one fills somebody's disk."""
    path = write_config(guide=None, checkpoint=checkpoint, selection=selection, evaluation={"every": evaluated})
    config = load_config(path)
    assert gist("train", path, "--set", f"training.stop_at_step={stop}").code == 0
    run = path.parent / "runs" / "run"
    assert checkpoints_kept(config.checkpoint, config.selection, evaluated, stop) == Run(run).saved_steps()
    folder = run / "checkpoints" / f"step-{stop:09}"
    on_disk = sum((folder / name).stat().st_size for name in ("model.safetensors", "training_state.safetensors"))
    student = training_of(config)[1]
    assert checkpoint_bytes(student.encoder) == pytest.approx(on_disk, rel=0.15)  # of a tiny model, names take their part
