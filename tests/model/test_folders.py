"""What a model's folder says counts: vectors are those of `SentenceTransformer(folder).encode`, or it is refused by name."""

import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, LayerNorm, Normalize, Pooling, Transformer
from support.families import FAMILIES
from support.running import gist
from transformers import AutoTokenizer, GPT2Config, GPT2Model

from gist_train.config.errors import UserError
from gist_train.config.models import GuideConfig, ModelConfig
from gist_train.model import opening
from gist_train.model.folders import identity
from gist_train.model.loading import load_finished, load_guide, load_student
from gist_train.model.pretrained import Pretrained
from gist_train.model.whole import WholeModel

TEXTS = [
    "Does renewing count from today?",
    "late again",
    "My back tyre is flat and the valve snapped off while I was pumping it",
    "a",
]
LOADS = (
    load_finished,
    lambda name: load_guide(GuideConfig(name=name)),
    lambda name: load_student(ModelConfig(name=name)),
)
PROMPTS = {"query": "query: ", "document": "passage: "}


def changed(folder, target, **keys):
    """A copy of a model folder whose config_sentence_transformers.json has these keys."""
    shutil.copytree(folder, target)
    path = target / "config_sentence_transformers.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))
    return target


def with_modules(folder, target, *modules, pooling="mean"):
    """The transformer of a folder with pooling and further modules."""
    transformer = Transformer(str(folder), max_seq_length=64)
    width = transformer.auto_model.config.hidden_size
    made = SentenceTransformer(modules=[transformer, Pooling(width, pooling), *modules], device="cpu")
    made.save_pretrained(str(target), create_model_card=False)
    return target


def assert_same(model, folder, texts=TEXTS, atol=2e-6):
    expected = SentenceTransformer(str(folder), device="cpu").encode(list(texts))
    np.testing.assert_allclose(model.encode(texts), expected, rtol=0, atol=atol)


SAID = [
    {},
    {"prompts": PROMPTS, "default_prompt_name": "query"},
    {"truncate_dim": 12},
    {"prompts": PROMPTS, "default_prompt_name": "document", "truncate_dim": 7},
]
"""What config_sentence_transformers.json may say, by which embeddings differ."""


@pytest.mark.parametrize("said", range(len(SAID)))
@pytest.mark.parametrize("family", FAMILIES)
def test_vectors_are_sentence_transformers(make_model, tmp_path, family, said):
    """A figure that the exported model does not give is worth nothing: student, what it saves, --model, of all families."""
    pooling = ("mean", "cls", "lasttoken")[said % 3]
    folder = changed(make_model(family, pooling=pooling, normalize=said % 2 == 0), tmp_path / "model", **SAID[said])
    assert_same(load_finished(str(folder)), folder)
    student = load_student(ModelConfig(name=str(folder)))
    assert_same(student, folder)
    student.save(tmp_path / "saved")
    assert_same(load_finished(str(tmp_path / "saved")), folder)
    assert_same(student, tmp_path / "saved")


@pytest.mark.parametrize("pooling", ["max", "mean_sqrt_len_tokens", "weightedmean"])
@pytest.mark.parametrize("family", ["bert", "mpnet", "modernbert", "qwen2"])
def test_what_only_encodes_may_pool_in_any_way(make_model, tmp_path, family, pooling):
    """A guide is never trained: there is no reason to refuse what sentence-transformers runs."""
    folder = with_modules(make_model(family), tmp_path / "model", Normalize(), pooling=pooling)
    model = load_finished(str(folder))
    assert isinstance(model, WholeModel)
    assert_same(model, folder)
    with pytest.raises(UserError, match=f"pooling {pooling}"):
        load_student(ModelConfig(name=str(folder)))


@pytest.mark.parametrize("modules", [[Dense(32, 16)], [LayerNorm(32)], [Dense(32, 16), Normalize()]])
def test_what_only_encodes_may_have_further_modules(make_model, tmp_path, modules):
    """EmbeddingGemma, LaBSE, sentence-t5 and stella end in Dense layers, and are guides that people choose."""
    folder = with_modules(make_model(), tmp_path / "model", *modules)
    for model in (load_finished(str(folder)), load_guide(GuideConfig(name=str(folder)))):
        assert_same(model, folder)
        assert model.dimensions == SentenceTransformer(str(folder), device="cpu").get_embedding_dimension()
    cut = load_finished(str(folder)).with_truncation(5)
    whole = SentenceTransformer(str(folder), device="cpu").encode(TEXTS)[:, :5]
    if model.normalized:
        whole = whole / np.linalg.norm(whole, axis=1, keepdims=True)
    np.testing.assert_allclose(cut.encode(TEXTS), whole, rtol=0, atol=2e-6)
    with pytest.raises(UserError, match="Transformer -> Pooling, then Normalize"):
        load_student(ModelConfig(name=str(folder)))


