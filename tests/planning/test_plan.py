"""`gist-train plan`: its figures against the recipe's, against real data, and that it costs and changes nothing."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.running import gist

from gist_train.config.loading import load_config
from gist_train.config.schema import cache_folder
from gist_train.data.batches import BatchPlan
from gist_train.model.loading import load_guide
from gist_train.planning import plan as plan_module
from gist_train.planning.plan import _selected
from gist_train.training.setup import last_step, schedule_of

RECIPE = {
    "training": {"epochs": 40, "stop_at_step": 107_000, "batch_size": 16},
    "optimizer": {"lr": 5e-6},
    "selection": {"around": 102_000, "note": "The released model says: step 302,500."},
}


def planned(path: Path, *words: str) -> dict[str, Any]:
    ended = gist("plan", path, "--json", *words)
    assert ended.code == 0, ended.err
    printed: dict[str, Any] = json.loads(ended.out)
    return printed


def test_the_recipes_figures(write_config):
    """What a user must see before a GPU is spent on it: for 1,818,688 triplets in whole windows, the selected checkpoint lies
    inside the warm-up."""
    config = load_config(write_config(**RECIPE, data={"train": [{"source": "medi", "path": "x"}], "batching": "reference"}))
    rows = np.arange(1_818_688, dtype=np.int32)
    batches = BatchPlan(
        task=rows // 16 % 341,
        anchor=rows,
        positive=rows,
        positive_offsets=np.arange(len(rows) + 1),
        batching="reference",
        batch_size=16,
        seed=42,
    )
    schedule = schedule_of(config, batches.steps_per_epoch)
    assert (batches.steps_per_epoch, schedule.total_steps, schedule.warmup_steps) == (113_668, 4_546_720, 454_672)
    assert last_step(config, schedule) == 107_000
    selected = _selected(config, schedule, batches, 107_000)
    assert selected.step == 102_000
    assert round(selected.epoch, 3) == 0.897
    assert f"{selected.learning_rate:.4e}" == "1.1217e-06"
    assert selected.triplets_seen == 1_632_000
    assert selected.in_warmup
    # The figures that the released models' commit data state (RECIPE.md).
    assert f"{schedule.learning_rate(302_500):.4e}" == "3.3266e-06"
    assert round(302_500 / batches.steps_per_epoch, 2) == 2.66


def test_the_page_says_what_must_be_seen(write_config):
    """The same figures for a person: the warm-up, why it matters, and the note of the recipe."""
    path = write_config(
        **{**RECIPE, "training": {"max_steps": 40, "batch_size": 8, "stop_at_step": 3}, "selection": {"around": 2}}
    )
    ended = gist("plan", path, "--set", 'selection.note="The card and the commit data differ."')
    assert ended.code == 0, ended.err
    page = " ".join(ended.out.split())
    assert "selected step 2: epoch 0.167, learning rate 2.5000e-06, 16 triplets seen" in page
    assert "inside warm-up: the peak learning rate is never reached" in page
    assert "The card and the commit data differ." in page
    assert "rows 96 over 3 tasks" in page
    ended = gist("plan", path, "--set", "training.stop_at_step=30")
    assert "inside warm-up: the peak is reached after it" in " ".join(ended.out.split())
    assert "inside warm-up" not in gist("plan", path, "--set", "selection.around=20").out
    unreached = gist("plan", path, "--set", "selection.around=20", "--set", "training.stop_at_step=8").out
    assert "selected step 20" in " ".join(unreached.split())
    assert "the run ends before it" in unreached
    between = gist("plan", path, "--set", "selection.around=6", "--set", "training.stop_at_step=8").out
    assert "no checkpoint is written at it" in between
    assert "no checkpoint" not in gist("plan", path, "--set", "selection.around=8", "--set", "training.stop_at_step=12").out
    assert "at the end step 3: epoch 0.250" in " ".join(gist("plan", path, "--set", "selection.around=null").out.split())


def test_medi_like_data(write_config, shared_data):
    """30,814 rows in 1,926 windows of which 1,540 are whole and of one task (the data's own figure)."""
    source = {"source": "medi", "path": str(shared_data / "medi" / "medi_like_train.json.gz")}
    found = planned(write_config(data={"train": [source], "batching": "reference"}, training={"batch_size": 16}, guide=None))
    assert found["rows"] == 30_814
    assert found["steps_per_epoch"] == 1_540
    assert found["dropped_rows"] == 30_814 - 1_540 * 16
    assert found["dropped"]["short_window"] == 30_814 % 16
    assert found["dropped"]["mixed_window"] == 385 * 16
    assert len(found["tasks"]) == 18
    assert sum(found["tasks"].values()) == 30_814
    assert sum(found["text_tokens"]["texts_up_to"].values()) == found["unique_texts"]


def test_leaks_are_told(write_config, write_pairs, triplets):
    """A test set among the training rows must be seen before a GPU is paid for; no task, nothing to say."""
    path = write_config(evaluation=write_pairs([triplets[0]["anchor"], "no training text"]))
    (leak,) = planned(path)["leakage"]
    assert (leak["task"], leak["part"], leak["texts"], leak["shared"]) == ("pairs", "pairs", 6, 1)
    page = " ".join(gist("plan", path).out.split())
    assert f"1 of 6 texts of pairs (pairs), in {leak['rows']} rows: see data.exclude_evaluation_texts" in page
    exclude = ("--set", "data.exclude_evaluation_texts=true")
    found = planned(path, *exclude)
    assert found["leakage"] == [{**leak, "shared": 0, "rows": 0}]
    assert found["excluded_texts"] == 1
    page = " ".join(gist("plan", path, *exclude).out.split())
    assert "1 texts that evaluation judges on" in page
    assert "leaked" not in page
    assert planned(write_config("bare"))["leakage"] == []


def test_a_row_of_each_source_is_shown_as_it_is_trained(write_config, write_rows, triplets):
    """Columns the wrong way round, or a prompt without its space, are seen at a glance and in no count."""
    own = write_rows("own.jsonl", [{"a": f"first {n}", "p": [f"second {n}", "more"], "n": [f"third {n}"]} for n in range(9)])
    source = {
        "source": "jsonl",
        "path": str(own),
        "task": "t",
        "columns": {"anchor": "a", "positive": "p", "negative": "n"},
        "prompts": {"anchor": "query:", "positive": "passage: "},
    }
    other = write_rows("other.jsonl", [{"anchor": row["anchor"], "positive": row["positive"]} for row in triplets])
    path = write_config(data={"train": [source, {"source": "jsonl", "path": str(other)}]})
    first, second = planned(path)["examples"]
    assert first == {"task": "t", "anchor": "query:first 0", "positive": "passage: second 0", "negative": "third 0"}
    assert (second["anchor"], second["negative"]) == (triplets[0]["anchor"], None)
    page = " ".join(gist("plan", path).out.split())
    assert 'anchor "query:first 0" positive "passage: second 0" negative "third 0"' in page


def test_what_is_evaluated_is_said(write_config, write_pairs):
    """Hours of training that nothing measures are the commonest regret: it must be seen before they begin."""
    assert "evaluated on pairs" in " ".join(gist("plan", write_config(evaluation=write_pairs(["one"]))).out.split())
    assert "evaluated on nothing: name tasks in evaluation.tasks" in " ".join(gist("plan", write_config("bare")).out.split())


def test_a_corpus_of_before_there_was_exclusion_is_planned(write_config):
    """Its meta.json says nothing of rows left out; it must not be built again for that, nor break the plan."""
    path = write_config()
    before = planned(path)
    (corpus,) = (cache_folder(load_config(path)) / "corpora").glob("[0-9a-f]*")
    meta = json.loads((corpus / "meta.json").read_text())
    meta = {key: value for key, value in meta.items() if not key.startswith("excluded")}
    for count in meta["sources"]:
        del count["excluded"]
    (corpus / "meta.json").write_text(json.dumps(meta))
    after = planned(path)
    assert {**after, "disk": before["disk"]} == before


@pytest.mark.parametrize("batching", ["reference", "task", "mixed"])
def test_dropped_rows_are_all_told(write_config, write_rows, write_pairs, triplets, batching):
    """Rows read, less what is dropped and why, are the rows that an epoch trains on."""
    bad = {"anchor": "", "positive": "p"}
    path = write_rows("some.jsonl", [bad, *triplets, bad])
    labelled = write_rows(
        "labels.jsonl", [{"text": f"text {i}", "label": min(i % 3, i)} for i in range(20)] + [{"text": "alone", "label": "x"}]
    )
    sources = [
        {"source": "jsonl", "path": str(path), "max_rows_per_task": 21},
        {"source": "classification", "path": str(labelled)},
    ]
    data = {"train": sources, "batching": batching, "on_bad_row": "skip", "exclude_evaluation_texts": True}
    section = write_pairs(["Text 3.", triplets[95]["anchor"]])
    found = planned(write_config(data=data, evaluation=section))
    assert found["rows"] == 98 + 21
    assert found["dropped"]["bad"] == 2
    assert found["dropped"]["alone"] == 1
    assert found["dropped"]["excluded"] == 2
    assert found["dropped"]["not_drawn"] == 96 - 21 - 21 - 15 - 1
    assert found["dropped_rows"] == sum(found["dropped"].values())
    assert found["rows"] - found["dropped_rows"] == found["steps_per_epoch"] * 8


def test_nothing_is_trained_and_the_guide_stays_at_rest(write_config, tmp_path, monkeypatch):
    """A plan is asked for before a GPU is: no run folder, no embedding, and the tokens to embed are the guide's own."""
    path = write_config()
    config = load_config(path)
    monkeypatch.setattr("gist_train.model.guide.GuideStore.fill", lambda *_: pytest.fail("the store was filled"))
    found = planned(path)
    assert not (tmp_path / "runs" / "run").exists()
    assert not (cache_folder(config) / "guides").exists()
    guide = load_guide(config.guide)
    texts = {text for line in (tmp_path / "rows.jsonl").open() for text in _texts(json.loads(line))}
    assert found["guide"]["texts_to_embed"] == len(texts)
    assert found["guide"]["tokens_to_embed"] == sum(map(len, guide.tokens(sorted(texts))))
    assert not found["guide"]["tokens_are_estimated"]
    monkeypatch.setattr(plan_module, "EXACT_TEXTS", 40)
    estimated = planned(path)["guide"]
    assert estimated["tokens_are_estimated"]
    assert estimated["tokens_to_embed"] == pytest.approx(found["guide"]["tokens_to_embed"], rel=0.2)
    monkeypatch.undo()
    assert gist("prepare", path).code == 0
    after = planned(path)["guide"]
    assert (after["texts_to_embed"], after["tokens_to_embed"]) == (0, 0)
    assert after["store_bytes"] == found["guide"]["store_bytes"]
    assert after["store_bytes_now"] == pytest.approx(after["store_bytes"], rel=0.1)  # its meta.json is beside


def _texts(row: dict[str, Any]) -> list[str]:
    return [row["anchor"], *row["positive"], *row["negative"]]


@pytest.mark.parametrize("guide", ["model", "self", None])
def test_measure_takes_steps_and_leaves_no_trace(write_config, tmp_path, guide):
    """A time estimate must not cost the user a run folder, a store or a checkpoint."""
    sections = {} if guide == "model" else {"guide": guide}
    found = planned(write_config(**sections), "--measure")
    measured = found["measured"]
    assert measured["steps"] == 5
    assert measured["step_seconds"] > 0
    assert measured["guide_stood_in_for"] == (guide == "model")
    assert (measured["guide_pass_seconds"] > 0) == (guide == "model")
    assert measured["total_seconds"] == pytest.approx(12 * measured["step_seconds"] + measured["guide_pass_seconds"])
    assert not (tmp_path / "runs" / "run").exists()
    assert not (tmp_path / "runs" / ".cache" / "guides").exists()
    if guide == "self":  # the quickest one; the page is the same
        assert "in all" in gist("plan", write_config(**sections), "--measure").out


@pytest.mark.parametrize("family", ["bert", "roberta", "xlm-roberta", "mpnet", "distilbert", "modernbert", "qwen3", "deberta-v2"])
def test_every_family_is_planned(write_config, make_model, family):
    """What trains must be planned; a family that runs padded needs the memory of its padding."""
    found = planned(write_config(model={"name": str(make_model(family))}, guide=None))
    assert found["memory"]["activations"] > 0


def test_memory_is_that_of_the_switches(write_config):
    """Whoever turns them on because the plan says that the batch does not fit must see what it is worth."""
    path = write_config(training={"batch_size": 32, "max_steps": 3, "precision": "float32"}, guide=None)
    switches = [[], ["max_tokens_per_forward=512"], ["max_tokens_per_forward=512", "gradient_checkpointing=true"]]
    words = [[word for switch in some for word in ("--set", f"training.{switch}")] for some in switches]
    whole, cut, both = (planned(path, *some)["memory"] for some in words)
    assert whole["activations"] > 1.5 * cut["activations"] > 1.5 * both["activations"]
    assert (cut["max_tokens_per_forward"], cut["gradient_checkpointing"]) == (512, False)
    for page, again in ((gist("plan", path).out, False), (gist("plan", path, *words[2]).out, True)):
        shown = " ".join(page.split())
        assert ("on one device by 512 tokens" in shown) == again
        assert ("without what is computed again" in shown) == again


def test_a_missing_evaluation_file_is_told(write_config):
    """Not by the first evaluation, 5,000 steps into a paid GPU."""
    task = {"type": "sts", "name": "s", "path": "nowhere.tsv"}
    ended = gist("plan", write_config(evaluation={"tasks": [task]}))
    assert ended.code == 2
    assert "nowhere.tsv" in ended.err
