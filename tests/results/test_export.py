"""What is handed on: a model that everybody opens, with a card that tells falls as well as rises."""

import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from markdown_it import MarkdownIt
from rich.console import Console
from sentence_transformers import SentenceTransformer
from support.running import add_scores, gist

from gist_train.config.errors import UserError
from gist_train.data.manifests import _own_hash, seal
from gist_train.model.loading import load_finished
from gist_train.results.export import export_model
from gist_train.run_folder import Run

pytestmark = pytest.mark.usefixtures("on_cpu")


@pytest.fixture
def run(write_config, tmp_path):
    """A run with checkpoints at 4 and 8, and figures of steps 0 and 8."""
    ended = gist("train", write_config(training={"batch_size": 8, "max_steps": 8, "precision": "float32"}))
    assert ended.code == 0, ended.err
    folder = tmp_path / "runs" / "run"
    add_scores(folder, 0, {"stsb/spearman": 0.8, "b77/accuracy": 0.5})
    add_scores(folder, 8, {"stsb/spearman": 0.7512, "b77/accuracy": 0.625, "new/ndcg@10": 0.25})
    return folder


def test_the_folder_is_the_trained_student(run, quickstart_texts):
    """Vectors of another pooling or of other weights would be measured by everybody but us."""
    ended = gist("export", run)
    assert ended.code == 0, ended.err
    assert ended.out.strip() == str(run / "export")
    vectors = SentenceTransformer(str(run / "export"), device="cpu").encode(quickstart_texts[:50])
    student = load_finished(str(Run(run).checkpoint(8))).encode(quickstart_texts[:50])
    assert np.abs(vectors - student).max() < 1e-6
    before = load_finished(str(Run(run).checkpoint(4))).encode(quickstart_texts[:50])
    assert np.abs(vectors - before).max() > 1e-4


def test_how_far_it_is_is_shown(run):
    """A model of 7 billion weights takes minutes to copy, and ONNX as long: a still terminal looks like a hang."""
    stream = io.StringIO()
    export_model(Run(run), None, run / "export", console=Console(file=stream, force_terminal=True, width=80))
    assert "exporting, part" in stream.getvalue()
    assert "0/2" in stream.getvalue()


def test_no_training_state_goes_along(run):
    """The moments are twice the model, and a manifest that names missing files is no help."""
    export_model(Run(run), None, run / "export")
    names = {path.name for path in (run / "export").rglob("*")}
    assert {"modules.json", "model.safetensors", "tokenizer.json", "README.md"} <= names
    assert not names & {"training_state.safetensors", "manifest.json"}
    assert [path.name for path in run.iterdir() if path.name.startswith(".export")] == []


def test_a_named_step_is_exported(run, tmp_path):
    """--step N of a run folder, --to DIR; the YAML stands for the run as its folder does."""
    assert gist("export", tmp_path / "run.yaml", "--step", 4, "--to", tmp_path / "model").code == 0
    vectors = SentenceTransformer(str(tmp_path / "model"), device="cpu").encode(["a text"])
    assert np.abs(vectors - load_finished(str(Run(run).checkpoint(4))).encode(["a text"])).max() < 1e-6
    card = (tmp_path / "model" / "README.md").read_text()
    assert "4 steps of 8 triplets: 32 triplets seen" in card
    assert "No task was evaluated at this step." in card
    ended = gist("export", run, "--step", 5)
    assert ended.code == 2
    assert "4, 8" in ended.err


