"""The packed encoder against its slow, obvious twin in `families`: padded texts, a mask, transformers' own attention."""

import logging

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from support.families import DECODERS, PACKED_FAMILIES, assert_same_gradients, gradients, padded_twin, texts_of, transformer_of
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from gist_train.config.models import GuideConfig, ModelConfig
from gist_train.model.attention import PackedLengths, attend, packed_attention
from gist_train.model.dropout import Dropout, use_cheap_dropout
from gist_train.model.encoder import CPU_BATCH_TOKENS, Encoder, embed, pack
from gist_train.model.loading import load_guide, load_student

pytestmark = pytest.mark.usefixtures("one_thread")

LENGTHS = {
    "mixed": (3, 7, 1, 7, 12, 3, 3, 9),
    "one text": (6,),
    "one token": (1,),
    "all equal": (5, 5, 5, 5),
    "very unlike": (1, 60, 2, 60, 1),
    "descending": (9, 8, 7, 6),
    # More tokens in all than the model has positions.
    "many": tuple(range(1, 30)),
}


@pytest.mark.parametrize(("pooling", "normalized"), [("cls", True), ("mean", True), ("mean", False), ("last", True)])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", PACKED_FAMILIES)
def test_packed_equals_padded(family, attention, pooling, normalized):
    """A position that counts on from the text before, a token that sees its neighbour's, one that sees the future, or a mean
    over another text's tokens: each still trains, only worse. RoBERTa's and MPNet's positions begin after the padding id."""
    texts = texts_of(LENGTHS["mixed"])
    twin = transformer_of(family, attention).eval()
    encoder = Encoder(transformer_of(family), pooling=pooling, normalized=normalized).eval()
    assert encoder.packed
    expected, ours = padded_twin(twin, texts, pooling, normalized), encoder(pack(texts))
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, expected, rtol=2e-6, atol=2e-6)
    assert_same_gradients(gradients(encoder, ours), gradients(twin, expected))


@pytest.mark.parametrize(
    ("family", "changed"),
    [
        ("mpnet", lambda model: model.encoder.relative_attention_bias.weight.data.zero_()),
        ("modernbert", lambda model: [setattr(layer.attn, "sliding_window", None) for layer in model.layers]),
        ("mistral", lambda model: setattr(model.config, "sliding_window", None)),
        ("qwen3", lambda model: [setattr(layer.self_attn, "sliding_window", None) for layer in model.layers]),
        ("llama", lambda model: [setattr(layer.self_attn, "is_causal", False) for layer in model.layers]),
    ],
)
def test_what_makes_a_family_is_felt(family, changed):
    """The twins agree on little if the tiny models hardly feel their bias, their window or their direction."""
    texts = pack(texts_of(LENGTHS["mixed"]))
    encoder = Encoder(transformer_of(family), pooling="mean", normalized=True).eval()
    before = encoder(texts)
    changed(encoder.transformer)
    assert (encoder(texts) - before).abs().max() > 0.05


@pytest.mark.parametrize("family", ["modernbert", "mistral", "qwen3"])
@pytest.mark.parametrize("window", [2, 6, 10, 12, 14, 100])
def test_windows(family, window):
    """A window that is one token wider or narrower than the model's, at its edge, on either side or where it leaves nothing out:
    texts of 12 tokens and fewer."""
    given = {"local_attention": window} if family == "modernbert" else {"sliding_window": window}
    texts = texts_of(LENGTHS["mixed"])
    twin = transformer_of(family, **given).eval()
    encoder = Encoder(transformer_of(family, **given), pooling="mean", normalized=True).eval()
    expected, ours = padded_twin(twin, texts, "mean", True), encoder(pack(texts))
    torch.testing.assert_close(ours, expected, rtol=2e-6, atol=2e-6)
    assert_same_gradients(gradients(encoder, ours), gradients(twin, expected))