def test_a_guide_of_any_modules_fills_a_store(make_model, write_config, tmp_path):
    """The store's width is what the model gives, and not its transformer's."""
    guide = with_modules(make_model(width=48), tmp_path / "guide", Dense(48, 20))
    ended = gist(
        "train", write_config(guide={"name": str(guide), "dtype": "float32"}, training={"batch_size": 8, "max_steps": 2})
    )
    assert ended.code == 0, ended.err
    (meta,) = (tmp_path / "runs" / ".cache" / "guides").glob("*/meta.json")
    assert json.loads(meta.read_text())["width"] == 20


def test_a_guides_default_prompt_is_in_its_store(make_model, write_config, tmp_path):
    """Its folder says how it wants to be asked; without that its similarities are another model's."""
    folder = changed(make_model(width=48), tmp_path / "guide", prompts=PROMPTS, default_prompt_name="query")
    plain = {"name": str(make_model(width=48)), "dtype": "float32"}
    for section in ({"name": str(folder), "dtype": "float32"}, {**plain, "prompt": "query: "}, plain):
        assert gist("prepare", write_config(guide=section)).code == 0
    stores = (tmp_path / "runs" / ".cache" / "guides").glob("*/embeddings.bin")
    contents = sorted(store.read_bytes() for store in stores)
    assert len(contents) == 3
    assert len({*contents}) == 2  # the default is the same text as the prompt


def test_what_training_does_otherwise_is_said(make_model, write_config, tmp_path):
    """Nobody can guess that rows are trained without the prompt that the export puts before every text."""
    folder = changed(make_model(), tmp_path / "m", prompts=PROMPTS, default_prompt_name="query", truncate_dim=12)
    for command in ("plan", "prepare", "train"):
        ended = gist(command, write_config(model={"name": str(folder)}, guide=None, training={"batch_size": 8, "max_steps": 2}))
        assert ended.code == 0, ended.err
        assert 'sets the default prompt "query: "' in ended.err
        assert "cuts embeddings to 12 of 32 dimensions" in ended.err


def coded(folder, target):
    """A folder with code of its own, which gives other embeddings than BERT's."""
    shutil.copytree(folder, target)
    (target / "modeling_own.py").write_text(
        "from transformers import BertConfig, BertModel\n\n\n"
        "class OwnConfig(BertConfig):\n    pass\n\n\n"
        "class OwnModel(BertModel):\n    config_class = OwnConfig\n\n"
        "    def forward(self, *args, **kwargs):\n        out = super().forward(*args, **kwargs)\n"
        "        out.last_hidden_state = out.last_hidden_state.sign() * out.last_hidden_state.abs() ** 4\n        return out\n"
    )
    config = json.loads((target / "config.json").read_text())
    names = {"AutoConfig": "modeling_own.OwnConfig", "AutoModel": "modeling_own.OwnModel"}
    (target / "config.json").write_text(json.dumps({**config, "architectures": ["OwnModel"], "auto_map": names}))
    return target


def test_code_of_its_own_is_run_or_refused(make_model, write_config, write_pairs, tmp_path):
    """Run as a plain BERT it is another model: from the base to checkpoint, choice, average and export."""
    folder = coded(make_model(), tmp_path / "own")
    with pytest.raises(UserError, match=r"code of its own \(modeling_own.OwnModel\)"):
        load_student(ModelConfig(name=str(folder)))
    plain = load_finished(str(make_model())).encode(TEXTS)
    assert np.abs(load_finished(str(folder), trust_remote_code=True).encode(TEXTS) - plain).max() > 0.01
    path = write_config(
        model={"name": str(folder), "trust_remote_code": True},
        guide=None,
        optimizer={"lr": 1e-12},
        training={"batch_size": 8, "max_steps": 8, "precision": "float32"},
        evaluation=write_pairs(["late again", "My back tyre is flat", "no lights here", "a text", "another one"]),
    )
    assert gist("train", path).code == 0
    scores = json.loads(gist("evaluate", path, "--json").out)
    assert scores["tuned"] == pytest.approx(scores["base"], abs=1e-3)
    chosen = gist("select", path, "--metric", "pairs/spearman", "--average", 2, "--merge-base", 0.5, "--json")
    assert chosen.code == 0, chosen.err
    assert json.loads(chosen.out)["figures"] == pytest.approx(scores["base"], abs=1e-3)
    assert gist("export", path).code == 0
    export = str(tmp_path / "runs" / "run" / "export")
    refused = gist("evaluate", path, "--model", export, "--set", "model.trust_remote_code=false")
    assert (refused.code, "trust_remote_code=true" in refused.err) == (2, True)
    again = json.loads(gist("evaluate", path, "--model", export, "--json").out)
    assert again == pytest.approx(scores["base"], abs=1e-3)


