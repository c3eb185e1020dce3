"""Our encoders and local tasks in the form that mteb asks for. Imports mteb, which takes seconds: import this where it is used.

Written against mteb 2.26: `EncoderProtocol`, `AbsTaskSTS`, `AbsTaskRetrieval`, `AbsTaskClassification`, `TaskMetadata`.
"""

import hashlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict
from mteb.abstasks import AbsTaskClassification, AbsTaskRetrieval
from mteb.abstasks.sts import AbsTaskSTS
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.models.abs_encoder import AbsEncoder, get_prompt_name
from mteb.models.model_meta import ModelMeta, ScoringFunction
from mteb.types import PromptType
from numpy.typing import NDArray

from gist_train.evaluation.classification import LoadedClassification
from gist_train.evaluation.encoding import TextEncoder, finite_vectors
from gist_train.evaluation.retrieval import LoadedRetrieval
from gist_train.evaluation.sts import LoadedSts

REMEMBERED = 200_000
"""Texts whose embeddings are kept for the next call of one task: mteb asks twice for the texts that two of its columns share."""


class MtebEncoder(AbsEncoder):  # type: ignore[misc]  # mteb's classes are not followed by mypy
    """A TextEncoder as an encoder of mteb; similarities are cosines, computed by mteb.

    Args:
        identity: what tells this model, and how it is run, from any other: the key of mteb's cache of results.
        normalized: whether the embeddings have length 1. Stated in mteb's cache, in the model's metadata and the folder's name.
        prompts: the model's own, by name ("query", "document", a task's name ...), put before the texts as sentence-transformers
            does. mteb's rules decide which one a task's texts get; instructions that mteb has for its tasks are not used.
    """

    def __init__(self, encoder: TextEncoder, *, identity: str, normalized: bool, prompts: Mapping[str, str]):
        self.encoder = encoder
        self.prompts = dict(prompts)
        self._known: dict[tuple[str | None, str], NDArray[np.float32]] = {}
        meta = {
            # Readable first; the revision is what tells two identities with the same readable part from each other.
            "name": "gist-train/" + re.sub(r"[^A-Za-z0-9._-]+", "_", identity)[:100],
            "revision": hashlib.blake2b(repr((identity, sorted(self.prompts.items()))).encode(), digest_size=16).hexdigest(),
            "similarity_fn_name": ScoringFunction.COSINE,
            "experiment_kwargs": {"normalized": normalized},
        }
        self.mteb_model_meta = ModelMeta.create_empty(meta)

    def encode(self, inputs: Any, *, task_metadata: Any, prompt_type: Any = None, **_: Any) -> NDArray[np.float32]:
        """(N, D) for the texts of all batches, in their order. Each unique text is encoded once, and all in one call.

        Args:
            inputs: batches of mteb's DataLoader, each with a list of texts under "text".

        Raises:
            FloatingPointError: an embedding holds a value that is not finite.
            ValueError: the encoder gave another number of vectors than texts.
        """
        prompt = self._prompt(task_metadata, prompt_type)
        keys = [(prompt, text) for batch in inputs for text in batch["text"]]
        new = [key for key in dict.fromkeys(keys) if key not in self._known]
        if new:
            vectors = finite_vectors(self.encoder, [text for _, text in new], task_metadata.name, prompt)
            self._known.update(zip(new, vectors, strict=True))
        out = np.stack([self._known[key] for key in keys])
        if len(self._known) > REMEMBERED:
            self.forget()
        return out

    def forget(self) -> None:
        """Lets go of the embeddings of one task's texts."""
        self._known.clear()

    def _prompt(self, task_metadata: Any, prompt_type: Any) -> str | None:
        """None for the model's default, which sentence-transformers takes where mteb names no prompt."""
        name = get_prompt_name(self.prompts, task_metadata, prompt_type)
        if name is None and prompt_type == PromptType.document:
            # What sentence-transformers' encode_document takes besides "document".
            name = next((other for other in ("passage", "corpus") if other in self.prompts), None)
        return None if name is None else self.prompts[name] or ""


