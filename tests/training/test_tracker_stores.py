"""TensorBoard, MLflow and trackio as they really are, each with a store in a folder, held against a run's own files."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections import Counter

import pytest
from support.running import MEASURED, exit_code_of, gist

from gist_train.training.runlog import RunLog
from gist_train.training.tracker_stores import Mlflow, TensorBoard, Trackio

pytestmark = pytest.mark.usefixtures("on_cpu")
STORES = (TensorBoard, Mlflow, Trackio)


@pytest.fixture
def tracking(tmp_path, monkeypatch):
    """The section `tracking` with all three, and nothing of this machine's user."""
    for name in [name for name in os.environ if name.startswith(("MLFLOW_", "TENSORBOARD_", "TRACKIO_S"))]:
        monkeypatch.delenv(name)
    return {"log_every": 1, "tensorboard": {}, "mlflow": {}, "trackio": {"project": project_of(tmp_path)}}


def project_of(folder):
    return "".join(sign if sign.isalnum() else "-" for sign in str(folder))


@pytest.fixture
def path(write_config, write_pairs, quickstart_texts, tracking):
    """The YAML of 12 steps, with evaluations at 0, 4, 8 and 12."""
    evaluation = {**write_pairs(quickstart_texts[:20]), "every": 4}
    return write_config(guide=None, tracking=tracking, evaluation=evaluation)


def own(run):
    """(name, step) -> value of all that a run's own files have, as trackers call it."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    metrics = {(name, row["step"]): row[name] for row in rows for name in row if name not in ("step", "time", "task")}
    scores = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
    return metrics | {(f"evaluation/{row['task']}/{row['metric']}", row["step"]): row["value"] for row in scores}


def of_tensorboard(folder):
    """[(name, step, value)] of all event files of a folder, as they were written."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    from tensorboard.util.tensor_util import make_ndarray

    events = [event for file in sorted(folder.iterdir()) for event in EventFileLoader(str(file)).Load()]
    values = [(value, event.step) for event in events for value in event.summary.value]
    return [(value.tag, step, make_ndarray(value.tensor).item()) for value, step in values if value.tag != "config/text_summary"]


def of_mlflow(runs, experiment="gist-train"):
    """The same of the only run of an experiment."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{runs / 'mlflow.db'}")
    (found,) = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
    history = [metric for name in found.data.metrics for metric in client.get_metric_history(found.info.run_id, name)]
    return [(metric.key, metric.step, metric.value) for metric in history]


def of_trackio(project):
    """The same of the only run of a project."""
    from trackio import SQLiteStorage

    (found,) = SQLiteStorage.get_run_records(project)
    rows = SQLiteStorage.get_logs(project, found["name"], run_id=found["id"])
    return [(name, row["step"], row[name]) for row in rows for name in row if name not in ("step", "timestamp")]


def assert_all_once(run, project, *, resumed=False):
    """Each tracker has each number of the run's own files once, and no other."""
    expected = own(run)
    assert len({step for _, step in expected}) == 13
    everywhere = {
        "TensorBoard": of_tensorboard(run / "tensorboard"),
        "MLflow": of_mlflow(run.parent),
        "trackio": of_trackio(project),
    }
    for name, logged in everywhere.items():
        counts = Counter((key, step) for key, step, _ in logged)
        assert [key for key, count in counts.items() if count > 1] == [], name
        assert counts.keys() == expected.keys(), name
        # What the clock decides is another number where steps are trained again.
        values = {(key, step): value for key, step, value in logged if not (resumed and key in MEASURED)}
        assert values == pytest.approx({key: expected[key] for key in values}, rel=1e-6, abs=1e-6), name


def test_each_has_every_number_once(path, tmp_path):
    """Twice in a curve, or not at all: stopped at step 6, gone back to 4, and trained to the end."""
    ended = gist("train", path, "--set", "training.stop_at_step=6")
    assert (ended.code, "warning" in ended.err) == (0, False), ended.err
    ended = gist("train", path, "--resume", "4", "--set", "evaluation.every=2")
    assert (ended.code, "warning" in ended.err) == (0, False), ended.err
    assert_all_once(tmp_path / "runs" / "run", project_of(tmp_path), resumed=True)


