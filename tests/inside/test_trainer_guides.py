"""The guide of the loss inside their trainer: each text once, by a model, its name, a store or vectors, as the user wrote it."""

import gc
import logging
import os
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset, DatasetDict
from support.running import in_processes
from support.trainers import columns_of, dataset_of, loss_and_gradients, opened

from gist_train import GuidedContrastiveLoss, UserError
from gist_train.config.models import GuideConfig
from gist_train.data.caches import cached, clear, days_unused
from gist_train.data.corpus import text_hashes
from gist_train.inside import growing
from gist_train.inside.texts import TEXTS, KeepsTexts, column_of, from_bytes, to_bytes
from gist_train.model.guide import GuideStore, store_folder
from gist_train.model.loading import load_guide
from gist_train.model.whole import WholeModel

pytestmark = pytest.mark.usefixtures("one_thread")
ROWS = 8
CPU = torch.device("cpu")


@pytest.fixture
def student(make_model):
    """Without dropout."""
    return opened(make_model(dropout=0.0))


@pytest.fixture
def folder(make_model):
    """Of a guide with a tokenizer of its own, which knows upper case."""
    return make_model(width=48, layers=1, cased=True, vocabulary=300, seed=1)


@pytest.fixture
def seen(monkeypatch):
    """The texts that a guide which sentence-transformers runs was asked for."""
    texts, embed = [], WholeModel.embed
    monkeypatch.setattr(WholeModel, "embed", lambda self, given, size: texts.extend(given) or embed(self, given, size))
    return texts


def given(student, loss, columns):
    """Loss and gradients of a batch that holds its texts."""
    return loss_and_gradients(loss, student, columns, KeepsTexts(student.preprocess))


@pytest.mark.parametrize("cut", [None, 3])
def test_a_guide_is_asked_once_for_a_text(student, folder, tmp_path, seen, cut):
    """Forty epochs, and another run, cost one pass: that is what a store is for. A text twice in a batch is one text."""
    columns = columns_of(ROWS, 3)
    columns[2][0] = columns[0][1]
    guide = opened(folder, training=False)
    loss = GuidedContrastiveLoss(student, guide, cache_dir=tmp_path, mini_batch_size=cut)
    first = given(student, loss, columns)
    assert sorted(seen) == sorted({text for column in columns for text in column})
    assert given(student, loss, columns)[0] == first[0]
    loss.guide.stores[0].write()
    again = GuidedContrastiveLoss(student, opened(folder, training=False), cache_dir=tmp_path)
    assert given(student, again, columns)[0] == pytest.approx(first[0], abs=1e-5)
    assert len(seen) == 3 * ROWS - 1
    other = opened(folder, training=False)
    with torch.no_grad():
        next(other.parameters()).add_(0.1)
    given(student, GuidedContrastiveLoss(student, other, cache_dir=tmp_path), columns)
    assert len(seen) == 2 * (3 * ROWS - 1), "the embeddings of another model were taken"


@pytest.mark.parametrize(
    "change",
    [
        lambda guide: setattr(guide.tokenizer, "truncation_side", "left"),
        lambda guide: setattr(guide[0].auto_model.config, "hidden_act", "relu"),
        lambda guide: setattr(guide.tokenizer.backend_tokenizer, "normalizer", None),
    ],
    ids=["side", "activation", "normalizer"],
)
def test_a_guide_that_reads_otherwise_has_its_own_store(student, folder, tmp_path, change):
    """Its weights and vocabulary are those of another, whose embeddings it would be given without a word."""
    models = [opened(folder, training=False) for _ in range(3)]
    change(models[1])
    stores = [GuidedContrastiveLoss(student, model, cache_dir=tmp_path).guide.stores[0].folder for model in models]
    assert stores[0] == stores[2]
    assert stores[0] != stores[1]


