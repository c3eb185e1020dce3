"""The compiled encoder against the packed one. A CPU has no flash attention: what it does stands in, written out."""

import pytest
import torch
from support.families import assert_same_gradients, gradients, texts_of, transformer_of
from support.flash import flash_stand_in
from torch import Tensor
from torch.nn.functional import dropout as torch_dropout

from gist_train.model.attention import flash_runs
from gist_train.model.compiled import MULTIPLE, CompiledEncoder
from gist_train.model.dropout import use_cheap_dropout
from gist_train.model.encoder import Encoder, means_of_texts, pack

COMPILED_FAMILIES = ["bert", "distilbert", "modernbert", "qwen3"]
"""RoBERTa's kin are BERT with positions from elsewhere, and the other decoders have what Qwen3 has."""
LONGEST = 64
BATCHES = ((3, 7, 1, 7, 12, 3, 3, 9), (5, 5, 5, 5), (6, 2), (1,), (8,), tuple(range(1, 30)), (1, 60, 2, 60, 1), (16, 8, 24))
"""Lengths of texts: many and one, one token, totals that are a multiple already."""


class Counting:
    """A backend that runs what it is given as it is, and counts how often it is given something."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, _):
        self.graphs += 1
        return graph


@pytest.fixture(autouse=True)
def as_on_cuda(monkeypatch):
    """Flash attention, and torch's own dropout: the one for CPUs can't be compiled, and need not be."""
    torch._dynamo.reset()
    monkeypatch.setattr("gist_train.model.attention._flash", flash_stand_in)
    monkeypatch.setattr("gist_train.model.dropout.dropout", torch_dropout)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch._dynamo.reset()


def encoder_of(family: str, *, pooling: str = "mean", dropout: float = 0.0, **given: object) -> Encoder:
    transformer = transformer_of(family, dropout=dropout, **given)
    use_cheap_dropout(transformer, None)
    return Encoder(transformer, pooling=pooling, normalized=True).train()


@pytest.mark.parametrize("family", COMPILED_FAMILIES)
def test_one_graph_for_all_batches_equals_the_packed_encoder(family):
    """A number of Python's that gets into the graph has it compiled for every batch, a minute each on a GPU; a break leaves most
    of the launches. With a text more, or a border amiss, it still trains, only worse."""
    encoder, backend = encoder_of(family), Counting()
    compiled = CompiledEncoder(encoder, LONGEST, backend=backend)
    for seed, lengths in enumerate(BATCHES):
        texts = pack(texts_of(lengths, seed))
        expected, ours = encoder(texts), compiled(texts)
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
        assert_same_gradients(gradients(encoder, compiled(texts)), gradients(encoder, encoder(texts)))
        with torch.no_grad():
            assert not compiled(texts).requires_grad
    assert backend.graphs == 1


def test_the_text_that_fills_up_changes_nothing():
    """Its tokens are 0, which no text of these has: whatever stands in that row of the embeddings, nobody may see or move it."""
    encoder = encoder_of("roberta")
    compiled = CompiledEncoder(encoder, LONGEST, backend=Counting())
    texts = pack(texts_of(BATCHES[0]))
    assert texts.input_ids.shape[1] % MULTIPLE != 0
    before = compiled(texts)
    table = "embeddings.word_embeddings.weight"
    gradient = gradients(encoder, before)[table]
    assert gradient[0].abs().max() == 0
    assert gradient[5:].abs().max() > 0
    with torch.no_grad():
        encoder.transformer.get_parameter(table)[0] += 100
    assert torch.equal(compiled(texts), before)


@pytest.mark.parametrize("lengths", BATCHES)
def test_borders_reach_the_last_token(lengths):
    """Flash attention writes nothing where no text is: what the memory held may be no number, and times 0 is none either."""
    compiled, seen = CompiledEncoder(encoder_of("bert"), LONGEST), []
    compiled._states = lambda encoder, *given: seen.append(given) or encoder.states(*given[:2], pack(texts_of([size])).lengths)
    size = (sum(lengths) // MULTIPLE + 1) * MULTIPLE
    compiled(pack(texts_of(lengths)))
    ((input_ids, position_ids, cumulative, longest, _),) = seen
    assert input_ids.shape == position_ids.shape == (1, size)
    assert cumulative.tolist() == [*pack(texts_of(lengths)).lengths.cumulative.tolist(), size]
    assert cumulative.dtype == torch.int32
    assert cumulative.diff().max() <= longest


def test_dropout_is_the_same_with_a_graph_and_without():
    """Gradient caching encodes a chunk twice: the gradient of one draw, handed on through another, no loss ever shows."""
    encoder = encoder_of("bert", dropout=0.3)
    compiled = CompiledEncoder(encoder, LONGEST, backend=Counting())
    texts = pack(texts_of(BATCHES[0]))

    def drawn(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return compiled(texts)

    with torch.no_grad():
        first = drawn(1)
    assert torch.equal(drawn(1), first)
    assert not torch.allclose(drawn(2), first)


def test_bf16_autocast():
    """Autocast stands around the graph and must be in it: traced without, the matrix products would be float32's, or fail."""
    encoder = encoder_of("bert")
    compiled = CompiledEncoder(encoder, LONGEST, backend=Counting())
    texts = pack(texts_of(BATCHES[0]))
    whole = compiled(texts)
    with torch.autocast("cpu", torch.bfloat16):
        expected, ours = encoder(texts), compiled(texts)
    torch.testing.assert_close(ours, expected, rtol=0, atol=3e-2)
    assert (ours - whole).abs().max() > 1e-4
    torch.testing.assert_close(compiled(texts), whole)


