"""The corpus against a plain dict of its rows.

Legend: N unique texts, R rows, V views.
"""

import itertools
import json
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numpy as np
import pytest
from support.corpora import PROMPTS, ROWS, built, data_of, expected_rows, read_back, texts_of

from gist_train.config.schema import DataConfig
from gist_train.config.sources import JsonlSource, MediSource
from gist_train.data.corpus import Corpus, text_hash
from gist_train.data.tokenising import tokenise_together


def code_points(texts: list[str]) -> list[np.ndarray]:
    """A tokenizer that loses nothing."""
    return [np.array([1, *map(ord, text), 2]) for text in texts]


def view_strings(corpus: Corpus) -> list[str]:
    return corpus.view_texts(0, corpus.view_count)


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


@pytest.mark.parametrize("chunk", [1, 3, 1000])
def test_texts_in_order(tmp_path, write_rows, chunk):
    """Whoever reads them all numbers them by their place: one that is off by a chunk would stand for another."""
    corpus = built(tmp_path / "corpus", data_of(write_rows("a.jsonl", ROWS)))
    assert list(corpus.texts(chunk)) == [corpus.text(i) for i in range(corpus.text_count)]


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
        for prompt, views, ids in zip(before, batch[5:8], (batch.anchor, batch.positive, batch.negative), strict=True):
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
    done = list(tokenise_together(corpus, code_points, vocabulary, "t", chunk))
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
    list(tokenise_together(corpus, code_points, 70_000, "one"))
    list(tokenise_together(corpus, lambda texts: [np.array([len(text)]) for text in texts], 100, "two"))
    assert corpus.has_tokens("one")
    assert corpus.has_tokens("two")
    every = np.arange(corpus.view_count)
    assert [ids.tolist() for ids in corpus.tokens("two").of(every)] == [[len(text)] for text in view_strings(corpus)]
    assert corpus.tokens("one").lengths(every).tolist() == [len(text) + 2 for text in view_strings(corpus)]


def test_interrupted_tokens_go_on(tmp_path, write_rows):
    """Half of the views' tokens, taken for all of them, would end in an index error at some step, or in wrong texts. What was
    done is kept: a million texts take minutes."""
    corpus = built(tmp_path / "corpus", data_of(write_rows("a.jsonl", ROWS)))
    counts = tokenise_together(corpus, code_points, 70_000, "t", part_views=2)
    assert [next(counts), next(counts)] == [0, 2]
    counts.close()
    assert not corpus.has_tokens("t")
    read = []

    def watched(texts):
        read.extend(texts)
        return code_points(texts)

    list(tokenise_together(corpus, watched, 70_000, "t", part_views=2))
    assert read == view_strings(corpus)[2:]
    assert [ids.tolist() for ids in corpus.tokens("t").of(np.arange(corpus.view_count))] == [
        ids.tolist() for ids in code_points(view_strings(corpus))
    ]
    assert [path.name for path in (corpus.folder / "tokens").iterdir()] == ["t"]


def test_a_damaged_part_is_made_anew(tmp_path, write_rows):
    """A part that lay on the disk while nobody trained may have rotted there: other ids would be other texts."""
    corpus = built(tmp_path / "corpus", data_of(write_rows("a.jsonl", ROWS)))
    counts = tokenise_together(corpus, code_points, 70_000, "t", part_views=2)
    assert [next(counts), next(counts), next(counts)] == [0, 2, 4]
    counts.close()
    part = corpus.folder / "tokens" / ".t-2.parts" / "0"
    content = bytearray(part.read_bytes())
    content[-1] ^= 1
    part.write_bytes(content)
    list(tokenise_together(corpus, code_points, 70_000, "t", part_views=2))
    expected = [ids.tolist() for ids in code_points(view_strings(corpus))]
    assert [ids.tolist() for ids in corpus.tokens("t").of(np.arange(corpus.view_count))] == expected


def test_tokens_are_made_together(tmp_path, write_rows):
    """Three that tokenise at the same time do each part once, and end with the same table as one alone."""
    corpus = built(tmp_path / "corpus", data_of(write_rows("a.jsonl", ROWS)))
    read, both = [], Barrier(3)

    def slow(texts):
        read.extend(texts)
        if len(read) <= 3:
            both.wait(timeout=30)  # all have begun before anyone goes on
        return code_points(texts)

    with ThreadPoolExecutor(3) as pool:
        runs = [
            pool.submit(lambda: list(tokenise_together(Corpus(corpus.folder), slow, 70_000, "t", part_views=1))) for _ in "abc"
        ]
        assert {run.result(timeout=60)[-1] for run in runs} == {corpus.view_count}
    list(tokenise_together(corpus, code_points, 70_000, "alone"))
    assert sorted(read) == sorted(view_strings(corpus))
    for name in ("ids.bin", "offsets.npy", "meta.json"):
        assert len({(corpus.folder / "tokens" / of_one / name).read_bytes() for of_one in ("t", "alone")}) == 1


def test_arrays_are_memory_mapped(tmp_path, write_rows):
    """Two million rows that every process reads into memory of its own are gigabytes times processes."""
    corpus = built(tmp_path / "corpus", data_of(write_rows("a.jsonl", ROWS)))
    list(tokenise_together(corpus, code_points, 70_000, "t"))
    table = corpus.tokens("t")
    names = "anchor task positive positive_offsets negative negative_offsets row_prompts hashes"
    for array in [*(getattr(corpus, name) for name in names.split()), table.ids, table.offsets]:
        assert isinstance(array, np.memmap)
        assert not array.flags.writeable
    assert corpus.positive_offsets.dtype == np.int64
    assert corpus.anchor.dtype == corpus.positive.dtype == np.int32
