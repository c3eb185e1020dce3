"""ONNX: the model that others run is the one that was trained, and what 8 bits cost is told."""

import json
import shutil
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from rich.console import Console
from sentence_transformers import SentenceTransformer
from support.running import gist
from transformers import DistilBertConfig, DistilBertModel

from gist_train.config.errors import UserError
from gist_train.config.evaluation import StsTask
from gist_train.config.models import ModelConfig
from gist_train.evaluation.measuring import values
from gist_train.evaluation.tasks import load_tasks, measure
from gist_train.model.loading import load_finished
from gist_train.results import onnx as exporting
from gist_train.results.onnx import FLOAT32, INT8, OnnxEncoder, OnnxPlan, add_onnx, onnx_table

pytestmark = pytest.mark.usefixtures("on_cpu")
FAMILIES = {
    "bert-mean": {"family": "bert"},
    "roberta-cls": {"family": "roberta", "layers": 1, "pooling": "cls", "normalize": False},
    "mpnet-mean": {"family": "mpnet", "layers": 1},
    "bert-last": {"family": "bert", "pooling": "lasttoken", "layers": 1},
}
# An export costs seconds, whatever the size of the model: the fast tests share two.
NAMES = ["bert-mean", "roberta-cls", *(pytest.param(name, marks=pytest.mark.slow) for name in ("mpnet-mean", "bert-last"))]
PLAIN = OnnxPlan(ModelConfig(name="m"), quantize=False, sts=(), max_length=None)


@pytest.fixture(scope="module")
def exported(make_model, tmp_path_factory):
    """Makes the folder of a family with ONNX in it, once, and what was reported."""
    made = {}

    def make(name):
        if name not in made:
            folder = tmp_path_factory.mktemp("onnx") / name
            shutil.copytree(make_model(**FAMILIES[name]), folder)
            made[name] = folder, add_onnx(folder, PLAIN)
        return made[name]

    return make


@pytest.fixture(scope="module")
def texts(quickstart_texts):
    """Texts of 1 to over 64 tokens, where the models cut, in no order of length."""
    return [" ".join(quickstart_texts[i : i + 1 + i % 7]) for i in range(40)] + ["a", " ".join(quickstart_texts[:60]), ""]


