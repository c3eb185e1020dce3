"""Tasks and benchmarks of the package mteb: named in the YAML, run by mteb itself, its results kept in its own cache.

mteb is an extra and slow to import (some seconds), so that it is imported by the functions that need it.
"""

import copy
import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gist_train.config.errors import Fault, UserError, shown
from gist_train.config.evaluation import ClassificationTask, MtebTask, RetrievalTask, StsTask
from gist_train.data.hub import bars_off, machine_failed, reason_of
from gist_train.evaluation.classification import LoadedClassification, read_classification
from gist_train.evaluation.encoding import TextEncoder
from gist_train.evaluation.retrieval import LoadedRetrieval, read_retrieval
from gist_train.evaluation.sts import LoadedSts, read_sts
from gist_train.progress import others_silent

HOW_TO_LIST = "`mteb available-tasks` and `mteb available-benchmarks` list all names"
BATCH_ROWS = 512
"""Rows that mteb's DataLoader hands over at a time. All of them are collected before one is encoded."""


@dataclass(frozen=True, slots=True)
class LoadedMteb:
    """A task of mteb, all tasks of one of its benchmarks, or local files as one of its tasks. No data of the hub is read yet."""

    name: str
    tasks: tuple[Any, ...]
    """mteb's AbsTask objects, as mteb made them: they draw random numbers, so that each measurement has copies of its own."""
    benchmark: bool
    where: str
    """The task's key in the YAML."""

    def metrics(self) -> list[str]:
        """Names of its metrics: the main score, or "<mteb task>/<main score>" of each task of a benchmark and their mean."""
        if not self.benchmark:
            return [task.metadata.main_score for task in self.tasks]
        return [*(f"{task.metadata.name}/{task.metadata.main_score}" for task in self.tasks), "mean"]

    def judged_texts(self) -> Mapping[str, Sequence[str]]:
        """None: its data are mteb's, and may not be here yet."""
        return {}

    def content(self) -> list[tuple[str, str, str | None]]:
        """(name, main score, revision of the data set) of each of mteb's tasks: what tells two contents apart."""
        return [(task.metadata.name, task.metadata.main_score, task.metadata.dataset.get("revision")) for task in self.tasks]


def read_mteb(task: MtebTask, where: str, faults: list[Fault]) -> LoadedMteb | None:
    """What `task` names, or None and a fault: mteb is not installed, it has no such name, or a local file is wrong."""
    try:
        with others_silent(), bars_off():
            import mteb
            from mteb.get_tasks import TASK_LIST
    except ImportError as error:
        fix = 'pip install "gist-train[mteb]"'
        faults.append(Fault(where, f"the package mteb can't be imported: {error}", "mteb 2, the extra mteb of this package", fix))
        return None
    if task.files is not None:
        local = _local(task, where, faults)
        return None if local is None else LoadedMteb(task.name, (local,), False, where)
    benchmarks = {name: benchmark for benchmark in mteb.get_benchmarks() for name in (benchmark.name, *(benchmark.aliases or ()))}
    # Not mteb.get_tasks(), which leaves some out, such as private and superseded ones.
    known_tasks = {listed.metadata.name for listed in TASK_LIST}
    if task.name in benchmarks:
        if task.revision is not None:
            expected = "null: a benchmark has many data sets, each with a revision of its own"
            faults.append(Fault(f"{where}: revision", shown(task.revision), expected, "set it to null, or name a task"))
        tasks = tuple(benchmarks[task.name].tasks)
    elif task.name in known_tasks:
        with others_silent(), bars_off():
            tasks = (mteb.get_task(task.name),)
        if task.revision is not None:
            tasks = (_at_revision(tasks[0], task.revision, where, faults),)
    else:
        near = difflib.get_close_matches(task.name, [*known_tasks, *benchmarks], n=3, cutoff=0.5)
        fix = f"did you mean {' or '.join(map(shown, near))}? {HOW_TO_LIST}" if near else HOW_TO_LIST
        faults.append(Fault(f"{where}: name", shown(task.name), "the name of a task or a benchmark of mteb", fix))
        return None
    others = {f"{kind} ({one.metadata.name})" for one in tasks for kind in one.metadata.modalities if kind != "text"}
    if others:
        faults.append(Fault(f"{where}: name", f"inputs of the kind {', '.join(sorted(others)[:5])}", "text", "name other tasks"))
    return LoadedMteb(task.name, tasks, task.name in benchmarks, where)


