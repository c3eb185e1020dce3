"""The corpus against a plain dict of its rows, its fingerprint, and builds that do not come to their end.

Legend: N unique texts, R rows, V views.
"""

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gist_train.config.errors import UserError
from gist_train.config.schema import DataConfig
from gist_train.config.sources import Columns, CsvSource, JsonlSource, MediSource, Prompts
from gist_train.data.corpus import Corpus, build_corpus, corpus_fingerprint, text_hash

WriteRows = Callable[..., Path]
ROWS: list[dict[str, Any]] = [
    {"anchor": "a", "positive": ["p", "p2"], "negative": ["n", "a", "n"], "task": "x"},
    {"anchor": "b", "positive": "p", "task": "x"},
    {"anchor": "a", "positive": ["日本", "ñ"], "negative": "n2", "task": "y"},
    {"anchor": "p", "positive": "a", "negative": [], "task": "x"},
    {"anchor": "a", "positive": ["p", "p2"], "negative": ["n", "a", "n"], "task": "x"},
    {"anchor": "A", "positive": "a b", "negative": ["a  b"], "task": "y"},
]
PROMPTS = Prompts(anchor="query: ", positive="passage: ", negative="passage: ")


def data_of(*paths: Path, prompts: Prompts | None = None, **settings: Any) -> DataConfig:
    return DataConfig(train=[JsonlSource(path=str(path), prompts=prompts) for path in paths], **settings)


def built(folder: Path, data: DataConfig) -> Corpus:
    for _ in build_corpus(folder, data, "f" * 32):
        pass
    return Corpus(folder)


def texts_of(value: Any) -> list[str]:
    return [] if value is None else [value] if isinstance(value, str) else list(value)


def code_points(texts: list[str]) -> list[np.ndarray]:
    """A tokenizer that loses nothing."""
    return [np.array([1, *map(ord, text), 2]) for text in texts]


def read_back(corpus: Corpus) -> list[dict[str, Any]]:
    """The rows of a corpus, by its arrays alone."""
    rows = []
    for row in range(corpus.row_count):
        positives = corpus.positive[corpus.positive_offsets[row] : corpus.positive_offsets[row + 1]]
        negatives = corpus.negative[corpus.negative_offsets[row] : corpus.negative_offsets[row + 1]]
        rows.append(
            {
                "anchor": corpus.text(corpus.anchor[row]),
                "positive": [corpus.text(i) for i in positives],
                "negative": [corpus.text(i) for i in negatives],
                "task": corpus.tasks[corpus.task[row]],
                "prompts": tuple(corpus.prompts[i] for i in corpus.row_prompts[row]),
            }
        )
    return rows


def expected_rows(rows: list[dict[str, Any]], prompts: tuple[str, str, str] = ("", "", "")) -> list[dict[str, Any]]:
    return [
        {
            "anchor": row["anchor"],
            "positive": texts_of(row["positive"]),
            "negative": texts_of(row.get("negative")),
            "task": row["task"],
            "prompts": prompts,
        }
        for row in rows
    ]


def view_strings(corpus: Corpus) -> list[str]:
    return corpus.view_texts(0, corpus.view_count)


def refused(tmp_path: Path, data: DataConfig) -> UserError:
    with pytest.raises(UserError) as caught:
        built(tmp_path / "corpus", data)
    assert not list(tmp_path.glob("corpus*"))
    assert not list(tmp_path.glob(".corpus*"))
    return caught.value


def test_round_trip(tmp_path, write_rows):
    """Lists of positives and negatives, rows without negatives, rows that come twice, texts that serve on both sides: an
    offset that slips by one pairs an anchor with its neighbour's positive and still trains."""
    corpus = built(tmp_path / "corpus", data_of(write_rows("a.jsonl", ROWS)))
    assert read_back(corpus) == expected_rows(ROWS)
    unique = {text for row in ROWS for key in ("anchor", "positive", "negative") for text in texts_of(row.get(key))}
    texts = [corpus.text(i) for i in range(corpus.text_count)]
    assert sorted(texts) == sorted(unique)
    assert [h.tobytes() for h in corpus.hashes] == [text_hash(text) for text in texts]
    assert corpus.text_lengths().tolist() == [len(text.encode()) for text in texts]
    assert (corpus.meta["rows"], corpus.meta["texts"], corpus.meta["skipped_rows"]) == (6, len(unique), 0)
    assert not (corpus.folder / "skipped.jsonl").exists()