@pytest.mark.parametrize("family", PACKED_FAMILIES)
def test_a_text_that_holds_the_padding_id(family):
    """A tokenizer reads a literal <pad> as the padding token: RoBERTa and MPNet give it a position of its own, and count on
    behind it. Only such tokens have a position that their place in the text does not say."""
    texts = [np.array(ids, np.int32) for ids in ([7, 1, 8], [9], [1, 1, 6, 1, 12, 13], [1], [10, 11, 12])]
    twin = transformer_of(family).eval()
    # One at a time, unpadded: sentence-transformers would tell such a token from padding by its mask.
    expected = torch.cat([padded_twin(twin, [text], "mean", False) for text in texts])
    ours = Encoder(transformer_of(family), pooling="mean", normalized=False).eval()(pack(texts))
    torch.testing.assert_close(ours, expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("family", PACKED_FAMILIES)
def test_the_manual_path_of_training_equals_padded(family):
    """With dropout attention is written out: at a rate that rounds to nothing it must still have its bias, window, direction
    and shared heads, in outputs and in gradients."""
    texts = texts_of(LENGTHS["mixed"])
    twin = transformer_of(family).eval()
    transformer = transformer_of(family)
    use_cheap_dropout(transformer, 1e-9)
    encoder = Encoder(transformer, pooling="mean", normalized=True).train()
    expected, ours = padded_twin(twin, texts, "mean", True), encoder(pack(texts))
    torch.testing.assert_close(ours, expected, rtol=2e-6, atol=2e-6)
    assert_same_gradients(gradients(encoder, ours), gradients(twin, expected))


@pytest.mark.parametrize("family", PACKED_FAMILIES)
def test_bf16_autocast(family):
    """Rotary positions leave queries in float32 beside values in bf16: attention that takes one type only fails at the first
    step, or leaves its fast path without a word."""
    texts = texts_of(LENGTHS["mixed"])
    encoder = Encoder(transformer_of(family, initializer_range=0.1), pooling="mean", normalized=True).eval()
    expected = encoder(pack(texts))
    with torch.autocast("cpu", torch.bfloat16):
        ours = encoder(pack(texts))
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, expected, rtol=0, atol=5e-2)
    assert not torch.equal(ours, expected)
    assert all(gradient.isfinite().all() for gradient in gradients(encoder, ours).values())


@pytest.mark.parametrize("pad", [0, 1, 3])
@pytest.mark.parametrize("family", PACKED_FAMILIES)
def test_padding_ids(family, pad):
    """RoBERTa's first position follows from the padding id; a constant 2 would be right for one tokenizer only."""
    texts = texts_of(LENGTHS["mixed"])
    expected = padded_twin(transformer_of(family, pad=pad).eval(), texts, "mean", True)
    ours = Encoder(transformer_of(family, pad=pad), pooling="mean", normalized=True).eval()(pack(texts))
    torch.testing.assert_close(ours, expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize(("family", "pooling"), [("bert", "cls"), ("bert", "mean"), ("mpnet", "mean"), ("qwen3", "last")])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_lengths(lengths, family, pooling):
    """One text, one token, equal lengths, lengths far apart, more tokens than positions: each groups texts in its own way."""
    texts = texts_of(LENGTHS[lengths])
    twin = transformer_of(family).eval()
    encoder = Encoder(transformer_of(family), pooling=pooling, normalized=True).eval()
    expected, ours = padded_twin(twin, texts, pooling, True), encoder(pack(texts))
    torch.testing.assert_close(ours, expected, rtol=2e-6, atol=2e-6)
    assert_same_gradients(gradients(encoder, ours), gradients(twin, expected))


def test_order_of_texts_does_not_matter():
    """Texts are sorted by length inside: an embedding that comes out in the sorted order belongs to another text."""
    texts = texts_of(LENGTHS["mixed"])
    encoder = Encoder(transformer_of("bert"), pooling="mean", normalized=True).eval()
    expected = encoder(pack(texts))
    weights = torch.randn(expected.shape)
    (expected * weights).sum().backward()
    before = {name: p.grad.clone() for name, p in encoder.named_parameters() if p.grad is not None}
    order = np.random.default_rng(1).permutation(len(texts)).tolist()
    encoder.zero_grad()
    ours = encoder(pack([texts[i] for i in order]))
    torch.testing.assert_close(ours, expected[order], rtol=2e-6, atol=2e-6)
    (ours * weights[order]).sum().backward()
    assert_same_gradients({name: p.grad for name, p in encoder.named_parameters() if p.grad is not None}, before)


def test_pack_lays_texts_end_to_end():
    """The layout that attention and pooling rely on, written out for three texts."""
    packed = pack([np.array([7, 8, 9]), np.array([5]), np.array([1, 2, 3])])
    assert packed.input_ids.tolist() == [[5, 7, 8, 9, 1, 2, 3]]
    assert packed.positions.tolist() == [[0, 0, 1, 2, 0, 1, 2]]
    assert packed.lengths.groups == ((1, 1), (2, 3))
    assert packed.lengths.sizes == [1, 6]
    assert packed.lengths.longest == 3
    assert packed.lengths.cumulative.tolist() == [0, 1, 4, 7]
    assert packed.lengths.cumulative.dtype == torch.int32
    assert packed.restore.tolist() == [1, 0, 2]


# Whole models: against sentence-transformers.

TEXTS = ["a", "my card was declined", "  How do I top up?\n", "x" * 300, "word " * 200, "exchange rate, please", "ÄÖ ñ 日本"]


@pytest.mark.parametrize(
    ("family", "pooling", "normalize"),
    [
        *(("bert", pooling, normalize) for pooling in ("cls", "mean", "lasttoken") for normalize in (True, False)),
        ("roberta", "cls", False),
        ("xlm-roberta", "mean", True),
        ("mpnet", "mean", True),
        ("mpnet", "cls", False),
        ("distilbert", "mean", True),
        ("modernbert", "cls", True),
        ("mistral", "lasttoken", True),
        ("mistral", "mean", False),
        ("qwen3", "lasttoken", False),
        ("deberta-v2", "mean", True),
    ],
)
def test_equals_sentence_transformers(make_model, family, pooling, normalize):
    """Special tokens, truncation, pooling or normalisation that differ from what the saved model does when others open it
    make a model that trains on other embeddings than it is used for."""
    folder = str(make_model(family, pooling=pooling, normalize=normalize))
    model = load_student(ModelConfig(name=folder))
    assert model.encoder.normalized == normalize
    assert model.encoder.pooling == {"lasttoken": "last"}.get(pooling, pooling)
    ours = model.encode(TEXTS)
    theirs = SentenceTransformer(folder, device="cpu").encode(TEXTS, normalize_embeddings=False)
    np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=2e-6)
    np.testing.assert_allclose(load_guide(GuideConfig(name=folder)).encode(TEXTS), ours, rtol=1e-6, atol=1e-6)


