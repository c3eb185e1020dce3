"""A checkpoint -> the folder that is handed on: a sentence-transformers model with its card, without training state."""

import os
import shutil
from pathlib import Path

import yaml
from huggingface_hub import metadata_load
from rich.console import Console
from yaml import YAMLError

from gist_train.config.errors import Fault, UserError, listed
from gist_train.config.evaluation import EvaluationConfig
from gist_train.config.models import ModelConfig
from gist_train.data.files import read_json, whole_folder
from gist_train.data.leases import held
from gist_train.data.manifests import foreign_files, verified_manifest
from gist_train.model.adapters import WEIGHTS
from gist_train.model.loading import load_trained
from gist_train.progress import counting, say, terminal
from gist_train.results.card import model_card
from gist_train.results.example import Example, example_of
from gist_train.results.onnx import OnnxPlan, add_onnx, onnx_table
from gist_train.results.selected import read_selected
from gist_train.run_folder import MANIFEST, TRAINING_STATE, Run
from gist_train.training.checkpoint import Checkpoint, checkpoint_to_resume, no_checkpoint


def export_model(
    run: Run,
    step: int | None,
    to: Path,
    *,
    evaluation: EvaluationConfig | None = None,
    onnx: OnnxPlan | None = None,
    hub_id: str | None = None,
    console: Console | None = None,
) -> Path:
    """Writes the checkpoint of `step` (None: what was selected, or else the newest) of `run` to `to`, with a card.

    An export that is at `to` is replaced; any other folder is left alone.

    Args:
        evaluation: whose scores the card has for a step that was not selected; None: the run's own.
        onnx: what is to be done to have the model in ONNX too; None for torch's weights alone.
        hub_id: repository of the hub that it is meant for, if any.
        console: where it is said what is passed over or left, and the ONNX model's report is shown; None for stderr.

    Raises:
        UserError: no such checkpoint, a damaged one, one that can't be ONNX, or something else is at `to`.
        ArithmeticError: the ONNX model gives other embeddings than torch.
    """
    selected = read_selected(run) if step is None else None
    if selected is None:
        origin = checkpoint_to_resume(run, step, console or terminal())
    else:
        origin = Checkpoint(selected.folder(run), verified_manifest(selected.folder(run)))
    if origin is None:
        raise no_checkpoint(run)
    to, console = to.absolute(), console or terminal()
    if foreign := foreign_files(origin.folder, origin.manifest):
        say(console, f"left in {origin.folder}, for no training wrote them there: {listed(foreign)}")
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        found = f'"{to.parent}": {error.strerror}'
        raise UserError(Fault("--to", found, "a folder in one that can be made", "name another folder")) from None
    with held(to.parent / f".{to.name}.export.lock") as other:
        if other is not None:
            found = f"{to}, which another export writes: {other}"
            raise UserError(Fault("--to", found, "one at a time", "wait for it, or name another"))
        if os.path.lexists(to) and not _is_export(to):
            found = f"{to}, which is no export of this package"
            raise UserError(Fault("--to", found, "a new folder, or an earlier export", "name another folder"))
        parts = 2 if onnx is None else 3
        with whole_folder(to, replace=True) as partial, counting("exporting, part", parts, console, passing=True) as count:
            _copy(origin, run, partial)
            count.reach(1)
            example = _example(partial, run, hub_id)
            count.reach(2)
            report = None if onnx is None else add_onnx(partial, onnx)
            count.reach(parts)
            card = model_card(run, origin.manifest, evaluation=evaluation, selected=selected, onnx=report, example=example)
            (partial / "README.md").write_text(card, encoding="utf-8")
    if report is not None:
        console.print(onnx_table(report))
    return to


def _copy(origin: Checkpoint, run: Run, to: Path) -> None:
    """The files of the checkpoint that its manifest names, those of the training aside; with adapters the merged model."""
    if WEIGHTS in origin.manifest["files"]:
        model = ModelConfig(**yaml.safe_load(run.config.read_text(encoding="utf-8"))["model"])
        load_trained(origin.folder, model).save(to)
        return
    for name in origin.manifest["files"]:
        if name != TRAINING_STATE:
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(origin.folder / name, to / name)


def _example(folder: Path, run: Run, hub_id: str | None) -> Example:
    config = yaml.safe_load(run.config.read_text(encoding="utf-8"))
    return example_of(
        folder,
        read_json(run.description).get("examples", []),
        hub_id or f"path/to/{config['name']}",
        trust_remote_code=config["model"].get("trust_remote_code", False),
    )


def _is_export(folder: Path) -> bool:
    """Whether a folder is one that an export wrote, or empty: a checkpoint and any other model are not to be replaced."""
    if not folder.is_dir():
        return False
    if not any(folder.iterdir()):
        return True
    if (folder / MANIFEST).exists() or not (folder / "README.md").is_file():
        return False
    try:
        return "gist_train" in (metadata_load(folder / "README.md") or {})
    except (ValueError, YAMLError):
        return False
