"""Prompts of evaluation tasks: the task's own, else the folder's, else the training's."""

import json
import shutil

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer
from support.running import gist

from gist_train.config.evaluation import RetrievalTask, StsTask
from gist_train.evaluation.tasks import content_hash, load_tasks, measure
from gist_train.model.loading import load_finished

PROMPTS = {"anchor": "query: ", "positive": "passage: ", "negative": "passage: "}
QUERIES, DOCUMENTS = ["late again", "flat tyre"], ["the train is late", "a tyre without air", "no lights here"]


@pytest.fixture
def search(tmp_path):
    """A retrieval folder of two queries and three documents."""
    folder = tmp_path / "search"
    (folder / "qrels").mkdir(parents=True)
    for name, letter, texts in (("corpus", "d", DOCUMENTS), ("queries", "q", QUERIES)):
        rows = [json.dumps({"_id": f"{letter}{n}", "text": text}) + "\n" for n, text in enumerate(texts)]
        (folder / f"{name}.jsonl").write_text("".join(rows))
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq0\td0\t1\nq1\td1\t1\n")
    return folder


class Asked:
    """An encoder that remembers what it was asked."""

    def __init__(self, prompts):
        self.prompts, self.calls = prompts, []

    def encode(self, texts, prompt=None):
        self.calls.append((prompt, sorted(texts)))
        return np.random.default_rng(0).normal(size=(len(texts), 8)).astype(np.float32)


@pytest.mark.parametrize(
    ("given", "folder", "asked"),
    [
        ({}, {}, (None, None)),
        ({}, {"query": "q: ", "document": "d: "}, ("q: ", "d: ")),
        ({}, {"query": "q: ", "passage": "p: "}, ("q: ", "p: ")),
        ({"query": "ask: "}, {"query": "q: ", "document": "d: "}, ("ask: ", "d: ")),
        ({"query": "", "document": ""}, {"query": "q: ", "document": "d: "}, ("", "")),
    ],
)
def test_sides_have_prompts_of_their_own(search, given, folder, asked):
    """E5, BGE and Qwen3-Embedding are worth a good deal less without the prompts that they were trained with."""
    (task,) = load_tasks([RetrievalTask.model_validate({"name": "s", "path": str(search), "prompts": given})])
    encoder = Asked(folder)
    measure(encoder, [task])
    if asked[0] == asked[1]:
        assert encoder.calls == [(asked[0], sorted([*QUERIES, *DOCUMENTS]))]
    else:
        assert encoder.calls == [(asked[0], sorted(QUERIES)), (asked[1], sorted(DOCUMENTS))]


def test_scores_are_those_of_encode_query_and_encode_document(make_model, search, tmp_path):
    """What the model's user will call; the same text may be read in two ways."""
    folder = tmp_path / "m"
    shutil.copytree(make_model(), folder)
    path = folder / "config_sentence_transformers.json"
    prompts = {"query": "Does renewing count: ", "passage": "whole street "}
    path.write_text(json.dumps({**json.loads(path.read_text()), "prompts": prompts}))
    theirs = SentenceTransformer(str(folder), device="cpu")
    similarities = theirs.encode_query(QUERIES) @ theirs.encode_document(DOCUMENTS).T
    ranks = [1 + int((row > row[n]).sum()) for n, row in enumerate(similarities)]
    scores = measure(load_finished(str(folder)), load_tasks([RetrievalTask(name="s", path=str(search))]))
    assert scores["s/mrr@10"].value == pytest.approx(np.mean([1 / rank for rank in ranks]))


def test_a_prompt_of_a_task_is_part_of_what_it_asks(tmp_path):
    """Scores under another prompt are another task's; without one the hash is what it always was."""
    path = tmp_path / "p.tsv"
    path.write_text("sentence1\tsentence2\tscore\na\tb\t1\nc\td\t2\n")
    plain, one, other = load_tasks([StsTask(name="s", path=str(path), prompt=prompt) for prompt in (None, "x: ", "y: ")])
    assert len({content_hash(task) for task in (plain, one, other)}) == 3
    encoder = Asked({"query": "q: "})
    measure(encoder, [plain])
    measure(encoder, [one])
    assert [prompt for prompt, _ in encoder.calls] == [None, "x: "]


def test_training_prompts_are_in_the_export_and_in_its_scores(write_config, search, tmp_path):
    """Whoever opens the export must find how it was trained, and its scores be what `encode_query` gives."""
    rows = tmp_path / "rows.jsonl"
    source = {
        "source": "jsonl",
        "path": str(rows),
        "prompts": {"anchor": "query: ", "positive": "passage: ", "negative": "passage: "},
    }
    task = {"type": "retrieval", "name": "s", "path": str(search)}
    path = write_config(
        data={"train": [source]}, guide=None, training={"batch_size": 8, "max_steps": 4}, evaluation={"tasks": [task]}
    )
    for command in ("train", "export"):
        ended = gist(command, path)
        assert ended.code == 0, ended.err
    export = SentenceTransformer(str(tmp_path / "runs" / "run" / "export"), device="cpu")
    assert (export.prompts["query"], export.prompts["document"]) == ("query: ", "passage: ")
    assert export.default_prompt_name is None
    similarities = export.encode_query(QUERIES) @ export.encode_document(DOCUMENTS).T
    ranks = [1 + int((row > row[n]).sum()) for n, row in enumerate(similarities)]
    scores = json.loads(gist("evaluate", path, "--json").out)
    assert scores["tuned"]["s/mrr@10"] == pytest.approx(np.mean([1 / rank for rank in ranks]))


def test_one_prompt_for_all_texts_becomes_the_default(write_config, tmp_path):
    """Trained with it, `encode` without it would be another model."""
    rows = tmp_path / "rows.jsonl"
    source = {"source": "jsonl", "path": str(rows), "prompts": {"anchor": "t: ", "positive": "t: ", "negative": "t: "}}
    path = write_config(data={"train": [source]}, guide=None, training={"batch_size": 8, "max_steps": 2})
    for command in ("train", "export"):
        assert gist(command, path).code == 0
    export = SentenceTransformer(str(tmp_path / "runs" / "run" / "export"), device="cpu")
    assert export.prompts[export.default_prompt_name] == "t: "
