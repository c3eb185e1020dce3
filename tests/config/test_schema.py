"""The models of the config: defaults, ranges, combinations, and what a resume may change."""

from typing import Any, get_args

import pytest
from pydantic import ValidationError

from gist_train.config import evaluation, models, schema, sources
from gist_train.config.faults import fault_of
from gist_train.config.fields import Section
from gist_train.config.models import GuideConfig
from gist_train.config.schema import Config, mathematics
from gist_train.config.sources import JsonlSource


def config(**sections: Any) -> Config:
    smallest = {"name": "run", "model": {"name": "m"}, "data": {"train": [{"source": "jsonl", "path": "a.jsonl"}]}}
    return Config.model_validate(smallest | sections)


def test_smallest_config_has_the_recipes_hyperparameters():
    """A default that drifts changes every run whose YAML leaves the key out."""
    smallest = config()
    assert (smallest.loss.temperature, smallest.loss.margin, smallest.loss.margin_strategy) == (0.01, 0.0, "absolute")
    assert (smallest.optimizer.lr, smallest.optimizer.betas, smallest.optimizer.eps) == (5e-6, [0.9, 0.999], 1e-8)
    assert (smallest.schedule.type, smallest.schedule.warmup_ratio) == ("linear", 0.1)
    training = smallest.training
    assert (training.batch_size, training.epochs, training.max_steps, training.seed, training.grad_clip) == (16, 1, None, 42, 1.0)
    assert (training.precision, training.stop_at_step, smallest.data.batching) == ("auto", None, "task")
    assert (smallest.guide, smallest.output_dir, smallest.cache_dir, smallest.tracking.wandb) == (None, "runs", None, None)
    assert (smallest.evaluation.every, smallest.evaluation.tasks, smallest.selection.around) == (0, [], None)
    assert isinstance(smallest.data.train[0], JsonlSource)
    assert GuideConfig(name="g").dtype == "float16"


@pytest.mark.parametrize(
    ("section", "accepted"),
    [
        ("name", "GIST-small.v0_1"),
        ("guide", "self"),
        ("guide", {"name": "g", "prompt": ""}),
        ("model", {"name": "m", "layers": [0, 2, 4], "dropout": 0, "max_length": 8, "pooling": "mean"}),
        ("loss", {"margin": -1, "temperature": 1}),
        ("loss", {"dimensions": [64, 256, 128], "dimension_weights": [1, 0.5, 2.0]}),
        ("loss", {"dimensions": [1], "dimension_weights": None}),
        ("training", {"max_steps": 10, "stop_at_step": 10}),
        ("training", {"max_steps": 10, "epochs": None}),
        ("training", {"epochs": 2, "max_steps": None, "stop_at_step": 10**9, "seed": 2**32 - 1, "grad_clip": None}),
        ("training", {"max_tokens_per_forward": 512, "gradient_checkpointing": True}),
        ("training", {"max_tokens_per_forward": None, "gradient_checkpointing": False, "compile": False}),
        ("training", {"max_tokens_per_forward": 512, "compile": True, "cuda_graph": True}),
        ("schedule", {"type": "constant", "warmup_ratio": 1}),
        ("data", {"train": [{"source": kind, "path": "*"} for kind in ("jsonl", "csv", "parquet", "medi")]}),
        (
            "data",
            {"train": [{"source": "csv", "path": "a", "columns": {"anchor": "q"}, "task": "t", "prompts": {"anchor": "q: "}}]},
        ),
        ("data", {"train": [{"source": "hub", "path": "me/set", "revision": "r", "subset": "en", "streaming": True}]}),
        ("data", {"train": [{"source": "medi", "path": "a", "weight": 0.5, "max_rows": 1, "max_rows_per_task": 1}]}),
        (
            "data",
            {"train": [{"source": "classification", "path": "a", "mining": {"model": {"name": "m"}}, "mask_same_label": True}]},
        ),
        ("data", {"train": [{"source": "jsonl", "path": "a", "weight": 1}], "batching": "reference"}),
        ("selection", {"around": 5, "note": "why"}),
        ("evaluation", {"truncate_dim": 64, "tasks": [{"type": kind, "name": "t", "path": "p"} for kind in ("pair",)]}),
        ("tracking", {"wandb": {"project": "p", "mode": "offline"}}),
    ],
)
def test_accepts(section: str, accepted: object):
    """A limit set too tight refuses a config that the design allows."""
    assert section in config(**{section: accepted}).model_fields_set


