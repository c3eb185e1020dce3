"""Every way to train, on one, two and three ranks: the same losses, whatever the number. One launch a number trains them all."""

import json

import numpy as np
import pytest
from support.running import QUIET, in_processes

from gist_train.config.loading import load_config
from gist_train.run_folder import Run
from gist_train.training_run import train

pytestmark = pytest.mark.usefixtures("on_cpu")

STEPS, LONG = 6, 20
WAYS = {
    "many_negatives-store": {},
    "pairs": {"negatives": 0},
    "triplets-hard": {"negatives": 1, "loss": {"negatives": "hard"}},
    "relative_margin-blocks": {"loss": {"margin": 0.05, "margin_strategy": "relative", "block_size": 5}},
    "absolute_margin-one_switch": {"loss": {"margin": -0.05, "contrast_anchors": False}},
    "no_blocks_of_one_kind-self": {"guide": "self", "loss": {"contrast_positives": False, "contrast_anchors": False}},
    "no_guide-duplicates_stay": {"guide": None, "loss": {"mask_duplicates": False}},
    "dimensions-self": {"guide": "self", "loss": {"dimensions": [32, 8], "dimension_weights": [1.0, 2.0], "block_size": 7}},
    "soft_mask-hardness-blocks": {"loss": {"mask": "soft", "softness": 0.1, "hardness": 3.0, "block_size": 5}},
    "two_guides": {"guides": 2, "loss": {"mask": "soft"}, "distillation": {"weight": 0.5, "regression": 0.2}},
    "votes-blocks": {"guides": 2, "loss": {"votes": "all", "block_size": 5}},
    "similar": {"data": {"batching": "similar", "similarity_depth": 2}, "training": {"batch_size": 8}},
    "distilled": {"distillation": {"weight": 2.0}},
    "distilled_alone-cached": {
        "loss": {"weight": 0.0},
        "distillation": {"weight": 1.0, "guide_temperature": 0.02},
        "training": {"max_tokens_per_forward": 512, "batch_size": 48},
    },
    "scores": {"scores": "texts", "distillation": {"scores": 0.7}},
    "scored_pairs-dimensions": {"scores": "pairs", "distillation": {"scores": 0.7}, "loss": {"dimensions": [32, 8]}},
    "adapters-cached": {
        "model": {"lora": {"rank": 4}},
        "training": {"max_tokens_per_forward": 512, "batch_size": 48},
    },
    "cached": {"training": {"max_tokens_per_forward": 512, "batch_size": 48}},
    "mixed": {"data": {"batching": "mixed"}},
    "reference-a_batch_of_one": {"data": {"batching": "reference"}, "training": {"batch_size": 1}},
    "checkpointed_layers": {"training": {"gradient_checkpointing": True, "batch_size": 7}},
    "float64": {"training": {"precision": "float64", "max_steps": LONG}},
    "float64-distilled-dimensions-blocks": {
        "loss": {"dimensions": [32, 8], "block_size": 5},
        "distillation": {"weight": 0.5, "regression": 0.3},
        "training": {"precision": "float64", "max_steps": 20},
    },
    "float64-cached-self-blocks": {
        "guide": "self",
        "loss": {"block_size": 5},
        "training": {"precision": "float64", "max_tokens_per_forward": 512, "batch_size": 40},
    },
}


def written(name, way, write_config, write_rows, triplets, model, guides):
    count = way.get("negatives")
    rows = triplets if count is None else [{**row, "negative": row["negative"][:count]} for row in triplets]
    kept = [row for row in rows if count is None or len(row["negative"]) == count]
    source = {"source": "jsonl"}
    if "scores" in way:
        kept = [scored(row, way["scores"]) for row in kept]
        source["scores"] = way["scores"]
    source["path"] = str(write_rows(f"{name}.jsonl", kept))
    if "guides" in way:
        way = {**way, "guide": guides}
    return write_config(
        name,
        model={"name": str(model), **way.get("model", {})},
        data={"train": [source], **way.get("data", {})},
        loss={"temperature": 0.05, **way.get("loss", {})},
        training={"batch_size": 16, "max_steps": STEPS, "precision": "float32", **way.get("training", {})},
        optimizer={"lr": 1e-3, "eps": 1e-3},
        checkpoint={"every": 1000},
        tracking={"log_every": 1},
        **{key: way[key] for key in ("guide", "distillation") if key in way},
    )


def scored(row, what):
    """The row with scores, or its pair with one."""
    by = np.random.default_rng(len(row["anchor"]))
    if what == "pairs":
        return {**row, "positive": row["positive"][:1], "negative": [], "score": round(5 * by.random(), 2)}
    drawn = [by.normal(size=len(row[side])).tolist() for side in ("positive", "negative")]
    return {**row, "pos_scores": drawn[0], "neg_scores": drawn[1]}


def train_all(paths, folder):
    """Rows of metrics of every way, by this process where it writes them."""
    found = {}
    for path in paths:
        config = load_config(path, [f"output_dir={folder}", f"cache_dir={folder.parent / 'cache'}"])
        assert train(config, timeout=60, console=QUIET) == 0
        metrics = Run.of(config).metrics
        found[path.stem] = [json.loads(line) for line in metrics.read_text().splitlines()]
    return found


@pytest.fixture
def paths(write_config, write_rows, triplets, make_model):
    model = make_model(dropout=0.0)
    guides = [{"name": str(make_model(width=width, layers=1, seed=width)), "dtype": "float32"} for width in (48, 32)]
    return [written(name, way, write_config, write_rows, triplets, model, guides) for name, way in WAYS.items()]


def column(rows, name):
    return np.array([row[name] for row in rows])


@pytest.mark.parametrize("counts", [(2,), pytest.param((3, 4), marks=pytest.mark.slow)])
def test_every_way_is_the_same_on_any_number_of_ranks(paths, tmp_path, counts):
    """Each of these changes which rank knows what: a way that forgets the others trains another model, and says nothing."""
    alone = train_all(paths, tmp_path / "one")
    for processes in counts:
        found = in_processes(processes, train_all, paths, tmp_path / f"of-{processes}", patience=400)[0][1]
        for name, way in WAYS.items():
            whole = way.get("training", {}).get("precision") == "float64"
            assert len(found[name]) == len(alone[name]) == way.get("training", {}).get("max_steps", STEPS)
            tolerance = 1e-9 if whole else 1e-4
            for key in ("loss", "grad_norm", "masked_ap"):
                apart = np.abs(column(found[name], key) - column(alone[name], key)) / np.maximum(
                    1, np.abs(column(alone[name], key))
                )
                # Under float32 the first losses differ by rounding alone, and later ones by what the weights made of it.
                assert apart[0] <= min(tolerance, 1e-5), (processes, name, key)
                assert apart.max() <= tolerance, (processes, name, key, apart.max())


def test_any_number_of_ranks_reads_the_same_rows(write_config, tmp_path):
    """With dropout on the losses differ, since each rank draws its own: what each step reads does not."""
    path = write_config(training={"batch_size": 16, "max_steps": 8, "precision": "float32"}, tracking={"log_rows": True})
    rows = []
    for processes in (1, 2):
        folder = tmp_path / f"of-{processes}"
        in_processes(processes, train_all, [path], folder)
        rows.append([json.loads(line) for line in (folder / "run" / "step-rows.jsonl").read_text().splitlines()])
    assert rows[0] == rows[1]
    assert [row["step"] for row in rows[0]] == list(range(1, 9))
    assert all(len(set(row["rows"])) == 16 for row in rows[0])
