"""Builds that do not come to their end, what a build leaves out, and rows that are mined."""

import json
import shutil
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.corpora import PROMPTS, ROWS, built, data_of, expected_rows, no_embeddings, read_back, settled, texts_of

from gist_train.config.errors import UserError
from gist_train.config.models import GuideConfig
from gist_train.config.schema import DataConfig
from gist_train.config.sources import ClassificationSource, JsonlSource, MiningConfig
from gist_train.data.building import build_corpus, read_together
from gist_train.data.corpus import Corpus, text_hash
from gist_train.data.drawing import drawn_rows
from gist_train.data.overlap import normalized, normalized_hash

BAD = [ROWS[0], {"anchor": "", "positive": "p"}, ROWS[1], {"anchor": "a"}, {"anchor": "a", "positive": ["p", 3]}]


def refused(tmp_path: Path, data: DataConfig) -> UserError:
    with pytest.raises(UserError) as caught:
        built(tmp_path / "corpus", data)
    assert not list(tmp_path.glob("corpus*"))
    assert not list(tmp_path.glob(".corpus*"))
    return caught.value


def test_bad_rows_fail_all_at_once(tmp_path, write_rows):
    """One fault a run makes a user start as often as there are bad rows."""
    error = refused(tmp_path, data_of(write_rows("rows.jsonl", BAD)))
    assert [fault.where for fault in error.faults] == [
        'data.train[0]: rows.jsonl, row 2: "anchor" is empty',
        'data.train[0]: rows.jsonl, row 4: "positive" is missing',
        'data.train[0]: rows.jsonl, row 5: "positive[1]" is not a string',
        "data.on_bad_row",
    ]
    assert "3 of 5 rows" in error.faults[-1].found
    assert "3 of 5 rows" in error.faults[-1].fix


def test_a_thousand_bad_rows_are_counted_and_not_listed(tmp_path, write_rows):
    """The message must fit a screen and still say how many rows `skip` would cost."""
    error = refused(tmp_path, data_of(write_rows("rows.jsonl", ROWS + [{"anchor": "", "positive": "p"}] * 1_500)))
    assert len(error.faults) == 11
    assert "1,500 of 1,506 rows" in str(error.faults[-1])


