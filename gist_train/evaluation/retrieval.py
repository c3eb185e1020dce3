"""Retrieval over a folder in BEIR's layout or the flat one, or over a file of rows. Config: `RetrievalTask`."""

import hashlib
import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from gist_train.config.errors import Fault, UserError, listed, shown
from gist_train.config.evaluation import RetrievalTask
from gist_train.config.sources import Columns, CsvSource, JsonlSource, ParquetSource, Source, XlsxSource
from gist_train.data.rows import Row
from gist_train.data.sources import read_rows
from gist_train.data.tables import BadRow, TableFile, text
from gist_train.evaluation.encoding import TextEncoder, encode_lists, side_prompt, unit
from gist_train.evaluation.metrics import Items
from gist_train.evaluation.task_files import FAULTS_PER_FILE, Record, TaskFile, fix_of_row, identifier, number, quoted

logger = logging.getLogger(__name__)

RANKED = 1 << 22
"""Similarities ranked at a time: 4 bytes each, and some 40 in scikit-learn while it sorts."""
RECALL_AT, MRR_AT = 100, 10
NEVER_FOUND = -2.0
"""Less than any cosine."""
UNKNOWN_SHARE = 0.2
"""Judgements of documents or queries that are not there, above which the files are taken not to belong together."""


@dataclass(frozen=True, slots=True)
class LoadedRetrieval:
    """Queries that have a relevant document, and all documents."""

    METRICS: ClassVar = RetrievalTask.METRICS
    name: str
    queries: tuple[str, ...]
    documents: tuple[str, ...]
    """Title, space, text; at least two."""
    bodies: tuple[str, ...] = field(default=(), kw_only=True)
    """The texts of the documents that have a title, without it."""
    judgements: tuple[dict[int, float], ...]
    """Per query: index of a document -> its judgement, above 0. What is not here counts 0. An index past the last document is a
    judged one that the corpus has not: nothing finds it, and it is part of what was to be found."""
    prompts: tuple[str | None, str | None] = field(default=(None, None), kw_only=True)
    """Before queries and documents; None for what the model's folder says."""
    itself: tuple[int, ...] = field(default=(), kw_only=True)
    """Per query: index of the document that is the query itself, which is no hit; -1 for none. () where no query has one."""

    def judged_texts(self) -> Mapping[str, Sequence[str]]:
        """Part -> the texts that scores are taken on."""
        # Training data hold passages without the title that precedes them here.
        return {"queries": self.queries, "documents": self.documents, **({"bodies": self.bodies} if self.bodies else {})}

    def prompts_for(self, encoder: TextEncoder) -> tuple[str | None, str | None]:
        """What this model reads before queries and before documents; None for its folder's default."""
        query, document = self.prompts
        if query is None:
            query = side_prompt(encoder, "query")
        if document is None:
            document = side_prompt(encoder, "document", "passage", "corpus")
        return query, document

    def measure(self, encoder: TextEncoder) -> dict[str, Items]:
        """By query: nDCG at 10 (gains as judged, documents of one similarity share their places), recall at 100, reciprocal rank.

        Recall and reciprocal rank are sentence-transformers' evaluator's, for which all that is judged above 0 is relevant.
        """
        from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
        from sklearn.metrics import ndcg_score  # type: ignore[import-untyped]

        query_prompt, document_prompt = self.prompts_for(encoder)
        if query_prompt == document_prompt:  # a text on both sides is encoded once
            both = encode_lists(encoder, self.name, self.queries, self.documents, prompt=query_prompt)
        else:
            both = encode_lists(encoder, self.name, self.queries, prompt=query_prompt)
            both += encode_lists(encoder, self.name, self.documents, prompt=document_prompt)
        queries, documents = [unit(vectors) for vectors in both]
        first_alike = _first_alike(documents)
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
            if first_alike is not None:
                similarities = similarities[:, first_alike]
            for row, judged in enumerate(self.judgements[start : start + at_a_time]):
                itself = self.itself[start + row] if self.itself else -1
                if itself >= 0:
                    similarities[row, itself] = NEVER_FOUND
                there = [document for document in judged if document < len(documents) and document != itself]
                near = _near(similarities[row], there)
                near = near[near != itself]
                gains_near = [judged.get(document, 0.0) for document in near.tolist()]
                # What is never found comes after ten others, and so counts in the ideal alone.
                gone = [gain for document, gain in judged.items() if document >= len(documents) or document == itself]
                gains = np.array(gains_near + [0.0] * 10 + gone if gone else gains_near)
                ranked = np.append(similarities[row, near], np.linspace(-1.5, NEVER_FOUND, len(gains) - len(near)))
                items[0, start + row] = ndcg_score(gains[None], ranked[None], k=10)
                # It ranks documents of one similarity by name, hence names that sort as the numbers do.
                evaluator.relevant_docs = {"query": {f"{document:09d}" for document in judged}}
                similar = zip(near.tolist(), similarities[row, near].tolist(), strict=True)
                hits = [{"corpus_id": f"{document:09d}", "score": similarity} for document, similarity in similar]
                metrics = evaluator.compute_metrics([hits])
                items[1:, start + row] = metrics["recall@k"][RECALL_AT], metrics["mrr@k"][MRR_AT]
        return {"ndcg@10": items[0], "recall@100": items[1], "mrr@10": items[2]}


