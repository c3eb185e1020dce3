"""Memory that runs out, really: a process that may have no more than some hundred MiB beyond what it has."""

import os
import re
import resource
import sys
from contextlib import redirect_stderr, redirect_stdout
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from support.running import exit_code_of, gist

from gist_train import cli
from gist_train.memory import MemoryShortageError, asked_for, lowered, naming_work

MIB = 1 << 20
FIRST_STEP, EMBEDDING = "gist_train.training.loop.set_learning_rate", "gist_train.model.pretrained.embed_batches"


def limited(words, function, more, told):
    """`gist-train WORDS`, with at most `more` MiB beyond what this process has when `function` is called first."""
    module, name = function.rsplit(".", 1)
    called = getattr(import_module(module), name)

    def with_limit(*args, **options):
        setattr(import_module(module), name, called)
        held = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (held + more * MIB, held + more * MIB))
        return called(*args, **options)

    setattr(import_module(module), name, with_limit)
    sys.argv = ["gist-train", *map(str, words)]
    with Path(told).open("w") as file, redirect_stderr(file), redirect_stdout(file):
        cli.main()


@pytest.fixture
def rows(write_rows, quickstart_texts):
    """512 short rows of one task, and 512 long ones of another."""
    few = [" ".join(text.split()[:3]) for text in quickstart_texts[:512]]
    short = [{"anchor": text, "positive": f"it is {i}", "task": "short"} for i, text in enumerate(few)]
    words = " ".join(quickstart_texts[:300]).split()
    long = [" ".join(words[i : i + 80]) for i in range(512)]
    return write_rows("both.jsonl", short + [{"anchor": text, "positive": text[::-1], "task": "long"} for text in long])


@pytest.fixture
def run(write_config, rows, make_model):
    """Writes the YAML of a run whose first step reads the short rows, and its second one the long ones."""

    def write(**sections):
        plain = {
            "model": {"name": str(make_model(width=192, layers=3)), "dropout": 0.0},
            "guide": None,
            "data": {"train": [{"source": "jsonl", "path": str(rows)}]},
            "training": {"batch_size": 512, "max_steps": 2, "precision": "float32", "seed": 1},
            "checkpoint": {"every": 1},
        }
        return write_config(**plain | sections)

    return write


@pytest.mark.slow
def test_a_step_says_what_lowers_it_with_a_value_that_fitted(run, tmp_path):
    """The first step fits and is kept; with what is said of the second one the same command then goes on to the end."""
    path, told = run(), tmp_path / "told.txt"
    assert exit_code_of(limited, ["train", path], FIRST_STEP, 700, told) == 1
    message = re.search(
        r"^out of memory: training, step 2\n  asked for .+\n  fix       (.+)\n  safe      (.+)\n", told.read_text(), re.M
    )
    assert message is not None, told.read_text()
    fixes = message[1].split("; ")
    assert [fix.split(":")[0] for fix in fixes] == [
        "training.max_tokens_per_forward",
        "training.gradient_checkpointing",
        "loss.block_size",
        "model.max_length",
    ]
    value, this = re.fullmatch(r".*: (\d+) \(which fitted before, and ([\d,]+) did not\)", fixes[0]).groups()
    assert int(this.replace(",", "")) > 3 * int(value)
    assert message[2] == "the checkpoint of step 1: the same command goes on from there"
    assert "Traceback" not in told.read_text()
    ended = exit_code_of(limited, ["train", path, "--set", f"training.max_tokens_per_forward={value}"], FIRST_STEP, 700, told)
    assert ended == 0, told.read_text()
    assert "resuming from step 1" in told.read_text()


