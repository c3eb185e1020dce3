"""Ranks that differ refuse; one that dies, hangs or fails ends the others soon, with one message that says which and why."""

import os
import re
import signal
import time
from functools import partial
from unittest import mock

import pytest
from support.running import gist, launched

from gist_train.config.errors import UserError
from gist_train.results.comparison import joined
from gist_train.run_folder import Run
from gist_train.training import rank_reports
from gist_train.training.runlog import RunLog

pytestmark = pytest.mark.usefixtures("on_cpu")
ENDLESS = {"batch_size": 8, "max_steps": 1_000_000, "precision": "float32"}
NAMED = r"rank {} \(host \S+, process \d+\)"


@pytest.fixture
def write(write_config):
    """Writes a run that does not end of itself; by keyword, sections that differ."""

    def written(file="run", **sections):
        return write_config(file, **{"training": ENDLESS, "tracking": {"log_every": 1}, "checkpoint": {"every": 5}, **sections})

    return written


def wait_for_rows(run, count=3):
    ends = time.monotonic() + 60
    while time.monotonic() < ends:
        if run.metrics.exists() and run.metrics.read_text().count("\n") >= count:
            time.sleep(3)  # what a rank says of itself is a second old, and more where much else runs
            return
        time.sleep(0.05)
    raise TimeoutError(f"{run}: no {count} rows of metrics")


def number_of(rank):
    return rank.process.pid


DIFFERENCES = {
    "optimizer.lr": {"optimizer": {"lr": 0.05}},
    "training.seed": {"training": {**ENDLESS, "seed": 4}},
    "training.batch_size": {"training": {**ENDLESS, "batch_size": 12}},
    "training.max_steps": {"training": {**ENDLESS, "max_steps": 14}},
    "loss.margin": {"loss": {"margin": 0.1}},
    "checkpoint.every": {"checkpoint": {"every": 7}},
}


@pytest.mark.parametrize("field", DIFFERENCES)
def test_other_configs_are_refused(write, tmp_path, field):
    """Another rate or seed trains a model of nothing, another number of steps hangs: field, rank and both values are told."""
    (tmp_path / "other").mkdir()
    other = write(**DIFFERENCES[field]).rename(tmp_path / "other" / "run.yaml")
    one = write()
    with launched(tmp_path, ["train", one], ["train", other]) as ranks:
        first, second = (rank.ended(60) for rank in ranks)
    assert (first.code, second.code) == (2, 2)
    told = first.err + second.err
    assert len(re.findall(rf"^{re.escape(field)}$", told, re.MULTILINE)) == 1
    assert re.search(rf"found     \S+, on {NAMED.format(1)}\n  expected  \S+, as on {NAMED.format(0)}", told)
    assert "Traceback" not in told
    assert not (tmp_path / "runs" / "run" / "metrics.jsonl").exists()


def test_other_weights_are_refused(write, make_model, tmp_path):
    """A model that was copied to each host, and trained on one of them: same name, other weights."""
    one = write(model={"name": "model"})
    for place, seed in (("here", 0), ("there", 1)):
        (tmp_path / place).mkdir()
        (tmp_path / place / "model").symlink_to(make_model(seed=seed))
    words = ["train", one, "--set", f"output_dir={tmp_path / 'runs'}"]
    with launched(tmp_path, words, words, before=partial(change_folder, tmp_path)) as ranks:
        first, second = (rank.ended(60) for rank in ranks)
    assert (first.code, second.code) == (2, 2)
    assert "weights of the student" in first.err + second.err


def change_folder(above):
    os.chdir(above / ("here" if os.environ["RANK"] == "0" else "there"))


def test_a_dead_rank_ends_the_others_soon(write, tmp_path):
    """The one that is left waits in a collective of the backend, whose error would name nobody."""
    run = Run(tmp_path / "runs" / "run")
    with launched(tmp_path, *[["train", write()]] * 2) as ranks:
        wait_for_rows(run, 6)
        os.kill(number_of(ranks[1]), signal.SIGKILL)
        began = time.monotonic()
        first = ranks[0].ended(60)
        assert time.monotonic() - began < 15
    assert first.code == 1
    assert re.search(rf"{NAMED.format(1)} died at step \d+, training", first.err)
    assert re.search(r"safe      the checkpoint of step \d+: the same command goes on", first.err)
    assert "Traceback" not in first.err
    assert first.err.count("died") == 1


