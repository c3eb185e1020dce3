"""The tasks that rows held out of training make: `evaluation.held_out`."""

from pathlib import Path

from gist_train.config.errors import Fault, UserError
from gist_train.config.evaluation import HELD_OUT, HELD_OUT_LABELS, ClassificationTask, RetrievalTask
from gist_train.config.schema import Config, cache_folder
from gist_train.config.sources import ClassificationSource
from gist_train.data.fingerprints import ContentHashes, corpus_fingerprint
from gist_train.data.held_out import FIT, LABELS, ROWS, write_held_out
from gist_train.data.leases import locked
from gist_train.evaluation.classification import LoadedClassification, read_classification
from gist_train.evaluation.retrieval import LoadedRetrieval, read_retrieval
from gist_train.progress import follow, terminal
from gist_train.run_folder import Run

KEY = "evaluation.held_out"


def held_out_folder(config: Config, amount: float | int) -> Path:
    """The folder of the rows that are held out: the run's own, if it has begun, else one that is drawn if no run has drawn it.

    Raises:
        UserError: a source can't be read, no row can be held out, or the run was trained on all rows.
    """
    run = Run.of(config)
    if run.saved_steps():
        if run.held_out.is_dir():
            return run.held_out
        found = f"{amount}, and a run that was trained on all rows: {run}"
        raise UserError(Fault(KEY, found, "null for this run", "take it out, or train anew under another name"))
    hashes = ContentHashes(cache_folder(config) / "content-hashes.json")
    labelled = {index: "" for index, source in enumerate(config.data.train) if isinstance(source, ClassificationSource)}
    name = f"{corpus_fingerprint(config.data, hashes, labelled)}-{amount}"
    folder = cache_folder(config) / "held-out" / name
    with locked(folder.parent, f".{name}.lock"):
        if not folder.is_dir():
            follow(write_held_out(folder, config.data, amount), "holding rows out", None, terminal())
    return folder


def held_out_tasks(config: Config) -> list[LoadedRetrieval | LoadedClassification]:
    """A retrieval over the pairs and triplets that are held out, and a classification of the labelled texts; none where none are.

    Raises:
        UserError: they can't be drawn, or are too few to judge by.
    """
    if config.evaluation.held_out is None:
        return []
    folder, faults = held_out_folder(config, config.evaluation.held_out), list[Fault]()
    tasks: list[LoadedRetrieval | LoadedClassification | None] = []
    rows, labels = folder / ROWS, folder / LABELS
    if rows.stat().st_size:
        tasks.append(read_retrieval(RetrievalTask(name=HELD_OUT, path=str(rows)), KEY, faults))
    if labels.stat().st_size:
        labelled = ClassificationTask(name=HELD_OUT_LABELS, train=str(folder / FIT), test=str(labels))
        tasks.append(read_classification(labelled, KEY, faults))
    if faults:
        raise UserError(*faults)
    return [task for task in tasks if task is not None]