def _first_alike(vectors: NDArray[np.float32]) -> NDArray[np.int64] | None:
    """(N,) for each of the vectors (N, D) the first that is the same to the bit; None where no two are.

    A product of matrices may give one vector similarities that differ in the last bit, by the column that it is in.
    """
    first: dict[bytes, int] = {}
    hashes = (hashlib.blake2b(vector.tobytes(), digest_size=16).digest() for vector in vectors)  # for millions of vectors
    numbers = np.array([first.setdefault(one, number) for number, one in enumerate(hashes)], np.int64)
    return None if len(first) == len(vectors) else numbers


def _near(similarities: NDArray[np.float32], judged: Collection[int]) -> NDArray[np.int64]:
    """The documents that a query's metrics depend on, ascending: the 100 most similar, all that tie with the last, the judged."""
    count = min(RECALL_AT, len(similarities))
    least = np.partition(similarities, -count)[-count]
    return np.union1d(np.flatnonzero(similarities >= least), np.fromiter(judged, np.int64, len(judged)))


def read_retrieval(task: RetrievalTask, where: str, faults: list[Fault]) -> LoadedRetrieval | None:
    """The task with its files read; None, and faults, where they have some."""
    folder = Path(task.path)
    if folder.is_file() and (source := _source(task)) is not None:
        return _read_rows(task, source, where, faults)
    if given := [key for key in ("columns", "where", "delimiter", "header") if _is_set(task, key)]:
        fix = f"take {' and '.join(given)} out, or name a file of rows"
        faults.append(Fault(f"{where}: {given[0]}", f"{shown(folder)}, which is no file of rows", "a file of rows", fix))
        return None
    if not folder.is_dir():
        what = f"a file that ends in {shown(folder.suffix)}" if folder.exists() else f"neither folder nor file in {Path.cwd()}"
        expected = "a folder, or a file of rows (.jsonl, .json, .csv, .tsv, .parquet or .xlsx), that exists"
        faults.append(Fault(f"{where}: path", f"{shown(folder)}, which is {what}", expected, "correct the path"))
        return None
    # The flat names first: they belong to one split.
    corpus = _part(task, ("corpus.jsonl",), where, faults)
    queries = _part(task, (f"queries.{task.split}.jsonl", "queries.jsonl"), where, faults)
    qrels = _part(task, (f"qrels.{task.split}.tsv", f"qrels/{task.split}.tsv"), where, faults)
    documents: dict[str, str | None] = {}
    bodies: dict[str, str] = {}
    asked: dict[str, str | None] = {}

    def document(row: Record) -> None:
        # The id is kept even where the text is bad, so that its judgements are not called unknown as well.
        document_id = _new_id(row, documents)
        # Title or text may be empty, as in several of BEIR's corpora; a document with neither can't be found.
        filled = [column for column in ("title", "text") if str(row[column] or "").strip()]
        documents[document_id] = " ".join(text(row[column], column) for column in filled) or None
        if len(filled) == 2:
            bodies[document_id] = text(row["text"], "text")

    def query(row: Record) -> None:
        query_id = _new_id(row, asked)
        asked[query_id] = text(row["text"], "text")

    if corpus:
        corpus.read(["_id", "text"], document, optional=["title"])
        if corpus.clean and len([text for text in documents.values() if text]) < 2:
            corpus.fault("not two documents with a text", "two or more", "a ranking needs documents to rank: add some")
    if queries:
        queries.read(["_id", "text"], query)
    if qrels is None:
        return None
    whole = corpus is not None and corpus.to_the_end and queries is not None and queries.to_the_end
    judged, left_out = _judgements(qrels, asked if whole else None, documents if whole else None)
    if empty := sum(text is None for text in documents.values()):
        left_out.append(f"{empty:,} documents without a text")
    if left_out:
        logger.warning("%s: left out: %s", where, listed(left_out))
    if not (whole and qrels.clean and judged):
        return None
    texts = {document_id: text for document_id, text in documents.items() if text is not None}
    index = {document_id: number for number, document_id in enumerate(texts)}
    for scores in judged.values():  # numbered on: what the corpus has not
        for document_id in scores:
            index.setdefault(document_id, len(index))
    judgements = tuple({index[document_id]: score for document_id, score in scores.items()} for scores in judged.values())
    asked_texts = tuple(asked[query_id] or "" for query_id in judged)
    # In ArguAna and Quora queries are documents too, with titles in ArguAna: BEIR and mteb take no query for a hit of itself.
    same = [asked[query_id] in (texts.get(query_id), bodies.get(query_id)) and query_id in texts for query_id in judged]
    itself = tuple(index[query_id] if is_document else -1 for query_id, is_document in zip(judged, same, strict=True))
    return LoadedRetrieval(
        task.name,
        asked_texts,
        tuple(texts.values()),
        judgements,
        bodies=tuple(bodies.values()),
        itself=itself if max(itself) >= 0 else (),
        prompts=(task.prompts.query, task.prompts.document),
    )


