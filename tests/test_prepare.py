"""What is prepared before a training: triplets mined with a model's store, and what is refused before it is put to work."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from running import QUIET, gist

from gist_train import prepare
from gist_train.config.errors import UserError
from gist_train.config.loading import load_config
from gist_train.config.schema import cache_folder
from gist_train.data.mining import mine_triplets
from gist_train.model.guide import GuideStore
from gist_train.model.pretrained import load_guide

CPU = torch.device("cpu")


@pytest.fixture
def intents(write_rows, quickstart_texts) -> Path:
    """90 real utterances under 6 labels, one of them twice."""
    rows = [{"text": text, "label": f"intent {i % 6}"} for i, text in enumerate(quickstart_texts[:89])]
    return write_rows("intents.jsonl", [*rows, rows[0]])


def classification(path: Path, **settings: object) -> dict[str, object]:
    return {"train": [{"source": "classification", "path": str(path), **settings}]}


def rows_of(corpus) -> list[tuple[str, str, str]]:
    return [
        (corpus.text(a), corpus.text(p), corpus.text(n))
        for a, p, n in zip(corpus.anchor, corpus.positive, corpus.negative, strict=True)
    ]


def test_triplets_are_mined_with_the_guide(write_config, intents, monkeypatch):
    """The corpus holds what the procedure draws of the guide's own vectors, and the guide reads each text once for mining and
    training together."""
    config = load_config(write_config(data=classification(intents)))
    read: list[str] = []
    real = prepare.load_guide

    def noted(model, where):
        guide = real(model, where)
        tokens = guide.tokens
        monkeypatch.setattr(type(guide), "tokens", lambda _, texts: (read.extend(texts), tokens(texts))[1])
        return guide

    monkeypatch.setattr(prepare, "load_guide", noted)
    corpus = prepare.prepare_corpus(config, CPU, QUIET)
    prepare.prepare_guide(config, corpus, CPU, QUIET)
    monkeypatch.undo()
    lines = [json.loads(line) for line in intents.open()]
    texts, labels = [line["text"] for line in lines], [line["label"] for line in lines]
    assert sorted(read) == sorted(set(texts))
    text_ids = np.array([texts.index(text) for text in texts])
    mined = mine_triplets(load_guide(config.guide).encode(texts), np.unique(labels, return_inverse=True)[1], text_ids)
    assert rows_of(corpus) == [
        (texts[a], texts[p], texts[n]) for a, p, n in zip(mined.anchor, mined.positive, mined.negative, strict=True)
    ]


def test_mining_has_a_model_and_a_store_of_its_own(write_config, intents, make_model):
    """Without a guide, or beside one, a model may be named; its store is not the guide's."""
    model = {"name": str(make_model(width=24, layers=1, seed=3)), "dtype": "float32"}
    config = load_config(write_config(data=classification(intents, mining={"model": model})))
    corpus = prepare.prepare_corpus(config, CPU, QUIET)
    stores = list((cache_folder(config) / "guides").iterdir())
    assert [GuideStore(folder).width for folder in stores] == [24]
    unguided = load_config(write_config("unguided", guide=None, data=classification(intents, mining={"model": model})))
    assert prepare.prepare_corpus(unguided, CPU, QUIET).folder == corpus.folder
    other = load_config(write_config("guided", data=classification(intents)))
    assert prepare.prepare_corpus(other, CPU, QUIET).folder != corpus.folder


def test_two_sources_share_one_pass_of_the_guide(write_config, intents, write_rows, quickstart_texts, monkeypatch):
    """Eleven sets must not load a large guide eleven times, nor embed a text of two of them twice."""
    other = write_rows("other.jsonl", [{"text": text, "label": i % 5} for i, text in enumerate(quickstart_texts[50:120])])
    data = {"train": [{"source": "classification", "path": str(path)} for path in (intents, other)]}
    loads, hashed = [], []
    real, identity = prepare.load_guide, prepare.store_folder
    monkeypatch.setattr(prepare, "load_guide", lambda *given: (loads.append(given), real(*given))[1])
    monkeypatch.setattr(prepare, "store_folder", lambda *given: (hashed.append(given), identity(*given))[1])
    config = load_config(write_config(data=data))
    corpus = prepare.prepare_corpus(config, CPU, QUIET)
    assert (len(loads), len(hashed)) == (1, 1)
    (folder,) = (cache_folder(config) / "guides").iterdir()
    assert len(GuideStore(folder)) == len(set(quickstart_texts[:120]))
    assert set(corpus.source.tolist()) == {0, 1}


def test_a_file_that_grows_while_it_is_read_is_told(write_config, tmp_path, monkeypatch):
    """Half of the old file and half of the new are no data set."""
    path = write_config()
    real = prepare.build_corpus

    def growing(*given):
        with (tmp_path / "rows.jsonl").open("a") as file:
            file.write(json.dumps({"anchor": "late", "positive": "row"}) + "\n")
        return real(*given)

    monkeypatch.setattr(prepare, "build_corpus", growing)
    ended = gist("prepare", path)
    assert ended.code == 2
    assert "changed while it was read" in ended.err
    monkeypatch.undo()
    assert gist("prepare", path).code == 0


