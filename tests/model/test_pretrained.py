"""Models as people keep them: what is loaded, what is refused, and that what is saved opens elsewhere."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Pooling, Transformer
from support.families import PACKED_FAMILIES, transformer_of
from transformers import AlbertConfig, AlbertModel, PreTrainedTokenizerFast, Qwen3ForCausalLM, Qwen3Model

from gist_train.config.errors import UserError
from gist_train.config.models import GuideConfig, ModelConfig
from gist_train.data.fingerprints import content_hash
from gist_train.model.dropout import Dropout
from gist_train.model.encoder import pack
from gist_train.model.families import FAMILIES, family_of
from gist_train.model.folders import identity
from gist_train.model.loading import load_finished, load_guide, load_student
from gist_train.model.pretrained import Pretrained

TEXTS = ["My Card was declined", "exchange rate?", "a", "top up " * 60, "ÄÖ ñ 日本"]


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def student(folder: Path, **settings: object) -> Pretrained:
    return load_student(ModelConfig(name=str(folder), **settings))


def refused(name: object, **settings: object) -> UserError:
    with pytest.raises(UserError) as caught:
        load_student(ModelConfig(name=str(name), **settings))
    # `raise ... from None`: a user sees the message and no library's traceback.
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    return caught.value


def copied(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to))


def set_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def opened_elsewhere(folder: Path, **settings: object) -> np.ndarray:
    return SentenceTransformer(str(folder), device="cpu", **settings).encode(TEXTS)


# What the config says against what the model says.


@pytest.mark.parametrize("saved", ["cls", "mean", "lasttoken"])
def test_pooling_is_the_models_unless_given(make_model, tmp_path, saved):
    """A pooling that only the forward pass knows would be lost in the saved folder, and others would open another model."""
    folder = make_model(pooling=saved)
    other = {"cls": "mean", "mean": "last", "lasttoken": "cls"}[saved]
    assert student(folder).encoder.pooling == {"lasttoken": "last"}.get(saved, saved)
    changed = student(folder, pooling=other)
    assert changed.encoder.pooling == other
    assert not np.allclose(changed.encode(TEXTS), student(folder).encode(TEXTS), atol=1e-3)
    changed.save(tmp_path / "saved")
    np.testing.assert_allclose(opened_elsewhere(tmp_path / "saved"), changed.encode(TEXTS), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family", ["bert", "roberta"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_tokens_are_those_of_the_tokenizers_own_call(make_model, quickstart_texts, family, side):
    """Tokens are made past it, for speed: a special token, a cut or a normalisation less, and the student reads something else
    than sentence-transformers feeds it."""
    model = student(make_model(family), max_length=9)
    model.tokenizer.truncation_side = side
    texts = [*TEXTS, *quickstart_texts[:200], "[SEP] [MASK] x", "ÀÉ\u200b 日本語 \t tabs", "word " * 100, "😀"]
    model.tokenizer(texts[:2], padding=True)  # leaves its padding behind
    expected = model.tokenizer(texts, truncation=True, max_length=9)["input_ids"]
    assert [tokens.tolist() for tokens in model.tokens(texts)] == expected


def test_max_length(make_model, tmp_path):
    """Cut where the config says, special tokens included, and saved so."""
    folder = make_model()
    assert student(folder).max_length == 64
    short = student(folder, max_length=9)
    assert [len(tokens) for tokens in short.tokens(TEXTS)][2:4] == [3, 9]
    assert short.tokens(TEXTS)[3][-1] == short.tokenizer.sep_token_id
    assert max(map(len, short.with_max_length(20).tokens(TEXTS))) == 20
    assert short.max_length == 9
    short.save(tmp_path / "saved")
    assert SentenceTransformer(str(tmp_path / "saved"), device="cpu").max_seq_length == 9
    np.testing.assert_allclose(opened_elsewhere(tmp_path / "saved"), short.encode(TEXTS), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("family", "positions"), [("bert", 80), ("roberta", 79), ("xlm-roberta", 79), ("mpnet", 78), ("qwen3", 80)]
)
def test_no_more_tokens_than_positions(make_model, family, positions):
    """RoBERTa and MPNet lose their first positions to the padding id (0 and 1 here). One token too many is an index error
    at the first long text, hours into a run, so it must be said at once."""
    longest = student(make_model(family), max_length=positions)
    assert longest.encode(["word " * 200]).shape == (1, 32)
    assert len(longest.tokens(["word " * 200])[0]) == positions
    error = refused(make_model(family), max_length=positions + 1)
    assert f"at most {positions} tokens" in error.faults[0].expected
    assert "model.max_length" in error.faults[0].fix


LAYERS = {"distilbert": "transformer.layer", "modernbert": "layers", "mistral": "layers", "qwen3": "layers"}
"""Where they are, elsewhere than in `encoder.layer`."""


@pytest.mark.parametrize(
    ("family", "keep"),
    [
        *((family, keep) for family in ("bert", "roberta", "mpnet") for keep in ([0], [1, 3], [0, 1, 2, 3])),
        ("distilbert", [1, 3]),
        ("modernbert", [0, 2]),
        ("modernbert", [0, 1, 3]),
        ("mistral", [1, 3]),
        ("qwen3", [1, 3]),
        ("qwen3", [0, 1, 2, 3]),
    ],
)
def test_layers_that_are_kept(make_model, tmp_path, family, keep):
    """Each kept layer has the base's weights and the others are gone, from the saved folder too: its config must count them, and
    say which of them are local."""
    folder = make_model(family, layers=4)
    base, cut = student(folder), student(folder, layers=keep)
    where = LAYERS.get(family, "encoder.layer")
    whole, left = (model.encoder.transformer.get_submodule(where) for model in (base, cut))
    for at, layer in enumerate(keep):
        theirs, ours = whole[layer].state_dict(), left[at].state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert len(left) == len(keep)
    same = np.allclose(cut.encode(TEXTS), base.encode(TEXTS), atol=1e-6)
    assert same == (len(keep) == 4)
    cut.save(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())[
        "n_layers" if family == "distilbert" else "num_hidden_layers"
    ] == len(keep)
    np.testing.assert_allclose(opened_elsewhere(tmp_path / "saved"), cut.encode(TEXTS), rtol=1e-6, atol=1e-6)


def test_modernberts_first_layer_stays_first(make_model):
    """It alone has no norm: a saved model in which another one stands there opens as a third model, without a word."""
    (fault,) = refused(make_model("modernbert", layers=3), layers=[1, 2]).faults
    assert fault.where == "model.layers"
    assert "layer 0 first" in fault.expected


def test_layers_that_the_model_does_not_have(make_model):
    """An index error says neither which key is wrong nor what is expected."""
    (fault,) = refused(make_model(), layers=[0, 2]).faults
    assert (fault.where, fault.found, fault.expected) == ("model.layers", "[0, 2]", "layers 0 to 1")


def test_dropout_is_the_models_unless_given(make_model):
    """0 must turn dropout off and null must not; every dropout is the cheap one."""
    for given, expected in ((None, {0.2}), (0.0, {0.0}), (0.4, {0.4})):
        model = student(make_model(dropout=0.2), dropout=given)
        layers = [m for m in model.encoder.modules() if isinstance(m, torch.nn.Dropout)]
        assert {type(m) for m in layers} == {Dropout}
        assert {m.p for m in layers} == expected
        texts = pack(model.tokens(TEXTS))
        model.encoder.train()
        with torch.no_grad():
            trained, evaluated = model.encoder(texts), model.encoder.eval()(texts)
        assert torch.allclose(trained, evaluated, atol=1e-6) == (given == 0.0)


@pytest.mark.parametrize("family", ["bert", "roberta", "mpnet", "distilbert", "modernbert", "qwen3"])
def test_every_weight_that_is_trained_has_a_gradient(make_model, family):
    """The pooler has no part in the embedding: if it were trained, weight decay would shrink it, and DistributedDataParallel
    would wait for its gradient. Any other weight that is frozen would not learn."""
    model = student(make_model(family))
    model.encoder.train()(pack(model.tokens(TEXTS))).sum().backward()
    for name, parameter in model.encoder.named_parameters():
        assert parameter.requires_grad == ("pooler." not in name), name
        assert (parameter.grad is not None) == parameter.requires_grad, name
    pooled = any("pooler." in name for name, _ in model.encoder.named_parameters())
    assert pooled == (family in ("bert", "roberta", "mpnet"))


def test_weights_are_float32_whatever_the_folder_says(make_model, tmp_path):
    """Updates of 5e-6 vanish in bf16 weights."""
    folder = copied(make_model(), tmp_path / "half")
    half = {name: value.to(torch.bfloat16) for name, value in load_file(folder / "model.safetensors").items()}
    save_file(half, folder / "model.safetensors", metadata={"format": "pt"})
    set_json(folder / "config.json", dtype="bfloat16")
    for model in (student(folder), load_guide(GuideConfig(name=str(folder)))):
        assert {p.dtype for p in model.encoder.parameters()} == {torch.float32}


# Folders.


@pytest.mark.parametrize("family", ["bert", "roberta", "xlm-roberta", "mpnet", "distilbert", "modernbert", "mistral", "qwen3"])
def test_what_is_saved_opens_elsewhere(make_model, tmp_path, family):
    """A checkpoint is a model: with weights that have changed since they were loaded."""
    model = student(make_model(family))
    with torch.no_grad():
        for parameter in model.encoder.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    model.save(tmp_path / "saved")
    ours = model.encode(TEXTS)
    np.testing.assert_allclose(opened_elsewhere(tmp_path / "saved"), ours, rtol=1e-6, atol=1e-6)
    again = load_finished(str(tmp_path / "saved"))
    np.testing.assert_allclose(again.encode(TEXTS), ours, rtol=1e-6, atol=1e-6)
    assert again.tokenizer_fingerprint() == model.tokenizer_fingerprint()
    assert not list((tmp_path / "saved").rglob("*.bin"))  # no pickle


def test_plain_transformers_folder(make_model):
    """The usual base model has no modules.json: mean pooling, as sentence-transformers does."""
    folder = make_model()
    plain = folder.with_name(folder.name + "-plain")
    assert not (plain / "modules.json").exists()
    model = student(plain)
    assert (model.encoder.pooling, model.encoder.normalized, model.max_length) == ("mean", False, 64)
    np.testing.assert_allclose(model.encode(TEXTS), opened_elsewhere(plain), rtol=1e-6, atol=1e-6)


def test_lower_casing_before_the_tokenizer(make_model, tmp_path):
    """Old folders ask for it in sentence_bert_config.json: a cased tokenizer alone would give other tokens. It is a part of
    the tokenizer from the moment it is loaded, so that a checkpoint has the tokens, and the fingerprint, of its base."""
    folder = copied(make_model(cased=True), tmp_path / "lower")
    upper, lower = student(folder), TEXTS[0].lower()
    assert upper.tokens([TEXTS[0]])[0].tolist() != upper.tokens([lower])[0].tolist()
    set_json(folder / "sentence_bert_config.json", do_lower_case=True)
    model = student(folder)
    assert model.tokens([TEXTS[0]])[0].tolist() == upper.tokens([lower])[0].tolist()
    assert model.tokenizer_fingerprint() != upper.tokenizer_fingerprint()
    np.testing.assert_allclose(model.encode(TEXTS), opened_elsewhere(folder), rtol=1e-6, atol=1e-6)
    model.save(tmp_path / "saved")
    saved = student(tmp_path / "saved")
    assert saved.tokens([TEXTS[0]])[0].tolist() == upper.tokens([lower])[0].tolist()
    assert saved.tokenizer_fingerprint() == model.tokenizer_fingerprint()


@pytest.mark.parametrize("name", ["/no/such/folder", "./no-such-folder", "nobody/no-such-model", "a b", "folder"])
@pytest.mark.parametrize("load", [refused, None], ids=["student", "guide"])
def test_no_such_model(tmp_path, name, load):
    """A slip of the pen in a name is the commonest fault: the message must say the name and the key."""
    if name == "folder":  # it exists, and holds no model
        name = str(tmp_path)
    if load:
        error = load(name)
    else:
        with pytest.raises(UserError) as caught:
            load_guide(GuideConfig(name=name))
        error = caught.value
    (fault,) = error.faults
    assert fault.where == ("model.name" if load else "guide.name")
    assert name in fault.found
    assert "\n" not in fault.found


def with_modules(make_model, folder: Path, *further: object, pooling: str = "mean", **options: bool) -> Path:
    base = make_model()
    transformer = Transformer(str(base.with_name(base.name + "-plain")), max_seq_length=64)
    modules = [transformer, Pooling(32, pooling, **options), *further]
    SentenceTransformer(modules=modules, device="cpu").save_pretrained(str(folder), create_model_card=False)
    return folder


def test_a_dense_module_is_refused(make_model, tmp_path):
    """Left out without a word, the embeddings would not be the model's."""
    folder = with_modules(make_model, tmp_path / "dense", Dense(32, 16))
    (fault,) = refused(folder).faults
    assert str(folder) in fault.where
    assert fault.found == "Transformer -> Pooling -> Dense"


