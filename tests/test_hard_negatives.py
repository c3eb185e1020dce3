"""Negatives that the guide finds: mined into files that others read, and trained on straight away."""

import itertools
import json

import datasets
import numpy as np
import pytest
from support.running import gist, launched

from gist_train import hard_negatives
from gist_train.config.sources import JsonlSource, ParquetSource
from gist_train.data.corpus import Corpus
from gist_train.data.sources import read_rows

pytestmark = pytest.mark.usefixtures("on_cpu")
RULES = "data.hard_negatives={per_row: 2, same_task: false, margin: 0.01}"


def corpora(tmp_path):
    """By how many negatives they have."""
    found = [Corpus(folder) for folder in (tmp_path / "runs" / ".cache" / "corpora").iterdir() if folder.name[0] != "."]
    return sorted(found, key=lambda corpus: len(corpus.negative))


def assert_own_negatives_are_first(plain, mined):
    before, after = np.diff(plain.negative_offsets), np.diff(mined.negative_offsets)
    assert (after >= before).all()
    assert (after <= before + 2).all()
    assert after.sum() > before.sum()
    for row in range(plain.row_count):
        own = plain.negative[plain.negative_offsets[row] : plain.negative_offsets[row + 1]].tolist()
        assert mined.negative[mined.negative_offsets[row] :][: len(own)].tolist() == own
    assert np.array_equal(plain.hashes, mined.hashes)


