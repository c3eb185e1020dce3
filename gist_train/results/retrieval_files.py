"""Retrieval folders, in BEIR's layout or the flat one -> queries, documents and judgements."""

import os
from collections.abc import Sequence
from pathlib import Path

from gist_train.config.errors import Fault, shown
from gist_train.config.evaluation import RetrievalTask
from gist_train.data.tables import BadRow, text
from gist_train.results.loaded_tasks import LoadedRetrieval
from gist_train.results.task_files import Record, TaskFile, identifier, number, quoted


def read_retrieval(task: RetrievalTask, where: str, faults: list[Fault]) -> LoadedRetrieval | None:
    folder = Path(os.path.expanduser(task.path))
    if not folder.is_dir():
        found = f"{shown(str(folder))}, which is {'a file' if folder.exists() else f'no folder in {Path.cwd()}'}"
        faults.append(Fault(f"{where}: path", found, "a folder that exists", "correct the path"))
        return None
    # The flat names first: they belong to one split.
    corpus = _part(folder, ("corpus.jsonl",), where, faults)
    queries = _part(folder, (f"queries.{task.split}.jsonl", "queries.jsonl"), where, faults)
    qrels = _part(folder, (f"qrels.{task.split}.tsv", f"qrels/{task.split}.tsv"), where, faults)
    documents: dict[str, str] = {}
    bodies: list[str] = []
    asked: dict[str, str] = {}

    def document(row: Record) -> None:
        # The id stands even where the text is bad, so that its judgements are not called unknown as well.
        at = _new_id(row, documents)
        # Title or text may be empty, as in several of BEIR's corpora, but not both.
        filled = [column for column in ("title", "text") if str(row.get(column) or "").strip()]
        documents[at] = " ".join(text(row[column], column) for column in filled or ["text"])
        if len(filled) == 2:
            bodies.append(text(row["text"], "text"))

    def query(row: Record) -> None:
        at = _new_id(row, asked)
        asked[at] = text(row["text"], "text")

    if corpus:
        corpus.read(("_id", "text"), document)
        if corpus.clean and len(documents) < 2:
            corpus.fault("one document", "two documents or more", "a ranking needs documents to rank: add some")
    if queries:
        queries.read(("_id", "text"), query)
    whole = corpus is not None and corpus.to_the_end and queries is not None and queries.to_the_end
    if qrels is None:
        return None
    judged = _judgements(qrels, asked if whole else None, documents if whole else None)
    if not (whole and qrels.clean and judged):
        return None
    index = {at: number for number, at in enumerate(documents)}
    judgements = tuple({index[at]: judgement for at, judgement in of.items()} for of in judged.values())
    return LoadedRetrieval(
        task.name, tuple(asked[at] for at in judged), tuple(documents.values()), judgements, bodies=tuple(bodies)
    )


def _judgements(qrels: TaskFile, queries: dict[str, str] | None, documents: dict[str, str] | None) -> dict[str, dict[str, float]]:
    """Query id -> document id -> judgement, those above 0 only. Ids are held against `queries` and `documents` where given."""
    said: dict[tuple[str, str], float] = {}

    def judgement(row: Record) -> None:
        pair = identifier(row["query-id"], "query-id"), identifier(row["corpus-id"], "corpus-id")
        for at, column, known in zip(pair, ("query-id", "corpus-id"), (queries, documents), strict=True):
            if known is not None and at not in known:
                kind = "query" if column == "query-id" else "document"
                raise BadRow(f'"{column}" is unknown', shown(at), f"the _id of a {kind}")
        score = number(row["score"], "score")
        if said.setdefault(pair, score) != score:
            raise BadRow("a pair that was judged before", f"{score:g}, {said[pair]:g} before", "one judgement of a pair")

    qrels.read(("query-id", "corpus-id", "score"), judgement)
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
    found = f"{shown(str(folder))} with {quoted(there[:20])}"
    expected = f"{' or '.join(names)}, or one of these with .gz"
    faults.append(Fault(f"{where}: no {names[0]}", found, expected, "add the file, or correct the path or the split"))
    return None


def _new_id(row: Record, known: dict[str, str]) -> str:
    at = identifier(row["_id"], "_id")
    if at in known:
        raise BadRow('"_id" was there before', shown(at), "each _id once")
    known[at] = ""
    return at