def as_mteb_task(task: LoadedSts | LoadedRetrieval | LoadedClassification) -> Any:
    """An AbsTask of mteb over a local task, judged by mteb's protocol on a split "test".

    STS and retrieval are defined as ours. Classification is another protocol than ours: mteb fits on `per_class` rows a
    class (8 where that is None), and takes the mean of 10 draws. Judgements must be whole numbers. mteb reads a document without
    the spaces around it. The data set's revision is a hash over the content: a file that changed is another revision.
    """
    match task:
        case LoadedSts():
            content: Any = (task.texts1, task.texts2, task.scores.tolist())
            kind, score = "STS", "cosine_spearman"
        case LoadedRetrieval():
            content = (task.queries, task.documents, [sorted(judged.items()) for judged in task.judgements])
            kind, score = "Retrieval", "ndcg_at_10"
        case LoadedClassification():
            content = (task.train_texts, task.train_labels.tolist(), task.test_texts, task.test_labels.tolist(), task.per_class)
            kind, score = "Classification", "accuracy"
    metadata = TaskMetadata(
        dataset={"path": "local files", "revision": hashlib.blake2b(repr(content).encode(), digest_size=16).hexdigest()},
        name=task.name,
        description="Local files.",
        type=kind,
        category="t2c" if kind == "Classification" else "t2t",
        eval_splits=["test"],
        eval_langs=["und"],  # undetermined
        main_score=score,
        is_public=False,
    )
    bases = {"STS": _LocalSts, "Retrieval": _LocalRetrieval, "Classification": _LocalClassification}
    return with_metadata(bases[kind], metadata)(task)


def with_metadata(task_class: Any, metadata: Any) -> Any:
    """The same class of tasks with other metadata. mteb drops an object's own when it unloads the data, but not a class's."""
    return type(task_class.__name__, (task_class,), {"metadata": metadata})


class _LocalSts(AbsTaskSTS):  # type: ignore[misc]
    def __init__(self, task: LoadedSts):
        self.task = task
        super().__init__()

    def load_data(self, **_: Any) -> None:
        columns = {"sentence1": self.task.texts1, "sentence2": self.task.texts2, "score": self.task.scores.tolist()}
        self.dataset = DatasetDict({"test": Dataset.from_dict(columns)})
        self.data_loaded = True


class _LocalRetrieval(AbsTaskRetrieval):  # type: ignore[misc]
    ignore_identical_ids = True

    def __init__(self, task: LoadedRetrieval):
        self.task = task
        super().__init__()

    def load_data(self, **_: Any) -> None:
        # A document that is a query has its id, by which mteb leaves it out of that query's hits.
        own = {document: f"q{query}" for query, document in enumerate(self.task.itself) if document >= 0}
        queries = [f"q{query}" for query in range(len(self.task.queries))]
        documents = [own.get(document, f"d{document}") for document in range(len(self.task.documents))]
        judged = {
            f"q{query}": {own.get(document, f"d{document}"): int(judgement) for document, judgement in scores.items()}
            for query, scores in enumerate(self.task.judgements)
        }
        split = {
            "corpus": Dataset.from_dict({"id": documents, "text": self.task.documents}),
            "queries": Dataset.from_dict({"id": queries, "text": self.task.queries}),
            "relevant_docs": judged,
            "top_ranked": None,
        }
        self.dataset = {"default": {"test": split}}
        self.data_loaded = True


class _LocalClassification(AbsTaskClassification):  # type: ignore[misc]
    def __init__(self, task: LoadedClassification):
        self.task = task
        if task.per_class is not None:
            self.samples_per_label = task.per_class
        super().__init__()

    def load_data(self, **_: Any) -> None:
        train = Dataset.from_dict({"text": self.task.train_texts, "label": self.task.train_labels.tolist()})
        test = Dataset.from_dict({"text": self.task.test_texts, "label": self.task.test_labels.tolist()})
        self.dataset = DatasetDict({"train": train, "test": test})
        self.data_loaded = True