def test_a_family_is_padded_and_says_so_once(make_model, caplog):
    """A family that can't run packed must not run wrongly packed, and who waits for it must learn why: in one line, not in
    one per forward."""
    with caplog.at_level(logging.INFO, "gist_train"):
        model = load_student(ModelConfig(name=str(make_model("deberta-v2"))))
        model.encode(TEXTS)
        model.encode(TEXTS)
    (line,) = [record.getMessage() for record in caplog.records if record.name.startswith("gist_train")]
    assert "deberta-v2" in line
    assert "padded" in line
    assert not model.encoder.packed


@pytest.mark.parametrize("pooling", ["cls", "mean", "last"])
def test_padded_gradients(pooling):
    """The fallback scatters tokens into a padded matrix and takes them out again: both have a backward pass to lose."""
    texts = texts_of(LENGTHS["mixed"])
    twin = transformer_of("deberta-v2").eval()
    encoder = Encoder(transformer_of("deberta-v2"), pooling=pooling, normalized=True).eval()
    expected, ours = padded_twin(twin, texts, pooling, True), encoder(pack(texts))
    torch.testing.assert_close(ours, expected, rtol=2e-6, atol=2e-6)
    assert_same_gradients(gradients(encoder, ours), gradients(twin, expected))


def test_decoders_of_an_encoders_family_are_not_packed():
    """BERT's layers are told their direction when they are built, and may look at another model's states."""
    transformer = transformer_of("bert")
    transformer.config.is_decoder = True
    assert not Encoder(transformer, pooling="mean", normalized=True).packed


@pytest.mark.parametrize("family", DECODERS)
def test_decoders_that_see_both_ways_are_not_packed(family):
    """A config turns their masks around, which packed attention does not ask for: it would stay causal."""
    texts = texts_of(LENGTHS["mixed"])
    encoder = Encoder(transformer_of(family, is_causal=False), pooling="mean", normalized=True).eval()
    assert not encoder.packed
    assert Encoder(transformer_of(family, is_causal=True), pooling="mean", normalized=True).packed
    expected = padded_twin(transformer_of(family, is_causal=False).eval(), texts, "mean", True)
    torch.testing.assert_close(encoder(pack(texts)), expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("family", DECODERS)
def test_decoders_keep_nothing_for_a_next_token(monkeypatch, family):
    """A cache of all layers' keys and values is memory, and time to copy, for nothing."""
    monkeypatch.setattr("transformers.cache_utils.DynamicCache.update", lambda *_, **__: pytest.fail("a cache"))
    encoder = Encoder(transformer_of(family), pooling="last", normalized=True)
    assert encoder.transformer.config.use_cache
    encoder(pack(texts_of((3, 5))))


# Attention alone.


def qkv(tokens: int, heads: int = 2, width: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, tokens, width) for _ in range(3))
    return q, k, v


