"""A call leaves its process as it was: a notebook has more in it than a training."""

import os
import signal
import threading
import warnings

import numpy as np
import pytest
import sklearn  # noqa: F401  (which changes environment and warnings when it is imported)
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from support.process import changes, process_state
from support.running import assert_same_run, gist

import gist_train
from gist_train import Run, UserError, load_config
from gist_train.api.process import process_as_it_was
from gist_train.run_folder import Run as RunFolder
from gist_train.training.display import Display

pytestmark = pytest.mark.usefixtures("on_cpu")
TASK = {"every": 4}


@pytest.fixture(autouse=True)
def _interrupts():
    """Ctrl-C does what it does in a terminal: where a shell began the tests in the background it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(params=["as torch begins", "as a user set it"])
def process(request, monkeypatch):
    """A process that nobody has touched, or one that a user has."""
    products = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    before = torch.get_float32_matmul_precision(), *(product.fp32_precision for product in products)
    with warnings.catch_warnings():
        if request.param == "as a user set it":
            monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "99")
            monkeypatch.setenv("PYTORCH_ALLOC_CONF", "max_split_size_mb:64")
            torch.set_float32_matmul_precision("medium")
            warnings.filterwarnings("error", "a filter of the user's")
            Accelerator(cpu=True, mixed_precision="bf16")
        yield
    torch.set_float32_matmul_precision(before[0])
    for product, precision in zip(products, before[1:], strict=True):
        product.fp32_precision = precision
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("process")
def test_a_training_leaves_the_process_as_it_was(write_config, write_pairs):
    """Products in another precision, other random numbers or a silent logger would show in the user's next cell, and nowhere
    else."""
    config = load_config(write_config(evaluation={**write_pairs(["one", "two"]), **TASK}))
    before = process_state()
    run = gist_train.train(config)
    assert run.steps == [4, 8, 12]
    assert changes(before, process_state()) == {}


@pytest.mark.usefixtures("process")
def test_other_calls_leave_the_process_as_it_was(write_config, write_pairs, tmp_path):
    """The same of all that does more than to read a file."""
    evaluation = {**write_pairs(["one", "two"]), **TASK}
    training = {"batch_size": 8, "max_steps": 4, "precision": "float32"}
    config = load_config(write_config(evaluation=evaluation, training=training, selection={"metric": "pairs/spearman"}))
    before = process_state()
    gist_train.plan(config, measure=True)
    gist_train.audit(config)
    gist_train.mine(config, tmp_path / "mined.jsonl")
    run = gist_train.train(config)
    run.evaluate(steps="all")
    run.select()
    run.export()
    run.report()
    assert changes(before, process_state()) == {}


@pytest.mark.usefixtures("process")
def test_a_call_that_fails_leaves_the_process_as_it_was(write_config):
    """A user who corrects a typo calls again in the same process."""
    config = load_config(write_config(guide={"name": "./nowhere"}))
    before = process_state()
    with pytest.raises(UserError, match="nowhere"):
        gist_train.train(config)
    assert changes(before, process_state()) == {}


def test_all_is_put_back_whatever_was_done():
    """The twin of the state that is compared: each part of it is changed here, and is back."""
    before = process_state()
    with process_as_it_was():
        os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] = "9"
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        torch.set_float32_matmul_precision("high")
        torch.backends.cuda.enable_cudnn_sdp(not torch.backends.cuda.cudnn_sdp_enabled())
        torch.set_num_threads(torch.get_num_threads() + 1)
        torch.manual_seed(7)
        np.random.seed(7)
        Accelerator(cpu=True)
        warnings.simplefilter("ignore")
        inside = process_state()
    changed = {*changes(before, inside)}
    assert {
        "environment ONEDNN_PRIMITIVE_CACHE_CAPACITY",
        "environment GLOO_SOCKET_IFNAME",
        "products",
        "attention",
        "torch",
        "random of torch",
        "random",
        "accelerate",
        "warnings",
    } <= changed
    assert changes(before, process_state()) == {}


def test_precisions_may_follow_each_other(write_config):
    """accelerate keeps one precision a process, and refuses the second training of a notebook."""
    for name, precision in (("one", "float32"), ("two", "bf16")):
        training = {"batch_size": 8, "max_steps": 1, "precision": precision}
        assert gist_train.train(load_config(write_config(name, training=training))).steps == [1]


def test_another_thread_may_train(write_config):
    """A page or a service calls from a thread of its own, where Python sets no handler of a signal."""
    config, runs = load_config(write_config(training={"batch_size": 8, "max_steps": 2, "precision": "float32"})), []
    thread = threading.Thread(target=lambda: runs.append(gist_train.train(config)))
    thread.start()
    thread.join()
    assert runs[0].steps == [2]


def interrupt_at(step, number, monkeypatch):
    """Has the signal come right after a step, as it may."""
    show = Display.show

    def shown(display, record, row):
        show(display, record, row)
        if record.step == step:
            signal.raise_signal(number)

    monkeypatch.setattr(Display, "show", shown)


@pytest.mark.usefixtures("process")
def test_an_interrupt_leaves_a_checkpoint_and_a_call_resumes(write_config, tmp_path, monkeypatch, capsys):
    """A notebook's stop button costs nothing: the second call gives the very weights and metrics of a run that nobody stopped."""
    path, folder = write_config(), tmp_path / "runs"
    before = process_state()
    with monkeypatch.context() as patched:
        interrupt_at(5, signal.SIGINT, patched)
        with pytest.raises(KeyboardInterrupt):
            gist_train.train(load_config(path))
    assert changes(before, process_state()) == {}
    assert Run(folder / "run").steps == [4, 5]
    assert "Stopped at step 5; checkpoint saved. Make the same call again to resume." in capsys.readouterr().err
    run = gist_train.train(load_config(path))
    assert "resuming from step 5" in capsys.readouterr().err
    assert run.steps == [4, 5, 8, 12]
    gist_train.train(load_config(write_config("whole")))
    assert_same_run(folder / "run", folder / "whole", 12)


