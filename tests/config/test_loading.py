"""YAML and `--set` -> config, or every fault at once."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from gist_train.config.errors import Fault, UserError
from gist_train.config.loading import load_config, resolved_yaml
from gist_train.config.models import GuideConfig
from gist_train.config.schema import Config

SMALLEST = "name: run\nmodel: {name: m}\ndata:\n  train:\n    - {source: jsonl, path: a.jsonl}\n"


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Loads text as the file c.yaml in the folder where the command runs."""
    monkeypatch.chdir(tmp_path)

    def load(text: str | bytes, *overrides: str) -> Config:
        Path("c.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
        return load_config(Path("c.yaml"), overrides)

    return load


def faults(load: Any, text: str | bytes, *overrides: str) -> tuple[Fault, ...]:
    with pytest.raises(UserError) as caught:
        load(text, *overrides)
    told: tuple[Fault, ...] = caught.value.faults
    assert all(line for fault in told for line in (fault.where, fault.found, fault.expected, fault.fix))
    return told


def test_all_faults_at_once(load: Any):
    """A user who is told one fault a run gives up before the tenth; a union must tell each fault once, not once per branch."""
    text = """\
name: a/b
batch_size: 3
model:
  name: 3
  pooling: clss
  pooling: mean
guide: {nam: g}
data:
  train:
    - {source: jsonl, path: x, columns: {anker: q}}
    - {path: x}
    - {source: jsnl, path: x}
    - 3
loss: {temprature: 1, contrast_anchors: yes}
training: {batch_size: 1_000, max_steps: 10, epochs: 2}
optimizer: {betas: [0.9, 2]}
1: x
"""
    told = [(fault.where, fault.found) for fault in faults(load, text, "schedule.type=linaer", "foo", "selection.aruond=3")]
    assert sorted(told) == sorted(
        [
            ("c.yaml: name (line 1)", '"a/b"'),
            ("c.yaml: batch_size (line 2)", 'an unknown key, "batch_size"'),
            ("c.yaml: model.name (line 4)", "3"),
            ("c.yaml: model.pooling (line 5)", '"clss"'),
            ("c.yaml: model.pooling (line 6)", "the same key a second time (first on line 5)"),
            ("c.yaml: guide.name (line 7)", "nothing"),
            ("c.yaml: guide.nam (line 7)", 'an unknown key, "nam"'),
            ("c.yaml: data.train[0].columns.anker (line 10)", 'an unknown key, "anker"'),
            ("c.yaml: data.train[1].source (line 11)", "nothing"),
            ("c.yaml: data.train[2].source (line 12)", '"jsnl"'),
            ("c.yaml: data.train[3] (line 13)", "3"),
            ("c.yaml: loss.temprature (line 14)", 'an unknown key, "temprature"'),
            ("c.yaml: loss.contrast_anchors (line 14)", '"yes"'),
            ("c.yaml: training.batch_size (line 15)", '"1_000"'),
            ("c.yaml: training.max_steps (line 15)", "10"),
            ("c.yaml: optimizer.betas[1] (line 16)", "2"),
            ("c.yaml: 1 (line 17)", "1"),
            ("--set schedule.type=linaer: schedule.type", '"linaer"'),
            ("--set foo", '"foo"'),
            ("--set selection.aruond=3: selection.aruond", 'an unknown key, "aruond"'),
        ]
    )


@pytest.mark.parametrize(
    ("override", "expected", "fix"),
    [
        ("loss.temprature=1", "temperature, margin", 'did you mean "temperature"?'),
        ("batch_size=4", "name, output_dir", "did you mean training.batch_size?"),
        ("model.pooling=Means", "cls, mean, last or null", 'did you mean "mean"?'),
        ("guide=selv", "self or null", 'did you mean "self"?'),
        ("training.batch_size=true", "a whole number of at least 1", "Triplets per optimizer step"),
        ("training.batch_size='8'", "a whole number of at least 1", "without quotes"),
        ("training.stop_at_step=0.5", "a whole number of at least 1 or null", "Optimizer step"),
        ("name=12", "letters, digits", "in quotes"),
        ("loss.margin=.nan", "a finite number", "threshold"),
        (
            "loss.dimensions=[256,256]",
            "a list of whole numbers of at least 1, each once, at least one or null",
            "each number once",
        ),
        ("loss.dimension_weights=[1]", "a list of numbers above 0", "give loss.dimensions"),
        ("loss.contrast_anchors=on", "true or false", "anchors"),
        ("data.train=[]", "a list of sources, at least one", "Sources of the training rows"),
        ("model=./folder", "a mapping (keys: name", 'write {name: "./folder"}'),
        ("guide=/folder", "a mapping (keys: name", 'write {name: "/folder"}'),
        ("guide=none", "self or null", "did you mean null?"),
        ("data.train[0].source=xml", "hub, jsonl, csv, xlsx, parquet, medi, classification or texts", "give what is expected"),
        ("evaluation.tasks=[{type: sts, name: a}]", "text that is not empty", "add the key path"),
        ("loss=", "a mapping (keys: weight, temperature", "The loss"),
        ("loss.softness=0", "a number above 0", "threshold"),
        ("data.similarity_depth=21", "a whole number from 0 to 20", "halved"),
    ],
)
def test_a_fault_says_what_is_allowed_and_how_to_mend_it(load: Any, override: str, expected: str, fix: str):
    """ "Invalid input" sends the user to the source code."""
    (fault,) = faults(load, SMALLEST, override)
    assert fault.where.startswith(f"--set {override}: ")
    assert expected in fault.expected
    assert fix in fault.fix


@pytest.mark.parametrize("guide", ["null", "self"])
@pytest.mark.parametrize(
    ("override", "where"),
    [
        ("distillation.weight=2", "distillation.weight"),
        ("distillation.regression=2", "distillation.regression"),
        ("data.batching=similar", "data.batching"),
    ],
)
def test_what_asks_the_guide_needs_one(load: Any, override: str, where: str, guide: str):
    """The student learns nothing from itself; without a guide a key that says otherwise would be a silent nothing."""
    (fault,) = faults(load, SMALLEST, override, f"guide={guide}")
    assert where in fault.where
    assert f"guide: {guide}" in fault.found
    assert load(SMALLEST, override, "guide={name: g}").guide.name == "g"


def test_something_must_be_learned(load: Any):
    (fault,) = faults(load, SMALLEST, "loss.weight=0", "guide={name: g}")
    assert fault.found == "0, and loss.weight: 0"
    assert load(SMALLEST, "loss.weight=0", "guide={name: g}", "distillation.weight=1").loss.weight == 0


@pytest.mark.parametrize(
    ("text", "where", "found", "fix"),
    [
        ("", "c.yaml", "an empty file", "recipe"),
        ("# only a comment\n", "c.yaml", "an empty file", "recipe"),
        ("- a\n", "c.yaml", "a list", "dash"),
        ("just words\n", "c.yaml", "just words", "colon"),
        ("name: a\n---\nname: b\n", "c.yaml (line 2)", "a second document", "---"),
        ("model:\n\tname: x\n", "c.yaml (line 2)", "a tab", "spaces"),
        ("model:\n  name: x\n\tmax_length: 3\n", "c.yaml (line 3)", "a tab", "spaces"),
        ("name: &a x\nmodel: {name: *a}\n", "c.yaml (line 1)", "anchor", "write the value out"),
        ("a:\n- *nothing\n", "c.yaml (line 2)", "alias", "write the value out"),
        ("name: !!python/object/apply:os.getcwd []\n", "c.yaml (line 1)", "a tag", "leave the tag out"),
        ("a: " + "[" * 100_000, "c.yaml (line 1)", "nesting deeper than 50", "levels"),
        ("a: 1\r\u2028\x85\r- b\n", "c.yaml (line 5)", "expected", "correct the line"),
        ("a: 'b\n", "c.yaml (line 2)", "unexpected end", "quote"),
        ("name: a: b\n", "c.yaml (line 1)", "not allowed here", "colon"),
        ("name: \x07\n", "c.yaml (line 1)", "#x0007", "remove"),
        ('name: "\\UFFFFFFFF"\n', "c.yaml", "an escape of no character", "escape"),
        (b"name: caf\xe9\n", "c.yaml", "0xe9 at byte 10", "UTF-8"),
    ],
)
def test_what_is_no_config_at_all(load: Any, text: str | bytes, where: str, found: str, fix: str):
    """Each of these would be a traceback, an alias bomb, or a config that is silently another one."""
    (fault,) = faults(load, text)
    assert fault.where == where
    assert found in fault.found
    assert fix in fault.fix


def test_missing_file_and_folder(tmp_path: Path):
    """A mistyped path is the commonest fault of all, and must not hide what is wrong with the overrides."""
    with pytest.raises(UserError) as caught:
        load_config(tmp_path / "no.yaml", ["a=["])
    assert caught.value.faults[0].found == "no such file"
    assert len(caught.value.faults) == 2
    with pytest.raises(UserError, match="inside the folder"):
        load_config(tmp_path)


@pytest.mark.parametrize(
    ("key", "written", "read"),
    [
        *[
            ("margin", written, read)
            for written, read in (("1e-5", 1e-5), ("1E+0", 1.0), ("5.0e-6", 5e-6), (".5", 0.5), ("-1.", -1.0))
        ],
        *[("block_size", written, read) for written, read in (("010", 10), ("+3", 3), ("0x10", 16), ("0o10", 8))],
        *[("mask_duplicates", written, read) for written, read in (("true", True), ("False", False))],
        *[("block_size", written, None) for written in ("~", "null", "Null", "")],
    ],
)
def test_scalars_are_those_of_yaml_1_2(load: Any, key: str, written: str, read: object):
    """PyYAML alone reads 1e-5 as text and 010 as 8."""
    value = load(SMALLEST + f"loss:\n  {key}: {written}\n").loss.model_dump()[key]
    assert (value, type(value)) == (read, type(read))


@pytest.mark.parametrize(
    "text", ["yes", "no", "on", "off", "y", "1:30", "2024-01-01", "1_000", "=", "<<", "e5", ".", "'1e-5'", "9" * 5000]
)
def test_text_stays_text(load: Any, text: str):
    """PyYAML alone reads `no` as false, 1:30 as 90 and a date as a date; a prompt or a column may be called so."""
    assert load(SMALLEST + f"guide: {{name: g, prompt: {text}}}\n").guide.prompt == text.strip("'")


def test_overrides_reach_every_place(load: Any):
    """An override that lands elsewhere trains another run than the one asked for; the last one wins."""
    config = load(
        "name: run\nmodel: {name: m}\ntraining:\ndata: {train: [{source: csv, path: a}, {source: csv, path: b}]}\n",
        *("training.max_steps=10", "guide={name: g, max_length: 8}", "guide.max_length=16", "data.train[0].path=x=y"),
        *("data.train.1.path=z", "loss.margin=0.1", "loss.margin=-1e-3", "tracking.wandb.project=p", "model.layers=[0, 2]"),
    )
    assert (config.training.max_steps, config.training.epochs) == (10, None)
    assert isinstance(config.guide, GuideConfig)
    assert (config.guide.max_length, [source.path for source in config.data.train]) == (16, ["x=y", "z"])
    assert (config.loss.margin, config.model.layers) == (-1e-3, [0, 2])
    assert config.tracking.wandb is not None


@pytest.mark.parametrize(
    ("override", "found"),
    [
        *[
            (override, f'"{override}"')
            for override in ("training.seed", "=3", "training..seed=3", "a.=3", "data.train[x]=3", "a b=1")
        ],
        ("data.train[1].path=x", '"1"'),
        ("data.train.first.path=x", '"first"'),
        ("name.sub=x", '"run"'),
        ("loss={margin: 1, margin: 2}", "the same key a second time"),
        ("loss.margin=[", "expected the node content"),
        ("guide=*a", "an anchor (&) or alias (*)"),
    ],
)
def test_bad_overrides_are_named(load: Any, override: str, found: str):
    """Without its text, the fault of one override among ten can't be found."""
    (fault,) = faults(load, SMALLEST, override)
    assert fault.where.startswith(f"--set {override}")
    assert found in fault.found


def test_an_override_mends_the_file(load: Any):
    """Values are judged after the overrides, and a fault in what an override replaced is no fault."""
    assert load(SMALLEST + "loss: {margin: x, nope: 1}\n", "loss={margin: 1}").loss.margin == 1.0


def test_bom_and_crlf(load: Any):
    """Files saved by Windows editors are good files."""
    assert load(b"\xef\xbb\xbf" + SMALLEST.replace("\n", "\r\n").encode()).name == "run"


AWKWARD = [
    "yes",
    "1e-5",
    "null",
    "0o17",
    "1:30",
    "2024-01-01",
    "query: ",
    " a\n\tb ",
    "#x",
    "é 漢 😀",
    "'\"\\",
    "<<",
    "~",
    "\x07",
    "[",
    "-",
    "!a",
    "&a",
]


@pytest.mark.parametrize("guide", [None, "self", {"name": "g", "prompt": "p"}])
def test_resolved_yaml_loads_back(load: Any, guide: object):
    """config.yaml of a run folder is what a resume starts from: a value that changes kind on the way is another run."""
    config = Config.model_validate(
        {
            "name": "1e5",
            "model": {"name": "m", "layers": [0, 2]},
            "guide": guide,
            "data": {
                "train": [
                    *[{"source": "jsonl", "path": text, "prompts": {"anchor": text}} for text in AWKWARD],
                    {"source": "medi", "path": "x"},
                ]
            },
            "loss": {"temperature": 1, "margin": -1e-300, "block_size": 4},
            "training": {"max_steps": 10**12},
            "optimizer": {"lr": 1e16, "eps": 5e-324},
            "evaluation": {
                "tasks": [
                    {"type": "sts", "name": "s", "path": "p"},
                    {"type": "retrieval", "name": "r", "path": "p"},
                    {"type": "classification", "name": "c", "train": "a", "test": "b"},
                ]
            },
            "tracking": {"wandb": {"project": "no"}},
        }
    )
    text = resolved_yaml(config)
    assert load(text) == config
    assert resolved_yaml(load(text)) == text


EXCLUDING = {"train": [{"source": "jsonl", "path": "a"}], "exclude_evaluation_texts": True}


def test_exclusion_without_tasks_is_told_at_its_key(tmp_path):
    """Nothing would be left out, and the user would believe that it was; told with all other faults, under the key to fix."""
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"name": "r", "model": {"name": "m"}, "data": EXCLUDING, "training": {"batch_size": 0}}))
    with pytest.raises(UserError) as caught:
        load_config(path)
    where = [fault.where for fault in caught.value.faults]
    assert [place.split(" (")[0] for place in where] == [f"{path}: training.batch_size", f"{path}: data.exclude_evaluation_texts"]
    assert "(line " in where[1]
    assert "evaluation.tasks" in caught.value.faults[1].fix
    task = "evaluation.tasks=[{type: sts, name: s, path: p}]"
    assert load_config(path, ["training.batch_size=2", task]).data.exclude_evaluation_texts
    assert not load_config(path, ["training.batch_size=2", "data.exclude_evaluation_texts=false"]).evaluation.tasks


def test_what_is_neither_a_path_nor_keys_is_told():
    """From a notebook, where a variable is not what it was thought to be."""
    with pytest.raises(UserError, match="the path of a YAML, or nested dicts"):
        load_config(None)