def test_the_guides_pass_says_what_lowers_it(run, make_model, tmp_path):
    """The same of the guide, and of a task that is evaluated."""
    told = tmp_path / "told.txt"
    path = run(guide={"name": str(make_model(width=768, layers=4, vocabulary=300)), "dtype": "float32"})
    assert exit_code_of(limited, ["prepare", path], EMBEDDING, 20, told) == 1
    assert re.search(
        r"""^out of memory: embedding with the guide
  asked for ([\d.]+ [MG]iB|an amount that was not said)
  fix       guide.batch_tokens: 2048 \(in place of 4,096\); guide.max_length: 32 \(in place of 64\)
  safe      what was whole before is whole now: the same command goes on from there\n\Z""",
        told.read_text(),
        re.MULTILINE,
    ), told.read_text()


def test_evaluation_says_what_lowers_it(run, write_pairs, quickstart_texts, tmp_path):
    """The model that is measured."""
    told = tmp_path / "told.txt"
    path = run(evaluation=write_pairs([" ".join([text] * 9) for text in quickstart_texts[:600]]))
    assert exit_code_of(limited, ["evaluate", path], EMBEDDING, 20, told) == 1
    assert "\nout of memory: evaluating pairs\n" in told.read_text()
    assert "  fix       evaluation.max_length: 32 (in place of 64)\n" in told.read_text()


@pytest.mark.parametrize(
    ("fails", "words"),
    [
        (lambda: torch.empty(1 << 50), "4,194,304.0 GiB"),
        (lambda: np.empty(1 << 50), "8.00 PiB"),
        (lambda: bytearray(1 << 60), "an amount that was not said"),
    ],
    ids=["torch", "numpy", "Python"],
)
def test_what_was_asked_for_is_told(fails, words):
    """Each says it in words of its own."""
    with (
        pytest.raises(MemoryShortageError, match="out of memory: the work\n") as raised,
        naming_work(lambda: ("the work", ["a: 1", "b: 2"])),
    ):
        fails()
    assert f"  asked for {words}\n  fix       a: 1; b: 2\n" in str(raised.value)


def test_the_gpus_words_are_known():
    """As torch 2.13 has them; on a GPU they are really raised (test_steps_cuda)."""
    error = torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 20.25 GiB. GPU 0 has a total capacity of 139.80 GiB of which"
    )
    assert asked_for(error) == "20.25 GiB, on the GPU"
    assert asked_for(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")).endswith(
        "on the GPU"
    )
    assert asked_for(OSError(12, "Cannot allocate memory")) == "an amount that was not said"
    assert asked_for(RuntimeError("could not create a primitive")) == "an amount that was not said"
    assert asked_for(RuntimeError("could not create a primitive descriptor for a matmul primitive")) is None
    assert asked_for(RuntimeError("shapes do not fit")) is None
    assert asked_for(ValueError("out of memory")) is None


def test_values_that_are_named_can_be_set():
    """A setting at its least is not named; what fitted is preferred to half."""
    assert lowered("a", 1000, None, 512) == "a: 512 (in place of 1,000)"
    assert lowered("a", 9000, 2000, 512) == "a: 2000 (which fitted before, and 9,000 did not)"
    assert lowered("a", 9000, 100, 512) == "a: 512 (in place of 9,000)"
    assert lowered("a", 9000, 9000, 512) == "a: 4500 (in place of 9,000)"
    assert lowered("a", 512, None, 512) is None


@pytest.mark.usefixtures("on_cpu")
def test_other_work_names_the_command(write_config, monkeypatch):
    """Wherever memory ends, there is no traceback; an error of ours keeps its own."""

    def fail(*_, **__):
        raise failure

    monkeypatch.setattr("gist_train.preparation.build_corpus", fail)
    failure = MemoryError("Unable to allocate 3.20 GiB for an array")
    ended = gist("prepare", write_config())
    assert ended.code == 1
    assert ended.err.splitlines()[-4:] == [
        "out of memory: gist-train prepare",
        "  asked for 3.20 GiB",
        "  fix       free memory that other programs use, or take a machine that has more",
        "  safe      what was whole before is whole now: the same command goes on from there",
    ]
    failure = RuntimeError("a fault of ours")
    with pytest.raises(RuntimeError, match="a fault of ours"):
        gist("prepare", write_config())
