"""The guide's store against the live guide: each text once, ever, whatever interrupts it.

Legend: E embeddings in the store, N texts of a corpus, G the guide's width.
"""

import io
import itertools
import json
import multiprocessing
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from sentence_transformers import SentenceTransformer
from support.running import gist, metrics

from gist_train import preparation
from gist_train.config.errors import UserError
from gist_train.config.loading import load_config
from gist_train.config.models import GuideConfig
from gist_train.config.schema import cache_folder
from gist_train.data.corpus import text_hash
from gist_train.data.leases import locked
from gist_train.model import filling as filling_module
from gist_train.model import guide as guide_module
from gist_train.model.checksums import HEADER, checksums
from gist_train.model.guide import GuideStore, store_folder
from gist_train.model.loading import load_guide, load_student
from gist_train.model.pretrained import Pretrained
from gist_train.planning.plan import plan
from gist_train.training import embedding
from gist_train.training.guides import SelfGuide

CPU = torch.device("cpu")
QUIET = Console(quiet=True)
PART = 8
"""Texts between two writes, in tests that interrupt."""


def hashes_of(texts: Sequence[str]) -> np.ndarray:
    return np.frombuffer(b"".join(map(text_hash, texts)), np.uint8).reshape(-1, 16)


def filling(folder: Path, guide: Pretrained, config: GuideConfig, texts: Sequence[str]) -> Iterator[int]:
    """The generator of a store's build, with the texts as a corpus has them."""
    lengths = np.array([len(text.encode()) for text in texts])
    return GuideStore(folder).fill(guide, config, hashes_of(texts), lengths, lambda i: texts[i])


def stored(folder: Path, texts: Sequence[str]) -> np.ndarray:
    """(N, G) what the store says of `texts`."""
    store = GuideStore(folder)
    positions = store.positions(hashes_of(texts))
    assert (positions >= 0).all()
    return store.read(positions)


def live(config: GuideConfig, texts: Sequence[str]) -> np.ndarray:
    """(N, G) of length 1, by sentence-transformers."""
    model = SentenceTransformer(config.name, device="cpu")
    if config.max_length:
        model.max_seq_length = config.max_length
    return model.encode([(config.prompt or "") + text for text in texts], normalize_embeddings=True)


def sizes(folder: Path) -> tuple[int, int]:
    return (folder / "embeddings.bin").stat().st_size, (folder / "hashes.bin").stat().st_size


@pytest.fixture
def texts(quickstart_texts) -> list[str]:
    return list(dict.fromkeys(quickstart_texts))[:30]


@pytest.fixture
def guide_folder(make_model) -> Path:
    return make_model(width=48, layers=1, cased=True, vocabulary=300, seed=1)


@pytest.fixture
def config(guide_folder) -> GuideConfig:
    return GuideConfig(name=str(guide_folder), dtype="float32", batch_tokens=512)


@pytest.fixture
def guide(config) -> Pretrained:
    return load_guide(config)


@pytest.fixture
def seen(monkeypatch) -> list[str]:
    """Every text that goes through any model's tokenizer from here on."""
    read: list[str] = []
    real = Pretrained.tokens

    def tokens(self: Pretrained, texts: Sequence[str]) -> Any:
        read.extend(texts)
        return real(self, texts)

    monkeypatch.setattr(Pretrained, "tokens", tokens)
    return read


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("float16", 5e-4)])
@pytest.mark.parametrize("normalize", [True, False])
def test_the_store_is_the_live_guide(tmp_path, make_model, texts, dtype, tolerance, normalize):
    """Cosine is all that is asked of the vectors: they have length 1 whether or not the guide's do. float16 may cost
    precision in the fourth digit and nothing else."""
    folder = make_model(width=48, normalize=normalize, seed=1)
    config = GuideConfig(name=str(folder), dtype=dtype, prompt="Represent: ")
    done = list(filling(tmp_path / "s", load_guide(config), config, texts))
    assert done[-1] == len(texts)
    assert done == sorted(done)
    vectors = stored(tmp_path / "s", texts)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, live(config, texts), rtol=0, atol=tolerance)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=tolerance)
    assert GuideStore(tmp_path / "s").width == 48
    assert sizes(tmp_path / "s") == (len(texts) * 48 * np.dtype(dtype).itemsize, len(texts) * 16)


