"""Whether a run may resume from a checkpoint: it must be whole, and made by the same mathematics over the same content."""

import json
from dataclasses import asdict

from rich.console import Console

from gist_train.config.errors import Fault, UserError, shown
from gist_train.config.faults import found_words
from gist_train.config.schema import Config, mathematics
from gist_train.data.corpus import Corpus
from gist_train.data.manifests import verified_manifest
from gist_train.run_folder import MANIFEST, Run
from gist_train.training.checkpoint import Checkpoint, Facts, checkpoint_to_resume, load_checkpoint, send_checkpoint
from gist_train.training.distributed import largest_over_ranks
from gist_train.training.ranks import Ranks
from gist_train.training.setup import Job

CONTENT = {
    "guide": "guide",
    "precision": "training.precision",
    "student": "model.name",
    "base": "model.name",
}
"""What a resume compares beside the config's fields, and the field that leads to it."""
NEWER_FIELDS = {
    "training.cuda_graph": False,
    "training.skip_spikes": None,
    "data.similarity_depth": 3,
    "data.drop_suspects": None,
    "data.hard_negatives": None,
    "data.hard_negatives.documents": None,
    "loss.weight": 1.0,
    "loss.mask": "hard",
    "loss.softness": 0.05,
    "loss.hardness": 0.0,
    "loss.votes": None,
    "model.lora": None,
    "distillation.weight": 0.0,
    "distillation.temperature": 0.05,
    "distillation.guide_temperature": None,
    "distillation.regression": 0.0,
    "distillation.scores": 0.0,
    "distillation.score_temperature": 1.0,
}
"""Fields that manifests from before they were there lack, and what runs did then."""
JUDGED = ", or evaluation.tasks, whose texts data.exclude_evaluation_texts leaves out, or data.drop_suspects"
FIX_CHANGE = "set it back, or give this training a name of its own"
LENGTH = ("training.epochs", "training.max_steps")
FIX_LENGTH = "set it back; to give a run that has ended more epochs: gist-train extend {run}"


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


def checkpoint_of_all(ranks: Ranks, run: Run, resume: str, console: Console) -> Checkpoint | None:
    """What `checkpoint_to_start_from` gives on the first rank, on all: other hosts need not have the run folder.

    Raises:
        UserError: on the first rank, as there.
    """
    own = checkpoint_to_start_from(run, resume, console) if ranks.rank == 0 else None
    manifest = json.loads(ranks.first_says(json.dumps(own and own.manifest)))
    return None if manifest is None else Checkpoint(run.checkpoint(manifest["step"]), manifest)


def load_on_all(origin: Checkpoint, job: Job) -> None:
    """Loads a checkpoint of `checkpoint_of_all`: from the disk where all ranks have it, else the first sends it to the others."""
    optimizer, state = job.training.optimizer, job.training.state
    first = job.training.accelerator.is_main_process
    missing = largest_over_ranks(int(not first and not _is_there(origin)))
    if first or not missing:
        load_checkpoint(origin.folder, job.student, optimizer, state)
    if missing:
        send_checkpoint(job.student, optimizer, state, origin.manifest["step"])


def _is_there(origin: Checkpoint) -> bool:
    """Whether this rank can read the checkpoint, whole and the very same."""
    if not (origin.folder / MANIFEST).exists():
        return False
    try:
        return bool(verified_manifest(origin.folder)["sha256"] == origin.manifest["sha256"])
    except (UserError, OSError):
        return False


def refuse_other_mathematics(origin: Checkpoint, config: Config) -> None:
    """Raises UserError where the config changed since the checkpoint was made; every field is named."""
    was, now = {**NEWER_FIELDS, **origin.manifest["mathematics"]}, mathematics(config)
    faults = [
        Fault(
            key,
            found_words(now.get(key, "nothing")),
            f"{found_words(was.get(key, 'nothing'))}, as in {origin.folder}",
            FIX_LENGTH.format(run=origin.folder.parent.parent) if key in LENGTH else FIX_CHANGE,
        )
        for key in sorted(was.keys() | now.keys())
        if was.get(key) != now.get(key)
    ]
    if faults:
        raise UserError(*faults)


def refuse_other_corpus(origin: Checkpoint, corpus: Corpus, *, excluding: bool) -> None:
    """Raises UserError where the same config names other rows than the checkpoint was made with: asked before the guide is put to
    work.

    Args:
        excluding: whether evaluation texts were left out of the data, so that these may be what changed.
    """
    if origin.manifest.get("corpus") != corpus.content:
        where = f"data.train{JUDGED}" if excluding else "data.train"
        found = f"another corpus ({corpus.content}), of {corpus.row_count:,} rows: a file that it reads has changed"
        fix = "bring back the file as it was, or give this training a name of its own"
        raise UserError(Fault(where, found, _that_of(origin, "corpus"), fix))


def refuse_other_content(origin: Checkpoint, facts: Facts) -> None:
    """Raises UserError where the same config names another model or guide than the checkpoint was made with."""
    now = json.loads(json.dumps(asdict(facts)))  # as the manifest has it
    faults = [
        Fault(
            name,
            f"another {key} ({now[key]})",
            _that_of(origin, key),
            FIX_CHANGE,
        )
        for key, name in CONTENT.items()
        if origin.manifest.get(key) != now[key]
    ]
    if faults:
        raise UserError(*faults)


def _that_of(origin: Checkpoint, key: str) -> str:
    return f"that of {origin.folder} ({origin.manifest.get(key)}); its config.yaml: {origin.folder.parent.parent}"