def test_the_card_tells_what_it_is_made_of(run, tmp_path, make_model):
    """A model without its config, data and losses can't be judged or made again."""
    export_model(Run(run), None, tmp_path / "model")
    card = (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    front = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    assert front is not None
    told = yaml.safe_load(front[1])
    assert "base_model" not in told  # a folder of this machine, which the hub could not link
    assert f"Fine-tuned from `{make_model().name}`" in card
    assert str(tmp_path) not in card
    assert told["library_name"] == "sentence-transformers"
    assert "sentence-similarity" in told["tags"]
    assert "8 steps of 8 triplets: 64 triplets seen" in card
    assert "rows.jsonl (jsonl, 96 rows)" in card
    config = yaml.safe_load((run / "config.yaml").read_text())
    block = re.search(r"```yaml\n(.*?)```", card, re.DOTALL)
    assert block is not None
    shown = yaml.safe_load(block[1])
    assert shown["model"] == {**config["model"], "name": make_model().name}  # paths of this machine are cut
    assert {key: shown[key] for key in ("training", "loss", "optimizer")} == {
        key: config[key] for key in ("training", "loss", "optimizer")
    }
    assert json.loads((run / "run.json").read_text())["corpus"] in card
    assert Path(config["guide"]["name"]).name in card
    assert "after the warm-up of 1 steps, in a schedule of 8;" in card


def test_the_card_tells_falls_as_well_as_rises(run, tmp_path):
    """A card with rises only is an advertisement."""
    export_model(Run(run), None, tmp_path / "model")
    lines = (tmp_path / "model" / "README.md").read_text().splitlines()
    assert "| stsb/spearman | 0.8000 | 0.7512 | -0.0488 |" in lines
    assert "| b77/accuracy | 0.5000 | 0.6250 | +0.1250 |" in lines
    assert [line for line in lines if line.startswith("| new/ndcg@10 | not measured | 0.2500 |")]
    assert len([line for line in lines if line.startswith("| ") and "/" in line]) == 3


@pytest.mark.parametrize("normalize", [True, False])
def test_the_card_tells_whether_embeddings_have_length_1(write_config, tmp_path, make_model, normalize):
    """Who compares by dot product must know; the model's own list of modules is what it does."""
    training = {"batch_size": 8, "max_steps": 1, "precision": "float32"}
    model = {"name": str(make_model(normalize=normalize))}
    assert gist("train", write_config("bare", model=model, guide=None, training=training)).code == 0
    export_model(Run(tmp_path / "runs" / "bare"), None, tmp_path / "model")
    modules = json.loads((tmp_path / "model" / "modules.json").read_text())
    assert modules[-1]["type"].endswith("Normalize") == normalize
    card = (tmp_path / "model" / "README.md").read_text()
    assert ("are normalised to length 1" in card, "are not normalised" in card) == (normalize, not normalize)


@pytest.mark.parametrize("guide", ["self", None])
def test_the_card_of_a_run_without_a_guide_model(write_config, tmp_path, guide):
    """guide: null and guide: self have no name to tell."""
    training = {"batch_size": 8, "max_steps": 1, "precision": "float32"}
    assert gist("train", write_config("bare", guide=guide, training=training)).code == 0
    export_model(Run(tmp_path / "runs" / "bare"), None, tmp_path / "model")
    card = (tmp_path / "model" / "README.md").read_text()
    assert ("guided by its own similarities" if guide else "without a guide") in card


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_a_foreign_folder_is_left_alone(run, tmp_path, kind):
    """--to ~/models must not empty ~/models."""
    to = tmp_path / "mine"
    kept = to / "thesis.txt" if kind == "folder" else to
    kept.parent.mkdir(exist_ok=True)
    kept.write_text("years of work")
    ended = gist("export", run, "--to", to)
    assert ended.code == 2
    assert str(to) in ended.err
    assert kept.read_text() == "years of work"


def test_a_checkpoint_and_another_model_are_no_export(run, tmp_path, make_model):
    """`--to` on a checkpoint would take its training state away, on the base model the model that was trained from."""
    mine = tmp_path / "mine"
    shutil.copytree(make_model(), mine)
    for to in (Run(run).checkpoint(4), mine):
        before = sorted(path.name for path in to.rglob("*"))
        ended = gist("export", run, "--to", to)
        assert (ended.code, ended.out) == (2, "")
        assert "no export of this package" in ended.err
        assert sorted(path.name for path in to.rglob("*")) == before
    assert gist("export", run, "--to", tmp_path / "new").code == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path / "new")
        assert gist("export", run, "--to", ".").code == 0


def test_an_export_is_replaced_whole(run, tmp_path):
    """A file that the new export does not have would stay from the old one."""
    to = tmp_path / "model"
    export_model(Run(run), 4, to)
    (to / "left-over.json").write_text("{}")
    export_model(Run(run), 8, to)
    assert not (to / "left-over.json").exists()
    assert "8 steps of 8 triplets" in (to / "README.md").read_text()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".model")] == []


def test_an_export_that_fails_leaves_the_old_one(run, tmp_path, monkeypatch):
    """Half of the new model in place of the old one would be the worst of both."""
    to = tmp_path / "model"
    export_model(Run(run), 4, to)

    def fail(*_, **__):
        raise OSError("no space left on device")

    monkeypatch.setattr("gist_train.results.export.model_card", fail)
    with pytest.raises(OSError, match="no space left"):
        export_model(Run(run), 8, to)
    assert "4 steps of 8 triplets" in (to / "README.md").read_text()
    assert SentenceTransformer(str(to), device="cpu").encode(["a text"]).shape == (1, 32)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".model")] == []


