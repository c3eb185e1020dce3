"""Retrieval over a folder in BEIR's layout or the flat one: queries, documents and judgements. Config: `RetrievalTask`."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
from sklearn.metrics import ndcg_score  # type: ignore[import-untyped]

from gist_train.config.errors import Fault, shown
from gist_train.config.evaluation import RetrievalTask
from gist_train.data.tables import BadRow, text
from gist_train.evaluation.encoding import TextEncoder, encode_lists, unit
from gist_train.evaluation.metrics import Items
from gist_train.evaluation.task_files import Record, TaskFile, identifier, number, quoted

RANKED = 1 << 22
"""Similarities ranked at a time: 4 bytes each, and some 40 in scikit-learn while it sorts."""
RECALL_AT, MRR_AT = 100, 10


@dataclass(frozen=True, slots=True)
class LoadedRetrieval:
    """Queries that have a relevant document, and all documents."""

    name: str
    queries: tuple[str, ...]
    documents: tuple[str, ...]
    """Title, space, text; at least two."""
    bodies: tuple[str, ...] = field(default=(), kw_only=True)
    """The texts of the documents that have a title, without it."""
    judgements: tuple[dict[int, float], ...]
    """Per query: index of a document -> its judgement, above 0. What is not here counts 0."""

    def judged_texts(self) -> Mapping[str, Sequence[str]]:
        """Part -> the texts that scores are taken on."""
        # Training data hold passages without the title that precedes them here.
        return {"queries": self.queries, "documents": self.documents, **({"bodies": self.bodies} if self.bodies else {})}

    def measure(self, encoder: TextEncoder) -> dict[str, Items]:
        """By query: nDCG at 10 (gains as judged, documents of one similarity share their places), recall at 100, reciprocal rank.

        Recall and reciprocal rank are sentence-transformers' evaluator's, for which all that is judged above 0 is relevant.
        """
        queries, documents = [unit(vectors) for vectors in encode_lists(encoder, self.name, self.queries, self.documents)]
        at_a_time = max(1, RANKED // len(documents))
        evaluator = InformationRetrievalEvaluator(
            {"query": ""},
            {},
            {"query": {"document"}},  # set anew for each query below
            mrr_at_k=[MRR_AT],
            precision_recall_at_k=[RECALL_AT],
            ndcg_at_k=[],
            accuracy_at_k=[],
            map_at_k=[],
        )
        items = np.zeros((3, len(queries)))
        for start in range(0, len(queries), at_a_time):
            similarities = queries[start : start + at_a_time] @ documents.T
            for row, judged in enumerate(self.judgements[start : start + at_a_time]):
                near = _near(similarities[row], judged)
                gains = np.array([judged.get(document, 0.0) for document in near.tolist()])
                items[0, start + row] = ndcg_score(gains[None], similarities[row, near][None], k=10)
                # It ranks documents of one similarity by name, hence names that sort as the numbers do.
                evaluator.relevant_docs = {"query": {f"{document:09d}" for document in judged}}
                similar = zip(near.tolist(), similarities[row, near].tolist(), strict=True)
                hits = [{"corpus_id": f"{document:09d}", "score": similarity} for document, similarity in similar]
                metrics = evaluator.compute_metrics([hits])
                items[1:, start + row] = metrics["recall@k"][RECALL_AT], metrics["mrr@k"][MRR_AT]
        return {"ndcg@10": items[0], "recall@100": items[1], "mrr@10": items[2]}


def _near(similarities: NDArray[np.float32], judged: Collection[int]) -> NDArray[np.int64]:
    """The documents that a query's metrics depend on, ascending: the 100 most similar, all that tie with the last, the judged."""
    count = min(RECALL_AT, len(similarities))
    least = np.partition(similarities, -count)[-count]
    return np.union1d(np.flatnonzero(similarities >= least), np.fromiter(judged, np.int64, len(judged)))


