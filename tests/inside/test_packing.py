"""A packed SentenceTransformer against itself, padded: the same embeddings and gradients from fewer tokens, and a way back."""

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import AdaptiveLayerLoss, GISTEmbedLoss
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, StaticEmbedding
from support.families import DECODERS, PACKED_FAMILIES
from support.trainers import assert_same, columns_of, loss_and_gradients, opened

from gist_train import UserError, pack, unpack
from gist_train.inside.packing import lay_out, runs_packed
from gist_train.model.attention import PACKED

pytestmark = pytest.mark.usefixtures("one_thread")
TEXTS = [text for column in columns_of(6, 3) for text in column]


def encoded(model, texts=TEXTS, **options):
    return torch.from_numpy(model.encode(texts, show_progress_bar=False, **options))


def gradients(model, texts=TEXTS):
    """Of a number that every embedding has a part in."""
    model.zero_grad()
    embeddings = model(model.preprocess(texts))["sentence_embedding"]
    value = (embeddings * torch.linspace(-1, 1, embeddings.numel()).view_as(embeddings)).sum()
    value.backward()
    return value.item(), {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("family", PACKED_FAMILIES)
def test_every_family_gives_what_it_gave(family, make_model):
    """Encoded, and in training, with texts padded on either side; packed attention never sees a neighbour's tokens."""
    model = opened(make_model(family, dropout=0.0, pooling="lasttoken" if family in DECODERS else "mean"))
    if family in DECODERS:
        model.tokenizer.padding_side = "left"
    vectors, expected = encoded(model), gradients(model.train())
    assert pack(model) is model
    assert runs_packed(model)
    torch.testing.assert_close(encoded(model), vectors, rtol=1e-5, atol=1e-5)
    assert_same(gradients(model.train()), expected)


@pytest.mark.parametrize("pooling", ["cls", "mean", "lasttoken", "max", "weightedmean", ("cls", "mean")], ids=str)
def test_every_pooling_and_what_is_behind_it(make_model, pooling):
    """Only the transformer is packed: its states go on padded, to any pooling, a Dense layer and Normalize."""
    plain = opened(make_model(dropout=0.0))
    pooled = Pooling(32, pooling)
    dense = Dense(pooled.get_embedding_dimension(), 24)
    model = SentenceTransformer(modules=[plain[0], pooled, dense, Normalize()], device="cpu")
    vectors, expected = encoded(model), gradients(model.train())
    pack(model)
    torch.testing.assert_close(encoded(model), vectors, rtol=1e-5, atol=1e-5)
    assert_same(gradients(model.train()), expected)


def test_prompts_and_empty_texts(make_model):
    """A prompt that pooling leaves out, and a text without a token, are as they were."""
    plain = opened(make_model(dropout=0.0))
    model = SentenceTransformer(modules=[plain[0], Pooling(32, "mean", include_prompt=False)], device="cpu")
    texts = [*TEXTS, "", "a"]
    options = [{"prompt": "what is asked: "}, {"output_value": "token_embeddings"}]
    expected = [encoded(model, texts, **options[0]), model.encode(texts, **options[1])]
    pack(model)
    torch.testing.assert_close(encoded(model, texts, **options[0]), expected[0], rtol=1e-5, atol=1e-5)
    for found, wanted in zip(model.encode(texts, **options[1]), expected[1], strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    decoder = pack(opened(make_model("mistral", dropout=0.0)))
    assert not encoded(decoder, ["", "a"])[0].isnan().any()


def test_only_real_tokens_are_computed(make_model):
    """That is what it is for: padded, the layers would see as many tokens as the longest text has, for each."""
    model, seen = opened(make_model(dropout=0.0)), []
    model[0].auto_model.embeddings.register_forward_hook(lambda _, __, out: seen.append(out.shape[:-1].numel()))
    features = model.preprocess(["a", "b", "how are you and what do you do the whole day long"])
    real = int(features["attention_mask"].sum())
    model(dict(features))
    pack(model)(dict(features))
    assert seen == [features["input_ids"].numel(), real]
    assert seen[0] > 1.5 * seen[1]


def test_unpack_gives_the_model_back(make_model, tmp_path):
    """What was packed can be saved, copied and unpacked: nothing of it may stay."""
    model = opened(make_model(dropout=0.0), training=False)
    attention, names = model[0].auto_model.config._attn_implementation, [*model.state_dict()]
    vectors = encoded(model)
    model.save_pretrained(str(tmp_path / "plain"), create_model_card=False)
    pack(pack(model))
    model.save_pretrained(str(tmp_path / "packed"), create_model_card=False)
    assert [*model.state_dict()] == names
    assert _files(tmp_path / "packed") == _files(tmp_path / "plain")
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for weight in twin.parameters():
            weight.zero_()
    torch.testing.assert_close(encoded(model), vectors, rtol=1e-5, atol=1e-5)
    assert runs_packed(twin)
    assert encoded(twin).abs().max() == 0
    assert unpack(model) is model
    assert not runs_packed(model)
    assert model[0].auto_model.config._attn_implementation == attention
    assert "forward" not in vars(model[0])
    torch.testing.assert_close(encoded(unpack(model)), vectors, rtol=0, atol=0)


def _files(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def test_flash_attentions_own_way_is_set_aside(make_model):
    """A model that flattens its inputs itself hands on no mask: it must pad while it is packed, and flatten again after."""
    model = opened(make_model(dropout=0.0))
    model[0].can_flatten_inputs = True
    pack(model)
    assert model[0].can_flatten_inputs is False
    encoded(model)
    unpack(model)
    assert model[0].can_flatten_inputs is True


def test_their_losses_run_with_it(make_model):
    """GISTEmbedLoss over a packed model gives what it gives over a padded one."""
    model = opened(make_model(dropout=0.0))
    guide = opened(make_model(width=48, layers=1, cased=True, vocabulary=300, seed=1), training=False)
    columns = columns_of(8, 3)
    expected = loss_and_gradients(GISTEmbedLoss(model, guide), model, columns)
    pack(model)
    assert_same(loss_and_gradients(GISTEmbedLoss(model, guide), model, columns), expected)


def test_padding_on_either_side_is_laid_out_alike():
    """A token's place in its text counts, and not its column."""
    right = torch.tensor([[5, 6, 0, 0], [7, 8, 9, 3], [4, 0, 0, 0]])
    left = torch.tensor([[0, 0, 5, 6], [7, 8, 9, 3], [0, 0, 0, 4]])
    first, second = (lay_out(ids, (ids > 0).long()) for ids in (right, left))
    for laid, ids in ((first, right), (second, left)):
        assert laid.texts.input_ids.tolist() == [[4, 5, 6, 7, 8, 9, 3]]
        assert laid.texts.positions.tolist() == [[0, 0, 1, 0, 1, 2, 3]]
        assert laid.texts.lengths.groups == ((1, 1), (1, 2), (1, 4))
        assert laid.texts.restore.tolist() == [1, 2, 0]
        assert ids.flatten()[laid.places].tolist() == laid.texts.input_ids[0].tolist()


def test_a_copy_on_another_device_is_told(make_model):
    """DataParallel copies a model to each GPU, and not what stands for its forward: copies would use the first GPU's weights."""
    model = pack(opened(make_model(dropout=0.0)))
    features = model.preprocess(["a text"])
    with pytest.raises(UserError, match="texts on meta, and weights on cpu"):
        model({**features, "input_ids": features["input_ids"].to("meta")})


def test_what_cannot_run_packed_is_told(make_model):
    """An unknown family, no transformer at all, and states that packed layers do not give: each with what to do."""
    with pytest.raises(UserError, match="DebertaV2Model"):
        pack(opened(make_model("deberta-v2", dropout=0.0)))
    words = StaticEmbedding(opened(make_model()).tokenizer, embedding_dim=8)
    with pytest.raises(UserError, match="StaticEmbedding"):
        pack(SentenceTransformer(modules=[words], device="cpu"))
    with pytest.raises(UserError, match=r'open it first: SentenceTransformer\("a/name"\)'):
        pack("a/name")
    model = pack(opened(make_model(dropout=0.0)))
    with pytest.raises(UserError, match="two segments"):
        model({**model.preprocess(["a text"]), "token_type_ids": torch.tensor([[0, 0, 1, 1]])})
    with pytest.raises(UserError, match="padded"):
        model({"input_ids": torch.tensor([[1, 2]])})
    guide = opened(make_model(width=48, layers=1, seed=1), training=False)
    with pytest.raises(UserError, match="output_hidden_states"):
        loss_and_gradients(AdaptiveLayerLoss(model, GISTEmbedLoss(model, guide)), model, columns_of(4, 2))
    other = opened(make_model(dropout=0.0))
    other[0].auto_model.config.output_hidden_states = True
    with pytest.raises(UserError, match="output_hidden_states"):
        pack(other)
    other[0].backend = "onnx"
    with pytest.raises(UserError, match="onnx"):
        pack(other)


def test_it_runs_in_another_process(make_model, tmp_path):
    """encode(pool=...) sends the model to processes that have never packed one."""
    model = pack(SentenceTransformer(str(make_model()), device="cpu"))
    (tmp_path / "model.pickle").write_bytes(pickle.dumps(model))
    code = "import pickle, sys; m = pickle.load(open(sys.argv[1], 'rb')); print(m.encode(['a short text', 'b']).tolist())"
    ran = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "model.pickle")], capture_output=True, text=True, check=False, timeout=300
    )
    assert ran.returncode == 0, ran.stderr
    np.testing.assert_allclose(json.loads(ran.stdout.splitlines()[-1]), model.encode(["a short text", "b"]), atol=1e-6)


def test_another_attention_after_packing_is_refused(make_model):
    """No other one sees where a text ends: tokens of all texts would attend to each other, and nothing would say so."""
    model = pack(SentenceTransformer(str(make_model()), device="cpu"))
    model[0].auto_model.set_attn_implementation("eager")
    with pytest.raises(UserError, match="another attention"):
        model.encode(["a text", "another, longer text"])
    model[0].auto_model.set_attn_implementation(PACKED)
    model.encode(["a text"])
