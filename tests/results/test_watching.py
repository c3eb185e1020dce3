"""`evaluate --watch`: checkpoints are measured as they land, by a process that training does not wait for."""

import json
import shutil
import threading
import time

import pytest
from support.running import WHOLE, add_scores, gist

from gist_train.config.loading import load_config
from gist_train.evaluation.score_file import read_scores
from gist_train.progress import terminal
from gist_train.results import comparison
from gist_train.results.comparison import watch
from gist_train.run_folder import Run

pytestmark = pytest.mark.usefixtures("on_cpu")


@pytest.fixture
def config(write_config, triplets, tmp_path):
    """A run of 8 steps with a checkpoint every 4, and a task that training itself never measures."""
    texts = [row["anchor"] for row in triplets]
    pairs = [f"{a}\t{b}\t{i % 6}\n" for i, (a, b) in enumerate(zip(texts[:9], texts[9:18], strict=True))]
    (tmp_path / "pairs.tsv").write_text("sentence1\tsentence2\tscore\n" + "".join(pairs))
    return write_config(
        evaluation={"tasks": [{"type": "sts", "name": "pairs", "path": str(tmp_path / "pairs.tsv")}]},
        training={"batch_size": 8, "max_steps": 8, "precision": "float32"},
    )


def test_a_finished_run_is_measured_and_left(config, tmp_path):
    """It must end by itself, with one JSON object on stdout, and find nothing to do the second time."""
    run = tmp_path / "runs" / "run"
    assert gist("train", config).code == 0
    ended = gist("evaluate", config, "--watch", "--json")
    assert ended.code == 0, ended.err
    scores = json.loads(ended.out)
    assert list(scores) == ["base", "step 4", "step 8"]
    rows = (run / "evaluations.jsonl").read_text()
    by_step = read_scores(Run(run), WHOLE)
    assert [by_step[step] for step in (0, 4, 8)] == list(scores.values())
    assert json.loads(gist("evaluate", config, "--watch", "--json").out) == scores
    assert (run / "evaluations.jsonl").read_text() == rows


def test_it_waits_for_what_is_not_there_yet(config, tmp_path, monkeypatch):
    """Started before the training: no folder, then checkpoint by checkpoint, then the end. It must neither end early nor hang."""
    monkeypatch.setattr(comparison, "POLL_SECONDS", 0.05)
    run, elsewhere = tmp_path / "runs" / "run", tmp_path / "elsewhere"
    assert gist("train", config).code == 0
    shutil.move(run, elsewhere)
    loaded = load_config(config, [])
    seen: list[int] = []
    watcher = threading.Thread(target=lambda: seen.extend(step for step, _ in watch(loaded, Run(run), terminal())), daemon=True)
    watcher.start()

    def measured(*steps):
        deadline = time.monotonic() + 60
        while sorted(read_scores(Run(run), WHOLE)) != [*steps]:
            assert time.monotonic() < deadline, read_scores(Run(run), WHOLE)
            time.sleep(0.05)

    shutil.copytree(elsewhere, run, ignore=shutil.ignore_patterns("checkpoints", "ended.json"))
    measured(0)
    for step in (4, 8):
        folder = Run(run).checkpoint(step)
        shutil.copytree(Run(elsewhere).checkpoint(step), folder.with_name(f".{folder.name}.partial"))
        folder.with_name(f".{folder.name}.partial").rename(folder)
        measured(*range(0, step + 1, 4))
    assert watcher.is_alive()  # the training might go on
    shutil.copy(elsewhere / "ended.json", run / "ended.json")
    watcher.join(60)
    assert seen == [0, 4, 8]


def test_a_checkpoint_that_is_gone_is_told(config, tmp_path, monkeypatch):
    """Retention may take one before its turn comes: no traceback, and the others are measured."""
    run = tmp_path / "runs" / "run"
    assert gist("train", config).code == 0
    monkeypatch.setattr(Run, "saved_steps", lambda _: [4, 6, 8])
    ended = gist("evaluate", config, "--watch")
    assert ended.code == 0, ended.err
    assert "step 6: deleted before its turn came" in ended.err
    assert sorted(read_scores(Run(run), WHOLE)) == [0, 4, 8]


def test_a_damaged_checkpoint_is_an_error(config, tmp_path):
    """What is there and wrong must not pass for what retention took."""
    assert gist("train", config).code == 0
    path = Run(tmp_path / "runs" / "run").checkpoint(8) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    ended = gist("evaluate", config, "--watch")
    assert ended.code == 2
    assert "SHA-256" in ended.err


def test_it_stands_alone(config):
    """Names of models beside it would be dropped in silence."""
    ended = gist("evaluate", config, "--watch", "--steps", "all")
    assert ended.code == 2
    assert "--watch alone" in ended.err


def test_training_writes_no_figure_of_a_step_twice(config, tmp_path):
    """What a watcher has measured, an evaluation during training leaves as it is."""
    run = tmp_path / "runs" / "run"
    assert gist("train", config).code == 0
    assert gist("evaluate", config, "--watch").code == 0
    before = (run / "evaluations.jsonl").read_text()
    assert gist("evaluate", config, "--steps", "all").code == 0
    assert (run / "evaluations.jsonl").read_text() == before
    add_scores(run, 4, {"pairs/spearman": 0.5}, content="another file")
    assert gist("evaluate", config, "--steps", "4").code == 0
    assert (run / "evaluations.jsonl").read_text().startswith(before)
