"""Words that a shell completes: commands and options by typer, and what only this program knows."""

import json
import os
import subprocess
import sys

import pytest
import typer
from conftest import ROOT

from gist_train.cli import app
from gist_train.commands.completion import paths, settings, several_steps
from gist_train.config.loading import load_config
from gist_train.run_folder import MANIFEST, Run

COMMANDS = typer.main.get_command(app).commands


def completed(*words):
    """What bash is answered for the last of these words; it hands them over one a line, cut at each "="."""
    asked = {"_GIST_TRAIN_COMPLETE": "complete_bash", "COMP_WORDS": "\n".join(words), "COMP_CWORD": str(len(words) - 1)}
    code = "import sys; sys.argv = ['gist-train']; from gist_train.cli import main; main()"
    ended = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **asked}, capture_output=True, text=True, timeout=120, cwd=ROOT
    )
    assert ended.stderr == ""
    return ended.stdout.split()


@pytest.fixture
def run(tmp_path):
    """A run folder with checkpoints of the steps 500, 1000 and 1500."""
    run = Run(tmp_path / "runs" / "r")
    for step in (500, 1000, 1500):
        run.checkpoint(step).mkdir(parents=True)
        (run.checkpoint(step) / MANIFEST).write_text("{}")
    return run


def test_a_shell_completes_commands_options_and_keys():
    """It asks this program for each word, as bash does here."""
    assert completed("gist-train", "e") == ["extend", "evaluate", "export", "explain"]
    assert "--resume" in completed("gist-train", "train", "my.yaml", "--r")
    assert completed("gist-train", "explain", "loss.margin") == ["loss.margin", "loss.margin_strategy"]
    assert completed("gist-train", "train", "my.yaml", "--set", "loss.margin") == ["loss.margin=", "loss.margin_strategy="]


def test_bash_cuts_words_at_each_equals_sign():
    """It puts the answer behind the last one: a whole word would stand there twice, and a half one is completed to nothing."""
    words = ("gist-train", "train", "my.yaml", "--set", "loss.margin", "=", "0.1", "--set", "training.precision", "=")
    assert completed(*words) == ["auto", "float32", "float64", "bf16", "fp16"]
    assert completed(*words, "b") == ["bf16"]
    assert completed("gist-train", "export", "r", "--format", "=", "o") == ["onnx"]


def test_a_shell_completes_fields():
    """Of some hundred names nobody knows all."""
    assert paths("loss.mar") == ["loss.margin", "loss.margin_strategy"]
    assert "data.train.path" in paths("data.")
    assert len(paths("")) > 90


def test_a_shell_completes_items_of_lists():
    """An index belongs to a key of a source: without it typing ends where it begins."""
    assert paths("data.train[0].pa") == ["data.train[0].path"]
    assert paths("evaluation.tasks[12].files[3].na") == ["evaluation.tasks[12].files[3].name"]
    assert settings("data.train[0].pa") == ["data.train[0].path="]
    assert settings("data.train[0].on") == []


def test_a_shell_completes_values_that_are_a_few_words():
    """A word of a fixed set is known here, and is mistyped by hand; a number is the user's own."""
    assert settings("loss.margin_strategy=") == ["loss.margin_strategy=absolute", "loss.margin_strategy=relative"]
    assert {"model.pooling=cls", "model.pooling=null"} <= {*settings("model.pooling=")}
    assert settings("loss.contrast_a") == ["loss.contrast_anchors=true", "loss.contrast_anchors=false"]
    assert {"data.train[0].source=jsonl", "data.train[0].source=texts"} <= {*settings("data.train[0].source=")}
    assert settings("training.epochs=") == settings("no.such=") == settings("guide=") == []


def test_every_value_that_is_completed_is_taken(tmp_path):
    """What tab gives and the command then refuses is worse than nothing."""
    of_run = {"name": "c", "model": {"name": "m"}, "guide": {"name": "g"}, "data": {"train": [{"source": "jsonl", "path": "p"}]}}
    (tmp_path / "c.yaml").write_text(json.dumps(of_run))
    for key in ("data.batching", "model.pooling", "training.precision", "loss.mask_duplicates", "schedule.type", "guide.dtype"):
        values = settings(f"{key}=")
        assert len(values) > 1
        for value in values:
            load_config(tmp_path / "c.yaml", [value])


def test_a_shell_completes_steps_of_the_run(run):
    """Which steps have a checkpoint is in a folder three levels down."""
    command = ("gist-train", "evaluate", str(run), "--steps")
    assert completed(*command, "") == ["all", "selected", "500", "1000", "1500"]
    assert completed(*command, "500,1") == ["500,1000", "500,1500"]
    assert completed("gist-train", "export", str(run), "--step", "15") == ["1500"]
    assert completed("gist-train", "train", str(run), "--resume", "") == ["auto", "never", "500", "1000", "1500"]


def test_a_yaml_names_the_run_too(run, write_config):
    """It is what people have at hand; where there is none, or a bad one, the shell hears nothing of it."""
    context = COMMANDS["evaluate"].make_context("evaluate", [str(write_config("r"))], resilient_parsing=True)
    assert several_steps(context, "500,") == ["500,500", "500,1000", "500,1500"]
    bad = run.folder / "bad.yaml"
    bad.write_text("nonsense: [")
    for argument in ([], ["no-such.yaml"], [str(bad)]):
        context = COMMANDS["evaluate"].make_context("evaluate", argument, resilient_parsing=True)
        assert several_steps(context, "") == ["all", "selected"]


def test_a_shell_completes_names_of_the_cache(tmp_path):
    """They are hashes, which nobody types."""
    (tmp_path / "corpora" / "1f2e").mkdir(parents=True)
    (tmp_path / "guides" / "77aa").mkdir(parents=True)
    assert {*completed("gist-train", "cache", str(tmp_path), "--clear", "")} == {"all", "1f2e", "77aa"}
    assert completed("gist-train", "cache", str(tmp_path / "none"), "--clear", "") == ["all"]


def test_a_completion_waits_for_nothing_heavy():
    """A person has pressed tab, and waits."""
    code = (
        "import sys; sys.argv = ['gist-train', '--version']; from gist_train.cli import main\n"
        "try: main()\n"
        "except SystemExit: print([name for name in ('torch', 'transformers', 'datasets', 'numpy') if name in sys.modules])"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert ended.stdout.splitlines()[-1] == "[]", ended.stderr