def killed(path, folder):
    """Trains until the stores have step 6, and is killed at step 7."""
    os.environ["TRACKIO_DIR"] = str(folder)
    have = {store: threading.Event() for store in STORES}
    for store in STORES:

        def log(self, rows, *, original=store.log, has=have[store]):
            original(self, rows)
            if rows[-1].step >= 6:
                has.set()

        store.log = log
    add = RunLog.add

    def add_and_die(self, record, *rest):
        row = add(self, record, *rest)
        if record.step == 6:
            assert all(event.wait(100) for event in have.values())
        if record.step == 7:
            os.kill(os.getpid(), signal.SIGKILL)
        return row

    RunLog.add = add_and_die
    return gist("train", path).code


def test_kill_minus_9_loses_and_doubles_nothing(path, tmp_path, trackio_folder):
    """The stores have step 6, the newest checkpoint is that of step 4, and trackio's last half second is lost."""
    assert exit_code_of(killed, path, trackio_folder) == -signal.SIGKILL
    assert (tmp_path / "runs" / "run" / "mlflow-id.txt").exists()
    ended = gist("train", path)
    assert (ended.code, "warning" in ended.err) == (0, False), ended.err
    assert "resuming from step 4" in ended.err
    assert_all_once(tmp_path / "runs" / "run", project_of(tmp_path), resumed=True)


def test_a_store_that_fails_ends_no_training(path, tmp_path, monkeypatch):
    """Each is lost in the middle, is told once, and gets what it lacks when the same command is given again."""
    with monkeypatch.context() as patch:
        for store in STORES:

            def fail(self, rows, *, original=store.log):
                if rows[-1].step >= 3:
                    raise OSError(28, "No space left on device")
                original(self, rows)

            patch.setattr(store, "log", fail)
        ended = gist("train", path)
    assert ended.code == 0, ended.err
    warnings = [line for line in ended.err.splitlines() if line.startswith("warning: ")]
    assert sorted(line.split(":")[1] for line in warnings) == [" MLflow", " TensorBoard", " trackio"]
    assert all("No space left on device. It gets no more rows" in line for line in warnings)
    ended = gist("train", path)
    assert (ended.code, "warning" in ended.err) == (0, False), ended.err
    assert_all_once(tmp_path / "runs" / "run", project_of(tmp_path))


def test_each_has_the_config(path, tmp_path):
    """Of two curves one wants to know first by what their runs differ."""
    assert gist("train", path, "--set", "training.max_steps=1", "--set", "evaluation.every=0").code == 0
    from mlflow import MlflowClient
    from trackio import SQLiteStorage

    runs = tmp_path / "runs"
    (found,) = MlflowClient(f"sqlite:///{runs / 'mlflow.db'}").search_runs(["1"])
    assert (found.info.run_name, found.info.status) == ("run", "FINISHED")
    assert (found.data.params["optimizer.lr"], found.data.params["guide"]) == ("0.001", "null")
    assert json.loads(found.data.params["data.train"])[0]["source"] == "jsonl"
    assert SQLiteStorage.get_run_config(project_of(tmp_path), "run")["optimizer"]["lr"] == 1e-3
    (events,) = (runs / "run" / "tensorboard").iterdir()
    assert b"    lr: 0.001\n" in events.read_bytes()


def test_addresses_of_the_environment_are_taken(path, tmp_path, monkeypatch):
    """A batch job sets them where no YAML can be changed; what the YAML says rules over them."""
    of_job, of_yaml = tmp_path / "job", tmp_path / "yaml"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{of_job / 'mlflow.db'}")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "of the job")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(of_job))
    of_job.mkdir()
    (of_job / "run").mkdir()  # of another run with this name
    assert gist("train", path, "--set", "tracking.trackio=null").code == 0
    assert len(of_mlflow(of_job, "of the job")) > 12
    (folder,) = of_job.glob("run-*")
    assert len(of_tensorboard(folder)) == len(own(tmp_path / "runs" / "run"))
    assert list((of_job / "run").iterdir()) == []
    of_yaml.mkdir()
    uri = f"tracking.mlflow={{tracking_uri: 'sqlite:///{of_yaml / 'mlflow.db'}', experiment: of the YAML}}"
    folder = f"tracking.tensorboard={{folder: {of_yaml}}}"
    ended = gist("train", path, "--set", "tracking.trackio=null", "--set", uri, "--set", folder, "--set", "name=other")
    assert (ended.code, "warning" in ended.err) == (0, False), ended.err
    assert len(of_mlflow(of_yaml, "of the YAML")) > 12
    assert list((of_yaml / "other").iterdir())
    assert not (tmp_path / "runs" / "mlflow.db").exists()


