"""What is prepared before a training: triplets mined with a model's store, and what is refused before it is put to work."""

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from support.running import QUIET, gist

from gist_train import preparation
from gist_train.config.errors import UserError
from gist_train.config.loading import load_config
from gist_train.config.models import GuideConfig
from gist_train.config.schema import cache_folder
from gist_train.data import manifests
from gist_train.data.mining import mine_triplets
from gist_train.data.overlap import normalized
from gist_train.model import guide as guide_module
from gist_train.model.guide import GuideStore
from gist_train.model.loading import load_guide
from gist_train.training import embedding
from gist_train.training.batching import batch_plan

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
    real = embedding.load_guide

    def noted(model, where):
        guide = real(model, where)
        tokens = guide.tokens
        monkeypatch.setattr(type(guide), "tokens", lambda _, texts: (read.extend(texts), tokens(texts))[1])
        return guide

    monkeypatch.setattr(embedding, "load_guide", noted)
    corpus = preparation.prepare_corpus(config, CPU, QUIET)
    embedding.prepare_guide(config, corpus, CPU, QUIET)
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
    corpus = preparation.prepare_corpus(config, CPU, QUIET)
    stores = list((cache_folder(config) / "guides").iterdir())
    assert [GuideStore(folder).width for folder in stores] == [24]
    unguided = load_config(write_config("unguided", guide=None, data=classification(intents, mining={"model": model})))
    assert preparation.prepare_corpus(unguided, CPU, QUIET).folder == corpus.folder
    other = load_config(write_config("guided", data=classification(intents)))
    assert preparation.prepare_corpus(other, CPU, QUIET).folder != corpus.folder


def test_two_sources_share_one_pass_of_the_guide(write_config, intents, write_rows, quickstart_texts, monkeypatch):
    """Eleven sets must not load a large guide eleven times, nor embed a text of two of them twice."""
    other = write_rows("other.jsonl", [{"text": text, "label": i % 5} for i, text in enumerate(quickstart_texts[50:120])])
    data = {"train": [{"source": "classification", "path": str(path)} for path in (intents, other)]}
    loads, hashed = [], []
    real, identity = embedding.load_guide, preparation.store_folder
    monkeypatch.setattr(embedding, "load_guide", lambda *given: (loads.append(given), real(*given))[1])
    monkeypatch.setattr(preparation, "store_folder", lambda *given: (hashed.append(given), identity(*given))[1])
    config = load_config(write_config(data=data))
    corpus = preparation.prepare_corpus(config, CPU, QUIET)
    assert (len(loads), len(hashed)) == (1, 1)
    (folder,) = (cache_folder(config) / "guides").iterdir()
    assert len(GuideStore(folder)) == len(set(quickstart_texts[:120]))
    assert set(corpus.source.tolist()) == {0, 1}