def test_bad_rows_are_skipped_and_said(tmp_path, write_rows):
    """Good rows keep their order, and the file says which rows are missing and why."""
    corpus = built(tmp_path / "corpus", data_of(write_rows("rows.jsonl", BAD), on_bad_row="skip"))
    assert read_back(corpus) == expected_rows([BAD[0], BAD[2]])
    assert corpus.meta["skipped_rows"] == 3
    skipped = [json.loads(line) for line in (corpus.folder / "skipped.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["where"].split(", ")[1].split(":")[0] for line in skipped] == ["row 2", "row 4", "row 5"]
    assert skipped[0]["found"] == '""'


def test_no_usable_row(tmp_path, write_rows):
    """A training on nothing must not start."""
    error = refused(tmp_path, data_of(write_rows("rows.jsonl", [{"anchor": "", "positive": "p"}]), on_bad_row="skip"))
    assert error.faults[-1].where == "data.train"
    assert "1 rows, none of them usable" in error.faults[-1].found


def test_a_broken_second_source_leaves_nothing(tmp_path, write_rows):
    """The first source alone is not the corpus."""
    error = refused(tmp_path, data_of(write_rows("a.jsonl", ROWS), tmp_path / "absent.jsonl"))
    assert "absent.jsonl" in str(error)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_an_interrupted_build_leaves_nothing(tmp_path, write_rows):
    """A corpus of the first 4,096 rows, taken for whole, would be trained on without a word."""
    path = write_rows("a.jsonl", [{"anchor": f"a{i}", "positive": "p"} for i in range(5_000)])
    folder = tmp_path / "corpus"
    counts = build_corpus(folder, data_of(path), "f", no_embeddings, settled)
    assert next(counts) == 4096
    assert not folder.exists()
    counts.close()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl"]
    assert built(folder, data_of(path)).row_count == 5_000


def test_leftovers_of_a_killed_build_are_not_taken_for_whole(tmp_path, write_rows):
    """A process that is killed cleans nothing up: its folder must not have the corpus' name, nor spoil the next build."""
    path = write_rows("a.jsonl", [{"anchor": f"a{i}", "positive": "p"} for i in range(5_000)])
    folder = tmp_path / "corpus"
    counts = build_corpus(folder, data_of(path), "f", no_embeddings, settled)
    next(counts)
    left = {p.name: shutil.copytree(p, tmp_path / "copies" / p.name) for p in tmp_path.glob(".corpus*")}
    counts.close()
    assert left
    for name, copy in left.items():
        shutil.copytree(copy, tmp_path / name)
    assert not folder.exists()
    corpus = built(folder, data_of(path))
    assert (corpus.row_count, corpus.text_count) == (5_000, 5_001)
    assert corpus.text(1) == "p"
    assert not list(tmp_path.glob(".corpus*"))


def test_a_source_that_changes_while_it_is_read_leaves_nothing(tmp_path, write_rows):
    """The fingerprint was made before: the new rows would stand under the old name for good."""

    def changed() -> None:
        raise UserError()

    counts = build_corpus(tmp_path / "corpus", data_of(write_rows("a.jsonl", ROWS)), "f", no_embeddings, changed)
    with pytest.raises(UserError):
        list(counts)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl"]


def test_content_tells_corpora_apart_that_their_sources_do_not(tmp_path, write_rows):
    """Mining may round a draw to another row on another machine: a resume, or a second node, must be told."""
    first, again = (built(tmp_path / name, data_of(write_rows("a.jsonl", ROWS))) for name in "ab")
    assert first.content == again.content
    rows = [{**ROWS[0], "negative": ["n", "n", "a"]}, *ROWS[1:]]
    other = built(tmp_path / "c", data_of(write_rows("a.jsonl", rows)))
    assert (other.fingerprint, other.text_count) == (first.fingerprint, first.text_count)  # the fingerprint is given
    assert other.content != first.content


# Draws.


def many(tasks: Sequence[int]) -> list[dict[str, Any]]:
    """Rows over tasks of these sizes, some texts of which come again."""
    return [
        {"anchor": f"a{task}-{i}", "positive": [f"p{i}", "q"], "negative": f"n{i % 7}", "task": f"t{task}"}
        for task, size in enumerate(tasks)
        for i in range(size)
    ]


@pytest.mark.parametrize("settings", [{"max_rows": 20}, {"max_rows_per_task": 7}, {"max_rows_per_task": 7, "max_rows": 9}])
def test_a_draw_is_the_corpus_of_the_drawn_rows(tmp_path, write_rows, settings):
    """Rows that are left out must leave nothing behind: no text for the guide to embed, no task, no wrong offset."""
    rows = many([30, 5, 12])
    path = write_rows("rows.jsonl", rows)
    drawn = built(tmp_path / "drawn", DataConfig(train=[JsonlSource(path=str(path), **settings)]))
    task = np.array([int(row["task"][1:]) for row in rows], np.int32)
    kept = drawn_rows(task, settings.get("max_rows"), settings.get("max_rows_per_task"), [42, 0]).tolist()
    assert 0 < len(kept) < len(rows)
    alone = built(tmp_path / "alone", data_of(write_rows("kept.jsonl", [rows[i] for i in kept])))
    assert read_back(drawn) == read_back(alone)
    assert drawn.tasks == alone.tasks
    texts = [[corpus.text(i) for i in range(corpus.text_count)] for corpus in (drawn, alone)]
    assert sorted(texts[0]) == sorted(texts[1])
    assert [row.tobytes() for row in drawn.hashes] == [text_hash(text) for text in texts[0]]
    assert drawn.view_count == alone.view_count
    assert (drawn.folder / "texts.utf8").stat().st_size == (alone.folder / "texts.utf8").stat().st_size
    assert drawn.meta["sources"][0]["not_drawn"] == len(rows) - len(kept)
    assert drawn.meta["sources"][0]["read"] == len(rows)


def test_a_draw_of_each_task_is_even_and_of_the_rest_too():
    """Of each task first, then of what is left: every row of a small task stays, and all rows come up alike."""
    task = np.repeat(np.arange(3, dtype=np.int32), [40, 4, 100])
    seeds = [[seed] for seed in range(400)]
    for seed in seeds[:5]:
        assert Counter(task[drawn_rows(task, None, 10, seed)].tolist()) == {0: 10, 1: 4, 2: 10}
        assert len(drawn_rows(task, 15, 10, seed)) == 15
        assert len(drawn_rows(task, 1000, None, seed)) == 144
        assert (np.diff(drawn_rows(task, 30, None, seed)) > 0).all()
    counts = np.bincount(np.concatenate([drawn_rows(task, None, 10, seed) for seed in seeds]), minlength=144)
    assert counts[40:44].tolist() == [400] * 4
    assert abs(counts[:40] / 400 - 0.25).max() < 0.1
    assert abs(counts[44:] / 400 - 0.1).max() < 0.07


def test_sources_draw_apart_from_each_other(tmp_path, write_rows):
    """The same file twice must not give the same rows twice; a source without a limit keeps all of its rows."""
    path = str(write_rows("rows.jsonl", many([60])))
    train = [JsonlSource(path=path, max_rows=20), JsonlSource(path=path), JsonlSource(path=path, max_rows=20)]
    corpus = built(tmp_path / "corpus", DataConfig(train=train))
    anchors = [[corpus.text(i) for i in corpus.anchor[corpus.source == source]] for source in range(3)]
    assert [len(of) for of in anchors] == [20, 60, 20]
    assert set(anchors[0]) != set(anchors[2])


# Labelled texts.

LABELLED = [
    *({"text": f"card {i}", "label": "card"} for i in range(6)),
    *({"text": f"loan {i}", "label": "loan"} for i in range(5)),
    {"text": "lonely", "label": "one of a kind"},
    {"text": "card 0", "label": "card"},
]


def by_hash(_: int, texts: Sequence[str]) -> np.ndarray:
    """Embeddings that depend on the text alone."""
    return np.stack([np.frombuffer(text_hash(text), np.uint8).astype(np.float32) for text in texts])


def mined(folder: Path, path: Path, excluded: Sequence[str] = (), **settings: Any) -> Corpus:
    """The corpus of one source of labelled texts."""
    source = ClassificationSource(path=str(path), mining=MiningConfig(model=GuideConfig(name="m")), **settings)
    hashes = {normalized_hash(text) for text in excluded}
    for _ in build_corpus(folder, DataConfig(train=[source]), "f" * 32, by_hash, settled, hashes):
        pass
    return Corpus(folder)


def test_labelled_texts_become_triplets(tmp_path, write_rows):
    """Each row is an anchor once; positive of its class, negative of another; both labels stand in the corpus."""
    path = write_rows("banking.jsonl", LABELLED)
    corpus = mined(tmp_path / "corpus", path, prompts=PROMPTS, task="mteb-banking-avs_triplets")
    label = {row["text"]: row["label"] for row in LABELLED}
    rows = read_back(corpus)
    counts = corpus.meta["sources"][0]
    assert (counts["read"], counts["alone"]) == (13, 1)
    assert len(rows) == 12 - counts["same_text"]
    assert {row["task"] for row in rows} == {"mteb-banking-avs_triplets"}
    assert {row["prompts"] for row in rows} == {("query: ", "passage: ", "passage: ")}
    for at, row in enumerate(rows):
        assert label[row["anchor"]] == label[row["positive"][0]] != label[row["negative"][0]]
        assert row["anchor"] != row["positive"][0]
        batch = corpus.batch(np.array([at]), corpus.positive[corpus.positive_offsets[[at]]])
        assert batch.label[0] != batch.negative_label[0]
        same = [i for i, other in enumerate(rows) if label[other["anchor"]] == label[row["anchor"]]]
        assert np.flatnonzero(corpus.label == batch.label[0]).tolist() == same
    assert Counter(row["anchor"] for row in rows).most_common(1)[0][1] <= 2  # "card 0" stands there twice


def test_labels_of_two_sources_differ(tmp_path, write_rows):
    """Label 0 of one data set has nothing to do with label 0 of another: taken for one, it would mask true negatives."""
    path = str(write_rows("numbers.jsonl", [{"text": f"t{i}", "label": i % 2} for i in range(8)]))
    train = [ClassificationSource(path=path, mining=MiningConfig(model=GuideConfig(name="m"))) for _ in range(2)]
    rows = JsonlSource(path=str(write_rows("rows.jsonl", ROWS)))
    for _ in build_corpus(tmp_path / "c", DataConfig(train=[train[0], rows, train[1]]), "f" * 32, by_hash, settled):
        pass
    corpus = Corpus(tmp_path / "c")
    labels = [set(corpus.label[corpus.source == source].tolist()) for source in range(3)]
    assert labels[1] == {-1}
    assert len(labels[0]) == len(labels[2]) == 2
    assert not labels[0] & labels[2]


def test_max_rows_draws_mined_triplets(tmp_path, write_rows):
    """A limit is of triplets, and does not narrow what they are mined of."""
    path = write_rows("banking.jsonl", LABELLED)
    few, whole = mined(tmp_path / "few", path, max_rows=4), mined(tmp_path / "whole", path)
    assert few.row_count == 4
    assert all(row in read_back(whole) for row in read_back(few))


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"text": "a", "label": "x"}, {"text": "b", "label": "x"}], "two different labels or more"),
        ([{"text": "a", "label": "x"}, {"text": "b", "label": "y"}], "2 labels of one row each"),
        ([{"text": "labels.jsonl"}], "no column for label"),
        (
            [{"text": "a", "label": 1.5}, *({"text": word, "label": word[0]} for word in ("x1", "x2", "y1"))],
            '"label" is not a string',
        ),
        ([{"text": "", "label": "y"}, *({"text": word, "label": word[0]} for word in ("x1", "x2", "y1"))], '"text" is empty'),
    ],
)
def test_labelled_files_that_can_not_be_mined(tmp_path, write_rows, rows, said):
    """With the file, the row and the field, before any model is put to work."""
    path = write_rows("labels.jsonl", rows)
    with pytest.raises(UserError) as caught:
        mined(tmp_path / "corpus", path)
    assert said in str(caught.value)
    assert "labels.jsonl" in str(caught.value)
    assert not (tmp_path / "corpus").exists()