def test_a_store_that_is_not_there(tmp_path):
    """The first question to a store comes before its first text."""
    store = GuideStore(tmp_path / "none")
    assert len(store) == 0
    assert store.width == 0
    assert store.positions(hashes_of(["a", "b"])).tolist() == [-1, -1]
    assert not (tmp_path / "none").exists()


def test_positions_in_any_order(tmp_path, guide, config, texts):
    """A look-up that is off by one gives a row another text's similarities."""
    list(filling(tmp_path / "s", guide, config, texts))
    store = GuideStore(tmp_path / "s")
    wanted = [*texts[::-1], "not there", texts[3], texts[3]]
    positions = store.positions(hashes_of(wanted))
    raw = (tmp_path / "s" / "hashes.bin").read_bytes()
    assert [raw[p * 16 : p * 16 + 16] if p >= 0 else None for p in positions] == [
        None if text == "not there" else text_hash(text) for text in wanted
    ]
    almost = hashes_of(texts[:1]).copy()
    almost[0, 15] ^= 1  # the second half of a hash counts too
    assert store.positions(almost).tolist() == [-1]


def test_another_corpus_adds_only_its_new_texts(tmp_path, guide, config, texts, seen):
    """Forty epochs, and every later run, cost one pass: a text that goes through the guide twice costs GPU days at scale."""
    list(filling(tmp_path / "s", guide, config, texts[:20]))
    first = stored(tmp_path / "s", texts[:20])
    assert sorted(seen) == sorted(texts[:20])
    seen.clear()
    assert list(filling(tmp_path / "s", guide, config, texts[10:]))[-1] == 10
    assert sorted(seen) == sorted(texts[20:])
    np.testing.assert_array_equal(stored(tmp_path / "s", texts[:20]), first)
    np.testing.assert_allclose(stored(tmp_path / "s", texts), live(config, texts), rtol=0, atol=1e-6)
    seen.clear()
    assert list(filling(tmp_path / "s", guide, config, texts[::-1])) == []
    assert seen == []


@pytest.mark.parametrize("how", ["stopped", "raised", "after the embeddings"])
def test_an_interrupted_build_goes_on(tmp_path, monkeypatch, guide, config, texts, seen, how):
    """What is written stays written: after an hour of embedding, Ctrl-C costs one part. Between the two writes of a part
    its embeddings have no hash yet, and must not be counted with the next."""
    monkeypatch.setattr(filling_module, "TEXTS_PER_WRITE", PART)
    build = filling(tmp_path / "s", guide, config, texts)
    if how == "stopped":
        assert next(count for count in build if count > 2 * PART) == 3 * PART
        build.close()
    else:
        real, calls = filling_module._append if how == "after the embeddings" else Pretrained.tokens, itertools.count(1)

        def fail(*arguments: Any) -> Any:
            if next(calls) == (9 if how == "after the embeddings" else 3):
                raise KeyboardInterrupt
            return real(*arguments)

        target = (filling_module, "_append") if how == "after the embeddings" else (Pretrained, "tokens")
        with monkeypatch.context() as patch:
            patch.setattr(*target, fail)
            with pytest.raises(KeyboardInterrupt):
                list(build)
    store = GuideStore(tmp_path / "s")
    assert len(store) == 2 * PART
    there = store.positions(hashes_of(texts)) >= 0
    seen.clear()
    assert list(filling(tmp_path / "s", guide, config, texts))[-1] == len(texts) - 2 * PART
    assert sorted(seen) == sorted(text for text, known in zip(texts, there, strict=True) if not known)
    np.testing.assert_allclose(stored(tmp_path / "s", texts), live(config, texts), rtol=0, atol=1e-6)
    assert sizes(tmp_path / "s") == (len(texts) * 48 * 4, len(texts) * 16)