def test_what_is_in_memory_alone_is_bounded(student, folder, tmp_path, monkeypatch):
    """A training over millions of texts must not hold their embeddings; they are on the disk at the end of the process too."""
    monkeypatch.setattr(growing, "MOST_UNWRITTEN", 40)
    loss = GuidedContrastiveLoss(student, opened(folder, training=False), cache_dir=tmp_path)
    columns = columns_of(25, 3)
    for first in range(0, 25, 5):
        given(student, loss, [column[first : first + 5] for column in columns])
        assert len(loss.guide.stores[0]._new.vectors) < 40
    (store,) = {*loss.guide.stores}
    unwritten, path = len(store._new.vectors), store.folder
    assert 0 < unwritten < 40
    del loss, store
    texts = [text for column in columns for text in column]
    assert (GuideStore(path).positions(text_hashes(texts)) >= 0).all()
    assert len(GuideStore(path)) == len({*texts})


def test_a_name_shares_the_store_of_the_command_line(student, folder, tmp_path, seen):
    """A guide that `gist-train prepare` has run is not run again, and reads each column after its prompt."""
    columns = columns_of(ROWS, 3)
    prompts = {"anchor": "query: ", "positive": "passage: ", "negative": "passage: "}
    config = GuideConfig(name=str(folder), prompts=prompts, dtype="float32")
    guide = load_guide(config)
    asked, passages = config.of_roles[0], config.of_roles[1]
    for one, texts in ((asked, columns[0]), (passages, columns[1] + columns[2])):
        store = GuideStore(store_folder(tmp_path, one, "guide"))
        lengths = np.array([len(text) for text in texts])
        list(store.fill(guide, one, text_hashes(texts), lengths, texts.__getitem__))
    with mock.patch("gist_train.inside.guides.load_guide", side_effect=AssertionError("it was loaded")):
        named = GuidedContrastiveLoss(student, str(folder), guide_prompts=prompts, cache_dir=tmp_path)
        of_section = GuidedContrastiveLoss(student, {"name": str(folder), "prompts": prompts}, cache_dir=tmp_path)
        first = given(student, named, columns)[0]
        assert given(student, of_section, columns)[0] == first
    live = GuidedContrastiveLoss(student, _plainly(folder), guide_prompts=prompts, cache_dir=tmp_path)
    assert given(student, live, columns)[0] == pytest.approx(first, abs=1e-4)
    assert {text.split(": ")[0] for text in seen} == {"query", "passage"}
    without = GuidedContrastiveLoss(student, str(folder), cache_dir=tmp_path)
    assert given(student, without, columns)[0] != pytest.approx(first, abs=1e-3)


def _plainly(folder):
    """The model of a folder as it is."""
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(folder), device="cpu")


@pytest.mark.parametrize("kind", ["store", "parquet", "npy"])
def test_a_store_or_vectors_guide(student, folder, tmp_path, kind):
    """Embeddings from elsewhere, such as of a model behind an API, mask as the model that made them."""
    columns = columns_of(ROWS, 3)
    model = GuidedContrastiveLoss(student, str(folder), cache_dir=tmp_path / "cache")
    expected = given(student, model, columns)
    texts = list({text for column in columns for text in column})
    vectors = load_guide(GuideConfig(name=str(folder))).encode(texts)
    if kind == "store":
        model.guide.stores[0].write()
        source = model.guide.stores[0].folder
    elif kind == "parquet":
        source = tmp_path / "vectors.parquet"
        lists = pa.array(vectors.tolist(), pa.list_(pa.float32()))
        pq.write_table(pa.table({"text": pa.array(texts), "embedding": lists}), source)
    else:
        source = tmp_path / "vectors.npy"
        np.save(source, vectors)
        lines = "".join(pa.array([text]).to_pylist()[0].join(['{"text": "', '"}\n']) for text in texts)
        source.with_suffix(".jsonl").write_text(lines, encoding="utf-8")
    loss = GuidedContrastiveLoss(student, source, cache_dir=tmp_path / "other")
    found = given(student, loss, columns)
    assert found[0] == pytest.approx(expected[0], abs=1e-5)
    columns[1][0] = "a text that nobody has embedded"
    with pytest.raises(UserError, match="nobody has embedded"):
        given(student, loss, columns)
    with pytest.raises(UserError, match=r"its method collator\(args\)"):  # decoded, in lower case and with other spaces
        loss_and_gradients(loss, student, [["WHAT is THIS?"] * 2, ["An Answer"] * 2])


