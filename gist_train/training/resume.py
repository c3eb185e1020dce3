"""Whether a run may go on from a checkpoint: it must be whole, and made by the same mathematics over the same content."""

import hashlib
from pathlib import Path
from typing import Any

from gist_train.config.errors import Fault, UserError, shown
from gist_train.config.faults import found_words
from gist_train.config.loading import resolved_yaml
from gist_train.config.schema import Config, mathematics
from gist_train.model.pretrained import Pretrained
from gist_train.training.checkpoint import checkpoint_to_resume, verified_manifest
from gist_train.training.lookups import GuideLookup

CONTENT = {"corpus": "data.train", "guide": "guide.name", "precision": "training.precision", "student": "model.name"}
"""What a resume compares beside the config's fields, and the field that leads to it."""
SINCE = {"training.cuda_graph": False}
"""Fields that manifests from before they were there lack, and what runs did then."""
MEND_CHANGE = "set it back, or give this training a name of its own"


def checkpoint_to_start_from(run: Path, resume: str) -> Path | None:
    """The checkpoint that `resume` ("auto", "never" or a step) asks for, None to start afresh.

    Raises:
        UserError: no such checkpoint, or "never" and a folder that has files in it.
    """
    if resume == "never":
        if run.exists() and any(run.iterdir()):
            raise UserError(
                Fault(
                    "--resume never",
                    f"{run}, which has files in it",
                    "an empty run folder, or none",
                    "give the run another name, or leave --resume out to go on with it",
                )
            )
        return None
    if resume != "auto" and not resume.isdecimal():
        raise UserError(Fault("--resume", shown(resume), "auto, never or a step", "name one of these"))
    return checkpoint_to_resume(run, None if resume == "auto" else int(resume))


def verified_for(origin: Path, config: Config) -> dict[str, Any]:
    """The manifest of a checkpoint that is whole and was made by the same mathematics.

    Raises:
        UserError: it is damaged, or the config changed since; every field is named.
    """
    manifest = verified_manifest(origin)
    was, now = {**SINCE, **manifest["mathematics"]}, mathematics(config)
    faults = [
        Fault(key, found_words(now.get(key, "nothing")), f"{found_words(was.get(key, 'nothing'))}, as in {origin}", MEND_CHANGE)
        for key in sorted(was.keys() | now.keys())
        if was.get(key) != now.get(key)
    ]
    if faults:
        raise UserError(*faults)
    return manifest


def facts_of(
    config: Config, student: Pretrained, corpus: str, guide: GuideLookup | str | None, precision: str, processes: int
) -> dict[str, Any]:
    """What a checkpoint must say so that a resume can tell whether it is the same mathematics."""
    return {
        "config_sha256": hashlib.sha256(resolved_yaml(config).encode()).hexdigest(),
        "mathematics": mathematics(config),
        "corpus": corpus,
        "guide": guide.store.fingerprint if isinstance(guide, GuideLookup) else guide,
        "precision": precision,
        "student": [student.tokenizer_fingerprint(), student.encoder.pooling, student.encoder.normalized],
        "processes": processes,
    }


def refuse_other_content(origin: Path, manifest: dict[str, Any], facts: dict[str, Any], *, excluding: bool) -> None:
    """Raises UserError where the same config names other data or another guide than the checkpoint was made with.

    Args:
        excluding: whether evaluation texts were left out of the data, so that these may be what changed.
    """
    tasks = {"corpus": ", or evaluation.tasks, whose texts data.exclude_evaluation_texts leaves out"} if excluding else {}
    faults = [
        Fault(
            name + tasks.get(key, ""),
            f"another {key} ({facts[key]})",
            f"that of {origin} ({manifest[key]}); its config.yaml: {origin.parent.parent}",
            MEND_CHANGE,
        )
        for key, name in CONTENT.items()
        if manifest[key] != facts[key]
    ]
    if faults:
        raise UserError(*faults)
