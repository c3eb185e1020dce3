"""evaluations.jsonl: what is appended is read back, whatever happened in between, and scores of unlike terms are never mixed."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from support.running import WHOLE, add_scores, exit_code_of

from gist_train.evaluation.metrics import Score
from gist_train.evaluation.score_file import Terms, append_scores, cut_scores, read_items, read_scores
from gist_train.run_folder import Run

EVALUATIONS = "evaluations.jsonl"


def test_scores_come_back_by_step(tmp_path):
    """Values of a step that is evaluated again replace the older ones."""
    add_scores(tmp_path, 0, {"sts/spearman": 0.5, "b77/f1": 0.25})
    add_scores(tmp_path, 4, {"sts/spearman": 0.6})
    add_scores(tmp_path, 4, {"sts/spearman": 0.7})
    assert read_scores(Run(tmp_path), WHOLE) == {0: {"sts/spearman": 0.5, "b77/f1": 0.25}, 4: {"sts/spearman": 0.7}}
    assert read_scores(Run(tmp_path / "elsewhere"), WHOLE) == {}


def test_a_row_says_how_it_was_measured(tmp_path):
    """The published scores are of unnormalised embeddings: a score that does not say which it is can't be put beside them."""
    scores = {"sts/spearman": Score(0.5, np.zeros((7, 2))), "mteb/accuracy": Score(0.25, None)}
    contents = {"sts": "abc", "mteb": "def"}
    append_scores(Run(tmp_path), 3, scores, terms=Terms(128, 256), normalized=False, length=128, contents=contents)
    first, second = (json.loads(line) for line in (tmp_path / EVALUATIONS).read_text().splitlines())
    common = {"step": 3, "base": None, "normalized": False, "length": 128, "max_length": 128, "truncate_dim": 256}
    assert first == {**common, "task": "sts", "metric": "spearman", "value": 0.5, "items": 7, "content": "abc"}
    assert second == {**common, "task": "mteb", "metric": "accuracy", "value": 0.25, "items": None, "content": "def"}


def test_scores_of_other_terms_stay_apart(tmp_path):
    """A score of 256 dimensions beside one of 384, or of 64 tokens beside 512, would pass for a gain or a loss of training."""
    short, narrow = Terms(64, None), Terms(None, 256)
    add_scores(tmp_path, 4, {"sts/spearman": 0.5})
    add_scores(tmp_path, 4, {"sts/spearman": 0.4}, terms=short)
    add_scores(tmp_path, 4, {"sts/spearman": 0.3}, terms=narrow)
    by_terms = {terms: read_scores(Run(tmp_path), terms) for terms in (WHOLE, short, narrow)}
    assert [by_terms[terms][4]["sts/spearman"] for terms in (WHOLE, short, narrow)] == [0.5, 0.4, 0.3]
    items = [read_items(Run(tmp_path), 4, "sts/spearman", terms, "content") for terms in (WHOLE, short, narrow)]
    assert [None if one is None else one.tolist() for one in items] == [[0.5, 0.5], [0.4, 0.4], [0.3, 0.3]]


def test_scores_of_another_task_file_do_not_count(tmp_path):
    """After an edit of the file the old scores are another task's: the latest content counts, or the one that is asked for."""
    add_scores(tmp_path, 0, {"sts/spearman": 0.5, "b77/f1": 0.2})
    add_scores(tmp_path, 4, {"sts/spearman": 0.6}, content="edited")
    assert read_scores(Run(tmp_path), WHOLE) == {0: {"b77/f1": 0.2}, 4: {"sts/spearman": 0.6}}
    assert read_scores(Run(tmp_path), WHOLE, {"sts": "content"}) == {0: {"sts/spearman": 0.5}}
    assert read_items(Run(tmp_path), 4, "sts/spearman", WHOLE, "content") is None
    assert read_items(Run(tmp_path), 4, "sts/spearman", WHOLE, "edited") is not None
    assert read_items(Run(tmp_path), 4, "sts/pearson", WHOLE, "edited") is None
    assert read_items(Run(tmp_path), 5, "sts/spearman", WHOLE, "content") is None


def test_a_torn_line_spoils_no_other(tmp_path):
    """The power went in the middle of a line: it is lost, those before and after it are not."""
    add_scores(tmp_path, 0, {"sts/spearman": 0.5})
    with (tmp_path / EVALUATIONS).open("a") as file:
        file.write('{"step": 4, "ta')
    assert read_scores(Run(tmp_path), WHOLE) == {0: {"sts/spearman": 0.5}}
    add_scores(tmp_path, 8, {"sts/spearman": 0.6})
    assert read_scores(Run(tmp_path), WHOLE) == {0: {"sts/spearman": 0.5}, 8: {"sts/spearman": 0.6}}


def test_a_torn_file_of_items_is_no_items(tmp_path):
    """Without them there is no interval; a traceback would keep the user from selecting at all."""
    add_scores(tmp_path, 0, {"sts/spearman": 0.5})
    (path,) = (tmp_path / "evaluation-items").rglob("*.safetensors")
    path.write_bytes(path.read_bytes()[:10])
    assert read_items(Run(tmp_path), 0, "sts/spearman", WHOLE, "content") is None


def test_a_run_that_goes_back_cuts_later_scores(tmp_path):
    """They are those of the trajectory that was left: kept, they would be taken for the new one's, and never measured again."""
    for step in (0, 4, 8, 12):
        add_scores(tmp_path, step, {"sts/spearman": step / 100})
    before = (tmp_path / EVALUATIONS).read_text()
    aside = tmp_path / "aside"
    aside.mkdir()
    cut_scores(Run(tmp_path), 8, aside)
    assert [*read_scores(Run(tmp_path), WHOLE)] == [0, 4, 8]
    assert (aside / EVALUATIONS).read_text() == before
    cut_scores(Run(tmp_path), 4, None)
    assert [*read_scores(Run(tmp_path), WHOLE)] == [0, 4]
    cut_scores(Run(tmp_path / "nothing"), 4, None)
    assert not (tmp_path / "nothing").exists()


def _append_many(run: str, first: int) -> int:
    for step in range(first, first + 40):
        add_scores(Path(run), step, {f"task{n}/spearman": 0.5 for n in range(20)})
    return 0


def test_two_writers_never_tear_a_line(tmp_path):
    """`evaluate --watch` and the training write at the same time: a torn line is a score that is lost."""
    with ThreadPoolExecutor(2) as both:
        codes = both.map(lambda first: exit_code_of(_append_many, str(tmp_path), first), (0, 100))
        assert [*codes] == [0, 0]
    lines = (tmp_path / EVALUATIONS).read_text().splitlines()
    assert len(lines) == 2 * 40 * 20
    assert len({(row["step"], row["task"]) for row in map(json.loads, lines)}) == 2 * 40 * 20
