"""End to end through the command line: words in, exit code out, one message and nothing half-written."""

import gzip
import json
import os
import re
import subprocess
import sys

import pytest
import yaml
from support.running import gist, metrics

from gist_train import __version__
from gist_train.results.comparison import run_names
from gist_train.run_folder import Run

pytestmark = pytest.mark.usefixtures("on_cpu")

GOOD = {"anchor": "turn on the light", "positive": "lights on please", "negative": "play a song", "task": "t"}


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


# What is wrong, the file's name and bytes, and what the message must say.
BAD_FILES = {
    "no file": ("rows.jsonl", None, ["data.train[0].path", "matches no file"]),
    "no column": ("rows.jsonl", lines({"question": "a", "answer": "b"}) * 20, ["question", "anchor"]),
    "an empty text": ("rows.jsonl", lines(GOOD) * 20 + lines({**GOOD, "positive": " "}), ["row 21", "positive", "empty"]),
    "a text that is a number": (
        "rows.jsonl",
        lines({**GOOD, "anchor": 5}) + lines(GOOD) * 20,
        ["row 1", "anchor", "not a string"],
    ),
    "invalid UTF-8": ("rows.jsonl", lines(GOOD) * 20 + b'{"anchor": "\xff\xfe"}\n', ["row 21", "UTF-8"]),
    "invalid UTF-8 in CSV": ("rows.csv", b"anchor,positive\na,b\n\xff,d\n", ["rows.csv", "UTF-8"]),
    "a cut gzip": ("rows.jsonl.gz", gzip.compress(lines(GOOD) * 2000)[:-30], ["rows.jsonl.gz", "cannot be read to its end"]),
    "no rows": ("rows.jsonl", b"", ["rows.jsonl", "no rows"]),
    "a header alone": ("rows.csv", b"anchor,positive\n", ["rows.csv", "no rows"]),
    "fewer rows than a batch": ("rows.jsonl", lines(GOOD) * 5, ["training.batch_size", "5 rows", "batch of 8"]),
    "a folder": ("rows", "folder", ["data.train[0].path", "a folder"]),
}


@pytest.mark.parametrize("command", ["train", "plan", "prepare"])
def test_dimensions_that_the_student_lacks_are_refused_early(write_config, tmp_path, command):
    """The loss would find out at the first step, after the guide's pass of hours."""
    ended = gist(command, write_config(loss={"dimensions": [8, 33]}))
    assert ended.code == 2
    for part in ("loss.dimensions", "[8, 33]", "at most 32", "fix"):
        assert part in ended.err
    assert not list((tmp_path / "runs").glob("**/corpora/*"))


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_data_ends_with_2_and_a_message(write_config, tmp_path, case):
    """The user's file is wrong: a traceback or exit code 1 would say that we are."""
    name, content, told = BAD_FILES[case]
    path = tmp_path / "in" / name
    path.parent.mkdir()
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    source = "csv" if ".csv" in name else "jsonl"
    config = write_config(data={"train": [{"source": source, "path": str(path)}]})
    ended = gist("train", config)
    assert ended.code == 2
    assert "Traceback" not in ended.err
    for part in [*told, "found", "expected", "fix"]:
        assert part in ended.err, part
    assert ended.err.count("  fix  ") <= 2  # the fault, and what may be done about all of its kind
    assert ended.out == ""
    assert not (tmp_path / "runs" / "run").exists()
    if case != "fewer rows than a batch":
        left = [path.name for path in (tmp_path / "runs").rglob("*") if path.is_file() and not path.name.endswith(".lock")]
        assert left == []