def read_retrieval(task: RetrievalTask, where: str, faults: list[Fault]) -> LoadedRetrieval | None:
    """The task with its files read; None, and faults, where they have some."""
    folder = Path(task.path)
    if not folder.is_dir():
        path = f"{shown(str(folder))}, which is {'a file' if folder.exists() else f'no folder in {Path.cwd()}'}"
        faults.append(Fault(f"{where}: path", path, "a folder that exists", "correct the path"))
        return None
    # The flat names first: they belong to one split.
    corpus = _part(folder, ("corpus.jsonl",), where, faults)
    queries = _part(folder, (f"queries.{task.split}.jsonl", "queries.jsonl"), where, faults)
    qrels = _part(folder, (f"qrels.{task.split}.tsv", f"qrels/{task.split}.tsv"), where, faults)
    documents: dict[str, str] = {}
    bodies: list[str] = []
    asked: dict[str, str] = {}

    def document(row: Record) -> None:
        # The id is kept even where the text is bad, so that its judgements are not called unknown as well.
        document_id = _new_id(row, documents)
        # Title or text may be empty, as in several of BEIR's corpora, but not both.
        filled = [column for column in ("title", "text") if str(row[column] or "").strip()]
        documents[document_id] = " ".join(text(row[column], column) for column in filled or ["text"])
        if len(filled) == 2:
            bodies.append(text(row["text"], "text"))

    def query(row: Record) -> None:
        query_id = _new_id(row, asked)
        asked[query_id] = text(row["text"], "text")

    if corpus:
        corpus.read(["_id", "text"], document, optional=["title"])
        if corpus.clean and len(documents) < 2:
            corpus.fault("one document", "two documents or more", "a ranking needs documents to rank: add some")
    if queries:
        queries.read(["_id", "text"], query)
    whole = corpus is not None and corpus.to_the_end and queries is not None and queries.to_the_end
    if qrels is None:
        return None
    judged = _judgements(qrels, asked if whole else None, documents if whole else None)
    if not (whole and qrels.clean and judged):
        return None
    index = {document_id: number for number, document_id in enumerate(documents)}
    judgements = tuple({index[document_id]: score for document_id, score in scores.items()} for scores in judged.values())
    texts = tuple(asked[query_id] for query_id in judged)
    return LoadedRetrieval(task.name, texts, tuple(documents.values()), judgements, bodies=tuple(bodies))


def _judgements(qrels: TaskFile, queries: dict[str, str] | None, documents: dict[str, str] | None) -> dict[str, dict[str, float]]:
    """Query id -> document id -> judgement, those above 0 only. Ids are compared with `queries` and `documents` where given."""
    said: dict[tuple[str, str], float] = {}

    def judgement(row: Record) -> None:
        pair = identifier(row["query-id"], "query-id"), identifier(row["corpus-id"], "corpus-id")
        for value, column, known in zip(pair, ("query-id", "corpus-id"), (queries, documents), strict=True):
            if known is not None and value not in known:
                kind = "query" if column == "query-id" else "document"
                raise BadRow(f'"{column}" is unknown', shown(value), f"the _id of a {kind}")
        score = number(row["score"], "score")
        if said.setdefault(pair, score) != score:
            raise BadRow("a pair that was judged before", f"{score:g}, {said[pair]:g} before", "one judgement of a pair")

    qrels.read(["query-id", "corpus-id", "score"], judgement)
    judged: dict[str, dict[str, float]] = {}
    for (query, document), score in said.items():
        if score > 0:
            judged.setdefault(query, {})[document] = score
    if qrels.clean and not judged:
        qrels.fault("no score above 0", "one relevant document or more", "check the column", what=": score")
    return judged


def _part(folder: Path, names: Sequence[str], where: str, faults: list[Fault]) -> TaskFile | None:
    """The first that exists of `names` in the folder, each as it is or with .gz."""
    for name in [name + ending for name in names for ending in ("", ".gz")]:
        if (folder / name).is_file():
            return TaskFile(folder / name, f"{where}: {name}", faults)
    there = sorted(str(path.relative_to(folder)) for path in (*folder.glob("*"), *folder.glob("qrels/*")) if path.is_file())
    content = f"{shown(str(folder))} with {quoted(there[:20])}"
    expected = f"{' or '.join(names)}, or one of these with .gz"
    faults.append(Fault(f"{where}: no {names[0]}", content, expected, "add the file, or correct the path or the split"))
    return None


def _new_id(row: Record, known: dict[str, str]) -> str:
    new = identifier(row["_id"], "_id")
    if new in known:
        raise BadRow('"_id" was there before', shown(new), "each _id once")
    known[new] = ""
    return new