def test_a_damaged_checkpoint_is_not_exported(run, tmp_path):
    """safetensors would copy the flipped bit on to everybody."""
    weights = Run(run).checkpoint(8) / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-9] ^= 4
    weights.write_bytes(data)
    with pytest.raises(UserError, match=r"model\.safetensors"):
        export_model(Run(run), 8, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_files_that_no_training_wrote_stay_behind(run, tmp_path):
    """A pickle, a token or code that somebody put there would be verified by nobody, and pushed to the hub."""
    folder = Run(run).checkpoint(8)
    foreign = {"pytorch_model.bin": b"\x80", ".env": b"HF_TOKEN=x", "modeling_own.py": b"print(1)", "deep/notes.txt": b"a"}
    for name, content in foreign.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    (folder / "link.bin").symlink_to("/etc/passwd")
    lines = Console(file=io.StringIO(), width=80)
    export_model(Run(run), 8, tmp_path / "model", console=lines)
    exported = {str(path.relative_to(tmp_path / "model")) for path in (tmp_path / "model").rglob("*")}
    assert not exported & {*foreign, "deep", "link.bin"}
    assert "model.safetensors" in exported
    (line,) = [line for line in lines.file.getvalue().splitlines() if line.startswith("left in ")]
    assert line.endswith(": .env, deep/notes.txt, link.bin, modeling_own.py, pytorch_model.bin")


HOSTILE = (
    "<img src=x onerror=alert(1)>",
    "[a](javascript:alert(1))",
    "`` ` <script>alert(1)</script> ` ``",
    "```\n<b>out of the block</b>",
    "*a* | _b_ ~~c~~ ![x](http://x/y.png)",
    "&lt;i&gt; \\`<u>",
)
"""What a file's name, a prompt or a path may hold."""


@pytest.mark.parametrize("hostile", HOSTILE)
def test_nothing_of_the_data_becomes_markup(write_config, tmp_path, write_rows, triplets, hostile):
    """The hub shows the card to everybody: a name in somebody's data must run no code in their browser."""
    rows = write_rows("rows.jsonl", [{**triplets[0], "anchor": hostile, "task": hostile}, *triplets[1:]])
    named = rows.with_name(hostile.replace("/", " ").replace("\n", " ") + ".jsonl")
    rows.rename(named)
    source = {"source": "jsonl", "path": str(named), "prompts": {"anchor": hostile}}
    training = {"batch_size": 8, "max_steps": 1, "precision": "float32"}
    path = write_config("hostile", data={"train": [source]}, training=training)
    config = yaml.safe_load(path.read_text())
    config["guide"] = {**config["guide"], "prompt": hostile}
    path.write_text(yaml.safe_dump(config))
    ended = gist("train", path)
    assert ended.code == 0, ended.err
    folder = export_model(Run(tmp_path / "runs" / "hostile"), None, tmp_path / "model")
    body = (folder / "README.md").read_text().split("\n---\n", 1)[1]
    tokens = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).parse(body)
    inline = [child for token in tokens for child in token.children or []]
    ours = ("<details><summary>config.yaml, paths shortened, without tracking and output folders</summary>", "</details>")
    kinds = {token.type for token in (*tokens, *inline) if token.content.strip() not in ours}
    assert not kinds & {"html_block", "html_inline", "link_open", "image", "em_open", "s_open", "strong_open"}
    (block,) = [token for token in tokens if token.type == "fence" and token.info == "yaml"]
    assert yaml.safe_load(block.content)["guide"]["prompt"] == hostile
    assert any(child.type == "code_inline" and named.name.split(".jsonl")[0].split()[0] in child.content for child in inline)


def test_a_manifest_names_files_of_its_own_folder_alone(run, tmp_path):
    """One that names ../../secrets would have an export copy it, and a push publish it."""
    folder = Run(run).checkpoint(8)
    (tmp_path / "secret").write_text("s")
    for name in (os.path.relpath(tmp_path / "secret", folder), str(tmp_path / "secret")):
        seal(folder, json.loads((folder / "manifest.json").read_text()))
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["files"][name] = {"size": 1, "sha256": hashlib.sha256(b"s").hexdigest()}
        manifest["sha256"] = _own_hash(manifest)
        (folder / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(UserError, match="outside of the folder"):
            export_model(Run(run), 8, tmp_path / "model")


def test_a_run_without_a_checkpoint_has_nothing_to_export(write_config, tmp_path):
    """Said as an error of the user's, not as a missing file."""
    ended = gist("export", write_config("never"))
    assert ended.code == 2
    assert "train first" in ended.err
    assert not (tmp_path / "runs" / "never").exists()


def test_the_cards_example_prints_what_the_card_says(run, tmp_path):
    """It is the first thing that a user runs: a line that fails, or another output, and nobody trusts the rest."""
    folder = export_model(Run(run), None, tmp_path / "model")
    card = (folder / "README.md").read_text(encoding="utf-8")
    code, output = re.search(r"```python\n(.*?)```\n+```text\n(.*?)```", card, re.DOTALL).groups()
    anchor = json.loads((run / "run.json").read_text())["examples"][0]["anchor"]
    assert json.dumps(anchor, ensure_ascii=False) in code
    ended = subprocess.run(
        [sys.executable, "-c", code.replace("path/to/run", str(folder))], capture_output=True, text=True, timeout=120, check=True
    )
    assert ended.stdout == output


def test_a_run_that_kept_no_rows_has_an_example(run, tmp_path):
    """Runs of before have no examples in run.json."""
    described = json.loads((run / "run.json").read_text())
    del described["examples"]
    (run / "run.json").write_text(json.dumps(described))
    card = (export_model(Run(run), None, tmp_path / "model") / "README.md").read_text(encoding="utf-8")
    assert "reset my password" in card
    assert "Some of the rows" not in card