def retrieval_of_rows(name: str, rows: Iterable[Row], prompts: tuple[str | None, str | None] = (None, None)) -> LoadedRetrieval:
    """Each anchor asks for its positives among the positives and negatives of all rows; a text counts once on a side.

    An anchor that is its own positive asks for the other ones, and not at all where it has no other.
    """
    judgements: dict[str, dict[int, float]] = {}
    index: dict[str, int] = {}
    for row in rows:
        for document in (*row.positives, *row.negatives):
            index.setdefault(document, len(index))
        if asked := {index[positive]: 1.0 for positive in row.positives if positive != row.anchor}:
            judgements.setdefault(row.anchor, {}).update(asked)
    itself = tuple(index.get(query, -1) for query in judgements)
    own = itself if max(itself, default=-1) >= 0 else ()
    return LoadedRetrieval(name, tuple(judgements), tuple(index), tuple(judgements.values()), itself=own, prompts=prompts)


def _source(task: RetrievalTask) -> Source | None:
    """The task's file as training would read it; None where its ending says that it holds no rows."""
    columns = None if task.columns is None else Columns(**task.columns.model_dump())
    match TableFile(Path(task.path), "").suffix:
        case ".jsonl" | ".json":
            return JsonlSource(path=task.path, columns=columns, where=task.where)
        case ".csv" | ".tsv":
            return CsvSource(path=task.path, columns=columns, where=task.where, delimiter=task.delimiter, header=task.header)
        case ".xlsx":
            return XlsxSource(path=task.path, columns=columns, where=task.where, header=task.header)
        case ".parquet":
            return ParquetSource(path=task.path, columns=columns, where=task.where)
    return None


