"""Rows held out of training: none of their texts trains, the draw is the one that an obvious loop makes, and what is refused."""

import json
from itertools import product

import numpy as np
import pytest
import torch
from support.running import QUIET, gist

from gist_train.config.errors import UserError
from gist_train.config.loading import load_config
from gist_train.data import held_out
from gist_train.data.files import json_lines
from gist_train.data.overlap import normalized
from gist_train.evaluation.held_out import held_out_folder, held_out_tasks
from gist_train.preparation import prepare_corpus
from gist_train.run_folder import Run

CPU = torch.device("cpu")
INTENTS = ("book a flight", "cancel a card", "play a song")


def texts_of(corpus):
    """Normalised texts that rows of a corpus have, unlike those that are only stored."""
    used = np.unique(np.concatenate([corpus.anchor, corpus.positive, corpus.negative]))
    return {normalized(corpus.text(text)) for text in used.tolist()}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {"source": "jsonl", "path": str(path)}


def pairs(count, start=0):
    return [{"anchor": f"Question {n}?", "positive": [f"answer {n}", f"ANSWER {n}!"]} for n in range(start, start + count)]


def drawn_by_a_loop(rows, keys, source, budgets):
    """Groups of rows that share a text, one after the other by the shuffled least key, each where it fits."""
    groups = []
    for row, texts in enumerate(rows):
        met = [group for group in groups if group[1] & set(texts)]
        groups = [group for group in groups if group not in met]
        groups.append(([row, *(r for group in met for r in group[0])], set(texts).union(*(group[1] for group in met))))
    order = sorted(groups, key=lambda group: min(keys[text] for text in group[1]) * int(held_out.SHUFFLE) % 2**64)
    left, held = list(budgets), [False] * len(rows)
    for group, _ in order:
        needed = [sum(source[row] == index for row in group) for index in range(len(left))]
        if all(need <= have for need, have in zip(needed, left, strict=True)):
            left = [have - need for need, have in zip(needed, left, strict=True)]
            for row in group:
                held[row] = True
    return held


@pytest.mark.parametrize(("seed", "texts"), [*product(range(6), (30, 90, 300))])
def test_the_draw_is_that_of_a_loop(seed, texts):
    """One row on the wrong side, and a text that judges the model has trained it."""
    draw = np.random.default_rng(seed)
    keys = draw.integers(0, 2**64, texts, np.uint64)
    rows = [draw.choice(texts, draw.integers(1, 4), replace=False).tolist() for _ in range(60)]
    source, budgets = draw.integers(0, 2, 60), draw.integers(0, 12, 2).tolist()
    bounds = np.cumsum([0, *map(len, rows)])
    held = held_out.drawn(np.concatenate(rows).astype(np.int64), bounds, keys, source, budgets)
    assert held.tolist() == drawn_by_a_loop(rows, keys.tolist(), source.tolist(), budgets)
    inside, outside = (
        {text for row, out in zip(rows, held, strict=True) if out is side for text in row} for side in (True, False)
    )
    assert not inside & outside


def test_no_text_of_a_held_out_row_trains(write_config, tmp_path):
    """Case, a question mark or another file must not bring it back."""
    first = write(tmp_path / "a.jsonl", pairs(60))
    second = write(tmp_path / "b.jsonl", [{"anchor": f"question {n}", "positive": f"reply {n}"} for n in range(30, 90)])
    hard = [{"anchor": f"ask {n}", "positive": f"say {n}", "negative": [f"answer {n}", f"reply {n + 30}"]} for n in range(60)]
    third = write(tmp_path / "c.jsonl", hard)
    config = load_config(write_config(data={"train": [first, second, third]}, evaluation={"held_out": 0.1}))
    (task,) = held_out_tasks(config)
    judged = {normalized(text) for texts in task.judged_texts().values() for text in texts}
    corpus = prepare_corpus(config, CPU, QUIET)
    assert 10 <= len(task.queries) <= 18
    assert not judged & texts_of(corpus)
    # All rows but these train; of a row with hard negatives only a negative is left out.
    rows = [row for _, row in json_lines(held_out_folder(config, 0.1) / held_out.ROWS)]
    assert corpus.row_count == 180 - len(rows)
    assert all(not any(text in texts_of(corpus) for text in row["negative"]) for row in rows)


def test_the_order_of_rows_is_no_matter(write_config, tmp_path):
    """A file that was sorted judges by the same rows."""
    names = []
    for name, rows in (("one", pairs(80)), ("two", pairs(80)[::-1])):
        source = write(tmp_path / f"{name}.jsonl", rows)
        config = load_config(write_config(name, data={"train": [source]}, evaluation={"held_out": 10}))
        names.append(set(held_out_tasks(config)[0].queries))
    assert names[0] == names[1]
    assert len(names[0]) == 10


def test_labelled_texts_become_a_classification(write_config, tmp_path):
    """Triplets are mined of the others; the classifier is fitted on rows that train."""
    rows = [{"text": f"please {intent} number {n}", "label": intent} for n in range(40) for intent in INTENTS]
    write(tmp_path / "intents.jsonl", rows)
    source = {"source": "classification", "path": str(tmp_path / "intents.jsonl")}
    other = write(tmp_path / "pairs.jsonl", pairs(20))
    config = load_config(write_config(data={"train": [source, other]}, evaluation={"held_out": 0.1}))
    retrieval, labels = held_out_tasks(config)
    assert (retrieval.name, len(retrieval.queries)) == ("held_out", 2)
    assert (labels.name, len(labels.test_texts)) == ("held_out_labels", 12)
    assert np.bincount(labels.train_labels).tolist() == [32, 32, 32]
    trained = texts_of(prepare_corpus(config, CPU, QUIET))
    assert not {normalized(text) for text in labels.test_texts} & trained
    assert {normalized(text) for text in labels.train_texts} <= trained