@pytest.mark.parametrize(("hash_bytes", "embedding_bytes"), [(5, 0), (0, 48 * 4 * 3), (0, 7), (15, 48 * 4 + 1)])
def test_a_torn_tail_is_tolerated(tmp_path, guide, config, texts, seen, hash_bytes, embedding_bytes):
    """What a power cut leaves at the ends of the files is cut off before anything is added behind it: else every later
    embedding stands beside its place."""
    folder = tmp_path / "s"
    list(filling(folder, guide, config, texts[:20]))
    for name, extra in (("hashes.bin", hash_bytes), ("embeddings.bin", embedding_bytes)):
        with (folder / name).open("ab") as stream:
            stream.write(b"\xff" * extra)
    np.testing.assert_allclose(stored(folder, texts[:20]), live(config, texts[:20]), rtol=0, atol=1e-6)
    seen.clear()
    list(filling(folder, guide, config, texts))
    assert sorted(seen) == sorted(texts[20:])
    np.testing.assert_allclose(stored(folder, texts), live(config, texts), rtol=0, atol=1e-6)
    assert sizes(folder) == (len(texts) * 48 * 4, len(texts) * 16)


def flip(path: Path, at: int = -100) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 0x10
    path.write_bytes(content)


ROW = 48 * 4


def zeros_from(path: Path, first: int) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:first] + bytes(len(content) - first))


def zero_both(folder: Path) -> None:
    zeros_from(folder / "embeddings.bin", 0)
    zeros_from(folder / "checksums.bin", HEADER.size)


def not_a_number(folder: Path) -> None:
    with (folder / "embeddings.bin").open("r+b") as stream:
        stream.write(b"\xff\xff\xff\x7f" * 48)


def another_width(folder: Path) -> None:
    path = folder / "meta.json"
    path.write_text(path.read_text().replace('"width": 48', '"width": 24'))


DAMAGES = {
    "a flipped bit": (lambda folder: flip(folder / "embeddings.bin", 7 * ROW + 3), 1),
    "a zeroed half": (lambda folder: zeros_from(folder / "embeddings.bin", 10 * ROW), 10),
    "both files of zeros": (zero_both, 20),
    "not a number": (not_a_number, 1),
    "a file that was cut": (lambda folder: os.truncate(folder / "embeddings.bin", 12 * ROW + 5), 8),
    "no file": (lambda folder: (folder / "embeddings.bin").unlink(), 20),
    "another width": (another_width, 0),
    "garbage in meta.json": (lambda folder: (folder / "meta.json").write_text("{" * 9999), 0),
    "a flipped bit in the header": (lambda folder: flip(folder / "checksums.bin", 1), 0),
    "a flipped checksum": (lambda folder: flip(folder / "checksums.bin"), 1),
    "a flipped hash": (lambda folder: flip(folder / "hashes.bin"), 1),
}
"""What happens to a store of 20 texts -> how many of them are to be embedded again."""


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_damaged_is_made_anew_and_nothing_else(tmp_path, guide, config, texts, seen, damage):
    """Used without a word, a rotten disk is another guide; and a store of days must not go for one bit."""
    folder, (spoil, count) = tmp_path / "s", DAMAGES[damage]
    list(filling(folder, guide, config, texts[:20]))
    before = stored(folder, texts[:20])
    spoil(folder)
    store = GuideStore(folder)
    positions = store.positions(hashes_of(texts[:20]))
    damaged = store.damaged(positions)
    lost = damaged | (positions < 0)
    assert lost.sum() == count
    if damaged.any():
        with pytest.raises(OSError, match=r"embeddings\.bin: \d+ damaged embeddings"):
            store.read(positions)
    store.forget(positions[damaged])
    seen.clear()
    list(filling(folder, guide, config, texts[:25]))
    again = {text for text, gone in zip(texts[:20], lost, strict=True) if gone}
    assert sorted(seen) == sorted([*again, *texts[20:25]])
    np.testing.assert_allclose(stored(folder, texts[:20]), before, rtol=0, atol=1e-6)
    assert not GuideStore(folder).damaged(GuideStore(folder).positions(hashes_of(texts[:25]))).any()


