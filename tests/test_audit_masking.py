"""What an audit counts as masked, against a loop over the candidates of each row."""

import json

import numpy as np
import pytest
from support.running import gist

from gist_train.auditing.audit import audit
from gist_train.auditing.looking import prepare_to_look, whole_data
from gist_train.auditing.masking import SEVERAL
from gist_train.config.loading import load_config
from gist_train.model.device import this_device
from gist_train.progress import terminal
from gist_train.run_folder import Run

pytestmark = pytest.mark.usefixtures("on_cpu")
TOLERANCE = 8 * np.finfo(np.float32).eps
"""How far two roundings of one similarity may be apart: such a candidate is not masked."""


def counted(config, margin):
    """By task: batches, rows, rows without a candidate, and by block masked and all candidates; a candidate at a time."""
    looked, plan = prepare_to_look(whole_data(config), this_device(), terminal())
    corpus, totals = looked.corpus, {}
    vectors = looked.guide.anchor.embeddings(np.arange(corpus.text_count, dtype=np.int32)).double().numpy()
    for step in range(1, plan.steps_per_epoch + 1):
        rows = plan.batch(step)
        anchors, positives = corpus.anchor[rows].tolist(), plan.positives(rows, 0).tolist()
        negatives = [text for row in rows for text in corpus.negative[slice(*corpus.negative_offsets[row : row + 2])].tolist()]
        tasks = {corpus.tasks[corpus.task[row]] for row in rows}
        total = totals.setdefault(min(tasks) if len(tasks) == 1 else SEVERAL, {"batches": 0, "rows": 0, "bare": 0, "blocks": {}})
        total["batches"] += 1
        total["rows"] += len(rows)
        for i, (anchor, positive) in enumerate(zip(anchors, positives, strict=True)):
            limit = vectors[anchor] @ vectors[positive] - margin + TOLERANCE
            left = 0
            for block, query, candidates in (
                ("ap", anchor, [text for j, text in enumerate(positives) if j != i]),
                ("an", anchor, negatives),
                ("aa", anchor, [text for j, text in enumerate(anchors) if j != i]),
                ("pp", positive, [text for j, text in enumerate(positives) if j != i]),
            ):
                masked = sum(vectors[query] @ vectors[text] > limit or text in (anchor, positive) for text in candidates)
                before = total["blocks"].get(block, (0, 0))
                total["blocks"][block] = (before[0] + masked, before[1] + len(candidates))
                left += len(candidates) - masked
            total["bare"] += left == 0
    return totals


@pytest.mark.parametrize("batching", ["task", "mixed"])
def test_what_is_masked_equals_a_loop(write_config, batching, tmp_path):
    """People choose a margin by these shares: a block that counts another's candidates would choose a wrong one."""
    data = {"train": [{"source": "jsonl", "path": str(tmp_path / "rows.jsonl")}], "batching": batching}
    config = load_config(write_config(data=data))
    margins = (0.0, 0.01, 0.05, 0.3)
    masking = audit(config, this_device(), terminal(), margins=margins, thresholds={}).masking
    bare = []
    for margin in margins:
        expected = counted(config, margin)
        assert masking.by_task[margin].keys() == expected.keys()
        for task, total in expected.items():
            one = masking.by_task[margin][task]
            assert (one.batches, one.rows, one.bare) == (total["batches"], total["rows"], total["bare"])
            assert {block: (one.masked[block], one.candidates[block]) for block in one.masked} == total["blocks"]
            bare.append(total["bare"] / total["rows"])
    assert max(bare) == 1
    assert any(0 < share < 1 for share in bare)


def test_what_is_masked_is_what_training_masks(write_config):
    """The shares are those of the first epoch's steps in metrics.jsonl."""
    path = write_config(training={"batch_size": 8, "max_steps": 12, "precision": "float32"})
    config = load_config(path)
    masking = audit(config, this_device(), terminal(), thresholds={}).masking
    assert gist("train", path).code == 0
    lines = [json.loads(line) for line in Run.of(config).metrics.read_text(encoding="utf-8").splitlines()]
    for task, one in masking.by_task[0.0].items():
        assert task != SEVERAL
        steps = [line for line in lines if line["task"] == task]
        assert len(steps) == one.batches
        for block in ("ap", "aa", "pp"):  # whose candidates are as many at every step
            mean = np.mean([line[f"masked_{block}"] for line in steps])
            assert one.masked[block] / one.candidates[block] == pytest.approx(mean, abs=1e-4)


def test_it_says_how_many_batches_it_looked_at(write_config, monkeypatch):
    """Of many tasks some have no line: who reads that nothing of them is masked is wrong."""
    monkeypatch.setattr("gist_train.auditing.masking.SAMPLED_BATCHES", 2)
    ended = gist("audit", write_config())
    assert ended.code == 0, ended.err
    text = " ".join(ended.out.split())
    assert "2 of the 12 batches of the first epoch were looked at; a task without a line has no batch" in text
    page = Run.of(load_config(write_config())).audit_page.read_text(encoding="utf-8")
    assert "of 2 of the 12 batches" in page
    assert "A task without a line" in page
    monkeypatch.undo()
    assert "a task without a line" not in " ".join(gist("audit", write_config()).out.split())