def test_the_guide_reads_what_the_user_wrote(student, folder, tmp_path, seen):
    """Decoded from the student's tokens, a text is in lower case, cut, after the student's prompt: the guide judges another."""
    columns = [["Does Anna PAY in €? " + "very long " * 50, ""], ["Yes, Anna does", "nothing"]]
    loss = GuidedContrastiveLoss(student, opened(folder, training=False), cache_dir=tmp_path)
    rows = [dict(zip(("anchor", "positive"), texts, strict=True)) for texts in zip(*columns, strict=True)]
    from support.trainers import arguments

    collate = loss.collator(arguments(tmp_path, prompts={"anchor": "query: "}))
    batch = collate(rows)
    features = [{key.removeprefix(f"{name}_"): value for key, value in batch.items() if key.startswith(name)} for name in rows[0]]
    assert features[0]["prompt_length"]
    loss(features)
    assert sorted(seen) == sorted(columns[0] + columns[1])
    seen.clear()
    loss([student.preprocess(column, prompt="query: ") for column in columns])
    assert any(text.startswith("query : does anna pay") for text in seen)


def test_texts_travel_as_bytes():
    """A tensor is sliced and sent as all others of a batch are: each row must be its text again, also where none has a sign."""
    for texts in (["", "a", "naïve ☃ 日本"], ["", ""], ["one"]):
        assert from_bytes(to_bytes(texts)) == texts
        assert from_bytes(to_bytes(texts)[1:]) == texts[1:]


def test_columns_of_other_features(student):
    """Laid end to end for flash attention, or padded on the left: the tokens are the same."""
    texts = ["how are you", "fine", "and what do you do the whole day"]
    features = student.preprocess(texts)
    expected = column_of(features, None)
    ids = [row[mask.bool()] for row, mask in zip(features["input_ids"], features["attention_mask"], strict=True)]
    cumulative = torch.tensor([0, *np.cumsum([len(row) for row in ids])])
    flat = {"input_ids": torch.cat(ids)[None], "cu_seq_lens_q": cumulative}
    student.tokenizer.padding_side = "left"
    for other in (flat, student.preprocess(texts)):
        assert (column_of(other, None).hashes == expected.hashes).all()
    assert len({row.tobytes() for row in expected.hashes}) == 3
    with pytest.raises(UserError, match=r"its method collator\(args\)"):
        column_of({"pixel_values": torch.zeros(2, 3)}, None)
    assert column_of({"pixel_values": torch.zeros(2, 3), TEXTS: to_bytes(texts)}, None).texts == texts


def test_all_texts_can_be_embedded_ahead(student, folder, tmp_path, seen):
    """One pass, sorted by length, in place of a few texts a step; labels are none of them."""
    columns = columns_of(ROWS, 3)
    labelled = dataset_of(columns[:2]).add_column("label", list(range(ROWS)))
    data = DatasetDict(pairs=labelled, triplets=dataset_of(columns))
    loss = GuidedContrastiveLoss(student, opened(folder, training=False), cache_dir=tmp_path)
    assert loss.embed(data) == 3 * ROWS
    lengths = [len(text) for text in seen]
    assert lengths == sorted(lengths, reverse=True)
    assert len(lengths) == 3 * ROWS
    given(student, loss, columns)
    assert loss.embed(data) == len(seen) == 3 * ROWS
    with pytest.raises(UserError, match="no column of texts"):
        loss.embed(Dataset.from_dict({"label": [1, 2]}))
    with pytest.raises(UserError, match="a guide that is a model"):
        GuidedContrastiveLoss(student, "self", cache_dir=tmp_path).embed(data)
    for other in ([{"anchor": "a"}], data["pairs"].to_iterable_dataset(), {"pairs": columns}):
        with pytest.raises(UserError, match=r"found     a (list|IterableDataset)"):
            loss.embed(other)