def test_a_folder_without_a_tokenizer_is_refused(make_model, tmp_path):
    """transformers makes one of five special tokens: a text is then its number of words."""
    folder = tmp_path / "m"
    shutil.copytree(make_model(), folder, ignore=shutil.ignore_patterns("tokenizer*", "vocab*", "special*"))
    for load in LOADS:
        with pytest.raises(UserError, match="special tokens: its files are missing"):
            load(str(folder))


def test_tokens_without_an_embedding_are_refused(make_model, tmp_path):
    """torch's IndexError, or an assert on a GPU, comes at the first text that holds one: after hours."""
    folder = tmp_path / "m"
    shutil.copytree(make_model(), folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["zzyzx"])
    tokenizer.save_pretrained(folder)
    for load in LOADS:
        with pytest.raises(UserError, match=r'\("zzyzx"\), and an embedding of'):
            load(str(folder))


def test_a_model_that_says_more_tokens_than_it_has_is_cut_there(make_model, tmp_path):
    """`--model` has no key for a length; sentence-transformers itself fails at longer texts."""
    folder = tmp_path / "m"
    shutil.copytree(make_model(), folder)
    path = folder / "sentence_bert_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "max_seq_length": 999}))
    model = load_finished(str(folder))
    assert (model.max_length, model.positions) == (80, 80)
    assert_same(model, folder)
    with pytest.raises(UserError, match=r"guide.max_length"):
        load_guide(GuideConfig(name=str(folder)))


def test_notes_beside_a_model_are_no_part_of_it(make_model, tmp_path):
    """A note in a guide's folder must not cost its whole pass again; another weight, prompt or module must."""
    folder = tmp_path / "m"
    shutil.copytree(make_model(), folder)

    def now():
        return identity(str(folder), None, "guide", lambda path: path.read_bytes().hex())

    before = now()
    for name in ("notes.txt", "trainer_state.json", "eval.json", "runs/r/checkpoints/step-000000001/model.safetensors"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    assert now() == before
    for name in ("model.safetensors", "tokenizer.json", "1_Pooling/config.json", "config_sentence_transformers.json"):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content + b" ")
        assert now() != before, name
        (folder / name).write_bytes(content)
    assert now() == before


def test_a_model_without_linear_layers_trains(write_config, make_model, tmp_path):
    """GPT-2 multiplies in Conv1D modules: what counts operations must not end a training."""
    plain = tmp_path / "plain"
    tokenizer = AutoTokenizer.from_pretrained(make_model())
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=4, n_positions=80, pad_token_id=tokenizer.pad_token_id
    )
    GPT2Model(config).save_pretrained(plain)
    tokenizer.save_pretrained(plain)
    folder = with_modules(plain, tmp_path / "gpt2")
    assert isinstance(load_student(ModelConfig(name=str(folder))), Pretrained)
    training = {"batch_size": 8, "max_steps": 2, "precision": "float32"}
    for command in ("plan", "train"):
        ended = gist(command, write_config(model={"name": str(folder)}, guide=None, training=training))
        assert ended.code == 0, ended.err


def test_a_pointer_of_git_lfs_is_named(make_model, tmp_path):
    """A clone without git-lfs looks whole, and safetensors says that a header is too large."""
    folder = tmp_path / "m"
    shutil.copytree(make_model(), folder)
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 90868376\n")
    for load in LOADS:
        with pytest.raises(UserError, match=r"model.safetensors of \d+ bytes: a pointer of git-lfs"):
            load(str(folder))


