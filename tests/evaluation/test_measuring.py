"""Models on tasks: that whoever waits sees it go on."""

import io
import time

import pytest
from rich.console import Console

from gist_train import progress
from gist_train.config.evaluation import EvaluationConfig
from gist_train.config.models import ModelConfig
from gist_train.evaluation import measuring
from gist_train.evaluation.measuring import Measuring
from gist_train.evaluation.metrics import Score
from gist_train.evaluation.mteb_tasks import LoadedMteb


class Foreign:
    """A model that is none of ours, as those with code of their own."""

    max_length = 32
    normalized = True

    def __init__(self):
        self.prompts = {}

    def with_max_length(self, _):
        return self

    def with_truncation(self, _):
        return self

    def fingerprint(self):
        return "fingerprint"


class Local:
    name = "local"


class OfMteb(LoadedMteb):
    name = "theirs"

    def __init__(self):
        pass


@pytest.mark.parametrize("task", [Local(), OfMteb()])
def test_work_that_counts_nothing_is_seen(task, monkeypatch, tmp_path):
    """Half an hour of a benchmark without a word is taken for a hang, and stopped."""

    def slowly(*_, **__):
        time.sleep(0.3)
        return {"score": 0.5}

    monkeypatch.setattr(progress, "EVERY", 0.05)
    monkeypatch.setattr(measuring, "measure_mteb", slowly)
    monkeypatch.setattr(measuring, "measure", lambda *_: {"local/score": Score(slowly()["score"], None)})
    console = Console(file=io.StringIO())
    at_hand = Measuring(EvaluationConfig(), ModelConfig(name="a/b"), {}, [task], tmp_path, console)
    assert [score.value for score in at_hand.of_model(Foreign()).values()] == [0.5]
    assert console.file.getvalue().splitlines()[0] == f"evaluating {task.name} (1 of 1), 0 s so far"