@pytest.mark.parametrize(("family", "layers"), [("bert", 1), ("qwen3", 2)])
def test_the_real_operator_is_traced(monkeypatch, family, layers):
    """The stand-in takes anything. Torch's own flash operator has an order of arguments, and shapes of its results and gradients,
    which it knows for tensors without data too."""
    monkeypatch.undo()
    called = []

    def noting(graph, inputs):
        called.extend(str(node.target) for node in graph.graph.nodes)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    meta = torch.device("meta")
    transformer = transformer_of(family, dropout=0.1, hidden_size=32, layers=layers).to(meta, torch.bfloat16)
    encoder = Encoder(transformer, pooling="cls", normalized=True).train()
    compiled = CompiledEncoder(encoder, LONGEST, backend=noting)
    for lengths in BATCHES[:2]:
        out = compiled(pack(texts_of(lengths)).to(meta))
        assert out.shape == (len(lengths), 32)
        out.sum().backward()
    assert sum("_flash_attention_forward" in name for name in called) == layers  # in one graph
    assert sum(p.grad is not None for p in transformer.parameters()) > 10 * layers


def test_a_text_longer_than_told_is_refused():
    """Flash attention would leave out the queries that are beyond the longest text: their states are what the memory held."""
    compiled = CompiledEncoder(encoder_of("bert"), 8, backend=Counting())
    compiled(pack(texts_of((8, 3))))
    with pytest.raises(ValueError, match="a text of 9 tokens"):
        compiled(pack(texts_of((9, 3))))


def test_flash_attention_needs_a_gpu(monkeypatch):
    """Asked on a machine without one, or for numbers that it does not take, it must say no and not look for a device."""
    assert not flash_runs(torch.device("cpu"), torch.bfloat16, 64)
    assert not flash_runs(torch.device("cuda"), torch.float32, 64)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 6))
    for built in (False, True):
        monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda built=built: built)
        assert flash_runs(torch.device("cuda"), torch.bfloat16, 64) == built
        assert not flash_runs(torch.device("cuda"), torch.bfloat16, 200)  # of which such a GPU trains none


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_means_of_texts(dtype):
    """On CUDA texts are averaged by their borders: another text's token in a mean still trains."""
    torch.manual_seed(0)
    hidden = torch.randn(13, 4, dtype=dtype).requires_grad_()
    cumulative = torch.tensor([0, 1, 4, 4 + 7, 13], dtype=torch.int32)
    ours = means_of_texts(hidden, cumulative)
    expected = torch.stack([hidden[a:b].float().mean(dim=0) for a, b in ((0, 1), (1, 4), (4, 11), (11, 13))])
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, expected)
    weights = torch.randn(4, 4)
    found, wanted = (torch.autograd.grad((x * weights).sum(), hidden)[0] for x in (ours, expected))
    torch.testing.assert_close(found, wanted)