def test_mined_files_are_what_others_read(write_config, tmp_path):
    """People mine once and train with whatever they have: FlagEmbedding's lines, sentence-transformers' numbered columns."""
    path = write_config()
    for name in ("mined.jsonl", "mined.parquet"):
        ended = gist("mine", path, "--to", tmp_path / name, "--set", RULES)
        assert ended.code == 0, ended.err
        assert "hard negatives: " in ended.err
    plain, mined = corpora(tmp_path)
    assert_own_negatives_are_first(plain, mined)
    lines = [json.loads(line) for line in (tmp_path / "mined.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(lines) == plain.row_count == mined.row_count
    assert all(set(line) == {"query", "pos", "neg", "task"} and line["pos"] for line in lines)
    ours = list(read_rows(JsonlSource(path=str(tmp_path / "mined.jsonl")), "data.train[0]"))
    assert [(row.anchor, list(row.positives), list(row.negatives), row.task) for row in ours] == [
        (line["query"], line["pos"], line["neg"], line["task"]) for line in lines
    ]
    table = datasets.load_dataset(
        "parquet", data_files=str(tmp_path / "mined.parquet"), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert table.column_names[:3] == ["anchor", "positive", "negative_1"]
    of_table = list(read_rows(ParquetSource(path=str(tmp_path / "mined.parquet")), "data.train[0]"))
    assert [(row.anchor, row.negatives) for row in of_table] == [
        (row.anchor, row.negatives) for row in ours for _ in row.positives
    ]


def test_training_takes_them_and_looks_once(write_config):
    path = write_config()
    words = ["train", path, "--set", RULES, "--set", "training.max_steps=2"]
    first = gist(*words)
    assert first.code == 0, first.err
    assert "looking for hard negatives" in first.err
    again = gist("prepare", path, "--set", RULES)
    assert again.code == 0, again.err
    assert "looking for hard negatives" not in again.err
    changed = gist(*words, "--set", "data.hard_negatives.per_row=1")
    assert changed.code == 2
    assert "data.hard_negatives" in changed.err


def test_rows_with_too_few_are_left_out_if_asked(write_config, tmp_path):
    path, rules = write_config(), "data.hard_negatives={{per_row: 30, margin: {}, same_task: false, drop_short: true}}"
    ended = gist("mine", path, "--to", tmp_path / "mined.jsonl", "--set", rules.format(0.002))
    assert ended.code == 0, ended.err
    plain, mined = sorted(corpora(tmp_path), key=lambda corpus: -corpus.row_count)
    assert 0 < mined.row_count < plain.row_count, ended.err[-400:]
    assert (np.diff(mined.negative_offsets) >= 30).all()
    ended = gist("mine", path, "--to", tmp_path / "none.jsonl", "--set", rules.format(1.5))
    assert ended.code == 2
    assert "no row got 30 negatives" in ended.err
    assert not (tmp_path / "none.jsonl").exists()


def test_a_plan_says_that_they_are_not_there_yet(write_config):
    """A plan is made in seconds: looking for them takes the guide's pass first."""
    ended = gist("plan", write_config(), "--set", RULES)
    assert ended.code == 0, ended.err
    assert "not looked for yet" in ended.err


@pytest.mark.parametrize("name", ["mined.csv", "nowhere/mined.jsonl"])
def test_other_files_are_refused_before_any_work(write_config, tmp_path, name):
    ended = gist("mine", write_config(), "--to", tmp_path / name)
    assert ended.code == 2
    assert "--to" in ended.err
    assert not (tmp_path / "runs").exists()


def test_without_a_guide_there_is_nothing_to_look_with(write_config, tmp_path):
    for guide in ("self", None):
        ended = gist("mine", write_config(guide=guide), "--to", tmp_path / "mined.jsonl")
        assert ended.code == 2
        assert f"guide\n  found     {guide or 'null'}\n" in ended.err
        ended = gist("prepare", write_config(guide=guide), "--set", RULES)
        assert ended.code == 2
        assert f"set, and guide: {guide or 'null'}" in ended.err


def test_rules_that_give_too_few_are_refused(write_config):
    """Four of the nearest two can't be had: each row would be short, and nobody would know why."""
    ended = gist("plan", write_config(), "--set", "data.hard_negatives={per_row: 4, ranks: [1, 2], pick: random}")
    assert ended.code == 2
    assert "as many as per_row asks for" in ended.err


@pytest.mark.slow
def test_two_processes_find_the_same(write_config, tmp_path):
    words = ["mine", write_config(), "--to", tmp_path / "mined.jsonl", "--set", RULES]
    assert gist(*words).code == 0
    alone = (tmp_path / "mined.jsonl").read_bytes()
    elsewhere = ["--set", f"output_dir={tmp_path / 'others'}"]
    with launched(tmp_path, *[[*words, *elsewhere]] * 2) as ranks:
        ended = [rank.ended(60) for rank in ranks]
    assert [rank.code for rank in ended] == [0, 0], ended[0].err
    assert (tmp_path / "mined.jsonl").read_bytes() == alone


def test_an_interrupted_search_goes_on(write_config, monkeypatch):
    """A million rows take hours on a CPU: what was looked for is kept."""
    path, pieces = write_config(), hard_negatives.parts_of
    monkeypatch.setattr(hard_negatives, "parts_of", lambda corpus, same_task: pieces(corpus, same_task=same_task, at_a_time=10))
    calls, look = [], hard_negatives.negatives_of

    def look_twice(*args):
        calls.append(args[0])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return look(*args)

    monkeypatch.setattr(hard_negatives, "negatives_of", look_twice)
    assert gist("prepare", path, "--set", RULES).code == 130
    again = gist("prepare", path, "--set", RULES)
    assert again.code == 0, again.err
    assert len(calls) == 3 + 8  # of ten pieces two were done


def negatives_by_row(corpus):
    bounds = corpus.negative_offsets
    return [[corpus.text(int(i)) for i in corpus.negative[a:b]] for a, b in itertools.pairwise(bounds.tolist())]


@pytest.mark.parametrize("prompts", [None, {"anchor": "query: ", "positive": "passage: ", "negative": "passage: "}])
def test_further_documents_become_negatives(write_config, tmp_path, triplets, prompts):
    """Answers that no row has are the hard negatives of a search: they are embedded, drawn and read by the student."""
    documents = [f"document {i} of the {word}" for i, word in enumerate(["river", "harbour", "bank", "market"] * 5)]
    own = triplets[0]["positive"][0]
    (tmp_path / "documents.txt").write_text("\n".join([*documents, own]) + "\n", encoding="utf-8")
    config = write_config(training={"batch_size": 8, "max_steps": 3, "precision": "float32"})
    rules = [RULES, f"data.hard_negatives.documents={{path: {tmp_path}/documents.txt}}", "data.hard_negatives.same_task=true"]
    if prompts:
        rules.append(f"guide.prompts={json.dumps(prompts)}")
    settings = [word for rule in rules for word in ("--set", rule)]
    ended = gist("train", config, *settings)
    assert ended.code == 0, ended.err
    plain, mined = corpora(tmp_path)
    assert sorted(plain.text(int(i)) for i in plain.documents) == sorted([*documents, own])
    drawn = negatives_by_row(mined)
    assert len({text for row in drawn for text in row} & set(documents)) >= 2
    mine = [row for row in range(plain.row_count) if plain.text(int(plain.positive[plain.positive_offsets[row]])) == own]
    assert mine
    assert all(own not in drawn[row] for row in mine)
    # Moved, they are the same documents: nothing is embedded again.
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "documents.txt").rename(tmp_path / "elsewhere" / "documents.txt")
    settings = [word.replace("documents.txt", "elsewhere/documents.txt") for word in settings]
    again = gist("train", config, *settings, "--set", "training.stop_at_step=3")
    assert again.code == 0, again.err
    assert len(corpora(tmp_path)) == 2


def test_a_document_that_cannot_be_used_is_told(write_config, tmp_path):
    path = tmp_path / "documents.jsonl"
    path.write_text('{"text": "one"}\n{"text": 7}\n', encoding="utf-8")
    setting = f"data.hard_negatives={{documents: {{path: {path}}}}}"
    ended = gist("mine", write_config(), "--to", tmp_path / "mined.jsonl", "--set", setting)
    assert ended.code == 2
    assert "documents.jsonl, row 2" in ended.err
    skipping = gist("mine", write_config(), "--to", tmp_path / "mined.jsonl", "--set", setting, "--set", "data.on_bad_row=skip")
    assert skipping.code == 0, skipping.err
    assert "1 rows were skipped" in skipping.err
    gone = gist("mine", write_config(), "--to", tmp_path / "mined.jsonl", "--set", setting.replace("documents.jsonl", "no.jsonl"))
    assert gone.code == 2
    assert "data.hard_negatives.documents" in gone.err


def test_documents_that_evaluation_judges_on_are_left_out(write_config, write_pairs, tmp_path):
    (tmp_path / "documents.txt").write_text("a judged text\nanother text\n", encoding="utf-8")
    path = write_config(evaluation=write_pairs(["A judged  text"]))
    rules = f"data.hard_negatives={{per_row: 1, margin: 0, same_task: false, documents: {{path: {tmp_path}/documents.txt}}}}"
    ended = gist("mine", path, "--to", tmp_path / "m.jsonl", "--set", rules, "--set", "data.exclude_evaluation_texts=true")
    assert ended.code == 0, ended.err
    plain, _ = corpora(tmp_path)
    assert [plain.text(int(i)) for i in plain.documents] == ["another text"]