@pytest.mark.parametrize(("pooling", "options"), [("max", {}), ("weightedmean", {}), ("mean", {"include_prompt": False})])
def test_poolings_that_are_not_there_are_refused(make_model, tmp_path, pooling, options):
    """Anything but cls, mean and last over all tokens would be pooled as something else. The fix must fix it."""
    folder = with_modules(make_model, tmp_path / "model", pooling=pooling, **options)
    (fault,) = refused(folder).faults
    assert f"pooling {pooling}" in fault.found
    assert "model.pooling" in fault.fix
    assert student(folder, pooling="cls").encoder.pooling == "cls"


def test_layers_of_a_family_that_nobody_has_cut(make_model, tmp_path):
    """An AttributeError is no answer to a config."""
    base = make_model()
    config = AlbertConfig(
        vocab_size=400, embedding_size=16, hidden_size=32, num_attention_heads=4, intermediate_size=64, max_position_embeddings=80
    )
    AlbertModel(config).save_pretrained(tmp_path / "albert")
    PreTrainedTokenizerFast.from_pretrained(base).save_pretrained(tmp_path / "albert")
    model = student(tmp_path / "albert")
    assert not model.encoder.packed
    np.testing.assert_allclose(model.encode(TEXTS), opened_elsewhere(tmp_path / "albert"), rtol=1e-6, atol=1e-6)
    (fault,) = refused(tmp_path / "albert", layers=[0]).faults
    assert fault.where == "model.layers"