def _read_rows(task: RetrievalTask, source: Source, where: str, faults: list[Fault]) -> LoadedRetrieval | None:
    """The task over a file of rows."""
    if _is_set(task, "split"):
        faults.append(Fault(f"{where}: split", f"{shown(task.split)}, and a file of rows", "a folder", "take split out"))
    rows, bad = list[Row](), list[Fault]()
    try:
        for row in read_rows(source, where):
            if isinstance(row, Fault):
                bad.append(replace(row, fix=fix_of_row(task)))
            elif row is not None:
                rows.append(row)
    except UserError as error:
        faults += error.faults
        return None
    if bad and (task.on_bad_row == "fail" or not rows):
        faults += bad[:FAULTS_PER_FILE]
        return None
    if bad:
        logger.warning("%s: %s of %s rows left out, as %s", where, f"{len(bad):,}", f"{len(rows) + len(bad):,}", bad[0].where)
    loaded = retrieval_of_rows(task.name, rows, (task.prompts.query, task.prompts.document))
    if unasked := len({row.anchor for row in rows}) - len(loaded.queries):
        found = f"{unasked:,} of {unasked + len(loaded.queries):,} anchors that are their only positive"
        if not loaded.queries:
            fix = "name rows whose positive is another text: no text is a hit of itself"
            faults.append(Fault(where, found, "an anchor with a positive that is another text", fix))
            return None
        logger.warning("%s: left out: %s", where, found)
    if len(loaded.documents) < 2:
        found = f"{len(loaded.documents)} different positives and negatives in {len(rows):,} rows"
        faults.append(Fault(where, found, "two or more", "a ranking needs documents to rank: add rows"))
    return loaded


def _is_set(task: RetrievalTask, key: str) -> bool:
    return bool(getattr(task, key) != RetrievalTask.model_fields[key].default)


def _judgements(
    qrels: TaskFile, queries: Mapping[str, str | None] | None, documents: Mapping[str, str | None] | None
) -> tuple[dict[str, dict[str, float]], list[str]]:
    """Query id -> document id -> judgement, those above 0 only; and what of the file is left out, in words.

    Ids are compared with `queries` and `documents` where given. BEIR's own downloads judge some that are not there: such a query
    is not asked, such a document is never found. Where many are, the files do not belong together.
    """
    said: dict[tuple[str, str], float] = {}
    unknown: dict[str, list[str]] = {"query-id": [], "corpus-id": []}

    def judgement(row: Record) -> None:
        pair = identifier(row["query-id"], "query-id"), identifier(row["corpus-id"], "corpus-id")
        score = number(row["score"], "score")
        if said.setdefault(pair, score) != score:
            raise BadRow("a pair that was judged before", f"{score:g}, {said[pair]:g} before", "one judgement of a pair")
        for value, column, known in zip(pair, unknown, (queries, documents), strict=True):
            if known is not None and value not in known:
                unknown[column].append(value)

    qrels.read(["query-id", "corpus-id", "score"], judgement)
    left_out = []
    for column, ids in unknown.items():
        kind = "queries" if column == "query-id" else "documents"
        if len(ids) > UNKNOWN_SHARE * len(said):
            found = f"{len(ids):,} of {len(said):,} judgements of {kind} that are not there, such as {shown(ids[0])}"
            qrels.fault(found, f"the _id of {kind}", "bring files together that belong together", what=f": {column}")
        elif ids:
            left_out.append(f"{len(ids):,} judgements of {kind} that are not there")
    judged: dict[str, dict[str, float]] = {}
    for (query, document), score in said.items():
        if score > 0 and (queries is None or queries.get(query)):  # a query without a text was a bad row
            judged.setdefault(query, {})[document] = score
    if qrels.clean and not judged:
        qrels.fault("no score above 0", "one relevant document or more", "check the column", what=": score")
    return judged, left_out


def _part(task: RetrievalTask, names: Sequence[str], where: str, faults: list[Fault]) -> TaskFile | None:
    """The first that exists of `names` in the folder, each as it is or with .gz."""
    folder = Path(task.path)
    for name in [name + ending for name in names for ending in ("", ".gz")]:
        if (folder / name).is_file():
            return TaskFile(folder / name, f"{where}: {name}", faults, task)
    there = sorted(str(path.relative_to(folder)) for path in (*folder.glob("*"), *folder.glob("qrels/*")) if path.is_file())
    content = f"{shown(folder)} with {quoted(there[:20])}"
    expected = f"{' or '.join(names)}, or one of these with .gz"
    faults.append(Fault(f"{where}: no {names[0]}", content, expected, "add the file, or correct the path or the split"))
    return None


def _new_id(row: Record, known: dict[str, str | None]) -> str:
    new = identifier(row["_id"], "_id")
    if new in known:
        raise BadRow('"_id" was there before', shown(new), "each _id once")
    known[new] = None
    return new