BAD_CONFIGS = {
    "an unknown key": ({"lerning_rate": 1}, ["lerning_rate"]),
    "an unknown key below": ({"training": {"batch_sise": 8}}, ["training.batch_sise", "batch_size"]),
    "a wrong type": ({"optimizer": {"lr": "fast"}}, ["optimizer.lr", "fast"]),
    "both lengths": (
        {"training": {"epochs": 1, "max_steps": 2}},
        ["training.max_steps", "null where epochs is 1", "--set training.epochs=null"],
    ),
    "a stop by no metric": (
        {"evaluation": {"every": 2, "stop_after": 1, "tasks": [{"type": "sts", "name": "s", "path": "./nowhere.tsv"}]}},
        ["selection.metric", "stop_after", "s/spearman"],
    ),
    "no such model": ({"model": {"name": "./nowhere"}}, ["model.name", "./nowhere"]),
    "no such guide": ({"guide": {"name": "./nowhere"}}, ["guide.name", "./nowhere"]),
    "a layer too many": ({"layers": [0, 7]}, ["model.layers", "layers 0 to 1"]),
    "a task without its file": (
        {"evaluation": {"tasks": [{"type": "sts", "name": "s", "path": "./nowhere.tsv"}]}},
        ["evaluation.tasks[0]", "nowhere.tsv"],
    ),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_a_bad_config_ends_with_2_and_a_message(write_config, make_model, tmp_path, case):
    """Each fault has its path; nothing is written before the config is known to be good."""
    sections, told = BAD_CONFIGS[case]
    if "layers" in sections:
        sections = {"model": {"name": str(make_model()), **sections}}
    ended = gist("train", write_config(**sections))
    assert ended.code == 2
    assert "Traceback" not in ended.err
    for part in [*told, "found", "expected", "fix"]:
        assert part in ended.err, part
    assert not (tmp_path / "runs" / "run").exists()


def test_all_faults_of_a_config_are_told_at_once(write_config):
    """One at a time, a user starts the command once per slip."""
    ended = gist("train", write_config(lerning_rate=1, optimizer={"lr": "fast"}), "--set", "training.seed=x")
    assert ended.code == 2
    assert all(path in ended.err for path in ("lerning_rate", "optimizer.lr", "training.seed"))


@pytest.mark.parametrize("command", ["prepare", "train", "evaluate", "export"])
def test_a_config_that_is_not_there(command, tmp_path, monkeypatch):
    """Every command says so in the same way."""
    monkeypatch.chdir(tmp_path)
    ended = gist(command, "no.yaml")
    assert ended.code == 2
    assert "no.yaml" in ended.err
    assert "no such file" in ended.err
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_word_ends_with_2():
    """Typer's own errors have the same code as ours."""
    assert gist("trian", "a.yaml").code == 2
    assert gist("train").code == 2
    assert gist("train", "a.yaml", "--resume").code == 2
    assert gist("--help").code == 0


def test_train_tells_where_it_runs_first(write_config, tmp_path):
    """Whoever starts two processes by mistake, or one, reads it in the first line."""
    ended = gist("train", write_config(), "--set", "training.max_steps=2", "--set", "checkpoint.every=1")
    assert ended.code == 0, ended.err
    assert re.match(r"gist-train \S+: train run\n1 process on cpu, 1 threads each, float32\n", ended.err), ended.err
    assert ended.out == ""
    run = tmp_path / "runs" / "run"
    assert Run(run).saved_steps() == [1, 2]
    assert [row["step"] for row in metrics(run)] == [1, 2]
    described = json.loads((run / "run.json").read_text())
    assert described["processes"] == 1
    assert described["packages"].keys() >= {"torch", "transformers", "sentence-transformers"}
    assert yaml.safe_load((run / "config.yaml").read_text())["training"]["max_steps"] == 2
    assert gist("evaluate", run).code == 2  # config.yaml loads; there is no task


def test_training_embeds_nothing_that_prepare_did(write_config, monkeypatch, tmp_path):
    """The guide sees each text once, ever: forty epochs, and the runs after this one, cost one pass."""
    path = write_config()
    ended = gist("prepare", path)
    assert ended.code == 0, ended.err
    assert "96 rows over 3 tasks" in ended.err
    assert not (tmp_path / "runs" / "run").exists()

    def refuse(*_):
        raise AssertionError("read, tokenised or embedded again")

    for name in ("training.embedding.load_guide", "preparation.build_corpus", "preparation.tokenise_together"):
        monkeypatch.setattr(f"gist_train.{name}", refuse)
    assert gist("prepare", path).code == 0
    assert gist("train", path, "--set", "training.max_steps=2").code == 0
    assert gist("train", write_config("other", optimizer={"lr": 1e-5}), "--set", "training.max_steps=2").code == 0


@pytest.fixture
def measured(write_config, triplets, tmp_path):
    """The config of a run with one STS task, evaluated every 2 steps."""
    texts = [row["anchor"] for row in triplets]
    pairs = [f"{a}\t{b}\t{i % 6}\n" for i, (a, b) in enumerate(zip(texts[:30], texts[30:60], strict=True))]
    (tmp_path / "pairs.tsv").write_text("sentence1\tsentence2\tscore\n" + "".join(pairs))
    tasks = [{"type": "sts", "name": "pairs", "path": str(tmp_path / "pairs.tsv")}]
    return write_config(
        evaluation={"every": 2, "tasks": tasks},
        training={"batch_size": 8, "max_steps": 4, "precision": "float32"},
        checkpoint={"every": 2, "keep_last": 10},
    )


def test_evaluate_prints_one_json_object(measured, tmp_path):
    """`gist-train evaluate --json | jq` breaks on one line more."""
    assert gist("train", measured).code == 0
    run = tmp_path / "runs" / "run"
    rows = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
    during = {(row["step"], f"{row['task']}/{row['metric']}"): row["value"] for row in rows}
    assert {step for step, _ in during} >= {2, 4}

    ended = gist("evaluate", measured, "--json")
    assert ended.code == 0, ended.err
    figures = json.loads(ended.out)
    assert list(figures) == ["base", "tuned", "guide"]
    assert all(list(values) == ["pairs/spearman", "pairs/pearson"] for values in figures.values())
    assert figures["tuned"]["pairs/spearman"] == pytest.approx(during[4, "pairs/spearman"], abs=1e-6)

    steps = json.loads(gist("evaluate", run, "--steps", "all", "--json").out)
    assert list(steps) == ["step 2", "step 4"]
    one = gist("evaluate", run, "--model", run / "checkpoints" / "step-000000004", "--json")
    assert json.loads(one.out) == pytest.approx(steps["step 4"])
    ended = gist("evaluate", run, "--steps", "3")
    assert ended.code == 2
    assert "2, 4" in ended.err
    assert gist("evaluate", run, "--steps", "newest").code == 2
    table = gist("evaluate", run)
    assert table.code == 0
    assert "tuned - base" in table.out


def test_what_libraries_print_is_no_part_of_the_object(write_config, monkeypatch):
    """W&B says its mode on stdout where it is imported: who reads the object would read that first."""
    from gist_train.planning import plan as planning

    real = planning.plan
    monkeypatch.setattr(planning, "plan", lambda *args, **given: (print("[INFO] a library's line"), real(*args, **given))[1])
    ended = gist("plan", write_config(), "--json")
    assert json.loads(ended.out)["name"] == "run"
    assert "a library's line" in ended.err


def test_a_guide_is_measured_once(write_config, write_pairs, monkeypatch):
    """It does not change, and took over half of the command."""
    from gist_train.evaluation.measuring import Measuring

    measured, real = [], Measuring._evaluate

    def counting(self, model, *rest):
        measured.append(model.width)
        return real(self, model, *rest)

    monkeypatch.setattr(Measuring, "_evaluate", counting)
    evaluation = write_pairs([f"text {n}" for n in range(9)])
    first = gist("evaluate", write_config(evaluation=evaluation), "--json")
    assert first.code == 0, first.err
    assert measured == [32, 48]
    again = gist("evaluate", write_config("other", evaluation=evaluation), "--json")
    assert measured == [32, 48, 32]
    assert json.loads(again.out) == json.loads(first.out)


def test_the_version():
    """The first thing that is asked for in a report of a fault."""
    assert gist("--version").out == f"{__version__}\n"


def test_the_module_is_the_command(measured, tmp_path):
    """`python -m gist_train` as a real process: stdout is the JSON alone, whatever libraries print."""
    ended = subprocess.run(
        [sys.executable, "-m", "gist_train", "evaluate", str(measured), "--json"],
        env={**os.environ, "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert ended.returncode == 0, ended.stderr
    assert list(json.loads(ended.stdout)) == ["base", "guide"]
    assert "Traceback" not in ended.stderr
    assert not (tmp_path / "runs" / "run").exists()


OTHERS = [pytest.param(name, marks=pytest.mark.slow) for name in ("evaluate", "select", "export", "report")]


@pytest.mark.parametrize("command", ["plan", "train", *OTHERS])
def test_something_is_said_before_anything_slow(write_config, command):
    """Seconds of nothing after a command look like a hang: torch alone takes two to import."""
    path = write_config(model={"name": "no-such-model"})  # it ends where the work would begin
    run_with = [sys.executable, "-X", "importtime", "-m", "gist_train", command, str(path)]
    ended = subprocess.run(run_with, capture_output=True, text=True, timeout=120)
    before, said, after = ended.stderr.partition(f"gist-train {__version__}: {command} run\n")
    assert said, ended.stderr[-2000:]
    imported = {line.rsplit("|", 1)[-1].strip() for line in before.splitlines()}
    assert "gist_train.cli" in imported
    assert not imported & {"torch", "transformers", "numpy", "accelerate"}
    assert "torch" in after


def test_init_says_something_before_torch(write_config, tmp_path):
    """It has no config to name; whether there is a GPU takes seconds to find out."""
    write_config()
    words = ["init", str(tmp_path / "rows.jsonl"), "--to", str(tmp_path / "my.yaml")]
    run_with = [sys.executable, "-X", "importtime", "-m", "gist_train", *words]
    ended = subprocess.run(run_with, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr[-2000:]
    before, said, after = ended.stderr.partition(f"gist-train {__version__}: init {tmp_path / 'my.yaml'}\n")
    assert said
    assert not re.search(r"\| +torch\n", before)
    assert re.search(r"\| +torch\n", after)


def test_several_runs_stand_side_by_side(write_config, write_pairs):
    """Which of two trainings is better is what people ask, and would put together by hand."""
    evaluation = write_pairs([f"text {n}" for n in range(9)])
    names = ("one", "two")
    for name, seed in zip(names, (1, 2), strict=True):
        training = {"batch_size": 8, "max_steps": 2, "precision": "float32", "seed": seed}
        assert gist("train", write_config(name, evaluation=evaluation, training=training)).code == 0
    configs = [write_config(name, evaluation=evaluation) for name in names]
    together = gist("evaluate", *configs, "--json")
    assert together.code == 0, together.err
    scores = json.loads(together.out)
    assert list(scores) == ["base", "one", "guide", "two"]
    for name, config in zip(names, configs, strict=True):
        alone = json.loads(gist("evaluate", config, "--json").out)
        assert scores[name] == alone["tuned"]
        assert scores["base"] == alone["base"]
    table = gist("evaluate", *configs).out
    assert all(name in table for name in names)
    refused = gist("evaluate", *configs, "--steps", "all")
    assert (refused.code, "one run" in refused.err) == (2, True)


def test_no_run_takes_the_name_of_base_or_guide(write_config, write_pairs):
    """A run called base would take the base's column, and its score stand there as the base's."""
    evaluation = write_pairs([f"text {n}" for n in range(9)])
    other = {"tasks": [{**evaluation["tasks"][0], "name": "others"}]}
    training = {"batch_size": 8, "max_steps": 2, "precision": "float32"}
    configs = [
        write_config(name, evaluation=other if name == "g" else evaluation, training={**training, "seed": seed})
        for seed, name in enumerate(("my", "base", "g"))
    ]
    for config in configs:
        assert gist("train", config).code == 0
    scores = json.loads(gist("evaluate", *configs, "--json").out)
    assert list(scores) == ["base", "my", "guide", "run base", "g: base", "g", "g: guide"]
    alone = json.loads(gist("evaluate", configs[1], "--json").out)
    assert (scores["base"], scores["run base"]) == (alone["base"], alone["tuned"])
    assert scores["base"] != scores["run base"]


def test_runs_have_names_of_their_own(tmp_path):
    """Of two with one name, one would be gone."""
    there = [Run(tmp_path / name) for name in ("a/x", "b/x", "a/guide[1]")]
    assert run_names(there) == [str(run) for run in there]
    assert run_names([there[0], there[2]]) == ["x", "run guide[1]"]
    assert run_names([there[0], there[0]]) == [str(there[0]), f"{there[0]} (2)"]


def test_runs_of_different_tasks_have_empty_cells(write_config, write_pairs):
    """A score that one of them has not is no reason to refuse both."""
    evaluation = write_pairs([f"text {n}" for n in range(9)])
    other = {"tasks": [{**evaluation["tasks"][0], "name": "others"}]}
    configs = [write_config("one", evaluation=evaluation), write_config("two", evaluation=other)]
    together = gist("evaluate", *configs, "--json")
    assert list(json.loads(together.out)) == ["base", "guide", "two: base", "two: guide"]
    table = gist("evaluate", *configs)
    assert (table.code, "others/spearman" in table.out, "pairs/spearman" in table.out) == (0, True, True), table.err


@pytest.mark.parametrize("command", ["audit", "evaluate"])
def test_a_fault_of_selection_stops_what_selects_alone(write_config, write_pairs, command):
    """Whoever evaluates on other tasks need not clear away the metric that training went by."""
    evaluation = write_pairs([f"text {n}" for n in range(9)])
    config = write_config(evaluation=evaluation, selection={"metric": "gone/spearman"})
    ended = gist(command, config)
    assert ended.code == 0, ended.err
    assert ended.err.count("selection has a fault") <= 1
    for selecting in ("prepare", "train", "plan", "select"):
        refused = gist(selecting, config)
        assert refused.code == 2
        assert "selection.metric" in refused.err


def test_a_stopped_evaluation_keeps_what_was_measured(write_config, write_pairs, monkeypatch, tmp_path):
    """Ctrl-C in the last of several tasks must not cost the hours of those before it, and says what is kept."""
    from gist_train.evaluation import measuring

    evaluation = write_pairs([f"text {n}" for n in range(9)])
    evaluation["tasks"].append({**evaluation["tasks"][0], "name": "last"})
    config = write_config(evaluation=evaluation, training={"batch_size": 8, "max_steps": 2, "precision": "float32"})
    assert gist("train", config).code == 0
    real = measuring.measure

    def stopped(encoder, tasks):
        if tasks[0].name == "last":
            raise KeyboardInterrupt
        return real(encoder, tasks)

    monkeypatch.setattr(measuring, "measure", stopped)
    ended = gist("evaluate", config)
    assert ended.code == 130
    assert "Stopped. Scores of a run's checkpoints that were measured are kept" in ended.err
    kept = [json.loads(line)["task"] for line in Run(tmp_path / "runs" / "run").evaluations.read_text().splitlines()]
    assert {*kept} == {"pairs"}
