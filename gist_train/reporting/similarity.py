"""How alike a model finds some held-out texts, before training and after: what belongs together draws near, the rest apart.

A page is made on the CPU from what is on this machine: nothing is downloaded, no code of a model's own is run, and models and
task files are bounded in size, so that it takes seconds.

Legend: N texts, D dimensions of an embedding.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError

from gist_train.config.errors import UserError
from gist_train.config.evaluation import EvaluationTask, MtebTask, RetrievalTask
from gist_train.config.loading import load_config
from gist_train.config.schema import Config, training_prompts
from gist_train.config.secrets import hidden
from gist_train.evaluation.classification import LoadedClassification
from gist_train.evaluation.clustering import LoadedClustering
from gist_train.evaluation.encoding import TextEncoder, finite_vectors, unit
from gist_train.evaluation.held_out import held_out_tasks
from gist_train.evaluation.pairs import LoadedPairs
from gist_train.evaluation.retrieval import LoadedRetrieval
from gist_train.evaluation.score_file import Terms, read_scores
from gist_train.evaluation.sts import LoadedSts
from gist_train.evaluation.tasks import LocalTask, load_tasks
from gist_train.evaluation.triplets import LoadedTriplets
from gist_train.memory import asked_for
from gist_train.model.hub import folder_on_disk
from gist_train.model.loading import load_student, load_trained
from gist_train.model.pretrained import Pretrained
from gist_train.results.selected import read_selected
from gist_train.run_folder import TRAINING_STATE, Run

PAIRS = 10
"""That are drawn of a task of pairs."""
CLASSES, OF_A_CLASS = 4, 5
"""That are drawn of a task of labelled texts."""
ALIKE = 0.9
"""Quantile of human scores from which on a pair counts as belonging together."""
LONGEST = 256
"""Tokens that a text is cut to."""
LARGEST_MODEL, LARGEST_TASK = 3 << 30, 64 << 20
"""Bytes of weights, and of a task's files."""

Texts = Sequence[Sequence[str]]
"""Groups of texts that belong together."""


@dataclass(frozen=True, slots=True)
class SimilarityMap:
    """Cosine similarities of some texts."""

    task: str
    what: str
    """The texts are, in words."""
    texts: list[str]
    """Those that belong together beside each other."""
    groups: list[int]
    """(N,) equal for texts that belong together."""
    before: NDArray[np.float64]
    """(N, N) of the base model."""
    after: NDArray[np.float64]
    """(N, N) of the selected model, or of a checkpoint."""
    name: str
    """Of that one."""

    def mean(self, cosines: NDArray[np.float64], *, together: bool) -> float | None:
        """Over all pairs of two texts that belong together, or that do not; None where there is no such pair."""
        group = np.array(self.groups)
        asked = (group[:, None] == group) == together
        np.fill_diagonal(asked, val=False)
        return float(cosines[asked].mean()) if asked.any() else None


@dataclass(frozen=True, slots=True)
class NoMap:
    """Why there is none."""

    reason: str


def similarity_map(run: Run) -> SimilarityMap | NoMap:
    """Of texts of the run's held-out rows, or else of the first task whose files are here and small."""
    config = load_config(run.config)
    if config.model.trust_remote_code:
        return NoMap("the model brings code of its own, which is not run for a page")
    if not run.saved_steps():
        return NoMap("the run has no checkpoint")
    folder, name = _shown(run, config)
    base = folder_on_disk(config.model.name, config.model.revision)
    if base is None:
        return NoMap(f"{config.model.name} is not on this machine")
    if (size := max(_weights(base), _weights(folder))) > LARGEST_MODEL:
        return NoMap(f"the model has {size / 1e9:.1f} GB of weights, and maps are drawn of up to {LARGEST_MODEL / 1e9:.1f}")
    here = config.model.model_copy(update={"name": str(base), "revision": None})
    try:
        task = _task(config, run)
        if task is None:
            return NoMap("no task of evaluation.tasks is made of files of up to 64 MB, and no row was held out")
        what, groups = drawn(task)
        before = _cosines(load_student(here, training_prompts(config)), config, task, groups)
        after = _cosines(load_trained(folder, here), config, task, groups)
    except UserError as error:
        return NoMap(f"{error.faults[0].where}: {error.faults[0].found}")
    except (OSError, ArithmeticError, SafetensorError, ValueError) as error:
        return NoMap(str(error))
    except (MemoryError, RuntimeError) as error:
        if asked_for(error) is None:
            raise
        return NoMap(f"out of memory: {asked_for(error)}")
    texts = [hidden(text) for group in groups for text in group]
    numbers = [number for number, group in enumerate(groups) for _ in group]
    return SimilarityMap(task.name, what, texts, numbers, before, after, name)


def _shown(run: Run, config: Config) -> tuple[Path, str]:
    """Folder and name of the selected model, else of the newest checkpoint that was measured, else of the newest."""
    if (selected := read_selected(run)) is not None:
        return selected.folder(run), selected.name
    saved = run.saved_steps()
    scores = read_scores(run, Terms.of(config.evaluation)) if run.evaluations.exists() else {}
    step = max(scores.keys() & {*saved}, default=saved[-1])
    return run.checkpoint(step), f"step {step:,}"


