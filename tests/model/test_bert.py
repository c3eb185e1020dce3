"""BERT's training path on a CPU against two twins: transformers' layers, and layers written out text by text under its draws."""

import math

import pytest
import torch
from support.families import assert_same_gradients, gradients, texts_of, transformer_of
from torch.nn.functional import layer_norm

from gist_train.model.dropout import kept, rate, use_cheap_dropout, words
from gist_train.model.encoder import Encoder, pack

FAMILIES = ["bert", "roberta"]
LENGTHS = (3, 7, 1, 7, 12, 3, 3, 9)


def encoder_of(family, p):
    transformer = transformer_of(family, dropout=p)
    use_cheap_dropout(transformer, None)
    return Encoder(transformer, pooling="mean", normalized=True).train()


def seeded(encoder, texts):
    torch.manual_seed(3)
    return encoder(pack(texts))


@pytest.mark.parametrize("lengths", [LENGTHS, (1,), (40,), (5, 5, 5)])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_transformers_layers(monkeypatch, family, lengths):
    """Without dropout: outputs and every weight's gradient are those of transformers' own layers over the same pack."""
    encoder, twin = encoder_of(family, 0.0), encoder_of(family, 0.0)
    assert encoder._own_layers
    ours = seeded(encoder, texts_of(lengths))
    found = gradients(encoder, ours)
    monkeypatch.setattr(Encoder, "_own_layers", False)
    expected = seeded(twin, texts_of(lengths))
    torch.testing.assert_close(ours, expected, rtol=2e-6, atol=2e-6)
    assert_same_gradients(found, gradients(twin, expected))


def dropped(x, drawn, p):
    of = rate(p)
    return x * kept(drawn.view(x.shape), of, x.dtype) * of.scale


def written_out(encoder, texts, p):
    """What the encoder should give: one text at a time in plain torch, with the draws in the order in which it makes them."""
    transformer, packed = encoder.transformer, pack(texts)
    torch.manual_seed(3)
    x = transformer.embeddings(input_ids=packed.input_ids, position_ids=encoder.position_ids(packed))[0]
    heads, width = transformer.config.num_attention_heads, x.shape[1] // transformer.config.num_attention_heads
    for layer in transformer.encoder.layer:
        own, after, output = layer.attention.self, layer.attention.output, layer.output
        drawn = words(sum(n * heads * length**2 for n, length in packed.lengths.groups))
        contexts, first, at = [], 0, 0
        for n, length in packed.lengths.groups:
            for _ in range(n):
                text = x[first : first + length]
                heads_of_text = []
                for head in range(heads):
                    q, k, v = (part(text)[:, head * width : (head + 1) * width] for part in (own.query, own.key, own.value))
                    weights = torch.softmax(q @ k.T / math.sqrt(width), dim=1)
                    heads_of_text.append(dropped(weights, drawn[at : at + length**2], p) @ v)
                    at += length**2
                contexts.append(torch.cat(heads_of_text, dim=1))
                first += length
        norm = after.LayerNorm
        h = dropped(after.dense(torch.cat(contexts)), words(x.numel()), p) + x
        attended = layer_norm(h, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
        norm = output.LayerNorm
        h = dropped(output.dense(layer.intermediate(attended)), words(x.numel()), p) + attended
        x = layer_norm(h, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
    parts = torch.split(x, [length for n, length in packed.lengths.groups for _ in range(n)])
    return torch.nn.functional.normalize(torch.stack([part.mean(dim=0) for part in parts])[packed.restore], dim=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_dropout_is_where_it_belongs(family):
    """A mask that is another one in the backward pass, or of another text, or scaled once too often, trains all the same."""
    encoder = encoder_of(family, 0.2)
    ours = seeded(encoder, texts_of(LENGTHS))
    found = gradients(encoder, ours)
    expected = written_out(encoder, texts_of(LENGTHS), 0.2)
    torch.testing.assert_close(ours, expected, rtol=5e-6, atol=5e-6)
    assert_same_gradients(found, gradients(encoder, expected))
    assert not torch.allclose(ours, encoder.eval()(pack(texts_of(LENGTHS))), atol=1e-2)


@pytest.mark.parametrize("p", [0.0, 0.2])
def test_bf16(p):
    """Its backward pass runs outside autocast, and must give each input's gradient in that input's type."""
    encoder = encoder_of("bert", p)
    expected = seeded(encoder, texts_of(LENGTHS))
    exact = gradients(encoder, expected)
    with torch.autocast("cpu", torch.bfloat16):
        ours = seeded(encoder, texts_of(LENGTHS))
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, expected, rtol=0, atol=5e-2)
    assert not torch.equal(ours, expected)
    for name, gradient in gradients(encoder, ours).items():
        assert gradient.dtype == torch.float32
        if "key.bias" not in name:  # whose gradient is zero but for rounding
            assert (gradient - exact[name]).norm() <= 0.05 * exact[name].norm() + 1e-4, name


def test_without_a_graph_it_gives_the_same():
    """A cached gradient is that of the first forward pass, which keeps no graph: other bits there would be another loss."""
    encoder = encoder_of("bert", 0.2)
    with torch.no_grad():
        first = seeded(encoder, texts_of(LENGTHS))
    assert torch.equal(first, seeded(encoder, texts_of(LENGTHS)))


def test_it_is_for_bert_in_training():
    """A model in evaluation has torch's own attention, which is faster without dropout; MPNet has another one."""
    assert encoder_of("roberta", 0.2)._own_layers
    assert not encoder_of("mpnet", 0.2)._own_layers
    assert not encoder_of("bert", 0.2).eval()._own_layers
