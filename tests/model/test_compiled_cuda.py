"""The compiled encoder on a GPU, fused by inductor, against the packed one there and on the CPU."""

import pytest
import torch
from support.families import gradients, texts_of, transformer_of
from torch._dynamo.utils import counters

from gist_train.model.compiled import CompiledEncoder
from gist_train.model.dropout import use_cheap_dropout
from gist_train.model.encoder import Encoder, pack

DEVICE = torch.device("cuda")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]
BATCHES = ((3, 7, 1, 7, 12, 3, 3, 9), (6,), tuple(range(1, 30)), (1, 60, 2, 60, 1))


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()


def encoder_of(family, dropout=0.0):
    # Heads of 8: flash attention takes none so small as these models' own.
    width = {"dim": 32} if family == "distilbert" else {"hidden_size": 32}
    transformer = transformer_of(family, dropout=dropout, **width)
    use_cheap_dropout(transformer, None)
    return Encoder(transformer, pooling="mean", normalized=True).train()


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "modernbert", "mistral", "qwen3"])
def test_compiled_equals_packed(family):
    """One graph for batches of all sizes, in bf16: what is fused rounds less often, and is off by no more than bf16 itself."""
    cpu, there = encoder_of(family), encoder_of(family).to(DEVICE)
    compiled = CompiledEncoder(there, 64)
    for lengths in BATCHES:
        texts = pack(texts_of(lengths))
        whole = cpu(texts)
        with torch.autocast("cuda", torch.bfloat16):
            ours, plain = compiled(texts.to(DEVICE)), there(texts.to(DEVICE))
        torch.testing.assert_close(ours.cpu(), whole, rtol=0, atol=6e-2)
        torch.testing.assert_close(ours, plain, rtol=0, atol=6e-2)
        theirs, own = gradients(cpu, whole), gradients(there, ours)
        assert own.keys() == theirs.keys()
        for name, gradient in theirs.items():
            if gradient.norm() > 1e-3:
                assert (own[name].cpu() - gradient).norm() <= 0.2 * gradient.norm(), name
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_dropout_is_the_same_with_a_graph_and_without(family):
    """Inductor draws for what it fused and flash attention for itself, from one generator: in one order both times, or gradient
    caching hands a gradient through other elements than it came from."""
    plain = encoder_of(family, dropout=0.3).to(DEVICE)
    compiled = CompiledEncoder(plain, 64)
    texts = pack(texts_of(BATCHES[0])).to(DEVICE)

    def drawn(encoder, seed):
        torch.manual_seed(seed)
        with torch.autocast("cuda", torch.bfloat16):
            return encoder(texts)

    with torch.no_grad():
        first = drawn(compiled, 1)
        means = [torch.stack([drawn(encoder, seed) for seed in range(400)]).mean(dim=0) for encoder in (compiled, plain)]
    assert torch.equal(drawn(compiled, 1), first)
    assert not torch.allclose(drawn(compiled, 2), first)
    # Draws of another rate, or scaled otherwise, have another mean.
    assert torch.cosine_similarity(*means).min() > 0.97
    assert (means[0].norm(dim=1) / means[1].norm(dim=1)).sub(1).abs().max() < 0.1