# Decoders.


def test_a_plain_causal_model_is_pooled_at_its_last_token(make_model, tmp_path):
    """Without modules.json sentence-transformers takes the last token's state of what was made to predict the next one."""
    folder = make_model("qwen3")
    transformer = Qwen3Model.from_pretrained(folder)
    whole = Qwen3ForCausalLM(transformer.config)
    whole.model = transformer
    whole.save_pretrained(tmp_path / "causal")
    PreTrainedTokenizerFast.from_pretrained(folder).save_pretrained(tmp_path / "causal")
    model = student(tmp_path / "causal")
    assert (model.encoder.pooling, model.encoder.packed) == ("last", True)
    np.testing.assert_allclose(model.encode(TEXTS), opened_elsewhere(tmp_path / "causal"), rtol=1e-6, atol=2e-6)
    model.save(tmp_path / "saved")
    np.testing.assert_allclose(opened_elsewhere(tmp_path / "saved"), model.encode(TEXTS), rtol=1e-6, atol=2e-6)


def test_an_empty_text_of_a_tokenizer_that_adds_nothing(make_model):
    """Without a token of its own, its last token would be another text's, and its mean nothing divided by nothing."""
    model = student(make_model("mistral"))
    assert model.tokens(["", "a"])[0].tolist() == [model.tokenizer.eos_token_id]
    found = model.encode(["a", "", "my card"])
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found[[0, 2]], model.encode(["a", "my card"]), rtol=1e-6, atol=1e-6)
    assert not np.allclose(found[1], found[0], atol=1e-3)