@pytest.fixture
def sts(tmp_path, quickstart_texts):
    """A file of scored pairs."""
    rows = [{"text1": quickstart_texts[i], "text2": quickstart_texts[3 * i + 1], "score": i % 6} for i in range(30)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {"type": "sts", "name": "pairs", "path": str(path), "columns": {"text1": "text1", "text2": "text2", "score": "score"}}


@pytest.fixture
def run(write_config, tmp_path, sts):
    """A run of two steps, with an sts task in its config."""
    training = {"batch_size": 8, "max_steps": 2, "precision": "float32"}
    config = write_config(training=training, checkpoint={"every": 1, "keep_last": 2}, evaluation={"tasks": [sts]})
    assert gist("train", config).code == 0
    return tmp_path / "runs" / "run"


@pytest.mark.parametrize("name", NAMES)
def test_onnx_gives_the_vectors_of_torch(exported, texts, name):
    """Slow twin: sentence-transformers' own encode, one text at a time, so that nothing is padded there and much here."""
    folder, report = exported(name)
    found = OnnxEncoder(folder / FLOAT32, load_finished(str(folder))).encode(texts)
    twin = SentenceTransformer(str(folder), device="cpu")
    expected = np.stack([twin.encode(text) for text in texts])
    assert found.dtype == np.float32
    assert np.abs(found - expected).max() < 1e-4
    assert np.abs(expected - expected[0]).max() > 1e-2  # else any vector would do
    assert report.difference <= 1e-4
    assert report.int8 is None
    assert report.size == (folder / FLOAT32).stat().st_size


@pytest.mark.slow
def test_a_distilbert_is_exported_too(make_model, texts, tmp_path):
    """DistilBERT takes no token types and has a mask of its own."""
    folder = tmp_path / "distilbert"
    shutil.copytree(make_model(), folder)
    size = json.loads((folder / "config.json").read_text())["vocab_size"]
    torch.manual_seed(3)
    config = DistilBertConfig(vocab_size=size, dim=32, n_layers=1, n_heads=4, hidden_dim=64, max_position_embeddings=80)
    DistilBertModel(config).save_pretrained(folder)
    add_onnx(folder, PLAIN)
    found = OnnxEncoder(folder / FLOAT32, load_finished(str(folder))).encode(texts)
    assert np.abs(found - SentenceTransformer(str(folder), device="cpu").encode(texts)).max() < 1e-4


@pytest.mark.parametrize(
    ("name", "inputs"),
    [
        ("bert-mean", ["input_ids", "attention_mask", "token_type_ids"]),
        ("roberta-cls", ["input_ids", "attention_mask"]),
    ],
)
def test_names_and_axes_are_those_that_others_look_for(exported, name, inputs):
    """sentence-transformers, optimum and transformers.js feed by name, any number of texts of any length."""
    folder, _ = exported(name)
    session = onnxruntime.InferenceSession(str(folder / FLOAT32))
    assert [taken.name for taken in session.get_inputs()] == inputs
    assert {taken.type for taken in session.get_inputs()} == {"tensor(int64)"}
    assert [given.name for given in session.get_outputs()] == ["last_hidden_state"]
    assert session.get_inputs()[0].shape == ["batch_size", "sequence_length"]
    for count, length in [(1, 1), (1, 9), (5, 1), (3, 64)]:
        fed = {key: np.full((count, length), 7 if key == "input_ids" else key == "attention_mask", np.int64) for key in inputs}
        (hidden,) = session.run(None, fed)
        assert hidden.shape == (count, length, 32)


def test_nothing_of_this_machine_is_in_the_file(exported):
    """The exporter writes stack traces into the graph, with the paths of whoever exported."""
    folder, _ = exported("bert-mean")
    content = (folder / FLOAT32).read_bytes()
    assert b"last_hidden_state" in content
    assert b".py" not in content
    assert sorted(path.name for path in (folder / "onnx").iterdir()) == ["model.onnx"]


def test_a_graph_that_ignores_the_mask_is_caught(exported, tmp_path):
    """Texts of one length would pass, and everybody's padded batches be wrong."""
    folder = tmp_path / "model"
    shutil.copytree(exported("bert-mean")[0], folder)
    model = onnx.load(folder / FLOAT32)
    for node in model.graph.node:
        node.input[:] = ["ones" if name == "attention_mask" else name for name in node.input]
    model.graph.node.insert(0, onnx.helper.make_node("Equal", ["attention_mask", "attention_mask"], ["same"]))
    model.graph.node.insert(1, onnx.helper.make_node("Cast", ["same"], ["ones"], to=onnx.TensorProto.INT64))
    onnx.save(model, folder / FLOAT32)
    torchs = load_finished(str(folder))
    one = OnnxEncoder(folder / FLOAT32, torchs).encode(["one text"])
    assert np.abs(one - torchs.encode(["one text"])).max() < 1e-4
    with pytest.raises(ArithmeticError, match=r"other embeddings than torch.*more than 1e-04"):
        exporting._difference(folder, torchs)


def test_int8_is_smaller_and_its_loss_is_told(exported, tmp_path, sts):
    """The figures are those of the two files, on texts cut where evaluation.max_length says."""
    folder = tmp_path / "model"
    shutil.copytree(exported("bert-mean")[0], folder)
    tasks = load_tasks([StsTask(**sts)])
    model = load_finished(str(folder))
    report = exporting._quantized(folder, model, OnnxPlan(ModelConfig(name="m"), quantize=True, sts=tuple(tasks), max_length=5))
    assert sorted(path.name for path in (folder / "onnx").iterdir()) == ["model.onnx", "model_int8.onnx"]
    assert report.size == (folder / INT8).stat().st_size
    assert report.size < 0.6 * (folder / FLOAT32).stat().st_size  # of a model this tiny the graph is a good part
    full = values(measure(model.with_max_length(5), tasks))
    small = values(measure(OnnxEncoder(folder / INT8, model.with_max_length(5)), tasks))
    assert list(report.scores) == ["pairs/spearman", "pairs/pearson"]
    for key, (before, after) in report.scores.items():
        # One pair of near-equal similarities that changes places moves Spearman by 4e-4.
        assert abs(before - full[key]) < (1e-4 if key.endswith("pearson") else 1e-2)
        assert after == small[key]
    before, after = report.scores["pairs/pearson"]
    assert after != before
    assert abs(full["pairs/pearson"] - measure(model, tasks)["pairs/pearson"].value) > 1e-3  # the cut matters
    assert 0.9 < report.lowest_cosine < report.mean_cosine < 1


def test_the_command_exports_checks_and_tells(run):
    """stdout is the folder alone, for a script; what was measured is on stderr; without --format nothing of it is done."""
    assert gist("export", run).code == 0
    assert not (run / "export" / "onnx").exists()
    ended = gist("export", run, "--format", "onnx", "--quantize")
    assert ended.code == 0, ended.err
    assert ended.out == f"{run / 'export'}\n"
    names = {str(path.relative_to(run / "export")) for path in (run / "export").rglob("*")}
    assert {"modules.json", "model.safetensors", "tokenizer.json", "README.md", str(FLOAT32), str(INT8)} <= names
    for told in ("largest difference from torch", "size, MB", "pairs/spearman"):
        assert told in ended.err
    for chatter in ("torch.onnx", "Warning", "pre-processing", "torchvision"):
        assert chatter not in ended.err
    model = load_finished(str(run / "export"))
    vectors = OnnxEncoder(run / "export" / FLOAT32, model).encode(["a text", "another, longer one"])
    assert np.abs(vectors - model.encode(["a text", "another, longer one"])).max() < 1e-4


def test_an_export_that_fails_leaves_the_old_one(run, exported, monkeypatch):
    """A model of other vectors would be handed on, or the good one be gone."""
    assert gist("export", run, "--step", 1).code == 0
    to = run / "export"
    before = {path: path.read_bytes() for path in to.rglob("*") if path.is_file()}

    def untrained(folder):
        shutil.copy(exported("bert-mean")[0] / FLOAT32, folder / FLOAT32)

    def interrupted(folder):
        (folder / FLOAT32).write_bytes(b"half")
        raise KeyboardInterrupt

    def broken(folder):
        (folder / FLOAT32).write_bytes(b"half")

    for write, code, told in ((untrained, 1, "differ by up to"), (interrupted, 130, ""), (broken, 2, "can't be exported")):
        monkeypatch.setattr(exporting, "_write", write)
        ended = gist("export", run, "--format", "onnx")
        assert ended.code == code
        assert ended.out == ""
        assert told in ended.err
        assert {path: path.read_bytes() for path in to.rglob("*") if path.is_file()} == before
        assert [path.name for path in run.iterdir() if path.name.startswith(".export")] == []


def test_a_model_that_torch_cannot_export_is_said_to_be_one(make_model, tmp_path, monkeypatch):
    """A thousand lines of the exporter's would tell the user nothing."""
    folder = tmp_path / "model"
    shutil.copytree(make_model(), folder)
    forward = exporting._LastHiddenState.forward

    def branching(self, input_ids, attention_mask, token_type_ids=None):
        if attention_mask.sum() > 3:
            return forward(self, input_ids, attention_mask, token_type_ids)
        return forward(self, attention_mask, attention_mask, token_type_ids)

    monkeypatch.setattr(exporting._LastHiddenState, "forward", branching)
    with pytest.raises(UserError, match=r"--format onnx\n.*family bert, which can't be exported") as error:
        add_onnx(folder, PLAIN)
    assert len(str(error.value).splitlines()) == 4


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_told_before_any_work(write_config, monkeypatch, package):
    """Minutes into an export, or as a traceback, it would be late."""
    monkeypatch.setitem(sys.modules, package, None)
    ended = gist("export", write_config(), "--format", "onnx")
    assert ended.code == 2
    assert f"{package} not installed" in ended.err
    assert 'pip install "gist-train[onnx]"' in ended.err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--quantize"], "add --format onnx"),
        (["--format", "onxx"], "onxx"),
        (["--format", "onnx", "--quantize"], "evaluation.tasks[1] (gone)"),
    ],
)
def test_wrong_words_are_told(write_config, words, told, tmp_path):
    """8 bits of torch's weights are nothing we make, and a task's file that is not there is told under its place."""
    corpus = {"type": "retrieval", "name": "other", "path": str(tmp_path)}
    missing = {"type": "sts", "name": "gone", "path": str(tmp_path / "gone.tsv")}
    ended = gist("export", write_config(evaluation={"tasks": [corpus, missing]}), *words)
    assert ended.code == 2
    assert told in ended.err
    assert ended.out == ""


def test_without_an_sts_task_the_cosines_are_shown(capsys):
    """A table that says nothing of the loss would look like no loss."""
    int8 = exporting.Int8Report(size=23_000_000, scores={}, lowest_cosine=0.9123, mean_cosine=0.9876)
    Console(width=80).print(onnx_table(exporting.OnnxReport(difference=2e-7, size=90_300_000, int8=int8)))
    told = capsys.readouterr().out
    assert "no sts task" in told
    for figure in ("90.3", "23.0", "2.0e-07", "0.9123", "0.9876"):
        assert figure in told
    Console(width=80).print(onnx_table(exporting.OnnxReport(difference=2e-7, size=90_300_000, int8=None)))
    assert "int8" not in capsys.readouterr().out