def test_a_file_that_was_cut_and_written_again_is_told(write_config, tmp_path, monkeypatch):
    """Its content is the old one now, but not what was read: the short corpus would be kept for good."""
    path, rows = write_config(), tmp_path / "rows.jsonl"
    real = prepare.build_corpus

    def regenerated(*given):
        content = rows.read_bytes()
        rows.write_bytes(b"".join(content.splitlines(keepends=True)[:40]))
        yield from real(*given[:4], lambda: (rows.write_bytes(content), given[4]())[1])

    monkeypatch.setattr(prepare, "build_corpus", regenerated)
    ended = gist("prepare", path)
    assert ended.code == 2
    assert "changed while it was read" in ended.err
    monkeypatch.undo()
    assert "96 rows" in gist("prepare", path).err


def test_one_source_may_have_no_usable_row(write_config, write_rows, triplets):
    """`skip` leaves bad rows out, also where a source has no others."""
    labels = write_rows("labels.jsonl", [{"text": "", "label": "x"}, {"text": "a", "label": None}])
    rows = write_rows("good.jsonl", triplets)
    train = [{"source": "classification", "path": str(labels)}, {"source": "jsonl", "path": str(rows)}]
    ended = gist("prepare", write_config(data={"train": train, "on_bad_row": "skip"}))
    assert ended.code == 0, ended.err
    assert "2 rows were skipped" in ended.err


def test_brackets_in_a_path_are_printed_as_they_are(write_config, tmp_path):
    """Taken for markup, they end hours of work in a traceback, or name another folder."""
    ended = gist("prepare", write_config(cache_dir=str(tmp_path / "x[" / "b]" / "a[v2]")))
    assert ended.code == 0, ended.err
    assert "a[v2]" in ended.err


def test_a_bad_label_is_told_before_the_model_is_loaded(write_config, write_rows, monkeypatch):
    """Minutes of a large guide must not come before the message that row 2 has no label."""
    path = write_rows("bad.jsonl", [{"text": "a", "label": "x"}, {"text": "b", "label": None}, {"text": "c", "label": "y"}])
    monkeypatch.setattr(prepare, "load_guide", lambda *_: pytest.fail("the guide was loaded"))
    with pytest.raises(UserError, match=r'bad\.jsonl, row 2: "label" is not a string'):
        prepare.prepare_corpus(load_config(write_config(data=classification(path))), CPU, QUIET)


def test_a_missing_model_for_mining_is_told_by_its_key(write_config, intents):
    """With two models in one YAML, `guide.name` would send the user to the wrong one."""
    ended = gist("prepare", write_config(data=classification(intents, mining={"model": {"name": "nobody/none"}})))
    assert ended.code == 2
    assert "data.train[0].mining.model.name" in ended.err


@pytest.mark.parametrize("guide", [None, "self"])
def test_mining_without_any_model_is_refused(write_config, intents, guide):
    """A student that is not trained yet is no judge of what is alike, and nothing else is named."""
    ended = gist("plan", write_config(guide=guide, data=classification(intents)))
    assert ended.code == 2
    assert "data.train[0].mining.model" in ended.err


def test_rows_that_would_contrast_with_nothing_are_refused(write_config, write_rows):
    """Without negatives of its own and without the batch's, a row's loss is 0 for ever."""
    path = write_rows("pairs.jsonl", [{"anchor": f"a{i}", "positive": f"p{i}", "negative": ["n"] * (i % 2)} for i in range(20)])
    data = {"train": [{"source": "jsonl", "path": str(path), "in_batch_negatives": False}]}
    ended = gist("train", write_config(data=data))
    assert ended.code == 2
    assert "data.train[0].in_batch_negatives" in ended.err
    assert "10 rows" in ended.err


def test_reference_batching_of_shuffled_rows_is_told(write_config, write_rows, triplets):
    """ "Lower the batch size" would not help: no two neighbours are of one task."""
    path = write_rows("shuffled.jsonl", [row for rows in zip(triplets[:32], triplets[40:72], strict=True) for row in rows])
    data = {"train": [{"source": "jsonl", "path": str(path)}], "batching": "reference"}
    ended = gist("plan", write_config(data=data))
    assert ended.code == 2
    assert "data.batching: task" in ended.err


def test_weights_reach_the_batches(write_config, write_rows, triplets):
    """96 rows, 32 of them twice: 128 rows an epoch."""
    paths = [write_rows(f"{name}.jsonl", rows) for name, rows in (("a", triplets[:64]), ("b", triplets[64:]))]
    sources = [{"source": "jsonl", "path": str(path)} for path in paths]
    plain = load_config(write_config(data={"train": sources}))
    weighted = load_config(write_config("weighted", data={"train": [sources[0], {**sources[1], "weight": 2.0}]}))
    plans = [prepare.batch_plan(config, prepare.prepare_corpus(config, CPU, QUIET)) for config in (plain, weighted)]
    assert [plan.steps_per_epoch for plan in plans] == [12, 16]


def test_a_resume_with_another_weight_is_refused(write_config, triplets, write_rows):
    """The corpus is the same, the batches are not: going on would train on other rows without a word."""
    source = {"source": "jsonl", "path": str(write_rows("rows.jsonl", triplets))}
    assert gist("train", write_config(data={"train": [source]}), "--set", "training.stop_at_step=2").code == 0
    ended = gist("train", write_config(data={"train": [{**source, "weight": 2.0}]}))
    assert ended.code == 2
    assert "data.train[0].weight" in ended.err