# Fingerprints.


def test_tokenizer_fingerprint(make_model, tmp_path):
    """What decides the tokens and nothing else: a length that is forgotten gives a student texts cut for another, a weight
    that counts tokenises a corpus again for every checkpoint."""
    one = student(make_model())
    assert one.tokenizer_fingerprint() == student(make_model()).tokenizer_fingerprint()
    assert re.fullmatch("[0-9a-f]{32}", one.tokenizer_fingerprint())
    trained = student(make_model(), layers=[1])
    trained.save(tmp_path / "trained")
    assert one.tokenizer_fingerprint() == student(tmp_path / "trained").tokenizer_fingerprint()
    others = [one.with_max_length(32), student(make_model(cased=True)), student(make_model(vocabulary=300))]
    assert len({model.tokenizer_fingerprint() for model in [one, *others]}) == 4


def test_tokenizer_fingerprint_does_not_change_with_use(make_model):
    """The tokenizer remembers its last call's truncation and padding; sentence-transformers pads with it too."""
    model = student(make_model())
    before = model.tokenizer_fingerprint()
    model.with_max_length(20).tokens(TEXTS)
    assert model.tokenizer_fingerprint() == before
    model.tokenizer(TEXTS, padding="max_length", max_length=50)
    assert model.tokenizer_fingerprint() == before


