"""benchmarks/guide.py, on a few rows: both sides give the same vectors, and counts and ratios are of what they say."""

import gzip
import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from rich.console import Console


@pytest.fixture
def benchmark() -> ModuleType:
    """The script as a module."""
    return importlib.import_module("benchmarks.guide")


@pytest.fixture
def data(tmp_path: Path, quickstart_texts: Sequence[str]) -> Path:
    """192 rows in MEDI's form; each two neighbours share their positive, and all rows have one of four negatives."""
    texts = list(dict.fromkeys(quickstart_texts))
    rows = [
        {
            "query": ["Find:", texts[i]],
            "pos": ["", texts[200 + i // 2]],
            "neg": ["", texts[400 + i % 4]],
            "task_name": "abc"[i // 64],
        }
        for i in range(192)
    ]
    (tmp_path / "medi").mkdir()
    with gzip.open(tmp_path / "medi" / "medi_like_train.json.gz", "wt", encoding="utf-8") as stream:
        json.dump(rows, stream)
    return tmp_path


def words(data: Path, model: Path, *more: str) -> list[str]:
    return ["--data", str(data), "--model", str(model), "--texts", "150", "--pairs", "2", "--device", "cpu", *more]


def test_both_sides_embed_the_same_texts(benchmark, data, make_model, capsys, monkeypatch):
    """A ratio of two different works says nothing. The other side must read a text as often as it stands in the rows, or the
    share of duplicates is made up; and --json is one object alone."""
    read: list[list[str]] = []
    encode = benchmark.SentenceTransformer.encode

    def counted(self, texts, **given):
        read.append(list(texts))
        return encode(self, texts, **given)

    monkeypatch.setattr(benchmark.SentenceTransformer, "encode", counted)
    assert benchmark.main(words(data, make_model(), "--json")) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["texts"], found["duplication_of_the_file"]) == (150, 3 * 192 / (192 + 96 + 4))
    assert found["tokens"] > 3 * 150
    assert found["largest_difference"] < 1e-5
    for name, of in (("ratio_of_a_text", "texts"), ("ratio_with_duplicates", "columns")):
        ratio = found[name]
        assert 0 < ratio["min"] <= ratio["median"] <= ratio["max"]
        assert ratio["min"] <= found["seconds"][of] / found["seconds"]["ours"] * 1.5
    assert len(read) == 1 + 3 + 2 * 4
    rows = json.loads(gzip.decompress((data / "medi" / "medi_like_train.json.gz").read_bytes()))
    for once, *columns in (read[4:8], read[8:]):
        assert len(set(once)) == len(once) == 150
        expected = [[row[key][1] for row in rows if row[key][1] in once] for key in ("query", "pos", "neg")]
        assert columns == expected
        assert found["texts_with_duplicates"] == sum(map(len, expected)) == pytest.approx(150 * found["duplication"])
        assert found["duplication"] > 1.2


def test_other_vectors_are_told(benchmark, data, make_model, monkeypatch, capsys):
    """A side that gives up on correctness would win every race."""
    read = benchmark.GuideStore.read
    monkeypatch.setattr(benchmark.GuideStore, "read", lambda self, positions: read(self, positions) + np.float32(1e-3))
    assert benchmark.main(words(data, make_model())) == 1
    assert "vectors differ by up to 1.0e-03" in capsys.readouterr().err


def test_the_table(benchmark, capsys):
    """What stands in it is what was measured: the texts with duplicates beside their ratio."""
    ratio = {"median": 1.25, "min": 1.0, "max": 1.5}
    benchmark.show(
        {
            "machine": {"device": "a CPU", "cores": 2, "threads": 2, "versions": {"torch": "2"}},
            "texts": 196,
            "texts_with_duplicates": 384,
            "duplication": 384 / 196,
            "duplication_of_the_file": 1.33,
            "tokens": 3000,
            "pairs": 3,
            "seconds": {"ours": 2.0, "texts": 2.5, "columns": 5.0},
            "theirs_batch_size": 32,
            "ratio_of_a_text": ratio,
            "ratio_with_duplicates": {"median": 2.5, "min": 2.0, "max": 3.0},
            "largest_difference": 2e-7,
            "equal": True,
        },
        Console(width=110),
    )
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.replace("│", " ").splitlines()]
    assert "each text once 196 2.00 2.50 1.25 1.00 - 1.50" in lines
    assert "with duplicates 384 2.00 5.00 2.50 2.00 - 3.00" in lines


def test_missing_data_are_told(benchmark, tmp_path, capsys):
    """No traceback for a folder that is not there."""
    assert benchmark.main(["--data", str(tmp_path / "nowhere")]) == 2
    assert "medi_like_train.json.gz" in capsys.readouterr().err
