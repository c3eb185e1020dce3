"""What makes two corpora the same, and what a command remembers of a file."""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.corpora import PROMPTS, ROWS, data_of

from gist_train.config.schema import DataConfig
from gist_train.config.sources import (
    OUTSIDE_CORPUS,
    ClassificationSource,
    Columns,
    CsvSource,
    HubSource,
    JsonlSource,
    MediSource,
    MiningConfig,
    ParquetSource,
    Prompts,
)
from gist_train.data import fingerprints
from gist_train.data.fingerprints import ContentHashes, corpus_fingerprint


def print_of(data: DataConfig, remembered: Path | None = None) -> str:
    return corpus_fingerprint(data, ContentHashes(remembered or Path("/nonexistent/hashes.json")), {})


def test_fingerprint_is_of_the_content_and_not_of_the_place(tmp_path, write_rows):
    """A file that was moved or touched is the same corpus, and another run's work on it counts."""
    path = write_rows("a.jsonl", ROWS)
    first = print_of(data_of(path))
    other = tmp_path / "elsewhere"
    other.mkdir()
    shutil.move(path, other / "a.jsonl")
    (other / "a.jsonl").touch()
    assert print_of(data_of(other / "a.jsonl")) == first
    assert print_of(data_of(other / "*.jsonl")) == first
    assert print_of(data_of(other / "a.jsonl", batching="mixed")) == first  # it shapes batches, not rows
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
        "max_rows": one(max_rows=3),
        "max_rows_per_task": one(max_rows_per_task=3),
    }


def test_fingerprint_knows_every_setting_that_shapes_rows(write_rows):
    """A setting that is forgotten here gives a run the rows of another one, without a word."""
    path = write_rows("a.jsonl", ROWS)
    prints = [print_of(data_of(path)), *map(print_of, variations(path).values())]
    assert len(set(prints)) == len(prints) == 11


def test_fingerprint_knows_content_order_and_name(write_rows):
    """One byte, the order of sources, and the name, which is the task of rows without one."""
    a, b = write_rows("a.jsonl", ROWS), write_rows("b.jsonl", ROWS[:3])
    prints = [print_of(data_of(*paths)) for paths in ((a,), (b,), (a, b), (b, a))]
    shutil.copy(a, a.with_name("c.jsonl"))
    prints.append(print_of(data_of(a.with_name("c.jsonl"))))
    write_rows("a.jsonl", [{**ROWS[0], "anchor": "A"}, *ROWS[1:]])
    prints.append(print_of(data_of(a)))
    assert len(set(prints)) == len(prints)


def test_the_model_of_mining_is_part_of_the_corpus(tmp_path, write_rows):
    """Triplets mined with another model are other rows; how they are masked is not."""
    path = str(write_rows("labels.jsonl", [{"text": "a", "label": 1}]))

    def found(store: str, **settings: Any) -> str:
        data = DataConfig(train=[ClassificationSource(path=path, **settings)])
        return corpus_fingerprint(data, ContentHashes(tmp_path / "no" / "hashes.json"), {0: store})

    assert found("s") != found("t")
    assert found("s", mask_same_label=True) == found("s")


CHANGED = {
    "task": "other",
    "max_rows": 7,
    "max_rows_per_task": 7,
    "columns": {"anchor": "q"},
    "prompts": {"anchor": "q: "},
    "subset": "en",
    "split": "dev",
    "where": "label == 1",
    "delimiter": ";",
    "header": False,
    "mining": {"seed": 1},
    "scores": "texts",
}
MINING = {"seed": 1, "positives": 5, "temperature": 0.1, "negatives": "least_similar", "negative_pool": 5}