def test_a_store_of_before_there_were_checksums_gets_them(tmp_path, guide, config, texts):
    """What is in it is taken as it is, once; from the next text on it is held against them."""
    folder = tmp_path / "s"
    list(filling(folder, guide, config, texts[:20]))
    (folder / "checksums.bin").unlink()
    assert not GuideStore(folder).damaged(np.arange(20)).any()
    list(filling(folder, guide, config, texts[:21]))
    assert (folder / "checksums.bin").stat().st_size == HEADER.size + 8 * 21
    flip(folder / "embeddings.bin", 3 * ROW)
    assert GuideStore(folder).damaged(np.arange(21)).nonzero()[0].tolist() == [3]


def test_a_large_store_is_looked_at_as_it_is_read(tmp_path, monkeypatch, guide, config, texts):
    """Of ten gigabytes a look at all would cost more than the start; a training never takes a step on a damaged row."""
    monkeypatch.setattr(guide_module, "LOOKED_AT", 100)
    folder = tmp_path / "s"
    list(filling(folder, guide, config, texts[:20]))
    flip(folder / "embeddings.bin", 3 * ROW)
    store = GuideStore(folder)
    assert not store.damaged(np.arange(20)).any()
    store.read(np.array([0, 1, 2, 4]))
    with pytest.raises(OSError, match="Run the same command again"):
        store.read(np.array([2, 3]))
    assert list(filling(folder, guide, config, texts[:20]))[-1] == 1


def test_a_run_says_which_texts_were_damaged(write_config, tmp_path):
    """And gives the losses of the run that nobody disturbed."""
    assert gist("train", write_config("whole")).code == 0
    (folder,) = (tmp_path / "runs" / ".cache" / "guides").iterdir()
    flip(folder / "embeddings.bin", 5 * ROW)
    ended = gist("train", write_config("damaged"))
    assert ended.code == 0
    assert "embeddings.bin: 1 damaged embeddings, of " in ended.err
    assert metrics(tmp_path / "runs" / "damaged") == metrics(tmp_path / "runs" / "whole")