# Texts that are left out.

HELD = [
    {"anchor": "How do I pay?", "positive": "by card", "negative": "n", "task": "x"},
    {"anchor": "a", "positive": ["By card!", "in cash", "by  CARD"], "negative": ["n", "how do i pay"], "task": "x"},
    {"anchor": "b", "positive": "by card", "task": "y"},
    {"anchor": "c", "positive": "in cash", "negative": ["By card", "how do I pay"], "task": "y"},
    {"anchor": "d", "positive": "in cash", "task": "x"},
]
EVALUATED = ["how do I pay", "By card."]


def test_a_corpus_without_texts_is_that_of_the_rows_without_them(tmp_path, write_rows):
    """A row filtered by hand and one that was left out must give the same corpus: no text, task or offset stays behind."""
    data = data_of(write_rows("held.jsonl", HELD))
    rows = [{**HELD[1], "positive": "in cash", "negative": "n"}, {**HELD[3], "negative": []}, HELD[4]]
    found, expected = built(tmp_path / "found", data, EVALUATED), built(tmp_path / "b", data_of(write_rows("rows.jsonl", rows)))
    assert read_back(found) == read_back(expected) == expected_rows(rows)
    assert found.content == expected.content
    assert [found.text(i) for i in range(found.text_count)] == [expected.text(i) for i in range(expected.text_count)]
    assert (found.excluded_rows, found.excluded_texts) == (2, 7)
    assert (found.meta["sources"][0]["read"], found.meta["sources"][0]["excluded"]) == (5, 2)
    assert (expected.excluded_rows, expected.excluded_texts) == (0, 0)
    assert built(tmp_path / "whole", data, ["nowhere"]).content == built(tmp_path / "plain", data).content


