"""Random input: what is read is right or refused in words, damage is never accepted, and numbers are finite.

A few draws each in the normal suite, the same each time; twenty times as many, new ones, under -m slow.
"""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from support.corpora import built, data_of
from torch.nn.functional import normalize

from gist_train.config.errors import Fault, UserError
from gist_train.config.loading import load_config, resolved_yaml
from gist_train.config.models import GuideVectorsConfig
from gist_train.config.schema import Config, DataConfig
from gist_train.data.batches import BatchPlan
from gist_train.data.corpus import text_hash
from gist_train.data.manifests import damage_in, seal, verified_manifest
from gist_train.data.rows import Row
from gist_train.data.sources import read_rows
from gist_train.model.filling import CHECKSUMS
from gist_train.model.guide import GuideStore
from gist_train.model.loss import guided_contrastive_loss
from gist_train.model.vectors import vector_store
from gist_train.run_folder import MANIFEST


def fuzzed(count: int, **drawn: st.SearchStrategy[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A test that calls the decorated check with `count` draws, and with twenty times as many where it is slow."""

    def decorate(check: Callable[..., None]) -> Callable[..., None]:
        @pytest.mark.parametrize("times", [1, pytest.param(20, marks=pytest.mark.slow)])
        def test(times: int) -> None:
            limits = settings(
                max_examples=count * times,
                derandomize=times == 1,
                deadline=None,
                database=None,
                phases=[Phase.generate, Phase.shrink],
                suppress_health_check=list(HealthCheck),
            )
            limits(given(**drawn)(check))()

        test.__doc__ = check.__doc__
        return test

    return decorate


def refusal(work: Callable[[], object]) -> str | None:
    """What the user is told where `work` is refused; None where it is not. Anything else that it raises is a fault of ours."""
    try:
        work()
    except (UserError, OSError) as error:
        return str(error)
    return None


TEXTS = st.text(st.characters(codec="utf-8"), max_size=12) | st.sampled_from(["", " ", "\ufeff", "\x00", "a,b", '"', "\t", "[1]"])
CELLS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
NAMES = st.sampled_from(["anchor", "positive", "negative", "query", "pos", "neg", "task", "label", "score", "text", ""]) | TEXTS
ROWS = st.lists(st.dictionaries(NAMES, CELLS, max_size=5), max_size=6)
CONTENTS = st.one_of(
    st.binary(max_size=60),
    ROWS.map(lambda rows: "".join(json.dumps(row) + "\n" for row in rows).encode()),
    ROWS.map(lambda rows: json.dumps(rows).encode()),
    st.lists(st.lists(TEXTS, max_size=4), max_size=5).map(lambda rows: "\n".join(map(",".join, rows)).encode()),
    st.just(b"anchor,positive\na,p\n"),
)


@fuzzed(
    60,
    kind=st.sampled_from(["jsonl", "csv", "parquet", "medi"]),
    suffix=st.sampled_from([".jsonl", ".json", ".csv", ".tsv", ".parquet", ".jsonl.gz", ""]),
    content=CONTENTS,
    places=st.lists(st.tuples(st.integers(0, 200), st.integers(0, 255)), max_size=3),
)
def test_a_file_is_rows_or_faults(kind, suffix, content, places):
    """Whatever a file of rows holds: rows with texts in them, faults, or one error that says what is wrong with the file."""
    spoilt = bytearray(content)
    for place, byte in places:
        if place < len(spoilt):
            spoilt[place] = byte
    with TemporaryDirectory() as folder:
        path = Path(folder) / f"file{suffix}"
        path.write_bytes(spoilt)
        data = DataConfig.model_validate({"train": [{"source": kind, "path": str(path)}]})
        rows = []
        told = refusal(lambda: rows.extend(read_rows(data.train[0], "data.train[0]")))
    assert told is None or "data.train[0]" in told
    for row in rows:
        assert row is None or isinstance(row, Row | Fault)
        if isinstance(row, Row):
            assert all(text.strip() for text in (row.anchor, *row.positives, *row.negatives))


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 10**9) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
PLAIN = {"name": "n", "model": {"name": "m"}, "data": {"train": [{"source": "jsonl", "path": "p"}]}}


@fuzzed(
    150,
    key=st.sampled_from(
        [*Config.model_fields, "data.train", "training.batch_size", "loss.margin", "guide.prompts", "model.layers"]
    ),
    value=VALUES,
)
def test_a_config_is_whole_or_refused(key, value):
    """Any value anywhere: a config that is written and read back the same, or faults that name their place."""
    given_config = json.loads(json.dumps(PLAIN))
    *sections, last = key.split(".")
    section = given_config
    for name in sections:
        section = section.setdefault(name, {})
    section[last] = value
    with TemporaryDirectory() as folder:
        path = Path(folder) / "c.yaml"
        path.write_text(yaml.safe_dump(given_config, allow_unicode=True), encoding="utf-8")
        if refusal(lambda: load_config(path)):
            return
        config = load_config(path)
        path.write_text(resolved_yaml(config), encoding="utf-8")
        assert load_config(path) == config


@fuzzed(60, tasks=st.lists(st.integers(0, 3), min_size=1, max_size=60), size=st.integers(1, 9), data=st.data())
def test_a_batch_plan_takes_each_row_once(tasks, size, data):
    """In an epoch, whole batches, the same whenever they are asked for; under "reference" of one task each."""
    rows, batching = len(tasks), data.draw(st.sampled_from(["reference", "task", "mixed"]))
    anchors = data.draw(st.lists(st.integers(0, 20), min_size=rows, max_size=rows))
    columns = {
        "task": np.array(tasks, np.int32),
        "anchor": np.array(anchors, np.int32),
        "positive": np.arange(rows, dtype=np.int32) + 30,
        "positive_offsets": np.arange(rows + 1),
        "batching": batching,
        "batch_size": size,
        "seed": data.draw(st.integers(0, 9)),
    }
    try:
        plan = BatchPlan(**columns)
    except ValueError:
        assert rows < size or batching == "reference"
        return
    steps = plan.steps_per_epoch
    for epoch in range(2):
        batches = [plan.batch(epoch * steps + step) for step in range(1, steps + 1)]
        assert np.array_equal(np.stack(batches), plan.epoch(epoch))
        taken = np.concatenate(batches)
        assert len(np.unique(taken)) == len(taken) == steps * size
        assert batching == "reference" or steps == rows // size
        assert batching != "reference" or all(len({tasks[row] for row in batch}) == 1 for batch in batches)
    step = data.draw(st.integers(1, 2 * steps))
    assert np.array_equal(BatchPlan(**columns).batch(step), plan.batch(step))


DAMAGE = {"place": st.floats(0, 1, exclude_max=True), "kind": st.sampled_from(["flip", "cut", "longer", "zeroes", "gone"])}


def spoil(path: Path, place: float, kind: str) -> bool:
    """Damages a file; whether anything changed."""
    content = bytearray(path.read_bytes())
    before = bytes(content)
    at = int(place * len(content))
    match kind:
        case "flip" if content:
            content[at] ^= 1 << (at % 8)
        case "cut":
            del content[at:]
        case "longer":
            content += b"\0"
        case "zeroes":
            content[at : at + 64] = bytes(len(content[at : at + 64]))
    if kind == "gone":
        path.unlink()
    else:
        path.write_bytes(content)
    if path.name == MANIFEST and bytes(content).rstrip() == before.rstrip():  # its last newline says nothing
        return kind == "gone"
    return kind == "gone" or bytes(content) != before


@fuzzed(60, number=st.integers(0, 3), **DAMAGE)
def test_no_damaged_checkpoint_is_taken(number, place, kind):
    """Any file of it, the manifest too, and any byte."""
    with TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "step"
        (checkpoint / "1_Pooling").mkdir(parents=True)
        for name, content in (("a.json", b"{}"), ("model.safetensors", bytes(range(256)) * 4), ("1_Pooling/config.json", b"[1]")):
            (checkpoint / name).write_bytes(content)
        seal(checkpoint, {"step": 7})
        files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
        changed = spoil(files[number], place, kind)
        told = refusal(lambda: verified_manifest(checkpoint))
    assert (told is not None) == changed
    assert told is None or str(checkpoint) in told


@pytest.fixture(scope="module", autouse=True)
def corpus(tmp_path_factory):
    """A sealed corpus, which the next test damages copies of."""
    folder = tmp_path_factory.mktemp("fuzzed")
    (folder / "rows.jsonl").write_text("".join(json.dumps({"anchor": f"a {i}", "positive": f"p {i}"}) + "\n" for i in range(9)))
    built(folder / "corpus", data_of(folder / "rows.jsonl"))
    CORPUS.append(folder / "corpus")


CORPUS: list[Path] = []


@fuzzed(40, number=st.integers(0, 99), **DAMAGE)
def test_no_damaged_corpus_is_taken(number, place, kind):
    """Any file and any byte of it: it is made anew."""
    with TemporaryDirectory() as folder:
        copy = Path(shutil.copytree(CORPUS[0], Path(folder) / "corpus"))
        files = sorted(path for path in copy.rglob("*") if path.is_file() and path.name != "manifest.json")
        changed = spoil(files[number % len(files)], place, kind)
        assert (damage_in(copy) is not None) == changed


@fuzzed(40, name=st.sampled_from(["embeddings.bin", CHECKSUMS, "hashes.bin"]), **DAMAGE)
def test_a_damaged_store_gives_no_other_vectors(name, place, kind):
    """What is not known to be whole is embedded again; no other vector comes out."""
    vectors = normalize(torch.randn(12, 8, generator=torch.Generator().manual_seed(0)), dim=1).numpy()
    texts = [f"text {i}" for i in range(12)]
    with TemporaryDirectory() as folder:
        np.save(Path(folder) / "guide.npy", vectors)
        (Path(folder) / "guide.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        config = GuideVectorsConfig(vectors=str(Path(folder) / "guide.npy"), dtype="float32")
        kept_in = vector_store(Path(folder) / "cache", config, "guide").folder
        spoil(kept_in / name, place, kind)
        read = []

        def read_whole() -> None:
            store = GuideStore(kept_in)
            positions = store.positions(np.frombuffer(b"".join(map(text_hash, texts)), np.uint8).reshape(-1, 16))
            kept = (positions >= 0) & ~store.damaged(positions)
            read.extend(zip(np.flatnonzero(kept).tolist(), store.read(positions[kept]), strict=True))

        told = refusal(read_whole)
    assert told is None or str(kept_in) in told
    for index, vector in read:
        assert np.allclose(vector, vectors[index], atol=1e-6)


SIZES = {"rows": st.integers(1, 6), "negatives": st.integers(0, 5), "width": st.integers(1, 5)}


@fuzzed(150, seed=st.integers(0, 10**6), scale=st.sampled_from([0.0, 1e-30, 1.0, 1e4, 1e18]), data=st.data(), **SIZES)
def test_the_loss_is_finite(seed, scale, data, rows, negatives, width):
    """Any shapes, masks and options, vectors of length 0 and of 10**18: a finite loss and gradient of each kind of candidate."""
    draw = torch.Generator().manual_seed(seed)

    def vectors(count):
        return torch.randn(count, width, generator=draw) * scale

    students = [vectors(count).requires_grad_() for count in (rows, rows, negatives)]
    guides = [vectors(count) for count in (rows, rows, negatives)] if data.draw(st.booleans()) else [None] * 3
    options = {
        "temperature": data.draw(st.sampled_from([0.001, 0.01, 1.0])),
        "margin": data.draw(st.sampled_from([-2.0, -0.1, 0.0, 0.1, 2.0])),
        "margin_strategy": data.draw(st.sampled_from(["absolute", "relative"])),
        "contrast_anchors": data.draw(st.booleans()),
        "contrast_positives": data.draw(st.booleans()),
        "block_size": data.draw(st.sampled_from([None, 1, 3])),
        "dimensions": data.draw(st.sampled_from([None, [width], [1, width][: 1 + (width > 1)]])),
    }
    if data.draw(st.booleans()):
        ids = [torch.randint(0, 4, (count,), generator=draw) for count in (rows, rows, negatives)]
        options |= dict(zip(("anchor_ids", "positive_ids", "negative_ids"), ids, strict=True))
    named = dict(zip(("guide_anchor", "guide_positive", "guide_negative"), guides, strict=True))
    out = guided_contrastive_loss(*students, **named, **options)
    out.loss.backward()
    assert math.isfinite(out.loss.item())
    assert out.loss.item() >= -1e-4
    for student in students:
        assert student.grad is None or torch.isfinite(student.grad).all()