@pytest.mark.parametrize("hung", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_hung_rank_is_named_within_the_timeout(write, tmp_path, hung):
    """Rank 0 keeps the store by which ranks speak: where it hangs, the others get no answer at all."""
    run = Run(tmp_path / "runs" / "run")
    no_checkpoint = write(checkpoint={"every": 1_000_000})  # or it may be that which hangs
    with launched(tmp_path, *[["train", no_checkpoint, "--timeout", 4]] * 2) as ranks:
        wait_for_rows(run)
        os.kill(number_of(ranks[hung]), signal.SIGSTOP)
        began = time.monotonic()
        other = ranks[1 - hung].ended(60)
        assert 3 < time.monotonic() - began < 40
    assert other.code == 1
    assert re.search(rf"hung: {NAMED.format(hung)} at step \d+, training: ", other.err)
    assert "training_run.py" in (run.stacks / f"rank-{1 - hung}.txt").read_text()
    assert "Traceback" not in other.err


def sleep_on_rank_1():
    """A rank whose disk does not answer: its threads live on, its main thread does not."""
    add = RunLog.add

    def add_and_sleep(log, record, *args):
        if os.environ["RANK"] == "1" and record.step == 5:
            time.sleep(1000)
        return add(log, record, *args)

    mock.patch.object(RunLog, "add", add_and_sleep).start()


def test_a_rank_that_stands_still_is_told_from_one_that_waits(write, tmp_path):
    """Both say that they live, and neither gets on: the one that waits in a collective is not to blame."""
    with launched(tmp_path, *[["train", write(), "--timeout", 4]] * 2, before=sleep_on_rank_1) as ranks:
        first, second = (rank.ended(60) for rank in ranks)
    assert (first.code, second.code) == (1, 1)
    told = first.err + second.err
    assert re.search(rf"hung: {NAMED.format(1)} at step \d+, training: no progress for 4 s", told)
    assert told.count("hung") == 1
    assert "add_and_sleep" in (tmp_path / "runs" / "run" / "stacks" / "rank-1.txt").read_text()


def fail_on_rank_1():
    """A rank that meets what the others do not."""
    add = RunLog.add

    def add_and_fail(log, record, *args):
        if os.environ["RANK"] == "1" and record.step == 5:
            raise OSError("no route to the disk")
        return add(log, record, *args)

    mock.patch.object(RunLog, "add", add_and_fail).start()


def test_one_failure_is_one_message(write, tmp_path):
    """The others would add tracebacks of a connection that closed, of which none says why."""
    with launched(tmp_path, *[["train", write()]] * 2, before=fail_on_rank_1) as ranks:
        first, second = (rank.ended(60) for rank in ranks)
    assert (first.code, second.code) == (1, 1)
    assert (first.err + second.err).count("no route to the disk") == 1
    assert re.search(rf"{NAMED.format(1)}:\nno route to the disk", second.err)
    assert "Traceback" not in first.err + second.err


def test_what_one_rank_refuses_all_end_with(write, tmp_path):
    """A typo in one host's copy of the YAML: code 2 on all ranks, for schedulers try failures of code 1 again."""
    good, bad = write(), tmp_path / "bad.yaml"
    bad.write_text(good.read_text().replace("max_steps: 1000000", "max_stepps: 7"))
    with launched(tmp_path, ["train", good], ["train", bad]) as ranks:
        first, second = (rank.ended(60) for rank in ranks)
    assert (first.code, second.code) == (2, 2)
    assert (first.err + second.err).count("did you mean") == 1


def test_ranks_prepare_together(write, tmp_path):
    """Each embeds its share with the guide, and one of them says how far all are."""
    with launched(tmp_path, *[["prepare", write()]] * 2) as ranks:
        first, second = (rank.ended(60) for rank in ranks)
    assert (first.code, second.code) == (0, 0)
    assert "96 rows over 3 tasks" in first.err
    assert "96 rows" not in second.err


def test_ranks_evaluate_together(write, triplets, tmp_path):
    """Each measures every second task of every model; what is kept is what one process would have measured."""
    texts = [row["anchor"] for row in triplets]
    tasks = []
    for name, first in (("a", 0), ("b", 20), ("c", 40)):
        pairs = zip(texts[first : first + 20], texts[first + 20 : first + 40], strict=True)
        (tmp_path / f"{name}.tsv").write_text("".join(f"{a}\t{b}\t{i % 6}\n" for i, (a, b) in enumerate(pairs)))
        columns = {"text1": "1", "text2": "2", "score": "3"}
        tasks.append({"type": "sts", "name": name, "path": str(tmp_path / f"{name}.tsv"), "header": False, "columns": columns})
    path = write(evaluation={"tasks": tasks}, training={"max_steps": 2, "batch_size": 8})
    assert gist("train", path).code == gist("evaluate", path).code == 0
    kept = tmp_path / "runs" / "run" / "evaluations.jsonl"
    alone = sorted(kept.read_text().splitlines())
    kept.unlink()
    with launched(tmp_path, *[["evaluate", path]] * 2) as ranks:
        ended = [rank.ended(60) for rank in ranks]
    assert [rank.code for rank in ended] == [0, 0]
    assert "measuring tuned" in ended[0].err
    assert sorted(kept.read_text().splitlines()) == alone
    assert len(alone) == 2 * 3 * 2  # base and tuned, three tasks of two metrics


def test_scores_of_all_ranks_are_in_the_order_of_one():
    parts = [{"m": {"a/x": 1.0, "a/y": 2.0, "c/x": 4.0}}, {"m": {"b/x": 3.0}}]
    assert list(joined(parts)["m"].items()) == [("a/x", 1.0), ("a/y", 2.0), ("b/x", 3.0), ("c/x", 4.0)]
    assert joined([{"m": {"a/x": 1.0}}, {"m": {}}]) == {"m": {"a/x": 1.0}}
    with pytest.raises(UserError, match="another process"):
        joined([{"base": {}, "tuned": {}}, {"base": {}}])


def test_what_is_the_work_of_one_is_done_once(write, tmp_path):
    """Typed behind the launcher of the training, each process would do the whole, and print it."""
    with launched(tmp_path, *[["plan", write()]] * 2) as ranks:
        first, second = (rank.ended(60) for rank in ranks)
    assert (first.code, second.code) == (0, 0)
    assert "plan is the work of one process" in first.err
    assert "plan" not in second.err


def test_a_rank_that_never_comes_is_named(write, tmp_path):
    """A host that did not start: the others would wait for it without a word."""
    words = ["train", write(), "--timeout", 3]
    with launched(tmp_path, words, words, before=stay_away) as ranks:
        first = ranks[0].ended(60)
    assert first.code == 1
    assert "rank 1 (which never came)" in first.err


def stay_away():
    if os.environ["RANK"] == "1":
        time.sleep(1000)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_second_signal_ends_a_rank_that_waits(write, tmp_path, number):
    """Python can't handle a signal while the backend waits: only kill -9 ended it, as schedulers do after their grace period."""
    with launched(tmp_path, *[["train", write()]] * 2) as ranks:
        wait_for_rows(Run(tmp_path / "runs" / "run"))
        os.kill(number_of(ranks[1]), signal.SIGSTOP)
        time.sleep(0.5)
        for _ in range(2):
            os.kill(number_of(ranks[0]), number)
            time.sleep(0.2)
        assert ranks[0].ended(20).code == 128 + number


def test_a_long_evaluation_is_no_hang():
    """Ranks wait for the first one as long as it gets on, however long that takes."""
    heard = rank_reports.LastReport()
    began = time.monotonic()
    for minute in range(3):
        report = rank_reports.Report("a", "m", 1, "1", "evaluating", 3, count=minute, waits=False, over=False, beat=minute)
        with mock.patch("time.monotonic", return_value=began + 9 * minute):
            heard.hear(report)
        assert not heard.silent(began + 9 * minute + 9, 10)
    assert heard.silent(began + 9 * minute + 11, 10)