def test_embedding_ahead_needs_the_collator(student, folder, tmp_path, caplog, capsys):
    """Without it the guide reads other texts than those that were embedded, and the whole pass is for nothing."""
    columns = columns_of(ROWS, 2)
    loss = GuidedContrastiveLoss(student, opened(folder, training=False), cache_dir=tmp_path)
    loss.embed(dataset_of(columns))
    assert f"{2 * ROWS:,} done" in capsys.readouterr().err
    given(student, loss, columns)
    assert "collator" not in caplog.text
    for _ in range(2):
        loss_and_gradients(loss, student, columns)
    assert caplog.text.count("collator(args)") == 1


def test_a_store_in_use_is_not_cleared(student, folder, tmp_path):
    """`gist-train cache --unused-for 30 --clear all` must not take the guide's pass from a training that has just begun."""
    loss = GuidedContrastiveLoss(student, opened(folder, training=False), cache_dir=tmp_path)
    given(student, loss, columns_of(ROWS, 2))
    loss.guide.stores[0].write()
    place = loss.guide.stores[0].folder
    os.utime(place, (0, 0))
    fixed = GuidedContrastiveLoss(student, str(place), cache_dir=tmp_path)
    entry = next(entry for entry in cached(tmp_path) if entry.folder == place)
    assert days_unused(entry) < 1
    del loss
    gc.collect()
    with pytest.raises(UserError, match=f"in use by process {os.getpid()}"):
        clear(next(entry for entry in cached(tmp_path) if entry.folder == place))
    del fixed
    gc.collect()
    clear(next(entry for entry in cached(tmp_path) if entry.folder == place))
    assert not place.exists()


def embedded_by(folder, cache):
    """What a process embeds of a data set that others embed too, and of the steps behind that."""
    texts, embed = [], WholeModel.embed
    model = opened(folder)
    with mock.patch.object(WholeModel, "embed", lambda self, given, size: texts.extend(given) or embed(self, given, size)):
        from accelerate import Accelerator

        Accelerator(cpu=True)
        loss = GuidedContrastiveLoss(model, opened(folder, training=False), cache_dir=cache)
        columns = columns_of(200, 2)
        loss.embed(dataset_of(columns))
        ahead = len(texts)
        given(model, loss, [column[:ROWS] for column in columns])
    return ahead, len(texts), len(loss.guide.stores[0].store)


def test_processes_share_the_work(folder, tmp_path):
    """Two processes that embed the same data ahead do half of it each, and neither writes over the other's."""
    found = [result for _, result in in_processes(2, embedded_by, folder, tmp_path)]
    assert sum(ahead for ahead, _, _ in found) == 400
    assert all(ahead == after > 0 for ahead, after, _ in found)
    assert {size for _, _, size in found} == {400}


def test_a_store_grows_under_other_processes(student, folder, tmp_path, seen):
    """What another process has embedded meanwhile is read from the disk, and not embedded again."""
    losses = [GuidedContrastiveLoss(student, opened(folder, training=False), cache_dir=tmp_path) for _ in range(2)]
    columns = columns_of(ROWS, 3)
    first = given(student, losses[0], columns)[0]
    losses[0].guide.stores[0].write()
    assert given(student, losses[1], columns)[0] == pytest.approx(first, abs=1e-6)
    assert len(seen) == 3 * ROWS