def test_weights_that_are_cut_short_are_an_error_of_the_user(make_model, tmp_path):
    """A download that broke off; the message names the model."""
    folder = tmp_path / "m"
    shutil.copytree(make_model(), folder)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    for load in LOADS:
        with pytest.raises(UserError, match=r"could not be loaded: .*(incomplete|covered)"):  # it is there, whatever its path
            load(str(folder))


def as_pickle(folder):
    """The folder with its weights as torch's pickles alone."""
    for weights in folder.rglob("model.safetensors"):
        torch.save(load_file(weights), weights.with_name("pytorch_model.bin"))
        weights.unlink()
    return folder


def converted(folder):
    script = ROOT / "scripts" / "convert_to_safetensors.py"
    return subprocess.run([sys.executable, script, folder], check=False, capture_output=True, text=True)


@pytest.mark.parametrize("modules", [(), (Dense(32, 16),)])
def test_a_pickle_is_refused_and_can_be_converted(make_model, tmp_path, modules):
    """Unpickling runs what the file says; a Dense layer of a guide is unpickled by sentence-transformers as the weights are."""
    folder = with_modules(make_model(), tmp_path / "model", *modules)
    expected = SentenceTransformer(str(folder), device="cpu").encode(TEXTS)
    as_pickle(folder)
    for load in LOADS:
        with pytest.raises(UserError, match=r"pytorch_model\.bin: weights as a pickle") as caught:
            load(str(folder))
        assert "scripts/convert_to_safetensors.py" in str(caught.value)
    assert converted(folder).returncode == 0
    np.testing.assert_allclose(load_finished(str(folder)).encode(TEXTS), expected, rtol=0, atol=2e-6)
    (tmp_path / "empty").mkdir()
    assert [converted(tmp_path / name).returncode for name in ("empty", "none")] == [2, 2]


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_a_hostile_pickle_runs_nowhere(make_model, tmp_path):
    """Neither where it is refused nor where it is converted; and torch's advice to load it all the same is not passed on."""
    folder = as_pickle(with_modules(make_model(), tmp_path / "model"))
    torch.save(Hostile(tmp_path / "ran"), folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="weights as a pickle"):
        load_finished(str(folder))
    ended = converted(folder)
    assert (ended.returncode, "not weights alone" in ended.stderr) == (1, True)
    assert not (tmp_path / "ran").exists()
    assert not list(folder.glob("*.safetensors"))


def test_what_loads_a_model_can_not_unpickle(tmp_path):
    """A model of the hub is looked at by its loaders alone; afterwards torch is as it was."""
    before = torch.load
    with pytest.raises(opening._PickleError, match=r"w\.bin"), opening._no_pickle():
        torch.load(tmp_path / "w.bin", weights_only=True)
    assert torch.load is before


def test_nothing_in_the_package_unpickles():
    """A loader that was added in a hurry would be found by whoever attacks the next user."""
    allowed = {"vars(torch)", "before = torch.load"}
    for path in (ROOT / "gist_train").rglob("*.py"):
        for line in path.read_text().splitlines():
            if re.search(r"import (pickle|dill|joblib|shelve|marshal)|torch\.load|read_pickle", line):
                assert any(part in line for part in allowed), f"{path}: {line}"
            if "np.load(" in line:
                assert "allow_pickle=False" in line, f"{path}: {line}"


def test_a_guide_that_has_prompts_and_gets_none_is_told(make_model, write_config, tmp_path):
    """E5's similarities without its prompts are another model's; nobody reads a folder's config before choosing a guide."""
    folder = changed(make_model(width=48), tmp_path / "guide", prompts=PROMPTS)
    said = "guide.prompt is not set: " + str(folder) + ' reads texts without the prompts of its folder (query: "query: "'
    assert said in gist("prepare", write_config(guide={"name": str(folder)})).err
    assert said not in gist("prepare", write_config(guide={"name": str(folder), "prompt": "query: "})).err


@pytest.mark.parametrize("whole", [False, True])
def test_an_adapter_is_refused_by_name(make_model, tmp_path, whole):
    """Its weights stand beside those that the packed encoder reads: the model would be measured as if it were not tuned."""
    folder = tmp_path / "adapter"
    if whole:
        shutil.copytree(make_model(), folder)
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "org/base"}')
    for load in LOADS:
        with pytest.raises(UserError, match='a LoRA adapter of "org/base"'):
            load(str(folder))