def test_real_rows(tmp_path, write_rows, triplets):
    """96 rows of real text over 3 tasks."""
    corpus = built(tmp_path / "corpus", data_of(write_rows("a.jsonl", triplets)))
    assert read_back(corpus) == expected_rows(triplets)


def test_several_sources_with_and_without_prompts(tmp_path, write_rows):
    """A text under two prompts is one text, which the guide reads once, and two views, which the student tells apart."""
    plain, prompted = write_rows("a.jsonl", ROWS[:3]), write_rows("b.jsonl", ROWS)
    data = DataConfig(train=[JsonlSource(path=str(plain)), JsonlSource(path=str(prompted), prompts=PROMPTS)])
    corpus = built(tmp_path / "corpus", data)
    rows = expected_rows(ROWS[:3]) + expected_rows(ROWS, ("query: ", "passage: ", "passage: "))
    assert read_back(corpus) == rows
    pairs = set()
    for row in rows:
        for prompt, texts in zip(row["prompts"], ([row["anchor"]], row["positive"], row["negative"]), strict=True):
            pairs |= {(prompt, text) for text in texts}
    assert corpus.view_count == len(pairs)
    assert sorted(view_strings(corpus)) == sorted(prompt + text for prompt, text in pairs)
    assert corpus.text_count == len({text for _, text in pairs})


def test_instructions_as_prompts(tmp_path):
    """MEDI's instructions are prompts when they are kept, and no part of the texts when they are not."""
    record = {"query": ["Find: ", "a"], "pos": ["Doc: ", "p"], "neg": ["Doc: ", "n"], "task_name": "t"}
    path = tmp_path / "medi.json"
    path.write_text(json.dumps([record]))
    kept = built(tmp_path / "kept", DataConfig(train=[MediSource(path=str(path))], keep_instructions=True))
    assert sorted(view_strings(kept)) == ["Doc: n", "Doc: p", "Find: a"]
    dropped = built(tmp_path / "dropped", DataConfig(train=[MediSource(path=str(path))]))
    assert sorted(view_strings(dropped)) == ["a", "n", "p"]
    assert [kept.text(i) for i in range(3)] == [dropped.text(i) for i in range(3)]


@pytest.mark.parametrize("prompts", [None, PROMPTS], ids=["no prompts", "prompts"])
def test_batch_is_a_plain_loop(tmp_path, write_rows, triplets, prompts):
    """Rows with 0 to 3 negatives, in any order, the same row twice: the flat pool of negatives is what the loss contrasts
    with, and its views are what the student reads."""
    corpus = built(tmp_path / "corpus", data_of(write_rows("a.jsonl", triplets), prompts=prompts))
    strings = view_strings(corpus)
    draw = np.random.default_rng(0)
    for size in (1, 2, 7, 40):
        rows = draw.integers(0, corpus.row_count, size)
        positives = np.array(
            [draw.choice(corpus.positive[corpus.positive_offsets[r] : corpus.positive_offsets[r + 1]]) for r in rows], np.int32
        )
        batch = corpus.batch(rows, positives)
        negatives = [corpus.negative[corpus.negative_offsets[r] : corpus.negative_offsets[r + 1]].tolist() for r in rows]
        assert batch.rows.tolist() == rows.tolist()
        assert batch.anchor.tolist() == [corpus.anchor[r] for r in rows]
        assert batch.positive.tolist() == positives.tolist()
        assert batch.negative.tolist() == list(itertools.chain(*negatives))
        assert batch.negative_offsets.tolist() == [0, *itertools.accumulate(map(len, negatives))]
        before = ("", "", "") if prompts is None else (prompts.anchor, prompts.positive, prompts.negative)
        for prompt, views, ids in zip(before, batch[5:], (batch.anchor, batch.positive, batch.negative), strict=True):
            assert [strings[v] for v in views] == [prompt + corpus.text(i) for i in ids]


