"""TensorBoard, MLflow and trackio: what each is told of a run, and how it is asked what it has of it.

Their packages are extras and slow to import: they are imported where a store is opened, in its own thread.
"""

import json
import os
import re
import secrets
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gist_train.config.loading import resolved_yaml
from gist_train.config.schema import Config
from gist_train.config.secrets import without_secrets
from gist_train.config.tracking import MlflowConfig, TensorboardConfig, TrackioConfig
from gist_train.data.files import write_text
from gist_train.run_folder import Run
from gist_train.training.tracker_thread import Row, TrackedModel

METRICS_AT_ONCE, PARAMETERS_AT_ONCE, LONGEST_PARAMETER = 1000, 100, 6000
"""That MLflow takes in a request, and characters of a parameter's value: https://mlflow.org/docs/latest/rest-api.html."""


class TensorBoard:
    """Event files in a folder of the run. It has no place for models."""

    def __init__(self, tensorboard: TensorboardConfig, config: Config, run: Run):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
        from torch.utils.tensorboard import SummaryWriter

        folder = self._folder(tensorboard, config, run)
        folder.mkdir(parents=True, exist_ok=True)
        events = EventAccumulator(str(folder), size_guidance={"scalars": 0})  # 0: all of them
        events.Reload()
        steps = {name: [event.step for event in events.Scalars(name)] for name in events.Tags()["scalars"]}
        self.sent: dict[str, int] | None = {name: max(steps[name]) for name in steps}
        self._writer = SummaryWriter(str(folder))
        text = "".join(f"    {line}\n" for line in resolved_yaml(config).splitlines())
        self._writer.add_text("config", text, max(self.sent.values(), default=0))

    def _folder(self, tensorboard: TensorboardConfig, config: Config, run: Run) -> Path:
        above = tensorboard.folder or os.environ.get("TENSORBOARD_LOGGING_DIR")
        if above is None:
            return run.tensorboard
        named = run.tracker_id("tensorboard")
        if not named.exists():
            taken = os.listdir(above) if os.path.isdir(above) else []
            write_text(named, _free_name(config.name, taken))
        return Path(above) / named.read_text(encoding="utf-8").strip()

    def name_of(self, name: str) -> str:
        """What a number is called there."""
        return name

    def log(self, rows: Sequence[Row]) -> None:
        """Keeps rows, in the order of their steps."""
        for row in rows:
            for name, value in row.values.items():
                self._writer.add_scalar(name, value, row.step, walltime=row.time)
        self._writer.flush()  # what is in the file outlives this process

    def log_model(self, model: TrackedModel) -> None:
        """Nothing: TensorBoard has no place for models, and no field of the config asks for it."""

    def end(self, code: int) -> None:  # noqa: ARG002  (a folder of events has no place for it)
        """Closes the file."""
        self._writer.close()


class Mlflow:
    """A run of an MLflow server, or of a database in output_dir."""

    def __init__(self, mlflow_config: MlflowConfig, config: Config, run: Run):
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
        import mlflow

        address, files = mlflow_config.tracking_uri, None
        if address is None and mlflow.is_tracking_uri_set():  # by MLFLOW_TRACKING_URI, or by whoever called us
            address = mlflow.get_tracking_uri()
        if address is None:
            folder = Path(config.output_dir).absolute()
            address, files = f"sqlite:///{folder / 'mlflow.db'}", (folder / "mlflow-artifacts").as_uri()
        self._client = mlflow.MlflowClient(tracking_uri=address)
        self._id = self._known_run(run) or self._new_run(mlflow_config, config, run, files)
        steps = {name: self._client.get_metric_history(self._id, name) for name in self._client.get_run(self._id).data.metrics}
        self.sent: dict[str, int] | None = {name: max(metric.step for metric in steps[name]) for name in steps}

    def name_of(self, name: str) -> str:
        """What a number is called there: MLflow takes few signs."""
        return _mlflow_name(name)

    def _known_run(self, run: Run) -> str | None:
        """The id of the run that was begun before; None where there is none, or not under this address."""
        from mlflow.exceptions import MlflowException
        from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST, ErrorCode

        if not run.tracker_id("mlflow").exists():
            return None
        known = run.tracker_id("mlflow").read_text(encoding="utf-8").strip()
        try:
            self._client.update_run(known, status="RUNNING")
        except MlflowException as error:
            if error.error_code == ErrorCode.Name(RESOURCE_DOES_NOT_EXIST):
                return None
            raise
        return known

    def _new_run(self, mlflow_config: MlflowConfig, config: Config, run: Run, files: str | None) -> str:
        from mlflow.entities import Param

        name = mlflow_config.experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME") or "gist-train"
        made: str = self._client.create_run(self._experiment(name, files), run_name=config.name).info.run_id
        write_text(run.tracker_id("mlflow"), made)
        parameters = [Param(_mlflow_name(key), value[:LONGEST_PARAMETER]) for key, value in _flat(config).items()]
        for first in range(0, len(parameters), PARAMETERS_AT_ONCE):
            self._client.log_batch(made, params=parameters[first : first + PARAMETERS_AT_ONCE])
        return made

    def _experiment(self, name: str, files: str | None) -> str:
        from mlflow.exceptions import MlflowException

        there = self._client.get_experiment_by_name(name)
        if there is None:
            try:
                return str(self._client.create_experiment(name, files))
            except MlflowException:
                if (there := self._client.get_experiment_by_name(name)) is None:  # else another run made it meanwhile
                    raise
        return str(there.experiment_id)

    def log(self, rows: Sequence[Row]) -> None:
        """Keeps rows, in the order of their steps."""
        from mlflow.entities import Metric

        metrics = [
            Metric(name, float(value), int(row.time * 1000), row.step) for row in rows for name, value in row.values.items()
        ]
        for first in range(0, len(metrics), METRICS_AT_ONCE):
            self._client.log_batch(self._id, metrics=metrics[first : first + METRICS_AT_ONCE])

    def log_model(self, model: TrackedModel) -> None:
        """Keeps the files of a model, in the folder `model` of the run's artifacts."""
        self._client.log_artifacts(self._id, str(model.folder), "model")
        self._client.set_tag(self._id, "selected_step", str(model.step))

    def end(self, code: int) -> None:
        """Keeps that the run ended, with this exit code."""
        self._client.set_terminated(self._id, "FAILED" if code else "FINISHED")