@pytest.mark.parametrize(
    ("path", "bad"),
    [
        *[(("name",), bad) for bad in ("", ".", "..", "a/b", "a b", "a\n", 3)],
        *[(("model", "layers"), bad) for bad in ([], [1, 1], [2, 1])],
        *[(("model", "dropout"), bad) for bad in (1, -0.1, True, "0.1")],
        *[(("training", "batch_size"), bad) for bad in (0, 16.0, True, "16", None)],
        *[(("training", "seed"), bad) for bad in (-1, 2**32)],
        *[(("loss", "temperature"), bad) for bad in (0, float("nan"), float("inf"), "1e-2")],
        *[(("optimizer", "betas"), bad) for bad in ([0.9], [0.9, 0.9, 0.9], 0.9)],
        (("loss", "contrast_anchors"), 1),
        *[(("loss", "dimensions"), bad) for bad in ([], [64, 64], 64, "64")],
        *[(("loss", "dimension_weights"), bad) for bad in ([], [1.0], 1.0)],  # weights without dimensions among them
        (("guide", "dtype"), "bf16"),
        (("guide",), "none"),
        (("schedule", "warmup_ratio"), 1.1),
        (("data", "train"), []),
        (("data", "train"), None),
        (("evaluation", "stop_after"), 3),  # and every is 0
        (("evaluation", "truncate_dim"), 0),
        *[(("selection", "metric"), bad) for bad in ({}, [], 3, {"s/spearman": 0}, {"s/spearman": True}, {3: 1}, {"a/b": "1"})],
        (("evaluation", "tasks"), [{"type": "retrieval", "name": "a", "path": p} for p in "xy"]),
        *[(("training", "max_tokens_per_forward"), bad) for bad in (0, 511, 4096.0, True, "4096")],
        *[
            (("training", switch), bad)
            for switch in ("gradient_checkpointing", "compile", "cuda_graph")
            for bad in (1, None, "true")
        ],
    ],
)
def test_refuses(path: tuple[str, ...], bad: object):
    """A value that slips through here fails hours later, or trains something else in silence."""
    given: Any = bad
    for key in reversed(path[1:]):
        given = {key: given}
    if path[0] in ("guide", "model") and isinstance(given, dict):
        given = {"name": "x"} | given
    with pytest.raises(ValidationError) as caught:
        config(**{path[0]: given})
    (fault,) = caught.value.errors()
    assert [part for part in fault["loc"] if part != "GuideConfig"] == list(path)


@pytest.mark.parametrize(
    ("training", "faults"),
    [
        ({"epochs": 1, "max_steps": 10}, ["max_steps"]),
        ({"epochs": None}, ["max_steps"]),
        ({"max_steps": 10, "stop_at_step": 11}, ["stop_at_step"]),
        ({"max_steps": 10, "stop_at_step": 11, "batch_size": 0}, ["batch_size", "stop_at_step"]),
        ({"epochs": 0, "max_steps": 10}, ["epochs"]),
    ],
)
def test_impossible_lengths(training: dict[str, Any], faults: list[str]):
    """Combinations have the path of the key to fix, and are told beside the faults of single keys."""
    with pytest.raises(ValidationError) as caught:
        config(training=training)
    assert [fault["loc"][1] for fault in caught.value.errors()] == faults


def test_every_dimension_has_one_weight():
    """A weight too few would leave a dimension out, or shift the others."""
    for weights in ([1.0], [1.0, 1.0, 1.0]):
        with pytest.raises(ValidationError) as caught:
            config(loss={"dimensions": [256, 64], "dimension_weights": weights})
        (fault,) = caught.value.errors()
        assert fault["loc"] == ("loss", "dimension_weights")
        assert "the 2 numbers of loss.dimensions" in str(fault["ctx"]["error"])
    before, after = (config(loss={"dimensions": [256, 64], "dimension_weights": w}) for w in (None, [1.0, 2.0]))
    assert mathematics(before) != mathematics(after)


WEIGHTED = {"train": [{"source": "jsonl", "path": "a"}, {"source": "jsonl", "path": "b", "weight": 2.0}]}
MINED = {"train": [{"source": "classification", "path": "a"}, {"source": "classification", "path": "b"}]}


@pytest.mark.parametrize(
    ("sections", "path", "said"),
    [
        ({"data": {**WEIGHTED, "batching": "reference"}}, ("data", "batching"), "data.train[1].weight"),
        ({"data": MINED}, ("data",), "name the model that triplets are mined with"),
        ({"data": MINED, "guide": "self"}, ("data",), "name the model that triplets are mined with"),
    ],
)
def test_impossible_sources(sections: dict[str, Any], path: tuple[str, ...], said: str):
    """Told by the key to fix, before a row is read."""
    with pytest.raises(ValidationError) as caught:
        config(**sections)
    (fault,) = caught.value.errors()
    assert fault["loc"] == path
    assert said in str(fault["ctx"]["error"])
    assert config(data=MINED, guide={"name": "g"}).data.train[0].source == "classification"


def test_max_steps_replaces_the_default_epochs():
    """Else every config with max_steps would have to say `epochs: null`."""
    assert config(training={"max_steps": 7}).training.epochs is None


def test_every_field_has_a_docstring_and_nothing_can_be_changed():
    """Error messages show the docstrings; a config that changes under way isn't the one that was hashed."""
    items = {item for module in (schema, models, sources, evaluation) for item in vars(module).values() if isinstance(item, type)}
    sections = [item for item in items if issubclass(item, Section) and item is not Section]
    fields = [(model, key, field) for model in sections for key, field in model.model_fields.items()]
    assert len(sections) >= 30
    assert len(fields) > 100
    assert [(model, key) for model, key, field in fields if not field.description] == []
    with pytest.raises(ValidationError):
        config().training.seed = 1  # type: ignore[misc]


