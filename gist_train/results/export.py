"""A checkpoint -> the folder that is handed on: a sentence-transformers model with its card, without training state."""

import shutil
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from gist_train import __version__
from gist_train.config.errors import Fault, UserError
from gist_train.data.files import read_json, whole_folder
from gist_train.results.figures import Terms, read_figures
from gist_train.results.selected import read_selected
from gist_train.training.checkpoint import MANIFEST, STATE, checkpoint_to_resume, verified_manifest


def export_model(run: Path, step: int | None, to: Path) -> Path:
    """Writes the checkpoint of `step` (None: what was selected, or else the newest) of the run folder `run` to `to`, with a card.

    An export that stands at `to` is replaced; any other folder is left alone.

    Raises:
        UserError: no such checkpoint, a damaged one, or something else stands at `to`.
    """
    selected = read_selected(run) if step is None else None
    origin = checkpoint_to_resume(run, step) if selected is None else selected.folder
    if origin is None:
        raise UserError(Fault(f"{run}/checkpoints", "no checkpoint", "one at least", "train first"))
    manifest = verified_manifest(origin)
    if to.exists() and (not to.is_dir() or (any(to.iterdir()) and not (to / "modules.json").exists())):
        raise UserError(
            Fault("--to", f"{to}, which holds something else", "a new folder, or an earlier export", "name another folder")
        )
    with whole_folder(to, replace=True) as partial:
        shutil.copytree(origin, partial, ignore=shutil.ignore_patterns(MANIFEST, STATE), dirs_exist_ok=True)
        (partial / "README.md").write_text(model_card(run, manifest), encoding="utf-8")
    return to


def model_card(run: Path, manifest: dict[str, Any]) -> str:
    """The README.md of a model: what it was made of, by which config, and its figures against the base's, falls too."""
    config_text = (run / "config.yaml").read_text(encoding="utf-8")
    config = yaml.safe_load(config_text)
    described, figures, step = read_json(run / "run.json"), read_figures(run, Terms(None, None)), manifest["step"]
    base, tuned = figures.get(0, {}), figures.get(step, {})
    environment = Environment(
        loader=PackageLoader("gist_train", "results"), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("card.md.jinja").render(
        name=config["name"],
        base=config["model"]["name"],
        # A folder of this machine means nothing to the hub, which links a base_model.
        base_on_hub=not Path(config["model"]["name"]).exists(),
        config=config,
        config_text=config_text.strip(),
        step=step,
        triplets=step * config["training"]["batch_size"],
        sources=list(zip(config["data"]["train"], described["data"], strict=True)),
        figures=[(key, base.get(key), value) for key, value in sorted(tuned.items())],
        run=described,
        version=__version__,
    )