def lengths_of(*groups: tuple[int, int]) -> PackedLengths:
    flat = [length for count, length in groups for _ in range(count)]
    return PackedLengths(tuple(groups), torch.tensor([0, *np.cumsum(flat)], dtype=torch.int32))


def layer(causal: bool = False) -> nn.Module:
    """What packed attention asks of a transformer's layer."""
    module = nn.Module()
    module.is_causal = causal
    return module


@pytest.mark.parametrize("heads", [4, 2, 1])
@pytest.mark.parametrize(("causal", "window"), [(False, None), (True, None), (False, 2), (True, 2), (True, 3), (False, 9)])
@pytest.mark.parametrize("scaling", [None, 0.3])
@pytest.mark.parametrize("dropout", [0.0, 1e-9])
def test_attention_equals_a_block_diagonal_mask(scaling, dropout, causal, window, heads):
    """The path with dropout is written out by hand: at a rate that rounds to nothing it must be the other path. A scale that
    one of them ignores would change the model between training and evaluation."""
    packed = lengths_of((2, 1), (1, 3), (2, 4))
    owner = torch.repeat_interleave(torch.arange(5), packed.cumulative.diff())
    distance = torch.arange(len(owner))[:, None] - torch.arange(len(owner))[None, :]
    seen = (owner[:, None] == owner[None, :]) & (distance.abs() < (window or 99)) & (distance >= (0 if causal else -99))
    q, k, v = qkv(len(owner), heads=4)
    q, k, v = (x.requires_grad_() for x in (q, k[:, :heads], v[:, :heads]))
    ours, nothing = packed_attention(
        layer(causal), q, k, v, None, packed=packed, dropout=dropout, scaling=scaling, sliding_window=window
    )
    repeated = [torch.cat([x[:, [h // (4 // heads)]] for h in range(4)], dim=1) for x in (k, v)]
    expected = scaled_dot_product_attention(q, *repeated, attn_mask=seen, scale=scaling).transpose(1, 2)
    assert nothing is None
    torch.testing.assert_close(ours, expected, rtol=2e-6, atol=2e-6)
    weights = torch.randn(ours.shape)
    for a, b in zip(
        torch.autograd.grad((ours * weights).sum(), (q, k, v)),
        torch.autograd.grad((expected * weights).sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dropout", [0.0, 1e-9])
def test_biases_are_added_to_the_scores_of_their_group(dropout):
    """A bias of another length has another shape; one that is added after the softmax, or has no gradient, has the right one."""
    packed = lengths_of((2, 1), (1, 3), (2, 4))
    q, k, v = (x[0].transpose(0, 1) for x in qkv(13))
    biases = [torch.randn(1, 2, length, length).requires_grad_() for _, length in packed.groups]
    ours = attend(q, k, v, packed, dropout=dropout, biases=biases)
    rows = []
    for (start, end), bias in zip(packed.cumulative.unfold(0, 2, 1).tolist(), (biases[i] for i in (0, 0, 1, 2, 2)), strict=True):
        scores = torch.einsum("qhw,khw->hqk", q[start:end], k[start:end]) / 2 + bias[0]
        rows.append(torch.einsum("hqk,khw->qhw", scores.softmax(-1), v[start:end]))
    expected = torch.cat(rows)
    torch.testing.assert_close(ours, expected, rtol=2e-6, atol=2e-6)
    weights = torch.randn(ours.shape)
    for a, b in zip(*(torch.autograd.grad((out * weights).sum(), biases) for out in (ours, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_attention_has_the_type_of_the_values():
    """Rotary positions turn queries and keys into float32 under autocast: flash attention takes none of them."""
    q, k, v = qkv(3)
    out, _ = packed_attention(layer(), q, k, v.bfloat16(), None, packed=lengths_of((1, 3)))
    assert out.dtype == torch.bfloat16


def test_a_mask_is_refused():
    """A mask that is taken and not looked at would let a token see padding, or the future."""
    q, k, v = qkv(3)
    with pytest.raises(ValueError, match="no attention mask"):
        packed_attention(layer(), q, k, v, torch.ones(1, 1, 3, 3), packed=lengths_of((1, 3)))


def test_attention_dropout_has_its_rate():
    """With values of one-hot rows the output is the weights themselves: a share p of them is 0, the others are divided by
    1 - p, so that the mean over many draws is attention without dropout."""
    length, p = 16, 0.3
    q, k, _ = qkv(8 * length, heads=4, width=length)
    v = torch.eye(length).repeat(8, 1).expand(1, 4, -1, -1)
    packed = lengths_of((8, length))
    plain, _ = packed_attention(layer(), q, k, v, None, packed=packed)
    torch.manual_seed(0)
    draws = torch.stack([packed_attention(layer(), q, k, v, None, packed=packed, dropout=p)[0] for _ in range(200)])
    assert (draws == 0).float().mean().item() == pytest.approx(p, abs=1e-3)
    kept = draws != 0
    torch.testing.assert_close(draws[kept], (plain / (1 - p)).expand_as(draws)[kept], rtol=1e-4, atol=1e-6)
    assert (draws.mean(0) - plain).abs().max() < 0.2
    assert (draws.mean(0) - plain).mean().abs() < 1e-3


@pytest.mark.parametrize("family", PACKED_FAMILIES)
def test_attention_dropout_reaches_the_model_in_training_only(monkeypatch, family):
    """The rate comes from the attention's dropout module or its own number, and the model's mode decides: a rate that gets lost
    on the way trains without attention dropout, one that stays in evaluation makes embeddings depend on chance."""
    rates: list[float] = []
    monkeypatch.setattr(Encoder, "_own_layers", False)  # which has tests of its own
    monkeypatch.setattr("gist_train.model.attention.cheap_dropout", lambda x, p: rates.append(p) or x)
    encoder = Encoder(transformer_of(family, dropout=0.2), pooling="mean", normalized=True)
    use_cheap_dropout(encoder.transformer, None)
    for module in encoder.modules():
        if isinstance(module, Dropout):
            module.p = 0.15 if module.p else 0.0
        if "attention_dropout" in vars(module):
            module.attention_dropout = 0.15
    texts = pack(texts_of((3, 3, 5)))
    encoder.eval()(texts)
    assert rates == []
    encoder.train()(texts)
    assert rates == [0.15] * 4  # 2 layers of 2 lengths


def test_dropout_is_off_in_eval_and_on_in_training():
    """Two forwards of an evaluated model are the same to the bit, two of a trained one are not, unless the seed is the same."""
    encoder = Encoder(transformer_of("bert", dropout=0.2), pooling="mean", normalized=True)
    use_cheap_dropout(encoder.transformer, None)
    texts = pack(texts_of(LENGTHS["mixed"]))

    def seeded(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return encoder(texts)

    encoder.eval()
    assert torch.equal(seeded(0), seeded(1))
    encoder.train()
    assert torch.equal(seeded(0), seeded(0))
    assert not torch.allclose(seeded(0), seeded(1))


# Many texts.


@pytest.mark.parametrize("batch_tokens", [1, 7, 20, 10_000])
def test_embed_in_batches(batch_tokens):
    """An index that comes twice or never leaves an embedding that is somebody else's, or was never written; a batch above the
    limit runs out of memory on the longest texts, hours in."""
    texts = texts_of([3, 9, 1, 30, 9, 9, 2, 4, 4, 1])
    encoder = Encoder(transformer_of("bert"), pooling="mean", normalized=True).eval()
    expected = torch.cat([encoder(pack([text])) for text in texts]).detach().numpy()
    seen: list[int] = []
    for indices, embeddings in embed(encoder, texts, batch_tokens):
        tokens = sum(len(texts[i]) for i in indices)
        assert tokens <= batch_tokens or len(indices) == 1
        assert embeddings.dtype == np.float32
        np.testing.assert_allclose(embeddings, expected[indices], rtol=2e-6, atol=2e-6)
        seen += indices.tolist()
    assert sorted(seen) == list(range(len(texts)))


def test_embed_takes_the_longest_first():
    """What does not fit in memory must show in the first batch, not in the last."""
    texts = texts_of([3, 9, 1, 30, 9])
    encoder = Encoder(transformer_of("bert"), pooling="cls", normalized=True).eval()
    longest = [max(len(texts[i]) for i in indices) for indices, _ in embed(encoder, texts, 12)]
    assert longest == sorted(longest, reverse=True)
    assert longest[0] == 30


def test_embed_bounds_a_batch_on_the_cpu():
    """A limit meant for a GPU falls out of a CPU's caches."""
    texts = texts_of([60] * 140)
    encoder = Encoder(transformer_of("bert"), pooling="cls", normalized=True).eval()
    sizes = [60 * len(indices) for indices, _ in embed(encoder, texts, 1_000_000)]
    assert sum(sizes) == 60 * 140
    assert max(sizes) <= CPU_BATCH_TOKENS < sum(sizes)


def test_embed_nothing(make_model):
    """A corpus that has all its embeddings asks for none."""
    encoder = Encoder(transformer_of("bert"), pooling="mean", normalized=True)
    assert list(embed(encoder, [], 512)) == []
    model = load_student(ModelConfig(name=str(make_model())))
    assert model.encode([]).shape == (0, 32)


def test_encode_gives_the_mode_back(make_model):
    """An evaluation in the middle of a training must not leave dropout off for the rest of it."""
    model = load_student(ModelConfig(name=str(make_model())))
    for training in (True, False):
        model.encoder.train(training)
        first = model.encode(TEXTS)
        assert model.encoder.training is training
        assert all(module.training is training for module in model.encoder.modules())
        np.testing.assert_array_equal(first, model.encode(TEXTS))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 6e-2)], ids=["float32", "bf16 and flash attention"]
)
@pytest.mark.parametrize(
    ("family", "pooling"),
    [
        ("bert", "cls"),
        ("bert", "mean"),
        ("bert", "last"),
        ("roberta", "mean"),
        ("xlm-roberta", "cls"),
        ("camembert", "mean"),
        ("mpnet", "mean"),
        ("distilbert", "mean"),
        ("modernbert", "mean"),
        ("llama", "last"),
        ("mistral", "last"),
        ("qwen2", "mean"),
        ("qwen3", "last"),
    ],
)
def test_cuda_equals_the_cpu(family, pooling, dtype, tolerance):
    """The flash path reads borders from `cumulative`, not from `groups`: both must say the same, forwards and backwards. It has
    its own direction, windows and shared heads."""
    texts = texts_of(LENGTHS["mixed"] + LENGTHS["very unlike"])
    # Heads of 8: the flash path takes no others so small.
    given = {"dim": 32} if family == "distilbert" else {"hidden_size": 32}

    def build() -> Encoder:
        return Encoder(transformer_of(family, **given), pooling=pooling, normalized=True).eval()

    cpu, gpu = build(), build().to("cuda")
    expected = cpu(pack(texts))
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        ours = gpu(pack(texts).to(torch.device("cuda")))
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.cpu(), expected, rtol=0, atol=tolerance)
    theirs, own = gradients(cpu, expected), gradients(gpu, ours)
    assert own.keys() == theirs.keys()
    for name, gradient in theirs.items():
        # In bf16 single numbers are off by some percent; the direction of a weight's whole gradient is not.
        if gradient.norm() > 1e-3:
            assert (own[name].cpu() - gradient).norm() <= 3 * tolerance * gradient.norm(), name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_embeddings_have_arrived():
    """They are fetched while the next batch is computed: read too early, they are what the memory held before."""
    texts = texts_of([length for length in (70, 60, 50, 40, 3) for _ in range(200)])

    def embedded(encoder: Encoder) -> dict[int, np.ndarray]:
        batches = list(embed(encoder, texts, 4096))
        assert len(batches) > 5
        return {int(i): vector for indices, vectors in batches for i, vector in zip(indices, vectors, strict=True)}

    cpu, gpu = (
        embedded(Encoder(transformer_of("bert", hidden_size=32), pooling="mean", normalized=True).eval().to(device))
        for device in ("cpu", "cuda")
    )
    assert cpu.keys() == gpu.keys() == set(range(len(texts)))
    for i, vector in cpu.items():
        np.testing.assert_allclose(gpu[i], vector, rtol=0, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_attention_dropout(dtype):
    """The flash operator has its own dropout: its mean over many draws is attention without it, and draws differ."""
    packed = lengths_of((4, 5), (4, 16))
    cumulative = packed.cumulative.cuda()
    packed = PackedLengths(packed.groups, cumulative)
    q, k, v = (x.to("cuda", dtype) for x in qkv(84, heads=4, width=16))
    plain, _ = packed_attention(layer(), q, k, v, None, packed=packed)
    draws = torch.stack([packed_attention(layer(), q, k, v, None, packed=packed, dropout=0.2)[0].float() for _ in range(500)])
    assert draws.std(0).mean() > 0.05
    assert (draws.mean(0) - plain.float()).abs().mean() < 0.03