def test_identity_is_of_the_content(make_model, tmp_path):
    """Embeddings of a guide that was trained on since, in the same folder, are another model's; a copy's are the same."""
    folder = copied(make_model(), tmp_path / "a")
    before = identity(str(folder), None, "guide", content_hash)
    assert identity(str(copied(folder, tmp_path / "b")), None, "guide", content_hash) == before
    weights = load_file(folder / "model.safetensors")
    name = sorted(weights)[0]
    weights[name].view(-1)[0] += 1e-3
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    changed = identity(str(folder), None, "guide", content_hash)
    set_json(next(folder.rglob("1_Pooling/config.json")), extra=1)
    assert len({before, changed, identity(str(folder), None, "guide", content_hash)}) == 3


def test_identity_of_a_hub_model_is_its_commit(monkeypatch):
    """`main` is another model tomorrow."""
    monkeypatch.setattr("gist_train.model.folders.commit_of", lambda name, revision: f"0a1b2c of {name} {revision}")
    assert identity("some/model", "main", "guide", content_hash) == "some/model@0a1b2c of some/model main"


def test_identity_of_no_model():
    """It is asked before the guide is loaded, so it must be as plain a message."""
    with pytest.raises(UserError, match="nobody/no-such-model") as caught:
        identity("nobody/no-such-model", None, "guide", content_hash)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


# The guide.


def test_the_guide_is_frozen_whatever_the_student_does(make_model):
    """A guide with dropout, or one that moves with the student's updates, decides about negatives by chance. Even where both
    are the same folder, they share nothing."""
    folder = make_model()
    model, guide = student(folder), load_guide(GuideConfig(name=str(folder)))
    before = guide.encode(TEXTS)
    model.encoder.train()
    model.encoder(pack(model.tokens(TEXTS))).sum().backward()
    with torch.no_grad():
        for parameter in model.encoder.parameters():
            parameter.add_(1.0)
    assert not any(module.training for module in guide.encoder.modules())
    assert not any(p.requires_grad or p.grad is not None for p in guide.encoder.parameters())
    np.testing.assert_array_equal(guide.encode(TEXTS), before)
    assert not guide.encoder(pack(guide.tokens(TEXTS))).requires_grad


def test_a_finished_model_is_in_eval_mode(make_model):
    """And a fault names the command line's option, not a key of the config."""
    model = load_finished(str(make_model()))
    assert not model.encoder.training
    assert not any(p.requires_grad for p in model.encoder.parameters())
    with pytest.raises(UserError) as caught:
        load_finished("nobody/no-such-model")
    assert caught.value.faults[0].where == "--model"