def test_batch_without_negatives(tmp_path, write_rows):
    """Pairs alone are data too."""
    corpus = built(tmp_path / "corpus", data_of(write_rows("a.jsonl", [{"anchor": "a", "positive": "p"}] * 3)))
    batch = corpus.batch(np.array([2, 0]), corpus.positive[[2, 0]])
    assert batch.negative.tolist() == batch.negative_views.tolist() == []
    assert batch.negative_offsets.tolist() == [0, 0, 0]


@pytest.mark.parametrize("chunk", [1, 3, 1000])
@pytest.mark.parametrize(("vocabulary", "dtype"), [(1 << 16, np.uint16), ((1 << 16) + 1, np.int32)])
def test_tokens_of_a_view_are_those_of_prompt_and_text(tmp_path, write_rows, chunk, vocabulary, dtype):
    """The prompt is tokenised with its text. Ids from 32,768 up are no negative numbers, and a vocabulary above 65,536 does
    not wrap around."""
    corpus = built(tmp_path / "corpus", data_of(write_rows("a.jsonl", ROWS), write_rows("b.jsonl", ROWS), prompts=PROMPTS))
    done = list(corpus.add_tokens(code_points, vocabulary, "t", chunk))
    assert done[-1] == corpus.view_count
    assert done == sorted(done)
    table = Corpus(corpus.folder).tokens("t")
    assert table.ids.dtype == dtype
    views = np.random.default_rng(0).permutation(corpus.view_count)
    expected = code_points([view_strings(corpus)[v] for v in views])
    assert [ids.tolist() for ids in table.of(views)] == [ids.tolist() for ids in expected]
    assert table.lengths(views).tolist() == [len(ids) for ids in expected]
    assert ord("本") in table.ids


def test_another_tokenizer_reads_no_source_again(tmp_path, write_rows):
    """Another student's tokens come from the texts that the corpus holds: the source may be gone, the table of the first
    tokenizer stays."""
    source = write_rows("a.jsonl", ROWS)
    corpus = built(tmp_path / "corpus", data_of(source))
    source.unlink()
    assert not corpus.has_tokens("one")
    list(corpus.add_tokens(code_points, 70_000, "one"))
    list(corpus.add_tokens(lambda texts: [np.array([len(text)]) for text in texts], 100, "two"))
    assert corpus.has_tokens("one")
    assert corpus.has_tokens("two")
    every = np.arange(corpus.view_count)
    assert [ids.tolist() for ids in corpus.tokens("two").of(every)] == [[len(text)] for text in view_strings(corpus)]
    assert corpus.tokens("one").lengths(every).tolist() == [len(text) + 2 for text in view_strings(corpus)]


def test_interrupted_tokens_leave_nothing(tmp_path, write_rows):
    """Half of the views' tokens, taken for all of them, would end in an index error at some step, or in wrong texts."""
    corpus = built(tmp_path / "corpus", data_of(write_rows("a.jsonl", ROWS)))
    counts = corpus.add_tokens(code_points, 70_000, "t", chunk=2)
    assert next(counts) == 2
    assert not corpus.has_tokens("t")
    counts.close()
    assert list((corpus.folder / "tokens").iterdir()) == []
    list(corpus.add_tokens(code_points, 70_000, "t", chunk=2))
    assert corpus.has_tokens("t")


def test_arrays_are_memory_mapped(tmp_path, write_rows):
    """Two million rows that every process reads into memory of its own are gigabytes times processes."""
    corpus = built(tmp_path / "corpus", data_of(write_rows("a.jsonl", ROWS)))
    list(corpus.add_tokens(code_points, 70_000, "t"))
    table = corpus.tokens("t")
    names = "anchor task positive positive_offsets negative negative_offsets row_prompts hashes"
    for array in [*(getattr(corpus, name) for name in names.split()), table.ids, table.offsets]:
        assert isinstance(array, np.memmap)
        assert not array.flags.writeable
    assert corpus.positive_offsets.dtype == np.int64
    assert corpus.anchor.dtype == corpus.positive.dtype == np.int32