def test_checksums_find_what_changes():
    """By hand: words times odd numbers; the order of words counts, and a row of zeros has none of zero."""
    draw = np.random.default_rng(0)
    for dtype, width in ((np.float16, 7), (np.float32, 3), (np.float32, 48)):
        rows = draw.standard_normal((50, width)).astype(dtype)
        sums = checksums(rows)
        weights = np.random.default_rng(20240229).integers(0, 2**64, -(-width * rows.itemsize // 8), np.uint64) | np.uint64(1)
        for row, found in zip(rows, sums.tolist(), strict=True):
            content = row.tobytes()
            words = [int.from_bytes(content[first : first + 8], "little") for first in range(0, len(content), 8)]
            expected = sum(word * int(weight) for word, weight in zip(words, weights, strict=True)) + 0x9E3779B97F4A7C15
            assert found == expected % 2**64
        for byte in range(rows[0].nbytes):
            for bit in range(8):
                content = bytearray(rows[0].tobytes())
                content[byte] ^= 1 << bit
                assert checksums(np.frombuffer(content, dtype)[None])[0] != sums[0]
        assert checksums(np.zeros((1, width), dtype))[0] != 0


@pytest.mark.parametrize("number", [float("nan"), float("inf"), 0.0])
@pytest.mark.filterwarnings("ignore:invalid value")
def test_an_embedding_that_is_not_finite_is_not_written(tmp_path, guide, config, texts, number):
    """A NaN is larger than no threshold: it would mask nothing, for ever. A vector of zeros has no direction."""
    list(filling(tmp_path / "s", guide, config, texts[:5]))
    norm = guide.encoder.transformer.encoder.layer[-1].output.LayerNorm
    with torch.no_grad():
        norm.weight.fill_(number)
        norm.bias.fill_(0)
    before = sizes(tmp_path / "s")
    with pytest.raises(ArithmeticError, match="no finite embedding"):
        list(filling(tmp_path / "s", guide, config, texts))
    assert sizes(tmp_path / "s") == before
    assert len(GuideStore(tmp_path / "s")) == 5


# Which store.


def test_a_store_for_each_guide(make_model, guide_folder, tmp_path):
    """Whatever changes an embedding has a store of its own; what changes only its cost has not."""
    base = {"name": str(guide_folder)}
    others = [
        {"dtype": "float32"},
        {"prompt": "query: "},
        {"prompt": "passage: "},
        {"max_length": 32},
        {"pooling": "cls"},
        {"name": str(make_model(width=48, layers=1, cased=True, vocabulary=300, seed=2))},
    ]
    folders = [store_folder(tmp_path, GuideConfig(**{**base, **other}), "guide") for other in [{}, *others]]
    assert len(set(folders)) == 7
    assert {folder.parent for folder in folders} == {tmp_path / "guides"}
    copy = shutil.copytree(guide_folder, tmp_path / "copy")
    for same in ({}, {"batch_tokens": 512}, {"name": str(copy)}):
        assert store_folder(tmp_path, GuideConfig(**{**base, **same}), "guide") == folders[0]
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\1\1")
    assert store_folder(tmp_path, GuideConfig(name=str(copy)), "guide") not in folders


def test_the_guide_reads_the_raw_text(make_model, write_config, write_rows):
    """With its own tokenizer, casing, prompt and length. Two texts that are one to an uncased student of 8 tokens are two
    to the guide: a guide that got the student's tokens would take them for duplicates."""
    long = "how do I top up my card " * 4
    pairs = [("My Card", "my card"), (long + "today", long + "never")]
    rows = write_rows("pairs.jsonl", [{"anchor": a, "positive": b, "negative": "exchange rate"} for a, b in pairs])
    folder = make_model("roberta", width=48, pooling="cls", cased=True, vocabulary=300, seed=1)
    config = load_config(
        write_config(
            model={"name": str(make_model()), "max_length": 8},
            guide={"name": str(folder), "dtype": "float32", "max_length": 60, "prompt": "query: "},
            data={"train": [{"source": "jsonl", "path": str(rows), "prompts": {"anchor": "other: "}}]},
        )
    )
    corpus = preparation.prepare_corpus(config, CPU, QUIET)
    student = load_student(config.model)
    look_up = embedding.prepare_guide(config, corpus, CPU, QUIET)
    texts = [corpus.text(i) for i in range(corpus.text_count)]
    vectors = look_up.anchor.embeddings(np.arange(len(texts))).numpy()
    assert vectors.shape == (5, 48)
    np.testing.assert_allclose(vectors, live(config.guide, texts), rtol=0, atol=1e-6)
    for pair in pairs:
        one, other = student.tokens([text.strip() for text in pair])
        assert one.tolist() == other.tolist()
        a, b = (vectors[texts.index(text.strip())] for text in pair)
        assert np.abs(a - b).max() > 5e-5  # the live guide above is met to 1e-6


def test_prompts_by_column(make_model, write_config, write_rows, monkeypatch):
    """E5 and its kind judge a question against passages only where each is read after its own prompt. A text of two columns
    is then two texts to the guide; and another prompt for one column must not embed the others anew."""
    rows = [{"anchor": f"q {i}", "positive": f"p {i}", "negative": [f"n {i}", f"q {i + 1}"]} for i in range(16)]
    source = {"source": "jsonl", "path": str(write_rows("rows.jsonl", rows))}
    folder = str(make_model(width=48, cased=True, vocabulary=300, seed=1))
    real, embedded = guide_module.prompted, list[str]()
    monkeypatch.setattr(guide_module, "prompted", lambda *given: (embedded.extend(real(*given)), real(*given))[1])

    def prepared(anchor):
        prompts = {"anchor": anchor, "positive": "passage: ", "negative": "passage: "}
        guide = {"name": folder, "dtype": "float32", "prompts": prompts}
        config = load_config(write_config(guide=guide, data={"train": [source]}))
        corpus = preparation.prepare_corpus(config, CPU, QUIET)
        assert embedding.guide_as_stored(config, corpus) is None
        expected = plan(config).guide.texts_to_embed
        embedded.clear()
        guide = embedding.prepare_guide(config, corpus, CPU, QUIET)
        assert len(embedded) == expected
        assert plan(config).guide.texts_to_embed == 0
        return corpus, guide

    corpus, guide = prepared("query: ")
    anchor, positive, negative = (texts.parts[0].store.folder for texts in guide.columns)
    assert positive == negative != anchor
    for texts, ids, prompt in (
        (guide.anchor, corpus.anchor, "query: "),
        (guide.positive, corpus.positive, "passage: "),
        (guide.negative, corpus.negative, "passage: "),
    ):
        config = GuideConfig(name=folder, dtype="float32", prompt=prompt)
        expected = live(config, [corpus.text(i) for i in ids.tolist()])
        np.testing.assert_allclose(texts.embeddings(np.asarray(ids)).numpy(), expected, rtol=0, atol=1e-6)
    _, other = prepared("ask: ")
    assert sorted(embedded) == sorted(f"ask: q {i}" for i in range(16))
    assert other.positive.parts[0].store.folder == positive
    assert other.fingerprint != guide.fingerprint


@pytest.mark.parametrize(("given", "guide"), [(None, None), ("self", SelfGuide())])
def test_without_a_model_there_is_no_store(write_config, given, guide):
    """An unguided baseline must not embed anything."""
    config = load_config(write_config(guide=given))
    corpus = preparation.prepare_corpus(config, CPU, QUIET)
    assert embedding.prepare_guide(config, corpus, CPU, QUIET) == guide
    assert not (cache_folder(config) / "guides").exists()


# Several guides.


def similarities(guide, corpus):
    """(rows, rows) of all anchors with the first positives."""
    positives = corpus.positive[corpus.positive_offsets[:-1]]
    return (guide.anchor.embeddings(corpus.anchor) @ guide.positive.embeddings(positives).T).double().numpy()


@pytest.fixture
def two_guides(make_model):
    """Of other widths; the second reads anchors after a prompt of its own."""
    first, second = (str(make_model(width=width, layers=1, cased=True, vocabulary=300, seed=width)) for width in (48, 32))
    return [{"name": first, "dtype": "float32"}, {"name": second, "dtype": "float32", "prompts": {"anchor": "ask: "}}]


def prepared_with(guide, write_config):
    config = load_config(write_config(guide=guide))
    corpus = preparation.prepare_corpus(config, CPU, QUIET)
    return config, corpus, embedding.prepare_guide(config, corpus, CPU, QUIET)


def test_several_guides_are_one_of_their_mean_similarity(two_guides, write_config):
    """Each divided by how far apart its own similarities lie, so that one whose cosines are all near 0.9 has its say too."""
    config, corpus, both = prepared_with(two_guides, write_config)
    alone = [prepared_with(one, write_config)[2] for one in two_guides]
    inverse = np.array([1 / guide.deviation(corpus) for guide in alone])
    expected = sum(weight * similarities(guide, corpus) for weight, guide in zip(inverse / inverse.sum(), alone, strict=True))
    np.testing.assert_allclose(similarities(both, corpus), expected, rtol=0, atol=1e-5)
    assert similarities(both, corpus).max() <= 1 + 1e-6
    assert both.fingerprint == ",".join(guide.fingerprint for guide in alone)
    again = embedding.guide_as_stored(config, corpus)
    assert again.anchor.weights == both.anchor.weights
    every = np.unique(corpus.negative)
    assert torch.equal(again.negative.embeddings(every), both.negative.embeddings(every))


def test_the_deviation_is_that_of_random_pairs(two_guides, write_config):
    _, corpus, guide = prepared_with(two_guides[0], write_config)
    assert guide.deviation(corpus) == pytest.approx(similarities(guide, corpus).std(), rel=0.1)
    assert guide.deviation(corpus) == guide.deviation(corpus)


def test_one_guide_in_a_list_is_one_guide(two_guides, write_config):
    config, _, guide = prepared_with([two_guides[0]], write_config)
    assert config == load_config(write_config(guide=two_guides[0]))
    assert config.guide == GuideConfig(**two_guides[0])
    assert guide.anchor.weights == (1.0,)


def test_vectors_and_a_model_guide_together(two_guides, write_config, tmp_path):
    """What is missing in the vectors is told under the guide's place in the list."""
    _, corpus, alone = prepared_with(two_guides[0], write_config)
    texts = [corpus.text(i) for i in range(corpus.text_count)]
    np.save(tmp_path / "given.npy", alone.anchor.embeddings(np.arange(len(texts))).numpy())
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    (tmp_path / "given.jsonl").write_text("".join(lines), encoding="utf-8")
    vectors = {"vectors": str(tmp_path / "given.npy"), "dtype": "float32"}
    _, _, models = prepared_with(two_guides, write_config)
    _, _, mixed = prepared_with([vectors, two_guides[1]], write_config)
    assert mixed.anchor.weights == models.anchor.weights
    np.testing.assert_allclose(similarities(mixed, corpus), similarities(models, corpus), rtol=0, atol=1e-6)
    (tmp_path / "given.npy").unlink()
    with pytest.raises(UserError) as caught:
        prepared_with([two_guides[1], vectors], write_config)
    assert "guide[1].vectors" in str(caught.value)


@pytest.mark.parametrize(
    ("guide", "where"),
    [
        ([{"name": "a"}, "self"], "guide[1]"),
        ([{"name": "a"}, {"nme": "b"}], "guide[1].nme"),
        ([{"name": "a"}, {"name": "b", "dtype": "float8"}], "guide[1].dtype"),
        ([], "guide"),
    ],
)
def test_a_fault_in_a_list_of_guides_is_told_in_its_place(guide, where, write_config):
    with pytest.raises(UserError) as caught:
        load_config(write_config(guide=guide))
    assert f": {where}" in str(caught.value)


def test_votes_need_several_guides(two_guides, write_config):
    votes = {"votes": "majority"}
    assert load_config(write_config(guide=two_guides, loss=votes)).loss.votes == "majority"
    for guide in (two_guides[0], [two_guides[0]], "self", None):
        with pytest.raises(UserError, match=r"loss\.votes"):
            load_config(write_config(guide=guide, loss=votes))


def test_prompts_of_the_same_words_in_other_columns_differ(two_guides, write_config):
    """What is kept of a guide's findings, mined negatives and suspects, is looked up by what each column was read after."""
    found = []
    for positive, negative in (("b: ", "b: "), ("a: ", "b: "), ("b: ", "a: ")):
        prompts = {"anchor": "a: ", "positive": positive, "negative": negative}
        found.append(prepared_with({**two_guides[0], "prompts": prompts}, write_config)[2].by_column)
    assert all(one != other for one, other in itertools.combinations(found, 2))


def test_a_plan_takes_steps_before_guides_that_vote_are_stored(two_guides, write_config):
    planned = plan(load_config(write_config(guide=two_guides, loss={"votes": "all"})), measure=True)
    assert planned.measured.guide_stood_in_for


def test_a_run_with_several_guides(two_guides, write_config):
    """It may resume with other places and sizes of them, and with no other guide."""
    path = str(write_config(guide=two_guides, training={"batch_size": 8, "max_steps": 4, "precision": "float32"}))
    done = gist("train", path, "--set", "training.stop_at_step=2")
    assert done.code == 0, done.err
    weights = re.findall(r"\((\d+)%\)", done.out + done.err)
    assert len(weights) == 2
    assert sum(map(int, weights)) == pytest.approx(100, abs=1)
    resumed = gist("train", path, "--set", "guide[0].batch_tokens=512")
    assert resumed.code == 0, resumed.err
    other = gist("train", path, "--set", "guide[1].prompts.anchor=say: ")
    assert other.code == 2
    assert "guide[1].prompts.anchor" in other.err
    planned = plan(load_config(Path(path)))
    assert planned.guide.name == f"{two_guides[0]['name']}, {two_guides[1]['name']}"
    assert planned.guide.texts_to_embed == 0


# Through `prepare`.


def test_prepared_once(write_config, seen):
    """A second run over the same data builds nothing, loads no guide and reads no text; it says nothing either."""
    config = load_config(write_config())
    corpus = preparation.prepare_corpus(config, CPU, QUIET)
    first = embedding.prepare_guide(config, corpus, CPU, QUIET)
    assert sorted(seen) == sorted(corpus.text(i) for i in range(corpus.text_count))
    seen.clear()
    console = Console(file=io.StringIO())
    again = embedding.prepare_guide(config, preparation.prepare_corpus(config, CPU, console), CPU, console)
    assert seen == []
    assert console.file.getvalue() == ""
    every = np.arange(corpus.text_count)
    assert torch.equal(again.anchor.embeddings(every), first.anchor.embeddings(every))


def prepare_beside(path: str, barrier: Any) -> tuple[list[str], int]:
    """`prepare_guide` in a process that reaches the lock when the other one does.

    Returns:
        The texts that it embedded, and how often it loaded the guide.
    """
    torch.set_num_threads(1)
    config = load_config(Path(path))
    corpus = preparation.prepare_corpus(config, CPU, QUIET)
    embedded: list[str] = []
    loaded: list[GuideConfig] = []
    met: list[int] = []
    real = Pretrained.tokens

    def load(guide: GuideConfig, where: str) -> Pretrained:
        loaded.append(guide)
        return load_guide(guide, where)

    @contextmanager
    def meet(folder: Path) -> Iterator[None]:
        if not met:
            met.append(barrier.wait(120))  # seconds; importing torch takes most of the wait
        with locked(folder):
            yield

    def tokens(self: Pretrained, texts: Sequence[str]) -> Any:
        embedded.extend(texts)
        return real(self, texts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(guide_module, "locked", meet)
        patch.setattr(embedding, "load_guide", load)
        patch.setattr(Pretrained, "tokens", tokens)
        embedding.prepare_guide(config, corpus, CPU, QUIET)
    return embedded, len(loaded)


def report_beside(path: str, barrier: Any, answers: Any) -> None:
    answers.put(prepare_beside(path, barrier))


@pytest.mark.slow  # test_guide_shared.py has it with ranks
def test_two_processes_embed_each_text_once(write_config):
    """Two runs that find the store empty at the same moment: one takes the texts, which are few, the other waits and finds the
    work done. Both embedding them would cost twice."""
    path = write_config()
    config = load_config(path)
    corpus = preparation.prepare_corpus(config, CPU, QUIET)  # before, so that the barrier is at the guide's lock
    spawn = multiprocessing.get_context("spawn")
    barrier, answers = spawn.Barrier(2), spawn.Queue()
    other = spawn.Process(target=report_beside, args=(str(path), barrier, answers))
    other.start()
    try:
        here, loads_here = prepare_beside(str(path), barrier)
        there, loads_there = answers.get(timeout=120)
    finally:
        other.join(30)
    assert other.exitcode == 0
    texts = [corpus.text(i) for i in range(corpus.text_count)]
    assert sorted(here + there) == sorted(texts)
    assert loads_here + loads_there == 1  # who waited finds the work done, and needs no guide
    folder = store_folder(cache_folder(config), config.guide, "guide")
    assert sizes(folder) == (len(texts) * 48 * 4, len(texts) * 16)
    np.testing.assert_allclose(stored(folder, texts), live(config.guide, texts), rtol=0, atol=1e-6)