@pytest.mark.parametrize("kind", [JsonlSource, CsvSource, ParquetSource, MediSource, HubSource, ClassificationSource])
def test_every_key_of_a_source_counts_but_those_named_here(tmp_path, kind):
    """A key that is added later and forgotten here would give a run the rows of another one, without a word."""
    path = tmp_path / ("folder" if kind is HubSource else "data.jsonl")
    (tmp_path / "folder").mkdir()
    (path / "a.jsonl" if kind is HubSource else path).write_text("{}")

    def found(**settings: Any) -> str:
        data = DataConfig.model_validate(
            {"train": [{"source": kind.model_fields["source"].default, "path": str(path), **settings}]}
        )
        return corpus_fingerprint(data, ContentHashes(tmp_path / "no" / "hashes.json"), {0: "s"})

    keys = set(kind.model_fields) - {"source", "path", "revision", "streaming"} - OUTSIDE_CORPUS
    assert keys <= CHANGED.keys()
    changed = {**CHANGED, "columns": {"text": "t"}} if kind is ClassificationSource else CHANGED
    prints = [found(), *(found(**{key: changed[key]}) for key in keys)]
    assert len(set(prints)) == len(keys) + 1
    for key, other in {"weight": 2.0, "in_batch_negatives": False}.items():
        assert found(**{key: other}) == prints[0]
    if kind is ClassificationSource:
        assert MINING.keys() == MiningConfig.model_fields.keys() - {"model"}
        assert len({found(mining={key: value}) for key, value in MINING.items()} | {prints[0]}) == 6


def test_files_are_hashed_once_until_they_change(tmp_path, monkeypatch):
    """A data set of gigabytes must not be read by every command; a changed one must be, or its old rows are trained on."""
    read: list[Path] = []
    real = fingerprints.content_hash
    monkeypatch.setattr(fingerprints, "content_hash", lambda path: (read.append(path), real(path))[1])
    file, remembered = tmp_path / "data", tmp_path / "cache" / "hashes.json"

    def hashed() -> str:
        hashes = ContentHashes(remembered)
        found = hashes.of(file)
        hashes.save()
        assert found == real(file)
        return found

    file.write_bytes(b"one")
    os.utime(file, (1, 1))
    monkeypatch.setattr(fingerprints, "SETTLED_SECONDS", -1.0)  # the time of its last change can't be set
    first = hashed()
    assert hashed() == first
    assert len(read) == 1
    file.write_bytes(b"two")  # as long as before
    os.utime(file, (1, 1))
    assert hashed() != first
    remembered.write_text("no JSON")
    assert hashed() == real(file)
    assert len(read) == 3


def test_a_file_that_was_just_written_is_not_remembered(tmp_path):
    """Within one tick of the clock it may be written again, and would look the same."""
    file, remembered = tmp_path / "data", tmp_path / "hashes.json"
    file.write_bytes(b"one")
    hashes = ContentHashes(remembered)
    hashes.of(file)
    hashes.save()
    assert not remembered.exists()


def test_without_exclusion_a_fingerprint_is_what_it_was(write_rows):
    """One more entry, and every corpus that stands in a cache would be built again."""
    path = write_rows("a.jsonl", ROWS)
    data = data_of(path)
    settings = data.train[0].model_dump(exclude={"path", "revision", "streaming", *OUTSIDE_CORPUS})
    told = [fingerprints.FORMAT, fingerprints.READERS, False, "fail", [settings, [("a.jsonl", fingerprints.content_hash(path))]]]
    assert print_of(data) == hashlib.blake2b(json.dumps(told, sort_keys=True).encode(), digest_size=16).hexdigest()


def test_excluded_texts_are_part_of_the_fingerprint(tmp_path, write_rows, monkeypatch):
    """Another evaluation file, or another rule of what is the same, leaves other rows; the order of its lines leaves the same."""
    path = str(write_rows("a.jsonl", ROWS))

    def found(*texts: str, **settings: Any) -> str:
        data = DataConfig(train=[JsonlSource(path=path, **settings)])
        hashes = [text.encode().ljust(16) for text in texts]
        return corpus_fingerprint(data, ContentHashes(tmp_path / "hashes.json"), {}, hashes)

    prints = [
        print_of(data_of(Path(path))),
        found("a"),
        found("b"),
        found("a", "b"),
        found("a", in_batch_negatives=False),
    ]
    assert len(set(prints)) == len(prints)
    assert found("b", "a") == prints[3]
    monkeypatch.setattr(fingerprints, "NORMALIZATION", -1)
    assert found("a") not in prints
