"""Whether a run may resume from a checkpoint: it must be whole, and made by the same mathematics over the same content."""

import json
from dataclasses import asdict

from rich.console import Console

from gist_train.config.errors import Fault, UserError, shown
from gist_train.config.faults import found_words
from gist_train.config.schema import Config, mathematics
from gist_train.run_folder import Run
from gist_train.training.checkpoint import Checkpoint, Facts, checkpoint_to_resume

CONTENT = {"corpus": "data.train", "guide": "guide", "precision": "training.precision", "student": "model.name"}
"""What a resume compares beside the config's fields, and the field that leads to it."""
NEWER_FIELDS = {"training.cuda_graph": False, "training.skip_spikes": None}
"""Fields that manifests from before they were there lack, and what runs did then."""
FIX_CHANGE = "set it back, or give this training a name of its own"


def checkpoint_to_start_from(run: Run, resume: str, console: Console) -> Checkpoint | None:
    """The checkpoint that `resume` ("auto", "never" or a step) asks for, None to start afresh.

    Raises:
        UserError: no such checkpoint, none that is whole, or "never" and a folder that has files in it.
    """
    if resume == "never":
        if run.folder.exists() and any(run.folder.iterdir()):
            raise UserError(
                Fault(
                    "--resume never",
                    f"{run}, which has files in it",
                    "an empty run folder, or none",
                    "give the run another name, or leave --resume out to resume it",
                )
            )
        return None
    if resume != "auto" and not resume.isdecimal():
        raise UserError(Fault("--resume", shown(resume), "auto, never or a step", "name one of these"))
    return checkpoint_to_resume(run, None if resume == "auto" else int(resume), console)


def refuse_other_mathematics(origin: Checkpoint, config: Config) -> None:
    """Raises UserError where the config changed since the checkpoint was made; every field is named."""
    was, now = {**NEWER_FIELDS, **origin.manifest["mathematics"]}, mathematics(config)
    faults = [
        Fault(
            key,
            found_words(now.get(key, "nothing")),
            f"{found_words(was.get(key, 'nothing'))}, as in {origin.folder}",
            FIX_CHANGE,
        )
        for key in sorted(was.keys() | now.keys())
        if was.get(key) != now.get(key)
    ]
    if faults:
        raise UserError(*faults)


def refuse_other_content(origin: Checkpoint, facts: Facts, *, excluding: bool) -> None:
    """Raises UserError where the same config names other data or another guide than the checkpoint was made with.

    Args:
        excluding: whether evaluation texts were left out of the data, so that these may be what changed.
    """
    tasks = {"corpus": ", or evaluation.tasks, whose texts data.exclude_evaluation_texts leaves out"} if excluding else {}
    now = json.loads(json.dumps(asdict(facts)))  # as the manifest has it
    faults = [
        Fault(
            name + tasks.get(key, ""),
            f"another {key} ({now[key]})",
            f"that of {origin.folder} ({origin.manifest[key]}); its config.yaml: {origin.folder.parent.parent}",
            FIX_CHANGE,
        )
        for key, name in CONTENT.items()
        if origin.manifest[key] != now[key]
    ]
    if faults:
        raise UserError(*faults)