class Trackio:
    """A run of trackio's database on this machine.

    With TRACKIO_SPACE_ID or TRACKIO_SERVER_URL trackio takes it elsewhere, where it can't be asked.
    """

    def __init__(self, trackio_config: TrackioConfig, config: Config, run: Run):
        import trackio

        self._project = trackio_config.project
        self._here = not (os.environ.get("TRACKIO_SPACE_ID") or os.environ.get("TRACKIO_SERVER_URL"))
        named = run.tracker_id("trackio")
        if not named.exists():
            there = {record["name"] for record in trackio.SQLiteStorage.get_run_records(self._project)}
            write_text(named, _free_name(config.name, there if self._here else {config.name}))
        name = named.read_text(encoding="utf-8").strip()
        options = without_secrets(config.model_dump(mode="json"))
        self._run = trackio.init(self._project, name, config=options, resume="allow", embed=False)
        kept = self._kept()
        self._expected = len(kept)
        """Rows that it has when it has taken all."""
        last = {name: row["step"] for row in sorted(kept, key=lambda row: row["step"]) for name in row}
        self.sent: dict[str, int] | None = last if self._here else None

    def name_of(self, name: str) -> str:
        """What a number is called there."""
        return name

    def _kept(self) -> list[dict[str, Any]]:
        from trackio import SQLiteStorage
        from trackio.fragments import import_inbox_dir

        import_inbox_dir()  # on a disk over a network rows wait there
        kept: list[dict[str, Any]] = SQLiteStorage.get_logs(self._project, self._run.name, run_id=self._run.id)
        return kept

    def log(self, rows: Sequence[Row]) -> None:
        """Keeps rows, in the order of their steps."""
        for row in rows:
            self._run.log(dict(row.values), row.step)
        self._expected += len(rows)

    def log_model(self, model: TrackedModel) -> None:
        """Keeps the files of a model, as a version of an artifact of the run's own."""
        from trackio import Artifact

        artifact = Artifact(f"model-{self._run.name}", "model", metadata=model.metadata)
        artifact.add_dir(str(model.folder))
        self._run.log_artifact(artifact, aliases=model.aliases)

    def end(self, code: int) -> None:  # noqa: ARG002  (it has no place for it)
        """Waits until all is written.

        Raises:
            OSError: not all is. It says so nowhere else.
        """
        self._run.finish()
        if self._here and (lost := self._expected - len(self._kept())):
            raise OSError(f"{lost:,} rows could not be written")


def _free_name(name: str, taken: Collection[str]) -> str:
    """A name that no other run has: its rows would be taken for ours."""
    return f"{name}-{secrets.token_hex(2)}" if name in taken else name


def _mlflow_name(name: str) -> str:
    """`name` with _ for what MLflow takes in no name: ndcg@10 is ndcg_10."""
    return re.sub(r"[^\w\-. :/]", "_", name, flags=re.ASCII)


def _flat(config: Config) -> dict[str, str]:
    """Dotted key -> value of every field, lists as JSON; no passwords."""

    def leaves(fields: Mapping[str, Any], above: str) -> Iterator[tuple[str, str]]:
        for key, value in fields.items():
            if isinstance(value, Mapping):
                yield from leaves(value, f"{above}{key}.")
            else:
                yield above + key, value if isinstance(value, str) else json.dumps(value)

    return dict(leaves(without_secrets(config.model_dump(mode="json")), ""))