def test_a_server_that_is_not_there_holds_nothing_up(path, monkeypatch):
    """MLflow's package tries for minutes. The training is over by then, and says what was not sent."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setattr("gist_train.training.tracker_thread.SECONDS_TO_END", 1)
    ended = gist("train", path, "--set", "tracking.tensorboard=null", "--set", "tracking.trackio=null")
    assert ended.code == 0, ended.err
    (warning,) = [line for line in ended.err.splitlines() if line.startswith("warning: ")]
    assert warning.startswith("warning: MLflow: not all was taken within 1 s. It gets no more rows. metrics.jsonl has all")


def test_two_runs_that_begin_an_experiment_at_once(path, tmp_path, monkeypatch):
    """Jobs of a sweep start together: each sees that there is no experiment, and one of them comes too late to make it."""
    import mlflow

    options = ["--set", "tracking.tensorboard=null", "--set", "tracking.trackio=null", "--set", "training.max_steps=2"]
    assert gist("train", path, *options).code == 0
    answers, ask = [None], mlflow.MlflowClient.get_experiment_by_name
    monkeypatch.setattr(mlflow.MlflowClient, "get_experiment_by_name", lambda *given: answers.pop() if answers else ask(*given))
    ended = gist("train", path, *options, "--set", "name=other")
    assert (ended.code, "warning" in ended.err, answers) == (0, False, []), ended.err
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}")
    assert {found.info.run_name for found in client.search_runs(["1"])} == {"run", "other"}


def test_trackio_on_a_disk_over_a_network(path, tmp_path, monkeypatch):
    """There it writes files that its page takes in later: a run that resumes before that has the same rows, once."""
    monkeypatch.setenv("TRACKIO_STORAGE_MODE", "jsonl")
    options = ["--set", "tracking.tensorboard=null", "--set", "tracking.mlflow=null"]
    for stop in (6, 12):
        ended = gist("train", path, *options, "--set", f"training.stop_at_step={stop}")
        assert (ended.code, "warning" in ended.err) == (0, False), ended.err
    logged = of_trackio(project_of(tmp_path))
    assert Counter((name, step) for name, step, _ in logged) == Counter(own(tmp_path / "runs" / "run").keys())


def test_two_runs_of_one_name_are_two_runs(path, tmp_path):
    """Trackio knows a run by its name: the second would be taken for one that has its rows already."""
    options = ["--set", "tracking.tensorboard=null", "--set", "tracking.mlflow=null", "--set", "training.max_steps=2"]
    assert gist("train", path, *options).code == 0
    ended = gist("train", path, *options, "--set", f"output_dir={tmp_path / 'others'}")
    assert (ended.code, "warning" in ended.err) == (0, False), ended.err
    from trackio import SQLiteStorage

    names = [record["name"] for record in SQLiteStorage.get_run_records(project_of(tmp_path))]
    assert len({*names}) == 2
    rows = [SQLiteStorage.get_logs(project_of(tmp_path), name) for name in names]
    assert [len([row for row in kept if "loss" in row]) for kept in rows] == [2, 2]


def test_their_packages_are_not_imported_unless_asked_for():
    """They take seconds, which every command would wait."""
    names = ("tensorboard", "mlflow", "trackio", "wandb")
    code = f"import sys, gist_train.cli, gist_train.training_run; print([name for name in {names} if name in sys.modules])"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (ended.stdout.strip(), ended.returncode) == ("[]", 0), ended.stderr


def test_a_row_that_was_cut_short_is_made_whole(path, tmp_path):
    """The power went while the last numbers of step 6 were written: those alone are missing, and no others come twice."""
    options = ["--set", "tracking.trackio=null", "--set", "tracking.mlflow=null"]
    assert gist("train", path, *options, "--set", "training.stop_at_step=6").code == 0
    run = tmp_path / "runs" / "run"
    (events,) = (run / "tensorboard").iterdir()
    os.truncate(events, events.stat().st_size - 100)
    before = len(of_tensorboard(run / "tensorboard"))
    assert before < len(own(run))
    ended = gist("train", path, *options)
    assert (ended.code, "warning" in ended.err) == (0, False), ended.err
    after = of_tensorboard(run / "tensorboard")
    assert Counter((name, step) for name, step, _ in after) == Counter(own(run).keys())
