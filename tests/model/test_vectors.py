"""Vectors from elsewhere as the guide: they mask as the model that made them does, and what is wrong with them is said."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.running import gist, metrics

from gist_train.config.errors import UserError
from gist_train.config.models import GuideConfig, GuideVectorsConfig
from gist_train.data.corpus import text_hashes
from gist_train.model.loading import load_guide
from gist_train.model.vectors import vector_store

ROWS = [{"anchor": f"question {i}", "positive": f"the answer {i}", "negative": f"no answer {i}"} for i in range(16)]
TEXTS = [text for row in ROWS for text in row.values()]


@pytest.fixture
def vectors(make_model) -> tuple[str, np.ndarray]:
    """A guide, and its embeddings of TEXTS, not of length 1."""
    folder = str(make_model(width=48, cased=True, vocabulary=300, seed=1))
    return folder, 3 * load_guide(GuideConfig(name=folder)).encode(TEXTS)


def parquet(path, texts, vectors, names=("text", "embedding")):
    lists = pa.array([list(map(float, one)) for one in vectors], pa.list_(pa.float32()))
    pq.write_table(pa.table([pa.array(texts), lists], names=list(names)), path)
    return str(path)


def beside(path, texts, vectors):
    path.with_suffix(".jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    np.save(path, vectors)
    return str(path)


@pytest.mark.usefixtures("on_cpu")
def test_they_train_as_the_guide_that_made_them(vectors, tmp_path, write_config, write_rows):
    """An API's model must be as good a guide as a local one: the losses are the same, whatever the file's form."""
    folder, made = vectors
    shuffled = np.random.default_rng(0).permutation(len(TEXTS))
    texts = [TEXTS[i] for i in shuffled]
    guides = {
        "model": {"name": folder, "dtype": "float32"},
        "parquet": {"vectors": parquet(tmp_path / "v.parquet", texts, made[shuffled]), "dtype": "float32"},
        "npy": {"vectors": beside(tmp_path / "w.npy", texts, made[shuffled]), "dtype": "float32"},
    }
    source = {"source": "jsonl", "path": str(write_rows("rows.jsonl", ROWS))}
    losses = {}
    for name, guide in guides.items():
        config = write_config(name, guide=guide, data={"train": [source]}, training={"batch_size": 8, "max_steps": 3})
        planned = gist("plan", config, "--json")
        assert planned.code == 0, planned.err
        ended = gist("train", config)
        assert ended.code == 0, ended.err
        losses[name] = [row["loss"] for row in metrics(tmp_path / "runs" / name)]
        assert (tmp_path / "runs" / name).is_dir()
        exported = gist("export", str(tmp_path / "runs" / name), "--to", str(tmp_path / name))
        assert exported.code == 0, exported.err
    assert len(losses["model"]) == 3
    assert losses["parquet"] == pytest.approx(losses["model"], rel=1e-6)
    assert losses["npy"] == losses["parquet"]
    assert "a guide whose vectors are in" in (tmp_path / "npy" / "README.md").read_text()
    # With half of the vectors lost, the losses are others: the guide is what is compared above.
    other = {"vectors": beside(tmp_path / "x.npy", texts, np.roll(made, 1, axis=0)[shuffled]), "dtype": "float32"}
    config = write_config("other", guide=other, data={"train": [source]}, training={"batch_size": 8, "max_steps": 3})
    assert gist("train", config).code == 0
    assert [row["loss"] for row in metrics(tmp_path / "runs" / "other")] != pytest.approx(losses["model"], rel=1e-6)


@pytest.mark.parametrize("command", ["plan", "train"])
def test_texts_without_a_vector_are_counted_and_listed(vectors, tmp_path, write_config, write_rows, command):
    """Left to itself, such a text would be a candidate that nobody judged."""
    guide = {"vectors": parquet(tmp_path / "v.parquet", TEXTS[3:], vectors[1][3:])}
    source = {"source": "jsonl", "path": str(write_rows("rows.jsonl", ROWS))}
    ended = gist(command, write_config(guide=guide, data={"train": [source]}))
    assert ended.code == 2
    assert 'no vector for 3 of 48 texts: "question 0", "the answer 0", "no answer 0"' in ended.err
    (listed,) = (tmp_path / "runs" / ".cache" / "guides").glob("*/missing.jsonl")
    assert sorted(json.loads(line)["text"] for line in listed.read_text().splitlines()) == sorted(TEXTS[:3])
    assert not (tmp_path / "runs" / "run").exists()


def test_the_store_holds_them_at_length_1(vectors, tmp_path):
    """Cosine similarity is asked of them; a column of another name is found where the config names it."""
    columns = {"text": "input", "vector": "vec"}
    path = parquet(tmp_path / "v.parquet", TEXTS, vectors[1], columns.values())
    config = GuideVectorsConfig(vectors=path, columns=columns, dtype="float32")
    store = vector_store(tmp_path, config, "guide")
    read = store.read(store.positions(text_hashes(TEXTS)))
    np.testing.assert_allclose(read, vectors[1] / np.linalg.norm(vectors[1], axis=1, keepdims=True), rtol=0, atol=1e-7)
    assert vector_store(tmp_path, config, "guide").folder == store.folder
    parquet(tmp_path / "v.parquet", TEXTS, vectors[1] + 1, columns.values())
    assert vector_store(tmp_path, config, "guide").folder != store.folder


def broken(tmp_path, kind):
    good = np.random.default_rng(0).normal(size=(2, 4)).astype(np.float32)
    path = tmp_path / "v.npy"
    match kind:
        case "gone":
            return str(tmp_path / "none.parquet")
        case "ending":
            return str(tmp_path / "v.bin")
        case "no texts":
            np.save(path, good)
        case "too few texts":
            beside(path, ["a"], good)
        case "zero":
            beside(path, ["a", "b"], good * [[1], [0]])
        case "nan":
            beside(path, ["a", "b"], good * [[1], [np.nan]])
        case "shape":
            beside(path, ["a", "b"], good[0])
        case "no array":
            beside(path, ["a", "b"], good)
            path.write_bytes(b"not numpy")
        case "two for one":
            beside(path, ["a", "b", "a"], np.concatenate([good, good[1:]]))
        case "empty text":
            beside(path, ["a", " "], good)
        case "unlike":
            return parquet(tmp_path / "v.parquet", ["a", "b"], [good[0], good[1][:3]])
        case "column":
            return parquet(tmp_path / "v.parquet", ["a", "b"], good, ("text", "vec"))
        case "text column":
            return parquet(tmp_path / "v.parquet", ["a", "b"], good, ("words", "embedding"))
        case "no list":
            pq.write_table(pa.table({"text": ["a"], "embedding": ["0.5"]}), tmp_path / "v.parquet")
            return str(tmp_path / "v.parquet")
        case "no parquet":
            (tmp_path / "v.parquet").write_text("text,embedding")
            return str(tmp_path / "v.parquet")
    return str(path)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("gone", "which is not there"),
        ("ending", "ends in .parquet or .npy"),
        ("no texts", "v.jsonl"),
        ("too few texts", "2 vectors, and 1 texts in v.jsonl"),
        ("zero", 'a vector of length 0.0 for "b"'),
        ("nan", 'a vector of length nan for "b"'),
        ("shape", "shape (4,)"),
        ("no array", "v.npy cannot be read"),
        ("two for one", "two vectors for one text that differ, number 1 and number 3"),
        ("empty text", "row 2"),
        ("unlike", "vectors of 3 and of 4 numbers"),
        ("column", "guide.columns.vector"),
        ("text column", "no column for text"),
        ("no list", "lists of floating-point numbers"),
        ("no parquet", "Parquet"),
    ],
)
def test_broken_files_are_refused(tmp_path, kind, said):
    """A vector of no direction is alike to nothing, and masks nothing, without a word; nothing is left of a half-made store."""
    config = GuideVectorsConfig(vectors=broken(tmp_path, kind))
    with pytest.raises(UserError) as caught:
        vector_store(tmp_path / "cache", config, "guide")
    assert said in str(caught.value)
    assert list((tmp_path / "cache").rglob("*.bin")) == []
