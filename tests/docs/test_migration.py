"""Pages for those who come from other trainers: every argument of theirs is there, and where it went exists."""

import dataclasses
import inspect
import re
from typing import get_args

import pytest
from conftest import ROOT
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer import evaluation, losses
from test_fixes import FIELD, exists

from gist_train.config.evaluation import EvaluationTask
from gist_train.config.faults import ELSEWHERE
from gist_train.config.schema import Config

OURS = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("from-*.md")}
TRAINER = OURS["from-sentence-transformers.md"]
FLAG = OURS["from-flagembedding.md"]
NEWER = {"activation_checkpointing", "activation_checkpointing_kwargs"}
"""Arguments of the training that transformers 5.17 does not have."""
FLAG_ARGUMENTS = [
    "model_name_or_path",
    "config_name",
    "tokenizer_name",
    "cache_dir",
    "trust_remote_code",
    "token",
    "train_data",
    "cache_path",
    "train_group_size",
    "query_max_len",
    "passage_max_len",
    "pad_to_multiple_of",
    "max_example_num_per_dataset",
    "query_instruction_for_retrieval",
    "query_instruction_format",
    "knowledge_distillation",
    "passage_instruction_for_retrieval",
    "passage_instruction_format",
    "shuffle_ratio",
    "same_dataset_within_batch",
    "small_threshold",
    "drop_threshold",
    "negatives_cross_device",
    "temperature",
    "fix_position_embedding",
    "sentence_pooling_method",
    "normalize_embeddings",
    "sub_batch_size",
    "kd_loss_type",
]
"""Of FlagEmbedding/abc/finetune/embedder/AbsArguments.py at 0dff36c; the package is no dependency."""


def rows(page, after, before="\n## "):
    """Cells of the rows of the first table after a text, the first cell as the names in it."""
    part = page.split(after, 1)[1].split(before, 1)[0]
    cells = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in part.splitlines() if line.startswith("| `")]
    return [(re.findall(r"`(\w+)`", first), *others) for first, *others in cells]


def names(*where):
    return [name for names, *_ in rows(*where) for name in names]


def test_every_argument_of_the_training_is_named():
    """A user who looks for one and finds nothing stays where they are."""
    installed = {field.name for field in dataclasses.fields(SentenceTransformerTrainingArguments)}
    named = names(TRAINER, "\n## Arguments of the training\n")
    assert sorted(installed - {*named}) == []
    assert sorted({*named} - installed - NEWER) == []
    assert len(named) == len({*named}) > 100


@pytest.mark.parametrize(
    ("after", "before", "classes"),
    [
        ("\n## Arguments of the trainer\n", "\n## ", [SentenceTransformerTrainer]),
        ("Of GISTEmbedLoss and CachedGISTEmbedLoss:\n", "Of MatryoshkaLoss", [losses.GISTEmbedLoss, losses.CachedGISTEmbedLoss]),
        ("Of MatryoshkaLoss around them:\n", "\n## ", [losses.MatryoshkaLoss]),
    ],
    ids=["trainer", "gist", "matryoshka"],
)
def test_every_argument_of_trainer_and_losses_is_named(after, before, classes):
    """The loss is what most of them come for."""
    installed = {name for one in classes for name in inspect.signature(one).parameters}
    assert sorted(names(TRAINER, after, before)) == sorted(installed)


def test_every_evaluator_is_named():
    """What judged a model before is what its user wants to see again first."""
    bases = {"BaseEvaluator", "SentenceEvaluator", "SimilarityFunction"}
    assert sorted(names(TRAINER, "\n## Evaluators\n")) == sorted({*evaluation.__all__} - bases)
    tasks = re.findall(r"`(\w+)`", " ".join(cell.split(":")[0] for _, cell in rows(TRAINER, "\n## Evaluators\n")))
    known = {one.model_fields["type"].default for one in get_args(get_args(EvaluationTask)[0])}
    assert {task for task in tasks if task not in ("none", "name")} <= known


def test_the_defaults_that_differ_are_those_of_both():
    """A default that is not as the page says is a training that goes another way without a word."""
    fields = {field.name: field.default for field in dataclasses.fields(SentenceTransformerTrainingArguments)}
    table = rows(TRAINER, "\n## Defaults that differ\n")
    assert len(table) == 6
    for (name,), theirs, field, ours in table:
        assert f"`{fields[name]}`" == theirs, name
        section, key = field.strip("`").split(".")
        value = Config.model_fields[section].annotation.model_fields[key].default
        assert f"`{value}`" == ours, field


def test_every_argument_of_flagembedding_is_named():
    """As of the file that the page names."""
    assert sorted(names(FLAG, "\n## Arguments\n")) == sorted(FLAG_ARGUMENTS)


@pytest.mark.parametrize("page", OURS)
def test_fields_that_the_pages_name_exist(page):
    """An argument that went nowhere is worse than one that is not named."""
    code = " ".join(re.findall("`[^`]+`", re.sub("```.*?```", "", OURS[page], flags=re.DOTALL))).replace("[]", "")
    named = {match[0] for match in FIELD.finditer(code)}
    assert len(named) > 10
    assert sorted(name for name in named if not exists(name)) == []


def test_hints_of_messages_and_the_page_agree():
    """The message of a refused key and the page are two answers to one question."""
    places = {name: "".join(cells) for names, *cells in rows(TRAINER, "\n## Arguments of the training\n") for name in names}
    both = [name for name in ELSEWHERE if name in places]
    assert len(both) > 20
    for name in both:
        field = re.match(r"[a-z_]+(\.[a-z_]+)*", ELSEWHERE[name])[0]
        assert field.rpartition(".")[2] in places[name].replace("[]", ""), name