def test_a_damaged_embedding_is_made_again(student, folder, tmp_path, seen):
    """A bit that flipped on the disk would mask at random for ever."""
    loss = GuidedContrastiveLoss(student, opened(folder, training=False), cache_dir=tmp_path)
    columns = columns_of(ROWS, 2)
    first = given(student, loss, columns)[0]
    loss.guide.stores[0].write()
    file = loss.guide.stores[0].folder / "embeddings.bin"
    content = bytearray(file.read_bytes())
    content[100] ^= 0x40
    file.write_bytes(content)
    again = GuidedContrastiveLoss(student, opened(folder, training=False), cache_dir=tmp_path)
    assert given(student, again, columns)[0] == pytest.approx(first, abs=1e-6)
    assert len(seen) == 2 * ROWS + 1


def test_a_disk_without_room_ends_no_training(student, folder, tmp_path, seen, caplog, monkeypatch):
    """The embeddings are there, in memory; that they can't be kept is said once."""
    monkeypatch.setattr(growing, "MOST_UNWRITTEN", 1)
    monkeypatch.setattr(growing.Filling, "append", mock.Mock(side_effect=OSError(28, "No space left on device")))
    loss = GuidedContrastiveLoss(student, opened(folder, training=False), cache_dir=tmp_path)
    columns = columns_of(ROWS, 2)
    with caplog.at_level(logging.WARNING):
        assert given(student, loss, columns)[0] == given(student, loss, columns)[0]
    assert caplog.text.count("No space left on device") == 1
    assert len(seen) == 4 * ROWS


def test_an_embedding_that_is_not_finite_is_told(student, folder, tmp_path):
    """It would be kept for ever, and compared with nothing: the text is named."""
    guide = opened(folder, training=False)
    with torch.no_grad():
        next(guide.parameters()).fill_(torch.nan)
    loss = GuidedContrastiveLoss(student, guide, cache_dir=tmp_path)
    with pytest.raises(FloatingPointError, match="no finite embedding"):
        given(student, loss, columns_of(ROWS, 2))


@pytest.mark.parametrize("own", [False, True])
def test_a_prompt_is_read_without_texts_too(make_model, tmp_path, own):
    """Where both tokenize alike the guide is given the student's tokens, before which nobody had put its prompt."""
    student, columns = opened(make_model(dropout=0.0)), columns_of(ROWS, 2)
    prompt, guide = "represent this: ", opened(make_model(seed=1), training=False)
    options = {} if own else {"guide_prompts": prompt}
    if own:
        guide.prompts, guide.default_prompt_name = {"query": prompt}, "query"
    loss = GuidedContrastiveLoss(student, guide, cache_dir=tmp_path, **options)
    known = loss._known([student.preprocess(column) for column in columns])
    for vectors, column in zip(known.guides, columns, strict=True):
        texts = [text.lower() for text in column]  # as the student's tokens have them
        expected = guide.encode(texts, prompt=prompt, normalize_embeddings=True, convert_to_tensor=True)
        torch.testing.assert_close(vectors, expected, rtol=0, atol=2e-3)


def test_what_can_not_be_embedded_ahead_is_told(student, folder, tmp_path):
    """A row without a text, and a cache that may not be written to: in a training the second ends nothing."""
    guide, columns = opened(folder, training=False), columns_of(ROWS, 2)
    loss = GuidedContrastiveLoss(student, guide, cache_dir=tmp_path)
    with pytest.raises(UserError, match=r'column "positive", row 2\n  found     no text'):
        loss.embed(Dataset.from_dict({"anchor": ["a", "b", "c"], "positive": ["x", "y", None]}))
    with pytest.raises(UserError, match=r'column "negative"\n  found     lists of texts'):
        loss.embed(Dataset.from_dict({"anchor": ["a"], "positive": ["x"], "negative": [["y", "z"]]}))
    with pytest.raises(UserError, match="negative_1, negative_2"):
        KeepsTexts(student.preprocess)([["y", "z"]])
    (tmp_path / "file").write_text("")
    loss = GuidedContrastiveLoss(student, guide, cache_dir=tmp_path / "file")
    with pytest.raises(UserError, match="cache_dir"):
        loss.embed(dataset_of(columns))