def test_tag_stands_first_in_every_union():
    """Error messages find the models of a union by their first field."""
    for union, tag in ((sources.Source, "source"), (evaluation.EvaluationTask, "type")):
        models = get_args(get_args(union)[0])
        assert [next(iter(model.model_fields)) for model in models] == [tag] * len(models)


def test_mathematics_leaves_out_only_what_may_change_on_resume():
    """A key too few here lets a resumed run go on with other mathematics; a key too many refuses a harmless change."""
    guide = {"name": "g", "batch_tokens": 512, "trust_remote_code": True}
    harmless = config(
        name="other",
        output_dir="o",
        cache_dir="c",
        guide=guide,
        loss={"block_size": 4},
        model={"name": "m", "trust_remote_code": True},
        data={"train": [{"source": "medi", "path": "b"}], "exclude_evaluation_texts": True},
        training={"stop_at_step": 5, "max_tokens_per_forward": 512, "gradient_checkpointing": True},
        checkpoint={"every": 1},
        selection={"around": 3},
        tracking={"log_every": 1},
        evaluation={"every": 3, "max_length": 64, "truncate_dim": 8, "tasks": [{"type": "sts", "name": "s", "path": "p"}]},
    )
    plain = mathematics(config(guide={"name": "g"}))
    assert mathematics(harmless) == plain
    assert {key.split(".")[0] for key in plain} == {
        "model",
        "guide",
        "data",
        "loss",
        "distillation",
        "training",
        "optimizer",
        "schedule",
        "evaluation",
    }
    assert [key for key in plain if key.startswith("evaluation")] == ["evaluation.held_out"]  # which rows train
    assert len(plain) == 58
    assert mathematics(config(guide="self"))["guide"] == "self"
    assert mathematics(config())["guide"] is None


@pytest.mark.parametrize(
    ("section", "changed", "key"),
    [
        ("model", {"name": "m", "max_length": 64}, "model.max_length"),
        ("guide", {"name": "g", "dtype": "float32"}, "guide.dtype"),
        ("loss", {"margin": 0.1}, "loss.margin"),
        ("loss", {"dimensions": [64]}, "loss.dimensions"),
        ("training", {"seed": 1}, "training.seed"),
        ("training", {"compile": True}, "training.compile"),
        ("optimizer", {"betas": [0.9, 0.99]}, "optimizer.betas"),
        ("data", {"train": [{"source": "jsonl", "path": "x", "weight": 2.0}]}, "data.train[0].weight"),
        ("data", {"train": [{"source": "jsonl", "path": "x", "in_batch_negatives": False}]}, "data.train[0].in_batch_negatives"),
    ],
)
def test_mathematics_names_what_changed(section: str, changed: dict[str, Any], key: str):
    """A resume with this changed would go on silently with another run."""
    before, after = mathematics(config(guide={"name": "g"})), mathematics(config(**{"guide": {"name": "g"}, section: changed}))
    assert [name for name in before if before[name] != after[name]] == [key]


STS = {"type": "sts", "name": "s", "path": "p.tsv"}


def test_a_metric_counts_alone_or_with_weights():
    """`metric: stsb/spearman` is the mapping with one weight, so that all that reads it reads one form."""
    of = {"tasks": [STS]}
    assert config(evaluation=of, selection={"metric": "s/spearman"}).selection.metric == {"s/spearman": 1.0}
    weights = {"s/spearman": 2, "s/pearson": 0.5}
    assert config(evaluation=of, selection={"metric": weights}).selection.metric == {"s/spearman": 2.0, "s/pearson": 0.5}


@pytest.mark.parametrize(
    ("evaluation", "selection", "found", "expected"),
    [
        ({"tasks": [STS]}, {"metric": "s/accuracy"}, "s/accuracy", "s/spearman, s/pearson"),
        ({"tasks": [STS]}, {"metric": {"s/spearman": 1, "x/f1": 1}}, "x/f1", "s/spearman, s/pearson"),
        ({}, {"metric": "s/spearman"}, "s/spearman", "none: evaluation.tasks is empty"),
        ({"tasks": [STS], "every": 5, "stop_after": 2}, {}, "null, and evaluation.stop_after", "s/spearman, s/pearson"),
    ],
)
def test_a_metric_must_be_measured(evaluation, selection, found, expected):
    """A misspelt metric would show after the training, when it is to be chosen by; stop_after would never stop."""
    with pytest.raises(ValidationError) as caught:
        config(evaluation=evaluation, selection=selection)
    (error,) = caught.value.errors()
    fault = fault_of(error, {(): ("run.yaml", None)})
    assert (fault.where, fault.found, fault.expected) == ("run.yaml: selection.metric", found, expected)