def measure_mteb(
    encoder: TextEncoder,
    loaded: LoadedMteb,
    *,
    identity: str,
    normalized: bool,
    prompts: Mapping[str, str],
    cache: Path,
) -> dict[str, float]:
    """The main score of each task, a fraction, as mteb computes it: the mean over the task's splits and subsets (languages).

    Of a task and of local files {"<metric>": value}; of a benchmark {"<mteb task>/<metric>": value, ..., "mean": over its tasks}.
    A score that mteb's cache holds for this identity and revision of the data is not computed again, and no data is read for it;
    what a task has done before it is interrupted is kept there too. A correlation that does not exist (all similarities are the
    same) counts 0.

    Whether embeddings are normalised changes the scores of tasks that fit a classifier on them, or go by other distances;
    retrieval and STS go by cosine. The cache keeps the two apart, and says which of them a result is.

    Args:
        identity: what tells this model's embeddings from any other's: weights, and also pooling, maximum length, truncated width.
        normalized: whether the encoder's embeddings have length 1.
        prompts: the model's own, by name, as sentence-transformers keeps them; {} for none.
        cache: folder of mteb's ResultCache.

    Raises:
        UserError: a task's data set can't be read.
        FloatingPointError: an embedding holds a value that is not finite.
        ValueError: the encoder gave another number of vectors than texts.
    """
    with others_silent(), bars_off():
        import mteb

        from gist_train.evaluation.mteb_adapters import MtebEncoder

        results = mteb.ResultCache(cache_path=cache)
        model = MtebEncoder(encoder, identity=identity, normalized=normalized, prompts=prompts)
        scores: dict[str, float] = {}
        for task in copy.deepcopy(loaded.tasks):
            for part in _parts(task):
                score = _score(model, part, results, loaded.where)
                model.forget()
            prefix = f"{task.metadata.name}/" if loaded.benchmark else ""
            scores[prefix + task.metadata.main_score] = score  # of the last part, which is the task itself
    if loaded.benchmark:
        scores["mean"] = sum(scores.values()) / len(scores)
    return scores


def _local(task: MtebTask, where: str, faults: list[Fault]) -> Any:
    """mteb's form of the task's files; None where there is a fault."""
    here = f"{where}: files"
    match task.files:
        case StsTask() as files:
            read: LoadedSts | LoadedRetrieval | LoadedClassification | None = read_sts(files, here, faults)
        case RetrievalTask() as files:
            read = read_retrieval(files, here, faults)
        case ClassificationTask() as files:
            read = read_classification(files, here, faults)
    if isinstance(read, LoadedRetrieval):
        parts = [judgement for judged in read.judgements for judgement in judged.values() if not judgement.is_integer()]
        if parts:
            expected = "whole numbers: mteb's metrics (trec_eval) take no others"
            faults.append(Fault(f"{here}: score", f"{parts[0]:g}", expected, "scale the judgements, or leave out type: mteb"))
            return None
    if read is None:
        return None
    from gist_train.evaluation.mteb_adapters import as_mteb_task

    return as_mteb_task(read)


def _at_revision(task: Any, revision: str, where: str, faults: list[Fault]) -> Any:
    """The same task on another revision of its data set."""
    from gist_train.evaluation.mteb_adapters import with_metadata

    if task.is_aggregate:
        expected = "null: the task is made of others, each with a data set and a revision of its own"
        faults.append(Fault(f"{where}: revision", shown(revision), expected, "set it to null"))
        return task
    data_set = {**task.metadata.dataset, "revision": revision}
    return with_metadata(type(task), task.metadata.model_copy(update={"dataset": data_set}))()


def _parts(task: Any) -> list[Any]:
    """The tasks that an aggregate is made of, and then itself: mteb takes its parts from the cache."""
    return [*(part for one in task.metadata.tasks for part in _parts(one)), task] if task.is_aggregate else [task]


def _score(model: Any, task: Any, results: Any, where: str) -> float:
    """The task's main score, from the cache or computed."""
    import mteb

    name = task.metadata.name
    try:
        kept = results.load_task_result(name, model.mteb_model_meta)
        # mteb itself would take a whole result for any revision.
        fits = kept is None or task.is_aggregate or kept.dataset_revision == task.metadata.revision
    except ValueError:  # a file cut short when the power went
        fits = False
    try:
        mteb.evaluate(
            model,
            task,
            co2_tracker=False,
            encode_kwargs={"batch_size": BATCH_ROWS, "show_progress_bar": False},
            cache=results,
            overwrite_strategy="only-missing" if fits else "always",
            show_progress_bar=False,
            public_only=False,  # a data set that is not there is an error, not a task left out
        )
    except Exception as error:  # of `datasets`, of pyarrow, or of the HTTP library of the day, which share no class
        if task.data_loaded or task.is_aggregate or machine_failed(error):
            raise
        raise _unread(task, where, error) from error
    # From the cache also where it was just computed: it rounds, and a score is the same the second time.
    score = results.load_task_result(name, model.mteb_model_meta).validate_and_filter_scores(task).get_score()
    return 0.0 if math.isnan(score) else float(score)


def _unread(task: Any, where: str, error: Exception) -> UserError:
    data_set, reason = task.metadata.dataset, reason_of(error)
    return UserError(
        Fault(
            f"{where}: {task.metadata.name}",
            f"its data set {data_set['path']} at revision {data_set['revision']} can't be read: {reason}",
            "a data set of the Hugging Face hub, or a copy of it in the cache of `datasets`",
            "check the network and, for a private or gated data set, your login; without a network, evaluate once where there is "
            "one and bring its cache (HF_HOME), or give local files under files",
        )
    )