def test_rows_that_all_share_a_text_can_not_be_held_out(write_config, tmp_path):
    """Half of the data, or a text on both sides, would be the way out otherwise."""
    source = write(tmp_path / "rows.jsonl", [{"anchor": f"question {n}", "positive": "see ticket"} for n in range(50)])
    path = write_config(data={"train": [source]}, evaluation={"held_out": 0.1})
    with pytest.raises(UserError, match=r"evaluation\.held_out") as caught:
        held_out_tasks(load_config(path))
    assert "50 that share no text" in str(caught.value)


def test_no_usable_row_is_told_by_its_cause(write_config, write_rows):
    """What can be held out of nothing is no question: the cause is in the rows."""
    numbers = write_rows("numbers.jsonl", [{"anchor": f"question {n}", "positive": n} for n in range(50)])
    rows = write_rows("rows.jsonl", [{"anchor": f"question {n}", "positive": f"{n}"} for n in range(50)])
    where = {"source": "jsonl", "path": str(rows), "where": 'positive == "none"'}
    for source, told in (({"source": "jsonl", "path": str(numbers)}, '"positive" is not a string'), (where, "data.train")):
        data = {"train": [source], "on_bad_row": "skip"}
        with pytest.raises(UserError, match="50 rows, none of them usable") as caught:
            held_out_tasks(load_config(write_config(data=data, evaluation={"held_out": 20})))
        assert told in caught.value.faults[0].where


def test_a_run_keeps_what_it_held_out(write_config, tmp_path):
    """Data that changed since would otherwise judge the model by rows that trained it."""
    source = write(tmp_path / "rows.jsonl", pairs(60))
    sections = {
        "data": {"train": [source]},
        "guide": None,
        "training": {"batch_size": 8, "max_steps": 2, "precision": "float32"},
        "checkpoint": {"every": 1},
    }
    path = write_config(**sections, evaluation={"every": 2, "held_out": 8}, selection={"metric": "held_out/ndcg@10"})
    assert gist("train", path).code == 0
    config = load_config(path)
    before = held_out_tasks(config)[0].queries
    assert held_out_folder(config, 8) == Run.of(config).held_out
    write(tmp_path / "rows.jsonl", pairs(60, start=30))
    assert held_out_tasks(config)[0].queries == before
    evaluated = gist("evaluate", str(Run.of(config)), "--json")
    assert "held_out/ndcg@10" in json.loads(evaluated.out)["tuned"]
    other = gist("train", write_config(**sections, evaluation={"held_out": 4}))
    assert other.code == 2
    assert "evaluation.held_out" in other.err
    # Trained on all rows: nothing is left that could judge it.
    write_config("all", **sections)
    assert gist("train", str(tmp_path / "all.yaml")).code == 0
    late = gist("evaluate", write_config("all", **sections, evaluation={"held_out": 8}))
    assert (late.code, "trained on all rows" in late.err) == (2, True)


@pytest.mark.parametrize("amount", [0, 0.0, 1.0, 0.6, -3, "a tenth", True])
def test_what_can_not_be_held_out(write_config, amount):
    """1.0 may be meant as one row or as all of them."""
    with pytest.raises(UserError, match=r"evaluation\.held_out"):
        load_config(write_config(evaluation={"held_out": amount}))


def test_its_names_are_known_and_taken(write_config, tmp_path):
    """A metric is checked before any work, and two tasks of one name would share their scores."""
    load_config(write_config(evaluation={"held_out": 0.1}, selection={"metric": "held_out_labels/accuracy"}))
    with pytest.raises(UserError, match="held_out/ndcg@10"):
        load_config(write_config(evaluation={"held_out": 0.1}, selection={"metric": "held_out/accuracy"}))
    task = {"type": "sts", "name": "held_out", "path": str(tmp_path / "none.tsv")}
    with pytest.raises(UserError, match="another name"):
        load_config(write_config(evaluation={"held_out": 0.1, "tasks": [task]}))


def test_graded_pairs_are_not_held_out(write_config, write_rows):
    """A pair of score 0 would judge a model by how well it finds what does not belong together."""
    graded = write_rows("graded.jsonl", [{"anchor": f"a{n}", "positive": f"b{n}", "score": float(n % 2)} for n in range(40)])
    sources = [{"source": "jsonl", "path": str(graded), "scores": "pairs"}]
    sections = {"evaluation": {"held_out": 0.5}, "distillation": {"scores": 1.0}, "guide": None}
    ended = gist("prepare", write_config(data={"train": sources}, **sections))
    assert (ended.code, "graded pairs alone" in ended.err) == (2, True), ended.err
    sources.append({"source": "jsonl", "path": str(write_rows("pairs.jsonl", pairs(40)))})
    config = write_config(data={"train": sources}, **sections)
    assert gist("prepare", config).code == 0
    anchors = [row["anchor"] for _, row in json_lines(held_out_folder(load_config(config), 0.5) / held_out.ROWS)]
    assert len(anchors) == 20
    assert {*anchors} <= {row["anchor"] for row in pairs(40)}
