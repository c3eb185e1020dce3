"""The operations that utilisation is counted in, against torch's own count of a forward and a backward pass."""

import itertools

import numpy as np
import pytest
import torch
from support.families import PACKED_FAMILIES, transformer_of
from torch.utils.flop_counter import FlopCounterMode

from gist_train.model.dropout import use_cheap_dropout
from gist_train.model.encoder import Encoder, pack
from gist_train.training import throughput
from gist_train.training.throughput import matmul_rate, training_flops


@pytest.mark.parametrize("family", PACKED_FAMILIES)
def test_flops_are_torchs(family):
    """Heads that are wider than the hidden states, shared keys, gated layers: each is forgotten in a formula made for BERT, and
    the utilisation looks just as likely."""
    transformer = transformer_of(family)
    use_cheap_dropout(transformer, 1e-9)  # the path that is written out: torch does not count the one operator of the other
    encoder = Encoder(transformer, pooling="mean", normalized=False).train()
    texts = [np.arange(5, 5 + length) for length in (3, 9, 9, 30)]
    torch.manual_seed(0)
    with FlopCounterMode(display=False) as counter:
        encoder(pack(texts)).sum().backward()
    assert training_flops(encoder, [(1, 3), (2, 9), (1, 30)]) == pytest.approx(counter.get_total_flops(), rel=0.005)


def test_the_rate_counts_the_products_of_the_encoder(monkeypatch):
    """Products left out, or counted for one layer alone, would make a step look nearer to the machine's limit, or further."""
    encoder = Encoder(transformer_of("bert"), pooling="mean", normalized=False)
    clock = itertools.count()
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: float(next(clock)))  # each product takes a second
    hidden, inner = encoder.transformer.config.hidden_size, encoder.transformer.config.intermediate_size
    flops_of_layer = 3 * 2 * 10 * (4 * hidden * hidden + 2 * hidden * inner)
    assert matmul_rate(encoder, 10, torch.float32) == pytest.approx(flops_of_layer / (3 * 6))
