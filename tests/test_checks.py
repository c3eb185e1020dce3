"""What `train` refuses before its first step, `plan` and `prepare` refuse too: a plan that says yes costs a night in a queue."""

import re

import pytest
from support.running import gist

pytestmark = pytest.mark.usefixtures("on_cpu")
TRAINING = {"batch_size": 8, "max_steps": 12, "precision": "float32"}
STS = {"type": "sts", "name": "pairs", "path": "nowhere.tsv"}

REFUSED = {
    "a loss over more dimensions than there are": {"loss": {"dimensions": [64, 8]}},
    "gradient checkpointing that the family lacks": {"model": "mpnet", "training": {**TRAINING, "gradient_checkpointing": True}},
    "both, of a family that has neither": {"model": "mpnet", "training": {**TRAINING, "compile": True, "cuda_graph": True}},
    "evaluation of longer texts than the model reads": {"evaluation": {"max_length": 1000}},
    "more dimensions to evaluate than there are": {"evaluation": {"truncate_dim": 64}},
    "a metric that no task gives": {"evaluation": "pairs", "selection": {"metric": "pairs/accuracy"}},
    "a task whose file is missing": {"evaluation": {"tasks": [STS]}},
    "a tracker whose package is missing": {"tracking": {"wandb": {"project": "p"}}},
    "three trackers whose packages are missing": {"tracking": {"tensorboard": {}, "mlflow": {}, "trackio": {}}},
    "longer texts than the model has positions": {"model": {"max_length": 4000}},
    "layers that the model does not have": {"model": {"layers": [0, 9]}},
    "fewer rows than a batch": {"training": {**TRAINING, "batch_size": 512}},
    "data that are not there": {"data": {"train": [{"source": "jsonl", "path": "nowhere.jsonl"}]}},
    "a run folder that can't be made": {"output_dir": "rows.jsonl"},
}
HERE = {
    "a compiled encoder": {"compile": True},
    "CUDA graphs": {"cuda_graph": True},
    "fp16": {"precision": "fp16"},
}
"""What a CPU can't do and a GPU can."""


def faults(err):
    """The faults in what a command said, whatever else it said."""
    return re.findall(r"^\S.*\n  found .*\n  expected .*\n  fix .*$", err, flags=re.MULTILINE)


@pytest.mark.parametrize("case", REFUSED)
def test_what_train_refuses_all_refuse(write_config, write_pairs, make_model, tmp_path, monkeypatch, case):
    """In the same words: a message that is new at the start of the run was not read the day before."""
    if "tracker" in case:
        monkeypatch.setattr("gist_train.checks.find_spec", lambda _: None)
    sections = dict(REFUSED[case])
    model = sections.get("model", {})
    family, options = (model, {}) if isinstance(model, str) else ("bert", model)
    sections["model"] = {"name": str(make_model(family)), **options}
    if sections.get("evaluation") == "pairs":
        sections["evaluation"] = write_pairs(["one", "two"])
    if "output_dir" in sections:
        sections["output_dir"] = str(tmp_path / sections["output_dir"])
    path = write_config(**sections)
    ended = {command: gist(command, path) for command in ("plan", "prepare", "train")}
    assert {command: end.code for command, end in ended.items()} == dict.fromkeys(ended, 2), {c: e.err for c, e in ended.items()}
    expected = faults(ended["train"].err)
    assert expected
    assert faults(ended["plan"].err) == faults(ended["prepare"].err) == expected


def test_what_train_takes_all_take(write_config, write_pairs):
    """Else the test above would pass where everything is refused."""
    path = write_config(evaluation=write_pairs(["one", "two"]), selection={"metric": "pairs/spearman"})
    assert [gist(command, path).code for command in ("plan", "prepare", "train")] == [0, 0, 0]


@pytest.mark.parametrize("case", HERE)
def test_what_only_this_machine_refuses_is_told(write_config, case):
    """Plans are made where there is no GPU: they must not fail for want of one, nor keep quiet about it."""
    path = write_config(training={**TRAINING, **HERE[case]})
    ended = {command: gist(command, path) for command in ("plan", "prepare", "train")}
    assert {command: end.code for command, end in ended.items()} == {"plan": 0, "prepare": 0, "train": 2}
    expected = faults(ended["train"].err)
    assert expected
    assert faults(ended["plan"].err) == faults(ended["prepare"].err) == expected
    assert "On this machine (device: cpu) gist-train train would refuse:" in ended["plan"].err
    assert gist("plan", path, "--measure").code == 2
