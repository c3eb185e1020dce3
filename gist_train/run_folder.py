"""A run's folder. The names of all files in it are here and nowhere else."""

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from gist_train.config.errors import Fault, UserError
from gist_train.config.loading import load_config
from gist_train.config.schema import Config

MANIFEST = "manifest.json"
"""In a checkpoint's folder and in an averaged model's: size and SHA-256 of each file in it, written last."""
TRAINING_STATE = "training_state.safetensors"
"""In a checkpoint's folder: the optimizer's moments."""
SELECT_LOCK = ".select.lock"
"""Held by who selects; the folder's own lock, `data.files.locked`, is held for a write."""
_CHECKPOINT = re.compile(r"step-(\d{9})")


@dataclass(frozen=True, slots=True)
class Run:
    """A run folder, there or not yet."""

    folder: Path

    @classmethod
    def of(cls, config: Config) -> "Run":
        """That of a config: output_dir/name."""
        return cls(Path(config.output_dir) / config.name)

    def __str__(self) -> str:
        return str(self.folder)

    @property
    def config(self) -> Path:
        """The resolved config."""
        return self.folder / "config.yaml"

    @property
    def description(self) -> Path:
        """Versions, hardware and fingerprints."""
        return self.folder / "run.json"

    @property
    def stacks(self) -> Path:
        """Where each rank stood when one of them hung."""
        return self.folder / "stacks"

    @property
    def report(self) -> Path:
        """The page of the run."""
        return self.folder / "report.html"

    @property
    def audit(self) -> Path:
        """What an audit of the rows found: beside the folder, in which a training begins with nothing."""
        return self.folder.with_name(f"{self.folder.name}-audit.json")

    @property
    def audit_page(self) -> Path:
        """The page of it."""
        return self.folder.with_name(f"{self.folder.name}-audit.html")

    @property
    def metrics(self) -> Path:
        """A row every `tracking.log_every` steps."""
        return self.folder / "metrics.jsonl"

    @property
    def rows(self) -> Path:
        """Which rows of the corpus each step read, where `tracking.log_rows` is on."""
        return self.folder / "step-rows.jsonl"

    @property
    def evaluations(self) -> Path:
        """A row a step, task and metric."""
        return self.folder / "evaluations.jsonl"

    def items(self, step: int, task: str, max_length: int | None, truncate_dim: int | None) -> Path:
        """What the scores of a step on a task are made of, under these terms."""
        terms = f"length-{max_length or 'whole'}-dimension-{truncate_dim or 'whole'}"
        return self.folder / "evaluation-items" / terms / f"step-{step:09d}-{task}.safetensors"

    @property
    def held_out(self) -> Path:
        """The folder of the rows that were held out of training, where `evaluation.held_out` says so."""
        return self.folder / "held-out"

    @property
    def selected(self) -> Path:
        """Which model was selected, and why."""
        return self.folder / "selected.json"

    @property
    def early_stop(self) -> Path:
        """At which step patience ran out, where it did."""
        return self.folder / "early-stop.json"

    @property
    def ended(self) -> Path:
        """There while a training has come to its end; not where it was interrupted, and may be resumed."""
        return self.folder / "ended.json"

    def tracker_id(self, tracker: str) -> Path:
        """What the run is called at a tracker, for as long as the folder lives."""
        return self.folder / f"{tracker}-id.txt"

    @property
    def tensorboard(self) -> Path:
        """Event files of TensorBoard, where `tracking.tensorboard` names no other folder."""
        return self.folder / "tensorboard"

    @property
    def tracked_model(self) -> Path:
        """The selected model while trackers are given it."""
        return self.folder / ".tracked-model"

    @property
    def export(self) -> Path:
        """Where the model is exported to by default."""
        return self.folder / "export"

    def start(self, origin: str) -> Path:
        """The model that `extend` begins with: a copy of another run's.

        Args:
            origin: the name of the checkpoint or mean that was copied.
        """
        return self.folder / f"start-{origin}"

    @property
    def writer_lock(self) -> Path:
        """Held by the only training that writes to the folder. Beside it: a folder with a file in it is a run."""
        return self.folder.parent / f".{self.folder.name}.lock"

    @property
    def checkpoints(self) -> Path:
        """The folder of all checkpoints."""
        return self.folder / "checkpoints"

    def checkpoint(self, step: int) -> Path:
        """The folder of the checkpoint of `step`."""
        return self.checkpoints / f"step-{step:09d}"

    def saved_steps(self) -> list[int]:
        """Steps that have a checkpoint, ascending. Only a folder with a manifest is one: it is written last."""
        if not self.checkpoints.is_dir():
            return []
        with os.scandir(self.checkpoints) as entries:  # of thousands, asked at each checkpoint
            named = [(entry, _CHECKPOINT.fullmatch(entry.name)) for entry in entries]
            folders = [(int(match[1]), entry.path) for entry, match in named if match and entry.is_dir(follow_symlinks=False)]
        return sorted(step for step, folder in folders if os.path.isfile(f"{folder}/{MANIFEST}"))

    def named_as_checkpoints(self) -> list[tuple[int, Path]]:
        """All that is named like a checkpoint, by ascending step: a file, a link or an empty folder may be, too."""
        entries = self.checkpoints.glob("step-*")
        return sorted((int(match[1]), entry) for entry in entries if (match := _CHECKPOINT.fullmatch(entry.name)))

    def unfinished_checkpoints(self) -> Iterator[Path]:
        """What killed processes left half written or half deleted."""
        return self.checkpoints.glob(".step-*")

    def set_aside(self, number: int) -> Path:
        """The folder of checkpoints that a run that went back to an earlier step parted from."""
        return self.checkpoints / f"set-aside-{number}"

    def averaged(self, steps: Sequence[int], base_weight: float) -> Path:
        """The folder of the mean of these steps: each mean has one of its own, so that a new choice harms no earlier one."""
        return self.folder / f"averaged-{hashlib.blake2b(repr((list(steps), base_weight)).encode(), digest_size=4).hexdigest()}"

    def all_averaged(self) -> Iterator[Path]:
        """The folders of all means."""
        return self.folder.glob("averaged-*")


def config_and_run(path: Path, overrides: list[str], *, selects: bool = False) -> tuple[Config, Run]:
    """The config and the run folder that a run folder or a YAML names; `selects` as `load_config` has it.

    Raises:
        UserError: it is neither, or the config has faults.
    """
    if not path.exists():
        raise UserError(Fault(str(path), "no such file or folder", "a run folder, or the YAML that made it", "correct the path"))
    if path.is_dir():
        run = Run(path)
        if not run.config.is_file():
            fix = "name the folder of a run, or the YAML that made it"
            raise UserError(Fault(str(path), f"a folder without {run.config.name}", "a run folder", fix))
        return load_config(run.config, overrides, selects=selects), run
    config = load_config(path, overrides, selects=selects)
    return config, Run.of(config)