def test_missing_weights_are_refused_and_not_drawn_at_random(make_model, tmp_path):
    """transformers fills what a file lacks with random numbers and goes on: such a guide would fill the store for good."""
    folder = tmp_path / "torn"
    shutil.copytree(make_model(), folder)
    weights = load_file(folder / "model.safetensors")
    save_file(
        {name: tensor for name, tensor in weights.items() if "layer.1" not in name},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(UserError, match=r"encoder\.layer\.1"):
        load_guide(GuideConfig(name=str(folder)))
    save_file(
        {name: tensor for name, tensor in weights.items() if not name.startswith("pooler.")},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    load_guide(GuideConfig(name=str(folder)))


def test_a_model_without_a_pooler_is_the_same_one_each_time(make_model, tmp_path):
    """Its random numbers made another model of it in each process: the base was measured anew, and no two runs were alike."""
    folder = tmp_path / "no-pooler"
    shutil.copytree(make_model(), folder)
    weights = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if not name.startswith("pooler.")}
    assert len(kept) < len(weights)
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    first, second = (load_finished(str(folder)) for _ in range(2))
    assert first.fingerprint() == second.fingerprint()
    second.save(tmp_path / "saved")
    assert load_finished(str(tmp_path / "saved")).fingerprint() == first.fingerprint()


def test_a_longer_cut_than_the_model_has_positions_is_refused(make_model):
    """The position table ends there: an index error at the first long text, in the middle of a run."""
    model = load_finished(str(make_model()))
    assert model.with_max_length(80).max_length == 80
    with pytest.raises(UserError, match="at most 80 tokens"):
        model.with_max_length(81)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dimension", [1, 8, 31])
def test_truncated_embeddings_are_those_of_sentence_transformers(make_model, normalize, dimension):
    """The first numbers, of length 1 again where the model has a Normalize module: a logistic regression on shorter vectors is
    another one, and a user of `encode(normalize_embeddings=True)` would see other figures."""
    folder = make_model(normalize=normalize)
    model = load_finished(str(folder))
    found = model.with_truncation(dimension).encode(TEXTS)
    theirs = SentenceTransformer(str(folder), device="cpu", truncate_dim=dimension)
    expected = theirs.encode(TEXTS, normalize_embeddings=normalize)
    assert found.shape == (len(TEXTS), dimension)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert np.allclose(np.linalg.norm(found, axis=1), 1) == normalize
    assert model.encode(TEXTS).shape == (len(TEXTS), 32)


def test_a_truncation_to_all_numbers_is_none(make_model):
    """The figures at the full width are those that the model has without any of this, to the last bit."""
    model = load_finished(str(make_model()))
    assert model.with_truncation(None) is model
    np.testing.assert_array_equal(model.with_truncation(32).encode(TEXTS), model.encode(TEXTS))
    for beyond in (33, 0):
        with pytest.raises(UserError, match=r"evaluation\.truncate_dim") as caught:
            model.with_truncation(beyond)
        assert "from 1 to 32" in caught.value.faults[0].expected


def test_what_is_saved_is_whole_whatever_was_measured(make_model, tmp_path):
    """A checkpoint that opens with a truncate_dim gives its users fewer numbers than it was trained to give."""
    student(make_model()).with_truncation(8).save(tmp_path / "saved")
    assert "truncate_dim" not in json.loads((tmp_path / "saved" / "config_sentence_transformers.json").read_text())
    assert opened_elsewhere(tmp_path / "saved").shape == (len(TEXTS), 32)


def test_a_tokenizer_that_cannot_be_written_is_an_oserror(make_model, tmp_path):
    """tokenizers raises a bare Exception where a disk is full or a name is taken, which the command line shows as a traceback."""
    (tmp_path / "model" / "tokenizer.json").mkdir(parents=True)
    with pytest.raises(OSError, match=f"{tmp_path}/model: .*irectory"):
        student(make_model()).save(tmp_path / "model")


def test_each_family_has_one_row():
    """Two rows for a class, or a name of layers that leads nowhere, would show when somebody trains that family."""
    assert len({family.model for family in FAMILIES}) == len(FAMILIES) == len(PACKED_FAMILIES)
    for name in PACKED_FAMILIES:
        transformer = transformer_of(name)
        family = family_of(transformer)
        assert family is not None, name
        assert len(transformer.get_submodule(family.layers)) == 2
        assert hasattr(transformer, "embeddings") or not family.positions_after_padding
    assert family_of(transformer_of("deberta-v2")) is None
