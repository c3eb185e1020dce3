"""The model that `select` chose, in W&B (offline), MLflow and trackio as they really are."""

import base64
import hashlib
import os

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer
from support.running import gist
from support.wandb_file import records_of

from gist_train.data.leases import held
from gist_train.run_folder import Run
from gist_train.training.tracker_stores import Mlflow

pytestmark = pytest.mark.usefixtures("on_cpu")


@pytest.fixture
def environment(monkeypatch, tmp_path):
    """Nothing of this machine's user, and no copy of a model in the home folder."""
    for name in [name for name in os.environ if name.startswith(("MLFLOW_", "WANDB_", "TRACKIO_S"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "wandb-data"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    yield
    import wandb

    wandb.teardown()


@pytest.fixture
def trained(write_config, write_pairs, quickstart_texts, environment):  # noqa: ARG001
    """The YAML of a run of 8 steps with evaluations and two checkpoints, trained with no tracker on."""
    evaluation = {**write_pairs(quickstart_texts[:20]), "every": 4}
    training = {"batch_size": 8, "max_steps": 8, "precision": "float32"}
    path = write_config(guide=None, training=training, evaluation=evaluation, selection={"metric": "pairs/spearman"})
    assert gist("train", path).code == 0
    return path


def sums(folder):
    """Path in a folder -> SHA-256 of the file."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_the_selected_model_is_kept_by_each(trained, tmp_path):
    """What each has are the files that `export` writes, no training state among them, in the run of the training."""
    run, project = tmp_path / "runs" / "run", tmp_path.name
    trackers = f"{{log_every: 1, wandb: {{}}, mlflow: {{}}, trackio: {{project: {project}}}, tensorboard: {{}}}}"
    assert gist("train", trained, "--set", f"tracking={trackers}").code == 0  # which have all of the run now
    keeping = f"{{wandb: {{log_model: true}}, mlflow: {{log_model: true}}, trackio: {{project: {project}, log_model: true}}}}"
    events = sums(run / "tensorboard")
    ended = gist("select", trained, "--around", 4, "--window", 0, "--set", f"tracking={keeping}")
    assert (ended.code, "warning" in ended.err) == (0, False), ended.err
    assert gist("export", run).code == 0
    expected = sums(run / "export")
    assert {"model.safetensors", "modules.json", "README.md"} <= expected.keys()
    assert not {"training_state.safetensors", "manifest.json"} & expected.keys()
    assert not (run / ".tracked-model").exists()
    assert sums(run / "tensorboard") == events

    from mlflow import MlflowClient

    (found,) = MlflowClient(f"sqlite:///{run.parent / 'mlflow.db'}").search_runs(["1"])
    assert (found.info.status, found.data.tags["selected_step"]) == ("FINISHED", "4")
    kept = run.parent / "mlflow-artifacts" / found.info.run_id / "artifacts" / "model"
    assert sums(kept) == expected
    assert np.isfinite(SentenceTransformer(str(kept), device="cpu").encode(["a text"])).all()

    from trackio import SQLiteStorage

    artifact = SQLiteStorage.get_artifact_manifest(project, "model-run", "selected")
    assert {entry["path"]: entry["digest"] for entry in artifact["manifest"]} == expected
    assert (artifact["type"], artifact["metadata"]["step"]) == ("model", 4)
    assert len(SQLiteStorage.get_run_records(project)) == 1

    files = sorted((run / "wandb").glob("offline-run-*/*.wandb"), key=lambda file: file.stat().st_mtime)
    assert {file.name for file in files} == {f"run-{(run / 'wandb-id.txt').read_text().strip()}.wandb"}
    (artifact,) = [record.artifact for record in records_of(files[-1]) if record.WhichOneof("record_type") == "artifact"]
    assert (artifact.name, artifact.type, {*artifact.aliases}) == ("model-run", "model", {"latest", "selected", "step-4"})
    md5 = {name: base64.b64encode(hashlib.md5((run / "export" / name).read_bytes()).digest()).decode() for name in expected}
    assert {entry.path: entry.digest for entry in artifact.manifest.contents} == md5


def test_nothing_is_logged_unless_asked_for(trained, tmp_path, monkeypatch):
    """A model is large, and may be for nobody else's eyes: a tracker that is on is not enough."""
    options = ["--set", "tracking={wandb: {}, mlflow: {}, tensorboard: {}, trackio: {}}"]
    ended = gist("select", trained, *options)
    assert ended.code == 0, ended.err
    assert not list((tmp_path / "runs").rglob("*-id.txt"))
    monkeypatch.setenv("WANDB_LOG_MODEL", "end")
    assert gist("select", trained, *options, "--set", "tracking.wandb.log_model=false").code == 0
    assert not list((tmp_path / "runs").rglob("*-id.txt"))
    assert gist("select", trained, *options).code == 0
    assert [path.name for path in (tmp_path / "runs").rglob("*-id.txt")] == ["wandb-id.txt"]


def test_a_tracker_that_fails_changes_no_choice(trained, tmp_path, monkeypatch):
    """The choice is made and written before; what failed is said."""

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Mlflow, "log_model", fail)
    ended = gist("select", trained, "--json", "--set", "tracking.mlflow={log_model: true}")
    assert ended.code == 0, ended.err
    assert '"step": ' in ended.out
    assert "warning: MLflow: [Errno 28] No space left on device. It may lack the model" in ended.err
    assert (tmp_path / "runs" / "run" / "selected.json").exists()


def test_while_a_training_runs_no_model_is_logged(trained, tmp_path):
    """Two processes in one run of W&B write over each other's rows."""
    with held(Run(tmp_path / "runs" / "run").writer_lock):
        ended = gist("select", trained, "--set", "tracking.mlflow={log_model: true}")
    assert ended.code == 0, ended.err
    assert "the model is logged by gist-train select once the training is over: process " in ended.err
    assert not (tmp_path / "runs" / "mlflow.db").exists()


def test_a_missing_package_is_told_before_any_work(trained, tmp_path, monkeypatch):
    """To choose may take an hour of evaluations."""
    monkeypatch.setattr("gist_train.checks.find_spec", lambda _: None)
    ended = gist("select", trained, "--set", "tracking.mlflow={log_model: true}")
    assert ended.code == 2
    assert 'pip install "gist-train[mlflow]"' in ended.err
    assert not (tmp_path / "runs" / "run" / "selected.json").exists()