def test_rows_with_own_negatives_go_with_the_last_of_them(tmp_path, write_rows):
    """Row 4 would contrast with nothing; row 5 never had a negative, and is refused later, as without any exclusion."""
    source = JsonlSource(path=str(write_rows("held.jsonl", HELD)), in_batch_negatives=False)
    corpus = built(tmp_path / "corpus", DataConfig(train=[source]), EVALUATED)
    assert [row["anchor"] for row in read_back(corpus)] == ["a", "d"]
    assert corpus.excluded_rows == 3


def test_rows_are_drawn_of_those_that_stay(tmp_path, write_rows):
    """Who asks for 20 rows gets 20, and none that holds an evaluation text."""
    rows = many([30, 30])
    source = JsonlSource(path=str(write_rows("rows.jsonl", rows)), max_rows=20)
    corpus = built(tmp_path / "corpus", DataConfig(train=[source]), [row["anchor"] for row in rows[:36]])
    counts = corpus.meta["sources"][0]
    assert corpus.row_count == 20
    assert (counts["read"], counts["excluded"], counts["not_drawn"]) == (60, 36, 4)
    assert corpus.tasks == ["t1"]


def test_labelled_texts_are_left_out_before_they_are_mined(tmp_path, write_rows):
    """Left out afterwards, they would take their anchors' only triplet with them; mined of, they would be trained on."""
    path = write_rows("banking.jsonl", LABELLED)
    rest = write_rows("rest.jsonl", [row for row in LABELLED if row["text"] not in ("card 0", "loan 3")])
    found = mined(tmp_path / "found", path, ["Card 0?", "loan: 3"], task="t")
    expected = mined(tmp_path / "expected", rest, task="t")
    assert read_back(found) == read_back(expected)
    assert found.content == expected.content
    assert (found.excluded_rows, found.excluded_texts) == (3, 2)
    assert (found.meta["sources"][0]["read"], found.meta["sources"][0]["excluded"]) == (13, 3)
    held = {normalized(found.text(i)) for i in range(found.text_count)}
    assert not held & {"card 0", "loan 3"}