# What makes two corpora the same.


def test_fingerprint_is_of_the_content_and_not_of_the_place(tmp_path, write_rows):
    """A file that was moved or touched is the same corpus, and another run's work on it counts."""
    path = write_rows("a.jsonl", ROWS)
    first = corpus_fingerprint(data_of(path))
    other = tmp_path / "elsewhere"
    other.mkdir()
    shutil.move(path, other / "a.jsonl")
    (other / "a.jsonl").touch()
    assert corpus_fingerprint(data_of(other / "a.jsonl")) == first
    assert corpus_fingerprint(data_of(other / "*.jsonl")) == first
    assert corpus_fingerprint(data_of(other / "a.jsonl", batching="mixed")) == first  # it shapes batches, not rows
    assert len(first) == 32


def variations(path: Path) -> dict[str, DataConfig]:
    def one(**settings: Any) -> DataConfig:
        return DataConfig(train=[JsonlSource(path=str(path), **settings)])

    return {
        "columns": one(columns=Columns(anchor="positive", positive="anchor")),
        "task": one(task="z"),
        "prompts": one(prompts=PROMPTS),
        "other prompts": one(prompts=Prompts(anchor="query: ")),
        "the file twice": data_of(path, path),
        "format": DataConfig(train=[CsvSource(path=str(path))]),
        "keep_instructions": data_of(path, keep_instructions=True),
        "on_bad_row": data_of(path, on_bad_row="skip"),
    }


def test_fingerprint_knows_every_setting_that_shapes_rows(write_rows):
    """A setting that is forgotten here gives a run the rows of another one, without a word."""
    path = write_rows("a.jsonl", ROWS)
    prints = [corpus_fingerprint(data_of(path)), *map(corpus_fingerprint, variations(path).values())]
    assert len(set(prints)) == len(prints) == 9


def test_fingerprint_knows_content_order_and_name(write_rows):
    """One byte, the order of sources, and the name, which is the task of rows without one."""
    a, b = write_rows("a.jsonl", ROWS), write_rows("b.jsonl", ROWS[:3])
    prints = [corpus_fingerprint(data_of(*paths)) for paths in ((a,), (b,), (a, b), (b, a))]
    shutil.copy(a, a.with_name("c.jsonl"))
    prints.append(corpus_fingerprint(data_of(a.with_name("c.jsonl"))))
    write_rows("a.jsonl", [{**ROWS[0], "anchor": "A"}, *ROWS[1:]])
    prints.append(corpus_fingerprint(data_of(a)))
    assert len(set(prints)) == len(prints)


# What goes wrong.

BAD = [ROWS[0], {"anchor": "", "positive": "p"}, ROWS[1], {"anchor": "a"}, {"anchor": "a", "positive": ["p", 3]}]


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
    assert "3 of 5 rows" in error.faults[-1].mend


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
    refused(tmp_path, data_of(write_rows("a.jsonl", ROWS), tmp_path / "absent.jsonl"))


def test_an_interrupted_build_leaves_nothing(tmp_path, write_rows):
    """A corpus of the first 4,096 rows, taken for whole, would be trained on without a word."""
    path = write_rows("a.jsonl", [{"anchor": f"a{i}", "positive": "p"} for i in range(5_000)])
    folder = tmp_path / "corpus"
    counts = build_corpus(folder, data_of(path), "f")
    assert next(counts) == 4096
    assert not folder.exists()
    counts.close()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl"]
    assert built(folder, data_of(path)).row_count == 5_000


def test_leftovers_of_a_killed_build_are_not_taken_for_whole(tmp_path, write_rows):
    """A process that is killed cleans nothing up: its folder must not have the corpus' name, nor spoil the next build."""
    path = write_rows("a.jsonl", [{"anchor": f"a{i}", "positive": "p"} for i in range(5_000)])
    folder = tmp_path / "corpus"
    counts = build_corpus(folder, data_of(path), "f")
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
