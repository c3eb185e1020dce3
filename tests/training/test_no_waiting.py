"""Nothing in a step asks the device for a value: it would wait for all that the device has been given so far.

Tensors without data stand in for a device that never answers. Copies that wait test_steps_cuda.py finds, on a GPU.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from support.families import PACKED_FAMILIES, texts_of, transformer_of
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from gist_train.config.training import SpikesConfig
from gist_train.model.encoder import Encoder, pack
from gist_train.model.loss import guided_contrastive_loss
from gist_train.training.gradient_cache import Texts, encode, texts_in
from gist_train.training.update import LossScale, Spikes, UpdateState, update

META = torch.device("meta")
LENGTHS = (3, 7, 1, 7, 12, 3, 3, 9)


class NoCopies(TorchDispatchMode):
    """Refuses copies between the host and the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if "copy" in str(func):
            devices = {x.device.type for x in (*args, out) if isinstance(x, Tensor)}
            assert len(devices) == 1, f"{func} from device to device"
        return out


@contextmanager
def nothing_crosses() -> Iterator[None]:
    """A list that becomes a tensor of a GPU is copied from memory that is not page-locked, which waits too."""
    with META:
        torch.empty(0)  # torch looks up once and for all what makes tensors: not what is put in place here
    refuse = mock.Mock(side_effect=AssertionError("a tensor made of a list"))
    with mock.patch.object(Tensor, "new_tensor", refuse), mock.patch.object(torch, "tensor", refuse), NoCopies():
        yield


def nullcontext_of(*_, **__):
    return nullcontext()


def test_values_are_not_there_to_be_asked_for():
    """The tests below prove nothing if it answers."""
    x = torch.empty(3, device=META)
    with pytest.raises(AssertionError), nothing_crosses():
        torch.arange(3).to(META)
    for ask in (lambda: x.sum().item(), lambda: x[x > 0], lambda: bool(x.sum() > 0), lambda: x.repeat_interleave(x.long())):
        with pytest.raises((RuntimeError, NotImplementedError)):
            ask()


@pytest.mark.parametrize("pooling", ["cls", "mean", "last"])
@pytest.mark.parametrize("family", PACKED_FAMILIES)
def test_the_encoder_asks_nothing(family, pooling):
    """Borders of texts are known on the host: who asks the device for them again waits in every layer."""
    encoder = Encoder(transformer_of(family, dropout=0.1).to(META), pooling=pooling, normalized=True).train()
    texts = pack(texts_of(LENGTHS)).to(META)
    with nothing_crosses():
        out = encoder(texts)
        out.sum().backward()
    assert out.shape == (len(LENGTHS), 16)


class Padded(nn.Module):
    """A transformer of a family that is padded, as far as its encoder looks at it."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(pad_token_id=0, model_type="padded", to_dict=dict)
        self.words = nn.Embedding(200, 16)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=self.words(input_ids) * attention_mask[..., None])


@pytest.mark.parametrize("pooling", ["cls", "mean", "last"])
def test_padding_asks_nothing(pooling):
    """How many tokens are real is known: to take them out by a mask would ask the device once more."""
    encoder, texts = Encoder(Padded().to(META), pooling=pooling, normalized=True).train(), pack(texts_of(LENGTHS)).to(META)
    assert not encoder.packed
    with nothing_crosses():
        encoder(texts).sum().backward()


def test_flash_attention_asks_nothing(monkeypatch):
    """What runs on a GPU in bf16 is not what runs on a CPU."""
    monkeypatch.setattr("gist_train.model.attention.flash_runs", lambda *_: True)
    transformer = transformer_of("mistral", dropout=0.1, hidden_size=32).to(META, torch.bfloat16)
    encoder, texts = Encoder(transformer, pooling="last", normalized=True).train(), pack(texts_of(LENGTHS)).to(META)
    with nothing_crosses():
        encoder(texts).sum().backward()
    assert transformer.layers[0].self_attn.q_proj.weight.grad is not None


def test_chunks_ask_nothing():
    """Gradient caching puts the chunks' embeddings where they belong, and takes gradients from there."""
    encoder = Encoder(transformer_of("bert").to(META), pooling="cls", normalized=True).train()
    chunks = [torch.arange(3).numpy(), torch.arange(3, 8).numpy()]
    ids, lengths = np.concatenate(texts_of(LENGTHS)), np.array(LENGTHS)
    texts: Texts = texts_in(chunks, ids, lengths.cumsum() - lengths, lengths, cached=True).each(lambda x: x.to(META))
    with nothing_crosses():
        embeddings = encode(encoder, texts, [1, 2])
        embeddings.sum().backward()
        for chunk, which in zip(texts.chunks, texts.which, strict=True):
            torch.autograd.backward(encoder(chunk), embeddings.grad[which])
    assert embeddings.grad.shape == (8, 16)


@pytest.mark.parametrize("rows", [None, (2, 5)])
@pytest.mark.parametrize("block_size", [None, 4])
@pytest.mark.parametrize("negatives", ["all", "hard"])
@pytest.mark.parametrize("widths", [{}, {"dimensions": [16, 8], "dimension_weights": [1.0, 0.5]}], ids=["whole", "dimensions"])
def test_the_loss_asks_nothing(widths, negatives, block_size, rows):
    """Masks are counted and applied where they are, under every rule there is."""
    sides = [torch.empty(n, 16, device=META, requires_grad=True) for n in (6, 6, 9)]
    guides = [torch.empty(n, 8, device=META) for n in (6, 6, 9)]
    ids = [torch.empty(n, dtype=torch.int32, device=META) for n in (6, 6, 9)]
    given = {
        **dict(zip(("guide_anchor", "guide_positive", "guide_negative"), guides, strict=True)),
        **dict(zip(("anchor_ids", "positive_ids", "negative_ids"), ids, strict=True)),
        "labels": ids[0],
        "negative_labels": ids[2],
        "own_negatives_only": torch.empty(6, dtype=torch.bool, device=META),
        "negative_rows": torch.empty(9, dtype=torch.int64, device=META),
    }
    # Such tensors know no autocast; it is off in the loss.
    with nothing_crosses(), mock.patch.object(torch, "autocast", nullcontext_of):
        out = guided_contrastive_loss(*sides, **given, negatives=negatives, block_size=block_size, rows=rows, **widths)
        out.loss.backward()
    assert all(x.grad is not None for x in sides)


@pytest.mark.parametrize("scaled", [False, True])
def test_the_update_asks_nothing(scaled):
    """Whether a gradient is finite or a spike, how far it is clipped and whether the scale falls: the device decides."""
    weight = nn.Parameter(torch.empty(4, 3, device=META))
    weight.grad = torch.empty(4, 3, device=META)
    # Torch has no fused AdamW for such tensors: what it is handed is all that is seen here.
    optimizer = SimpleNamespace(step=lambda: None, zero_grad=lambda **_: None)
    zero = torch.empty((), device=META)
    scale = LossScale(zero, zero.clone(), zero.clone()) if scaled else None
    with nothing_crosses():
        state = UpdateState(scale, Spikes.first(SpikesConfig(), META))
        norm, spike = update(optimizer, [weight], zero.clone(), zero.clone(), limit=1.0, state=state)
    assert norm.device == spike.device == optimizer.found_inf.device == optimizer.grad_scale.device == META