def test_nothing_left_is_told_with_the_key(tmp_path, write_rows):
    """ "Are the files what they say?" would send the user to the wrong place."""
    path = write_rows("pairs.jsonl", [{"anchor": "a", "positive": "b"}] * 3)
    with pytest.raises(UserError) as caught:
        built(tmp_path / "corpus", data_of(path), ["a"])
    assert "3 rows, 3 of them left out with the texts that evaluation judges on" in str(caught.value)
    labelled = write_rows("labels.jsonl", [{"text": word, "label": word[0]} for word in ("x1", "x2", "y1")])
    with pytest.raises(UserError) as caught:
        mined(tmp_path / "corpus", labelled, ["y1"])
    assert "1 more left out with the texts that evaluation judges on" in str(caught.value)
    assert not (tmp_path / "corpus").exists()


SOURCES_APART = {
    "plain": {"scores": "texts"},
    "prompts": {"prompts": PROMPTS},
    "drawn": {"max_rows": 3, "max_rows_per_task": 2},
}


def of_several_sources(write_rows) -> tuple[DataConfig, list[str]]:
    """Sources that share texts, tasks and labels, with prompts, draws, bad rows and mined triplets; and texts to leave out."""
    scored = [
        {**row, "pos_scores": [n + 0.5] * len(texts_of(row["positive"])), "neg_scores": [n] * len(texts_of(row.get("negative")))}
        for n, row in enumerate(ROWS)
    ]
    rows = {name: write_rows(f"{name}.jsonl", some) for name, some in (("one", scored), ("two", BAD), ("three", ROWS[::-1]))}
    labelled = [{"text": text, "label": label} for text, label in zip("abcdefpn", "xyxyzzxy", strict=True)]
    train = [JsonlSource(path=str(path), **SOURCES_APART[kind]) for path, kind in zip(rows.values(), SOURCES_APART, strict=True)]
    for name, some in (("labels", labelled), ("more", labelled[::-1])):
        mining = MiningConfig(model=GuideConfig(name="m"))
        train.insert(1, ClassificationSource(path=str(write_rows(f"{name}.jsonl", some)), mining=mining))
    return DataConfig(train=train, on_bad_row="skip"), ["A", "f"]


def embedded(_: int, texts: Sequence[str]) -> np.ndarray:
    """A vector for each text, whichever process asks."""
    return np.stack([np.random.default_rng(ord(text)).normal(size=4) for text in texts]).astype(np.float32)


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_sources_that_others_have_read_give_the_same_corpus(tmp_path, write_rows):
    """Numbers of texts, tasks, prompts and labels go by who comes first in the data, whoever was read first."""
    data, excluded = of_several_sources(write_rows)
    without = {normalized_hash(text) for text in excluded}
    given = (data, "f" * 32, embedded, settled, without)
    assert list(build_corpus(tmp_path / "alone", *given))[-1] == 2 * len(ROWS) + len(BAD) + 2 * 8
    parts = tmp_path / "parts"
    with ThreadPoolExecutor(3) as pool:
        read = (read_together(tmp_path / "together", data, embedded, without, parts) for _ in range(3))
        done = [run.result(timeout=60)[-1] for run in [pool.submit(list, one) for one in read]]
    assert sum(done) == 2 * len(ROWS) + len(BAD) + 2 * 8
    assert sorted(path.name for path in parts.iterdir()) == ["0", "1", "2", "3", "4"]
    shutil.rmtree(parts / "2")  # a part may be missing, or damaged
    (parts / "3" / "ids.npz").write_bytes(b"rotten")
    list(build_corpus(tmp_path / "together", *given, parts))
    alone, together = (bytes_of(tmp_path / name) for name in ("alone", "together"))
    assert len(json.loads(alone["meta.json"])["sources"]) == 5
    assert alone == together
    assert list(read_together(tmp_path / "together", data, embedded, without, parts)) == [0]