def test_a_signal_that_a_program_heeds_is_handed_on(write_config, monkeypatch, tmp_path):
    """A program that saves its own work on SIGUSR1 must still be told, and may not export what is half trained."""
    numbers = []
    before = signal.signal(signal.SIGUSR1, lambda number, _: numbers.append(number))
    try:
        interrupt_at(3, signal.SIGUSR1, monkeypatch)
        with pytest.raises(gist_train.Stopped, match="SIGUSR1"):
            gist_train.train(load_config(write_config()))
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert (numbers, Run(tmp_path / "runs" / "run").steps) == ([signal.SIGUSR1], [3])


def test_a_second_interrupt_does_not_end_the_program(write_config, monkeypatch):
    """A notebook's kernel holds all its user's objects: to lose them for a training that waits would be a bad trade."""
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    monkeypatch.setattr("gist_train.training.signals.PATIENCE", 0.0)
    show = Display.show

    def shown(display, record, row):
        show(display, record, row)
        if record.step == 2:
            for _ in range(2):
                signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Display, "show", shown)
    with pytest.raises(KeyboardInterrupt):
        gist_train.train(load_config(write_config()))
    assert ended == []


def test_the_command_line_says_what_it_said(write_config, monkeypatch, tmp_path):
    """The same stop, told to somebody who typed a command."""
    interrupt_at(5, signal.SIGINT, monkeypatch)
    ended = gist("train", write_config())
    assert ended.code == 130
    assert "Stopped at step 5; checkpoint saved. Run the same command to resume." in ended.err
    assert RunFolder(tmp_path / "runs" / "run").saved_steps() == [4, 5]


@pytest.mark.usefixtures("process")
def test_a_call_beside_another_one_is_refused(write_config):
    """They would share torch's random numbers and flags: neither would be what it is alone, and the process not as it was."""
    config = load_config(write_config())
    told: list[str] = []

    def beside():
        try:
            gist_train.plan(config)
        except UserError as error:
            told.append(str(error))

    with process_as_it_was():
        thread = threading.Thread(target=beside)
        thread.start()
        thread.join()
        gist_train.plan(config)  # of the same thread
    assert "another thread of this process" in told[0]
    thread = threading.Thread(target=beside)
    thread.start()
    thread.join()
    assert len(told) == 1