def _weights(folder: Path) -> int:
    """Bytes of a model's weights."""
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors") if file.name != TRAINING_STATE)


def _task(config: Config, run: Run) -> LocalTask | None:
    """The task whose texts are shown: of rows that were held out, else the first that is small, retrieval last."""
    if config.evaluation.held_out is not None and run.held_out.is_dir():
        moved = config.model_copy(update={"output_dir": str(run.folder.parent), "name": run.folder.name})
        return next(iter(held_out_tasks(moved)), None)
    small = [task for task in config.evaluation.tasks if not isinstance(task, MtebTask) and _size(task) <= LARGEST_TASK]
    chosen = sorted(small, key=lambda task: isinstance(task, RetrievalTask))[:1]
    loaded = load_tasks(chosen)
    return next((task for task in loaded if isinstance(task, LocalTask)), None)


def _size(task: EvaluationTask) -> int:
    """Bytes of a task's files; those that are not there count nothing, and are told when they are read."""
    values = task.model_dump()
    paths = [Path(values[key]) for key in ("path", "train", "test") if key in values]
    files = [file for path in paths for file in ([path] if path.is_file() else path.rglob("*"))]
    return sum(file.stat().st_size for file in files if file.is_file())


def drawn(task: LocalTask) -> tuple[str, Texts]:
    """What the texts are, in words, and the texts in groups that belong together: evenly spaced in the task's own order."""
    match task:
        case LoadedSts():
            alike = np.flatnonzero(task.scores >= np.quantile(task.scores, ALIKE))
            return "pairs with the highest human scores", [(task.texts1[i], task.texts2[i]) for i in _spaced(alike, PAIRS)]
        case LoadedPairs():
            alike = np.flatnonzero(task.together)
            return "pairs that belong together", [(task.texts1[i], task.texts2[i]) for i in _spaced(alike, PAIRS)]
        case LoadedTriplets():
            rows = _spaced(np.arange(len(task.anchors)), PAIRS)
            return "anchors, each with its positive", [(task.anchors[i], task.positives[i]) for i in rows]
        case LoadedRetrieval():
            return "queries, each with its best document", _found(task)
        case LoadedClassification():
            return _labelled(task.test_texts, task.test_labels)
        case LoadedClustering():
            return _labelled(task.texts, task.labels)


def _labelled(texts: Sequence[str], labels: NDArray[np.int64]) -> tuple[str, Texts]:
    """Texts of some labels that have most texts, or of all, where there are no more."""
    numbers, counts = np.unique(labels, return_counts=True)
    full = numbers[counts >= min(OF_A_CLASS, int(counts.max()))]
    classes = _spaced(full, CLASSES)
    each = max(OF_A_CLASS, CLASSES * OF_A_CLASS // len(classes))
    groups = [[texts[i] for i in _spaced(np.flatnonzero(labels == label), each)] for label in classes]
    return f"texts of {len(groups)} labels", groups


def _found(task: LoadedRetrieval) -> Texts:
    """Some queries with the document that is judged best."""
    best = {}
    for query, judged in enumerate(task.judgements):
        there = {index: value for index, value in judged.items() if index < len(task.documents)}
        if there:
            best[query] = max(there, key=lambda index: there[index])
    return [(task.queries[i], task.documents[best[i]]) for i in _spaced(np.array([*best]), PAIRS)]


def _spaced(of_all: NDArray[np.int64], count: int) -> list[int]:
    """At most `count` of these, evenly spaced."""
    places = np.unique(np.linspace(0, len(of_all) - 1, min(count, len(of_all))).astype(np.int64))
    some: list[int] = of_all[places].tolist()
    return some


def _cosines(model: Pretrained, config: Config, task: LocalTask, groups: Texts) -> NDArray[np.float64]:
    """(N, N) as the task's measure has them: with its prompts, and as many dimensions."""
    length = min(config.evaluation.max_length or model.max_length, LONGEST)
    encoder = model.with_max_length(length).with_truncation(config.evaluation.truncate_dim)
    texts = [text for group in groups for text in group]
    first, second = _prompts(task, encoder)
    vectors = finite_vectors(encoder, texts, task.name, first)
    if first != second:  # queries come first in their groups
        documents = [place > 0 for group in groups for place in range(len(group))]
        vectors[documents] = finite_vectors(encoder, texts, task.name, second)[documents]
    vectors = unit(vectors)
    cosines: NDArray[np.float64] = vectors.astype(np.float64) @ vectors.T.astype(np.float64)
    return cosines


def _prompts(task: LocalTask, encoder: TextEncoder) -> tuple[str | None, str | None]:
    """Before the first text of a group, and before the others."""
    return task.prompts_for(encoder) if isinstance(task, LoadedRetrieval) else (task.prompt, task.prompt)