def spoilt(path, how):
    content = bytearray(path.read_bytes())
    if how == "flipped":
        content[len(content) // 2] ^= 8
    path.write_bytes({"flipped": content, "cut": content[: len(content) // 2], "zeroed": bytes(len(content))}[how])


@pytest.mark.parametrize("how", ["flipped", "cut", "zeroed"])
def test_a_damaged_corpus_is_made_anew(write_config, how):
    """An array of ids with a bit flipped is another array of ids: other rows would train, or numpy raise in the middle."""
    config = load_config(write_config(guide=None))
    made = preparation.prepare(config, CPU, QUIET)
    before = [made.corpus.text(i) for i in range(made.corpus.text_count)], made.tokens.ids.tolist(), made.corpus.content
    names = sorted(path.relative_to(made.corpus.folder) for path in made.corpus.folder.rglob("*") if path.is_file())
    assert len(names) > 15
    for name in names:
        path = made.corpus.folder / name
        if path.name == ".lock" or path.stat().st_size == 0:
            continue
        spoilt(path, how)
        lines = Console(file=io.StringIO(), width=500)
        again = preparation.prepare(config, CPU, lines)
        assert f"made anew: {'tokens' if 'tokens' in name.parts else 'corpus'} " in lines.file.getvalue(), name
        assert path.name in lines.file.getvalue(), name
        assert (
            [again.corpus.text(i) for i in range(again.corpus.text_count)],
            again.tokens.ids.tolist(),
            again.corpus.content,
        ) == before
    lines = Console(file=io.StringIO(), width=500)
    preparation.prepare(config, CPU, lines)
    assert "made anew" not in lines.file.getvalue()


def test_of_a_large_corpus_sizes_are_looked_at(write_config, monkeypatch):
    """Reading ten gigabytes would take longer than all else before the first step."""
    monkeypatch.setattr(manifests, "LOOKED_AT", 10)
    config = load_config(write_config(guide=None))
    folder = preparation.prepare_corpus(config, CPU, QUIET).folder
    spoilt(folder / "positive.npy", "flipped")
    assert manifests.damage_in(folder) is None
    spoilt(folder / "positive.npy", "cut")
    assert "positive.npy of" in manifests.damage_in(folder)


def test_how_long_texts_take_is_said_before_they_are_embedded(write_config, intents, monkeypatch):
    """A plan stood for an hour at "embedding", and nobody could tell it from one that hangs."""
    monkeypatch.setattr(embedding, "TIMED_FROM", 20)
    lines = Console(file=io.StringIO(), width=200)
    config = load_config(write_config(data=classification(intents)))
    preparation.prepare_corpus(config, CPU, lines)
    said = lines.file.getvalue()
    assert re.search(r"\d+ texts to embed with \S+: about \d+ s\nembedding with the guide", said)


def test_the_time_is_that_of_all_texts(monkeypatch):
    """By a few of all lengths: the longest alone would make it many times what it is."""
    clock = [0.0]

    class Slow:
        """A tenth of a second for each letter."""

        default_prompt = ""

        def embed(self, texts, tokens):
            assert tokens == 512
            clock[0] += 0.1 * sum(map(len, texts))
            yield from ()

    monkeypatch.setattr(guide_module.time, "perf_counter", lambda: clock[0])
    lengths = np.arange(1, 1001)
    config = GuideConfig(name="g", batch_tokens=512)
    seconds = guide_module.seconds_to_embed(Slow(), config, np.arange(1000), lengths, lambda n: "x" * int(lengths[n]))
    assert seconds == pytest.approx(0.1 * lengths.sum())


@pytest.mark.parametrize("guide", [{"name": "./none"}, {"vectors": "none.parquet"}])
def test_a_missing_guide_is_told_before_rows_are_read(write_config, guide, monkeypatch):
    """The rows of a large set take many minutes, after which a slip of the pen would be told."""
    monkeypatch.setattr(preparation, "prepare_corpus", lambda *_: pytest.fail("rows were read"))
    with pytest.raises(UserError, match="none"):
        preparation.prepare(load_config(write_config(guide=guide)), CPU, QUIET)


def test_a_file_that_grows_while_it_is_read_is_told(write_config, tmp_path, monkeypatch):
    """Half of the old file and half of the new are no data set."""
    path = write_config()
    real = preparation.build_corpus

    def growing(*given):
        with (tmp_path / "rows.jsonl").open("a") as file:
            file.write(json.dumps({"anchor": "late", "positive": "row"}) + "\n")
        return real(*given)

    monkeypatch.setattr(preparation, "build_corpus", growing)
    ended = gist("prepare", path)
    assert ended.code == 2
    assert "changed while it was read" in ended.err
    monkeypatch.undo()
    assert gist("prepare", path).code == 0


def test_a_file_that_was_cut_and_written_again_is_told(write_config, tmp_path, monkeypatch):
    """Its content is the old one now, but not what was read: the short corpus would be kept for good."""
    path, rows = write_config(), tmp_path / "rows.jsonl"
    real = preparation.build_corpus

    def regenerated(*given):
        content = rows.read_bytes()
        rows.write_bytes(b"".join(content.splitlines(keepends=True)[:40]))
        yield from real(*given[:4], lambda: (rows.write_bytes(content), given[4]())[1])

    monkeypatch.setattr(preparation, "build_corpus", regenerated)
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
    monkeypatch.setattr(embedding, "load_guide", lambda *_: pytest.fail("the guide was loaded"))
    with pytest.raises(UserError, match=r'bad\.jsonl, row 2: "label" is not a string'):
        preparation.prepare_corpus(load_config(write_config(data=classification(path))), CPU, QUIET)


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
    plans = [batch_plan(config, preparation.prepare_corpus(config, CPU, QUIET)) for config in (plain, weighted)]
    assert [plan.steps_per_epoch for plan in plans] == [12, 16]


def test_a_resume_with_another_weight_is_refused(write_config, triplets, write_rows):
    """The corpus is the same, the batches are not: going on would train on other rows without a word."""
    source = {"source": "jsonl", "path": str(write_rows("rows.jsonl", triplets))}
    assert gist("train", write_config(data={"train": [source]}), "--set", "training.stop_at_step=2").code == 0
    ended = gist("train", write_config(data={"train": [{**source, "weight": 2.0}]}))
    assert ended.code == 2
    assert "data.train[0].weight" in ended.err


# Evaluation texts.


def excluding(path: Path) -> dict[str, object]:
    return {"train": [{"source": "jsonl", "path": str(path)}], "exclude_evaluation_texts": True}


def test_no_row_holds_an_evaluation_text(write_config, write_rows, write_pairs, triplets):
    """What the user is promised: as the texts are compared, none of them is trained on; and how much that cost is said."""
    texts = [triplets[i]["anchor"].upper() + " ?" for i in (0, 5, 50)] + [triplets[7]["positive"][0], triplets[11]["negative"][0]]
    section = write_pairs(texts)
    plain = write_config("plain", evaluation=section)
    before = preparation.prepare_corpus(load_config(plain), CPU, QUIET)
    path = write_config(evaluation=section, data=excluding(write_rows("rows.jsonl", triplets)))
    ended = gist("prepare", path)
    assert ended.code == 0, ended.err
    corpus = preparation.prepare_corpus(load_config(path), CPU, QUIET)
    evaluated = {normalized(text) for text in texts}
    trained = [{normalized(text) for text in c.texts()} for c in (corpus, before)]
    assert not trained[0] & evaluated
    assert trained[1] >= evaluated
    assert 0 < corpus.excluded_rows == 96 - corpus.row_count
    assert f"left out: {corpus.excluded_texts} texts" in ended.err
    assert f"{corpus.excluded_rows} rows" in ended.err
    assert "left out" not in gist("prepare", plain).err


def test_another_evaluation_file_is_another_corpus(write_config, write_rows, write_pairs, triplets):
    """The rows without the old test set, taken for those without the new one, would leak it; without exclusion nobody asks."""
    path = write_config(evaluation=write_pairs([triplets[0]["anchor"]]), data=excluding(write_rows("rows.jsonl", triplets)))
    off = ["data.exclude_evaluation_texts=false"]
    first, plain = (preparation.prepare_corpus(load_config(path, words), CPU, QUIET) for words in ([], off))
    write_pairs([triplets[1]["anchor"]])
    second, again = (preparation.prepare_corpus(load_config(path, words), CPU, QUIET) for words in ([], off))
    assert len({first.folder, second.folder, plain.folder}) == 3
    assert again.folder == plain.folder
    held = [{corpus.text(i) for i in corpus.anchor} for corpus in (first, second)]
    assert triplets[0]["anchor"] in held[1] - held[0]
    assert triplets[1]["anchor"] in held[0] - held[1]


def test_labelled_texts_of_a_test_set_are_not_mined(write_config, intents, write_pairs, quickstart_texts):
    """Neither embedded nor drawn: the guide's store has the vectors of the others only."""
    data = {**classification(intents), "exclude_evaluation_texts": True}
    config = load_config(write_config(data=data, evaluation=write_pairs([text.lower() for text in quickstart_texts[:9]])))
    corpus = preparation.prepare_corpus(config, CPU, QUIET)
    (folder,) = (preparation.cache_folder(config) / "guides").iterdir()
    assert len(GuideStore(folder)) == 80
    assert corpus.excluded_rows == 10  # one of them stands there twice
    assert not {text for row in rows_of(corpus) for text in row} & set(quickstart_texts[:9])


def test_a_broken_evaluation_file_is_refused_first(write_config, write_rows, triplets):
    """It decides which rows there are."""
    section = {"tasks": [{"type": "sts", "name": "s", "path": "nowhere.tsv"}]}
    ended = gist("prepare", write_config(data=excluding(write_rows("rows.jsonl", triplets)), evaluation=section))
    assert ended.code == 2
    assert "nowhere.tsv" in ended.err


def test_a_training_says_what_leaks(write_config, write_pairs, triplets, tmp_path):
    """Said before hours of training and kept in run.json, from which table and card are made; with exclusion nothing is left to
    say, and the checkpoint of the one is none of the other."""
    section = write_pairs([triplets[0]["anchor"].upper(), triplets[1]["anchor"], "no training text"])
    words = ("--set", "training.stop_at_step=2")
    ended = gist("train", write_config(evaluation=section), *words)
    assert ended.code == 0, ended.err
    assert "in training rows too: 2 of 8 texts of pairs (pairs); data.exclude_evaluation_texts: true" in ended.err
    (leak,) = json.loads((tmp_path / "runs" / "run" / "run.json").read_text())["leakage"]
    assert (leak["task"], leak["part"], leak["texts"], leak["shared"]) == ("pairs", "pairs", 8, 2)
    assert leak["rows"] >= 2

    exclude = ("--set", "data.exclude_evaluation_texts=true")
    ended = gist("train", write_config(evaluation=section), *words, *exclude)
    assert ended.code == 2
    assert "data.train" in ended.err
    assert "evaluation.tasks" in ended.err
    ended = gist("train", write_config("clean", evaluation=section), *words, *exclude)
    assert ended.code == 0, ended.err
    assert "in training rows too" not in ended.err
    (leak,) = json.loads((tmp_path / "runs" / "clean" / "run.json").read_text())["leakage"]
    assert (leak["shared"], leak["rows"]) == (0, 0)
    assert gist("train", write_config("bare"), *words).code == 0
    assert json.loads((tmp_path / "runs" / "bare" / "run.json").read_text())["leakage"] == []


def test_a_resume_over_other_excluded_texts_is_refused(write_config, write_rows, write_pairs, triplets):
    """The rows changed under the run, although no source did; a change that leaves the same rows is none."""
    path = write_config(evaluation=write_pairs([triplets[0]["anchor"]]), data=excluding(write_rows("rows.jsonl", triplets)))
    assert gist("train", path, "--set", "training.stop_at_step=2").code == 0
    write_pairs([triplets[0]["anchor"] + "!", "one more that nobody trains on"])
    ended = gist("train", path, "--set", "training.stop_at_step=3")
    assert ended.code == 0, ended.err
    assert "resuming from step 2" in ended.err
    write_pairs([triplets[1]["anchor"]])
    ended = gist("train", path, "--set", "training.stop_at_step=4")
    assert ended.code == 2
    assert "evaluation.tasks, whose texts data.exclude_evaluation_texts leaves out" in ended.err


def test_other_rows_are_refused_before_the_guide_works(write_config, write_rows, triplets):
    """Hours of a large guide lay before the message, which spoke of the YAML, and nothing in the YAML had changed."""
    source = {"source": "jsonl", "path": str(write_rows("rows.jsonl", triplets))}
    path = write_config(data={"train": [source]})
    assert gist("train", path, "--set", "training.stop_at_step=2").code == 0
    write_rows("rows.jsonl", [*triplets, {"anchor": "nobody has", "positive": "embedded this", "task": "a"}])
    ended = gist("train", path)
    assert ended.code == 2
    assert "a file that it reads has changed" in ended.err
    assert "bring back the file as it was" in ended.err
    assert "embedding with the guide" not in ended.err
