"""Every file in configs/ loads as it stands, and is planned with stand-ins from this machine."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from support.running import gist

from gist_train.config.loading import load_config
from gist_train.config.sources import ClassificationSource, HubSource

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
SISTERS = {
    "gist-small": ("BAAI/bge-small-en-v1.5", "cls", 16, 40, 102_000),
    "gist-base": ("BAAI/bge-base-en-v1.5", "cls", 32, 80, 103_500),
    "gist-large": ("BAAI/bge-large-en-v1.5", "cls", 16, 40, 171_000),
    "gist-all-minilm-l6-v2": ("sentence-transformers/all-MiniLM-L6-v2", "mean", 16, 40, 102_000),
}
"""RECIPE.md: base, pooling, batch size, epochs, the card's step."""
CLASSIFICATION = (
    "amazon_counterfactual",
    "amazon_reviews_multi",
    "amazon_massive_intent",
    "amazon_massive_scenario",
    "banking77",
    "emotion",
    "imdb",
    "mtop_domain",
    "mtop_intent",
    "toxic_conversations_50k",
    "tweet_sentiment_extraction",
)


def test_all_configs_are_found():
    """A pattern that misses a folder would check nothing and pass."""
    assert {path.stem for path in CONFIGS} == {*SISTERS, "distilled-small", "gist-small-from-sources", "own-data", "quickstart"}
    assert len(CONFIGS) == 8


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_is_planned(path, tmp_path, monkeypatch, make_model, triplets):
    """What a recipe says is accepted, source by source, up to the number of its steps. Only models and data are stood in for:
    of each source the same kind, with the columns it asks for."""
    config = load_config(path)
    monkeypatch.chdir(tmp_path)
    words: list[object] = ["--set", f"output_dir={tmp_path / 'runs'}", "--set", f"model.name={make_model(vocabulary=500)}"]
    words += ["--set", "model.revision=null", "--set", "model.max_length=64", "--set", "model.layers=null"]
    for where in config.guides:
        words += ["--set", f"{where}.name={make_model(width=24, layers=1, seed=1)}", "--set", f"{where}.max_length=64"]
        words += ["--set", f"{where}.revision=null"]
    words += ["--set", "evaluation.tasks=[]"]
    rows = 0
    for index, source in enumerate(config.data.train):
        stand_in, count = _stand_in(source, tmp_path / f"source{index}", triplets)
        rows += count
        words += ["--set", f"data.train[{index}].path={json.dumps(str(stand_in))}"]
    ended = gist("plan", path, "--json", *words)
    assert ended.code == 0, ended.err
    found = json.loads(ended.out)
    assert found["rows"] == rows
    assert found["total_steps"] == found["steps_per_epoch"] * config.training.epochs > 0
    tasks = {source.task for source in config.data.train if getattr(source, "task", None)}
    assert tasks <= set(found["tasks"])


def _stand_in(source: Any, folder: Path, triplets: list[dict[str, Any]]) -> tuple[Path, int]:
    """A file or folder of the source's kind, with some 96 rows, and how many these are."""
    folder.mkdir()
    if isinstance(source, ClassificationSource):
        texts = {source.columns.text: [], source.columns.label: []}
        for number, row in enumerate(triplets):
            texts[source.columns.text].append(row["anchor"])
            texts[source.columns.label].append(number % 4)
        pq.write_table(pa.table(texts), folder / "train-00000-of-00001.parquet")
        if source.subset is not None:  # as the hub has it: in the card's head
            head = {"configs": [{"config_name": source.subset, "data_files": "*.parquet"}]}
            (folder / "README.md").write_text(f"---\n{yaml.safe_dump(head)}---\n")
        return folder, 96
    flat = [
        {"query": row["anchor"], "pos": row["positive"][0], "neg": (row["negative"] or ["none of it"])[0], "task_name": "t"}
        for row in triplets
    ]
    if isinstance(source, HubSource):
        instructions = {f"{key}_instruct": ["Represent: "] * 96 for key in ("query", "pos", "neg")}
        columns = {key: [row[key] for row in flat] for key in flat[0]} | instructions
        pq.write_table(pa.table(columns), folder / "train-00000-of-00001.parquet")
        return folder, 96
    if source.source == "medi":
        records = [{**{key: ["Represent: ", row[key]] for key in ("query", "pos", "neg")}, "task_name": "t"} for row in flat]
        (folder / "medi.json").write_text(json.dumps(records))
        return folder / "medi.json", 96
    given = source.columns
    names = ((given and given.anchor) or "anchor", (given and given.positive) or "positive")
    lines = [json.dumps({names[0]: row["query"], names[1]: row["pos"]}) for row in flat]
    (folder / "rows.jsonl").write_text("\n".join(lines))
    return folder / "rows.jsonl", 96


@pytest.mark.parametrize("name", SISTERS)
def test_recipes_say_what_the_original_was_trained_with(name):
    """A figure that drifts in a recipe reproduces something else."""
    config = load_config(ROOT / "configs" / f"{name}.yaml")
    training, loss = config.training, config.loss
    found = (config.model.name, config.model.pooling, training.batch_size, training.epochs, config.selection.around)
    assert found == SISTERS[name]
    assert (config.guide.name, config.guide.pooling, config.guide.dtype) == ("WhereIsAI/UAE-Large-V1", "mean", "float32")
    assert (config.optimizer.lr, config.schedule.warmup_ratio, loss.temperature) == (5e-6, 0.1, 0.01)
    assert (training.seed, training.grad_clip, config.optimizer.weight_decay) == (42, 1.0, 0.0)
    assert config.data.batching == "reference"
    (source,) = config.data.train
    assert (source.path, source.revision) == (
        "avsolatorio/medi-data-mteb_avs_triplets",
        "238a0499b6e6b690cc64ea56fde8461daa8341bb",
    )


def test_gist_small_is_the_designs():
    """The note that the card and the released weights disagree stands beside the step that the card says."""
    config = load_config(ROOT / "configs" / "gist-small.yaml")
    assert (config.model.max_length, config.guide.max_length, config.training.precision) == (512, 512, "bf16")
    assert (config.training.stop_at_step, config.selection.window) == (107_000, 5_000)
    assert "302,500" in config.selection.note
    assert "commit-info.json on the hub page avsolatorio/GIST-small-Embedding-v0" in " ".join(config.selection.note.split())


def test_the_eleven_classification_sets():
    """Each pinned, in English, under the task name of the published triplets, mined as they were."""
    config = load_config(ROOT / "configs" / "gist-small-from-sources.yaml")
    sets = [source for source in config.data.train if isinstance(source, ClassificationSource)]
    assert sorted(source.task for source in sets) == sorted(f"mteb-{name}-avs_triplets" for name in CLASSIFICATION)
    assert all(len(source.revision or "") == 40 for source in sets)
    assert all(source.path.startswith("mteb/") for source in sets)
    assert {(s.mining.seed, s.mining.positives, s.mining.temperature, s.mining.negatives) for s in sets} == {
        (1029, 100, 0.05, "uniform")
    }


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_recipes_header_says_how_to_run_it(path):
    """A file that is opened first must say what to type."""
    header = path.read_text(encoding="utf-8").split("\n\n")[0]
    assert all(line.startswith("#") for line in header.splitlines())
    assert "Run " in header
    assert "gist-train " in header
    assert "Cost " in header
