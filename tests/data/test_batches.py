"""The batch plan: the authors' procedure written out, what every batching promises, and that a step is a pure function."""

import gzip
import itertools
import json
import os
import random
from collections import Counter
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from gist_train.data import batches
from gist_train.data.batches import BatchPlan
from gist_train.data.cells import Likeness

DATA = Path(os.environ.get("GIST_TRAIN_DATA", "../shared/data"))
SHUFFLED = ["task", "mixed", "similar"]
BATCHINGS = ["reference", *SHUFFLED]
SIZES = (37, 64, 5, 90, 1)
"""Rows per task: with remainders, without, and less than a batch of 8."""


def plan_of(tasks, batching="task", *, size=8, seed=42, anchors=None, positives=None, sources=None, weights=None) -> BatchPlan:
    """A plan over rows whose texts all differ, unless anchors (an id a row) or positives (a list of ids a row) are given."""
    rows = len(tasks)
    anchors = range(rows) if anchors is None else anchors
    positives = [[rows + row] for row in range(rows)] if positives is None else positives
    return BatchPlan(
        task=np.asarray(tasks, dtype=np.int32),
        anchor=np.asarray(anchors, dtype=np.int32),
        positive=np.asarray([text for row in positives for text in row], dtype=np.int32),
        positive_offsets=np.cumsum([0, *map(len, positives)], dtype=np.int64),
        batching=batching,
        batch_size=size,
        seed=seed,
        source=None if sources is None else np.asarray(sources, np.int32),
        weights=weights,
        likeness=likeness_of(rows) if batching == "similar" else None,
    )


def likeness_of(rows: int, depth: int = 2) -> Likeness:
    """Of random vectors of length 1."""
    vectors = np.random.default_rng(1).normal(size=(rows, 5)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return Likeness(depth, vectors.__getitem__)


def in_runs(*sizes: int) -> list[int]:
    return [task for task, size in enumerate(sizes) for _ in range(size)]


def scattered(*sizes: int) -> list[int]:
    tasks = in_runs(*sizes)
    random.Random(0).shuffle(tasks)
    return tasks


def epoch_of(plan: BatchPlan, epoch: int) -> list[list[int]]:
    first = epoch * plan.steps_per_epoch + 1
    return [plan.batch(step).tolist() for step in range(first, first + plan.steps_per_epoch)]


def joined(batches: list[list[int]]) -> list[int]:
    return list(itertools.chain.from_iterable(batches))


def original_epoch(tasks: list, size: int, seed: int = 42) -> list[list[int]]:
    """The authors' train script (avsolatorio/GISTEmbed at 26a9f73), a window at a time."""
    windows = []
    for start in range(0, len(tasks), size):
        window = list(range(start, min(start + size, len(tasks))))
        if len(window) < size:
            continue
        if len({tasks[row] for row in window}) > 1:
            continue
        windows.append(window)
    random.Random(seed).shuffle(windows)
    return windows


def sharing(batch: list[int], anchors: list[int], positives: list[int]) -> int:
    """Rows of a batch that share an anchor or positive text with a row before them."""
    texts = [{anchors[row], positives[row]} for row in batch]
    return sum(any(texts[i] & texts[j] for j in range(i)) for i in range(len(batch)))


# reference


@pytest.mark.parametrize("size", [1, 2, 8, 16, 64])
@pytest.mark.parametrize("sizes", [(64,), (37, 64, 5, 90, 1), (16, 16, 16), (7, 9, 160, 3), (100, 1, 100)])
def test_reference_is_the_authors_procedure(sizes, size):
    """Another order, or a window that is dropped or kept otherwise, is no reproduction."""
    tasks = in_runs(*sizes)
    expected = original_epoch(tasks, size)
    if not expected:
        with pytest.raises(ValueError, match="reference"):
            plan_of(tasks, "reference", size=size)
        return
    plan = plan_of(tasks, "reference", size=size)
    assert plan.steps_per_epoch == len(expected)
    assert epoch_of(plan, 0) == expected


@pytest.mark.parametrize("seed", [0, 1, 42])
def test_reference_shuffles_with_the_seed_and_repeats_the_order(seed):
    """A reshuffle at each epoch would be better, and another recipe."""
    tasks = in_runs(40, 23, 70)
    plan = plan_of(tasks, "reference", seed=seed)
    assert [epoch_of(plan, epoch) for epoch in range(3)] == [original_epoch(tasks, 8, seed)] * 3


def test_reference_takes_tasks_in_the_order_of_the_file():
    """A task may come again later in the file: windows are of neighbouring rows, not of all rows of a task."""
    tasks = [*[0] * 8, *[1] * 8, *[0] * 8, *[1] * 4, *[0] * 4]
    assert sorted(epoch_of(plan_of(tasks, "reference"), 0)) == [list(range(8)), list(range(8, 16)), list(range(16, 24))]


def test_reference_keeps_windows_and_counts_what_it_drops():
    """Parting rows there would leave the published order; dropped rows are dropped in every epoch."""
    tasks = in_runs(20, 20)
    plan = plan_of(tasks, "reference", anchors=[0] * 40)
    assert epoch_of(plan, 0) == original_epoch(tasks, 8)
    assert [plan.counts(epoch).left_out for epoch in (0, 1)] == [8, 8]
    assert plan.counts(0).rows == 40


def test_reference_windows_of_medi():
    """30,814 rows in file order make 1,926 windows of 16, the last one short, of which 1,540 are of one task."""
    path = DATA / "medi" / "medi_like_train.json.gz"
    if not path.exists():
        pytest.skip(f"{path} is missing")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        names = [row["task_name"] for row in json.load(file)]
    number = {name: i for i, name in enumerate(dict.fromkeys(names))}
    plan = plan_of([number[name] for name in names], "reference", size=16)
    assert (len(names), -(-len(names) // 16)) == (30_814, 1_926)
    assert plan.steps_per_epoch == 1_540
    assert epoch_of(plan, 0) == original_epoch(names, 16)


# task and mixed


@pytest.mark.parametrize("order", [in_runs, scattered])
def test_task_batches_are_of_one_task_but_for_remainders(order):
    """A batch of two tasks has negatives that are told apart by their looks. Only the remainders may mix."""
    tasks = order(*SIZES)
    plan = plan_of(tasks, "task")
    whole, remainders = sum(size // 8 for size in SIZES), sum(size % 8 for size in SIZES)
    for epoch in range(3):
        pure = [batch for batch in epoch_of(plan, epoch) if len({tasks[row] for row in batch}) == 1]
        assert plan.steps_per_epoch == whole + remainders // 8
        assert len(pure) >= whole
        of_task = Counter(tasks[batch[0]] for batch in pure)
        assert all(of_task[task] >= size // 8 for task, size in enumerate(SIZES))


@pytest.mark.parametrize("batching", SHUFFLED)
@pytest.mark.parametrize("sizes", [SIZES, (64, 64), (9,), (8,), (3, 3, 3)])
def test_an_epoch_leaves_out_less_than_a_batch(sizes, batching):
    """A row that comes twice is its own false negative; remainders that are thrown away by task cost rare tasks most."""
    rows = sum(sizes)
    plan = plan_of(scattered(*sizes), batching)
    assert plan.steps_per_epoch == rows // 8
    for epoch in range(4):
        seen = joined(epoch_of(plan, epoch))
        assert len(seen) == len(set(seen)) == rows // 8 * 8
        assert set(seen) <= set(range(rows))
        counts = plan.counts(epoch)
        assert (counts.rows, counts.left_out, counts.shared_text) == (rows, rows - len(seen), 0)
        assert counts.left_out < 8


@pytest.mark.parametrize("batching", SHUFFLED)
def test_other_rows_are_left_out_each_epoch(batching):
    """Rows that are left out of every epoch are never trained on."""
    tasks = scattered(37, 66, 20)
    plan = plan_of(tasks, batching)
    left = [set(range(len(tasks))).difference(*epoch_of(plan, epoch)) for epoch in range(12)]
    assert all(len(rows) == len(tasks) % 8 for rows in left)
    assert len({frozenset(rows) for rows in left}) == 12
    assert len(set.union(*left)) > 2 * len(left[0])
    assert {tasks[row] for row in set.union(*left)} == {0, 1, 2}


@pytest.mark.parametrize("batching", SHUFFLED)
def test_epochs_and_seeds_differ_in_what_stands_together(batching):
    """Batches that keep their rows and only change places show every row the same negatives for forty epochs."""
    tasks = scattered(*SIZES)
    orders = [epoch_of(plan_of(tasks, batching, seed=seed), epoch) for seed in (1, 2) for epoch in (0, 1)]
    for one, other in itertools.combinations(orders, 2):
        assert one != other
        alike = {frozenset(batch) for batch in one} & {frozenset(batch) for batch in other}
        assert len(alike) <= 1


def test_mixed_batches_cross_tasks():
    """An order that follows the file, or sorts by task, is "task" under another name."""
    tasks = in_runs(80, 80)
    plan = plan_of(tasks, "mixed")
    assert all(len({tasks[row] for row in batch}) == 2 for batch in epoch_of(plan, 0))


# A step is a pure function


@pytest.mark.parametrize("batching", BATCHINGS)
def test_a_step_does_not_depend_on_the_steps_before(batching):
    """A resume at step N opens a fresh plan: any state in the order of batches trains on other rows from there on."""
    tasks, anchors = in_runs(*SIZES), [row // 2 for row in range(sum(SIZES))]

    def fresh():
        return plan_of(tasks, batching, anchors=anchors)

    walker = fresh()
    steps = 3 * walker.steps_per_epoch
    walked = [walker.batch(step).copy() for step in range(1, steps + 1)]
    for step in random.Random(1).sample(range(1, steps + 1), 15):
        assert np.array_equal(fresh().batch(step), walked[step - 1])
        assert np.array_equal(walker.batch(step), walked[step - 1])
    assert [fresh().counts(epoch) for epoch in (2, 0, 1)] == [walker.counts(epoch) for epoch in (2, 0, 1)]


@pytest.mark.parametrize("batching", BATCHINGS)
def test_steps_count_from_one_and_epochs_from_zero(batching):
    """An epoch that begins a step early shifts every batch of a run after the first epoch."""
    plan = plan_of(in_runs(24, 24), batching)
    assert plan.steps_per_epoch == 6
    assert [plan.epoch_of(step) for step in (1, 6, 7, 12, 13)] == [0, 0, 1, 1, 2]
    assert plan.batch(1).shape == (8,)
    assert plan.batch(1).dtype == np.int64


@pytest.mark.parametrize("step", [0, -1])
@pytest.mark.parametrize("batching", BATCHINGS)
def test_step_zero_is_refused(batching, step):
    """Python would read it as the last batch of the epoch, and train."""
    with pytest.raises(ValueError, match=f"not {step}"):
        plan_of(in_runs(24), batching).batch(step)


@pytest.mark.parametrize(
    ("batching", "tasks"), [(batching, in_runs(7)) for batching in BATCHINGS] + [("reference", in_runs(7, 8)), ("task", [])]
)
def test_rows_that_make_no_whole_batch_are_refused(batching, tasks):
    """A run of no steps that ends well is worse than a message."""
    with pytest.raises(ValueError, match=f"{len(tasks)} rows give no whole batch of 8 with batching: {batching}"):
        plan_of(tasks, batching)


# Rows with several positives


def several(rows: int, most: int = 5) -> tuple[BatchPlan, list[list[int]]]:
    texts = itertools.count(rows)
    positives = [[next(texts) for _ in range(1 + row % most)] for row in range(rows)]
    return plan_of([0] * rows, positives=positives), positives


def test_a_row_trains_on_one_of_its_own_positives():
    """An offset that is off by one trains a row on its neighbour's positive."""
    plan, positives = several(50)
    drawn = plan.positives(np.arange(50), 3)
    assert drawn.dtype == np.int32
    assert all(text in own for text, own in zip(drawn.tolist(), positives, strict=True))


def test_positives_are_drawn_by_seed_epoch_and_row_alone():
    """A draw that depends on the batch, or on the calls before it, differs after a resume and between ranks."""
    plan, positives = several(60)
    whole = {epoch: plan.positives(np.arange(60), epoch) for epoch in (0, 1, 2)}
    subset = np.array([41, 3, 59, 0, 3, 17])
    for epoch in (2, 0, 1):
        assert np.array_equal(plan.positives(subset, epoch), whole[epoch][subset])
        assert np.array_equal(several(60)[0].positives(np.arange(60), epoch), whole[epoch])
    assert not np.array_equal(whole[0], whole[1])
    other = plan_of([0] * 60, positives=positives, seed=43)
    assert not np.array_equal(other.positives(np.arange(60), 0), whole[0])
    assert plan.positives(np.arange(0), 0).shape == (0,)


def test_all_positives_come_up_about_equally_often():
    """A draw that favours the first positive wastes the others. Bounds are five standard deviations."""
    epochs, rows = 400, 50
    plan, positives = several(rows)
    drawn = np.stack([plan.positives(np.arange(rows), epoch) for epoch in range(epochs)])
    for row, own in enumerate(positives):
        times = Counter(drawn[:, row].tolist())
        expected = epochs / len(own)
        assert set(times) == set(own)
        assert all(abs(times[text] - expected) <= 5 * np.sqrt(expected) for text in own)


def test_neighbouring_rows_and_epochs_draw_independently():
    """Draws that go round in step give the same pairs of positives in every batch. Bounds as above."""
    rows = 4000
    plan = plan_of([0] * rows, positives=[[rows + 2 * row, rows + 2 * row + 1] for row in range(rows)])
    bits = np.stack([(plan.positives(np.arange(rows), epoch) - rows) % 2 for epoch in (0, 1)])
    for one, other in [(bits[0, :-1], bits[0, 1:]), (bits[0], bits[1])]:
        pairs = np.bincount(2 * one + other, minlength=4)
        assert (np.abs(pairs - rows / 4) < 5 * np.sqrt(rows / 4)).all()


# Rows that share a text


def pairs_share(kind: str, rows: int) -> tuple[list[int], list[int]]:
    """Anchors and positives of rows of which 2k and 2k + 1 share a text."""
    anchors, positives = list(range(rows)), list(range(rows, 2 * rows))
    for row in range(0, rows, 2):
        if kind == "anchors":
            anchors[row + 1] = anchors[row]
        elif kind == "positives":
            positives[row + 1] = positives[row]
        else:
            anchors[row + 1] = positives[row]
    return anchors, positives


@pytest.mark.parametrize("kind", ["anchors", "positives", "anchor and positive"])
@pytest.mark.parametrize("batching", SHUFFLED)
def test_rows_that_share_a_text_are_parted(batching, kind):
    """Two rows with one text in a batch are each other's false negatives. Parting must lose no row, repeat none, and leave every
    batch the tasks that it had, or "task" batching is undone by the back door."""
    tasks = scattered(64, 128, 40)
    anchors, positives = pairs_share(kind, len(tasks))
    plain = plan_of(tasks, batching)
    plan = plan_of(tasks, batching, anchors=anchors, positives=[[text] for text in positives])
    shared_before = moved = 0
    for epoch in range(5):
        before, after = epoch_of(plain, epoch), epoch_of(plan, epoch)
        shared_before += sum(sharing(batch, anchors, positives) for batch in before)
        moved += sum(one != other for one, other in zip(joined(before), joined(after), strict=True))
        assert sum(sharing(batch, anchors, positives) for batch in after) == plan.counts(epoch).shared_text == 0
        assert sorted(joined(after)) == sorted(joined(before))
        for one, other in zip(before, after, strict=True):
            assert Counter(tasks[row] for row in one) == Counter(tasks[row] for row in other)
    assert 0 < moved <= 2 * shared_before


@pytest.mark.parametrize("batching", SHUFFLED)
def test_a_row_whose_anchor_is_its_positive_is_no_conflict(batching):
    """A row shares nothing with itself: it must neither be moved nor be counted."""
    tasks = in_runs(40, 24)
    plan = plan_of(tasks, batching, positives=[[row] for row in range(64)])
    assert epoch_of(plan, 0) == epoch_of(plan_of(tasks, batching), 0)
    assert plan.counts(0).shared_text == 0


def test_rows_of_one_text_are_parted_from_others():
    """Two equal ids in one row must not hide the row beside it that has the same text."""
    anchors = [row // 2 for row in range(64)]
    plan = plan_of([0] * 64, anchors=anchors, positives=[[text] for text in anchors])
    assert all(sharing(batch, anchors, anchors) == 0 for batch in epoch_of(plan, 0))
    assert plan.counts(0).shared_text == 0


@pytest.mark.parametrize("batching", SHUFFLED)
def test_rows_that_cannot_be_parted_are_counted(batching):
    """All rows with one anchor: seven of eight in each batch stand beside a twin, and the user must learn of it."""
    plan = plan_of([0] * 24, batching, anchors=[0] * 24)
    batches = epoch_of(plan, 0)
    assert sorted(joined(batches)) == list(range(24))
    assert plan.counts(0).shared_text == sum(sharing(batch, [0] * 24, list(range(24, 48))) for batch in batches) == 21


def test_rows_are_parted_within_their_task_only():
    """Two rows of a task of which there is one batch stay together: a partner of another task would mix the batch."""
    tasks = in_runs(8, 80)
    plan = plan_of(tasks, "task", anchors=[0, 0, *range(2, 88)])
    for epoch in range(5):
        assert sorted(range(8)) in [sorted(batch) for batch in epoch_of(plan, epoch)]
        assert plan.counts(epoch).shared_text == 1


def test_three_twins_in_two_batches_leave_one_that_is_counted():
    """What can be parted is parted, and only the rest is counted."""
    anchors = [0, 0, 0, *range(3, 16)]
    plan = plan_of([0] * 16, anchors=anchors)
    for epoch in range(20):
        assert plan.counts(epoch).shared_text == 1


def test_the_earlier_of_two_rows_moves_where_the_later_cannot():
    """Of two rows that share a text either may move: the only row of its task has no partner, the other row has seven."""
    tasks, anchors = in_runs(15, 1), [*range(15), 0]
    plan = plan_of(tasks, "mixed", anchors=anchors)
    assert [plan.counts(epoch).shared_text for epoch in range(20)] == [0] * 20


def test_parting_looks_at_the_positives_of_the_epoch():
    """Twins by a positive that is not drawn in an epoch share nothing in it; those by the drawn one must be parted in each."""
    rows, shared = 64, 1000
    positives = [[100 + row, shared + row // 4] for row in range(rows)]
    plan = plan_of([0] * rows, positives=positives)
    unparted = plan_of([0] * rows)
    before = 0
    for epoch in range(6):
        drawn = plan.positives(np.arange(rows), epoch).tolist()
        assert all(sharing(batch, list(range(rows)), drawn) == 0 for batch in epoch_of(plan, epoch))
        before += sum(sharing(batch, list(range(rows)), drawn) for batch in epoch_of(unparted, epoch))
    assert before > 0


def test_texts_that_can_not_be_parted_cost_no_time():
    """Yes and no as positives of 20,000 rows: 40,000 tries a batch would hold the training up for minutes each epoch."""
    rows = 20_000
    plan = BatchPlan(
        task=np.zeros(rows, np.int32),
        anchor=np.arange(rows, dtype=np.int32),
        positive=np.tile(np.array([rows, rows + 1], np.int32), rows // 2),
        positive_offsets=np.arange(rows + 1),
        batching="task",
        batch_size=16,
        seed=0,
    )
    tries = 0

    def counted(*args, **kwargs):
        nonlocal tries
        tries += 1
        return Counter(*args, **kwargs)

    with mock.patch.object(batches, "Counter", counted):
        assert plan.counts(0).shared_text >= rows - 2 * plan.steps_per_epoch - rows % 16
    assert tries == 0


# Weights of sources


@pytest.mark.parametrize("batching", SHUFFLED)
@pytest.mark.parametrize(("weight", "copies"), [(1.0, {1}), (2.0, {2}), (2.5, {2, 3}), (0.25, {0, 1})])
def test_a_row_is_in_an_epoch_as_often_as_its_weight_says(batching, weight, copies):
    """A weight that multiplied the loss, or the wrong source's rows, would train all the same."""
    sources = [0] * 40 + [1] * 80
    plan = plan_of([0] * 120, batching, size=4, sources=sources, weights=[1.0, weight])
    assert plan.steps_per_epoch == (40 + 80 * weight) // 4
    for epoch in range(3):
        stands = Counter(joined(epoch_of(plan, epoch)))
        assert {stands[row] for row in range(40)} == {1}
        assert {stands[row] for row in range(40, 120)} == copies
        assert sum(stands.values()) == 40 + 80 * weight
        assert plan.counts(epoch).left_out == sum(stands[row] == 0 for row in range(120))


def test_all_rows_of_a_light_source_have_their_turn():
    """With weight 0.3 each row comes up 3 times in 10 epochs: an independent draw an epoch would leave some out for long."""
    plan = plan_of([0] * 100, "mixed", size=1, sources=[0] * 100, weights=[0.3])
    counts = Counter(row for epoch in range(10) for row in joined(epoch_of(plan, epoch)))
    assert [counts[row] for row in range(100)] == [3] * 100


@pytest.mark.parametrize(("rows", "weight"), [(5, 0.1), (1, 0.5), (3, 1.05)])
def test_a_small_light_source_has_its_turn_too(rows, weight):
    """Rounded, one tenth of five rows is none: they would never be trained on, and nothing would say so."""
    plan = plan_of([0] * (40 + rows), "mixed", size=1, sources=[0] * 40 + [1] * rows, weights=[1.0, weight])
    seen = Counter(row for epoch in range(rows) for row in joined(epoch_of(plan, epoch)))
    assert all(seen[row] >= 1 for row in range(40, 40 + rows))


@pytest.mark.parametrize("batching", SHUFFLED)
def test_weights_of_one_change_nothing(batching):
    """Whoever writes the default out must get the run that leaves it out."""
    tasks = scattered(*SIZES)
    plain = plan_of(tasks, batching)
    written = plan_of(tasks, batching, sources=[0] * 30 + [1] * (len(tasks) - 30), weights=[1.0, 1.0])
    assert epoch_of(plain, 1) == epoch_of(written, 1)


@pytest.mark.parametrize("batching", SHUFFLED)
def test_copies_of_a_row_are_parted(batching):
    """A row beside its own copy is the worst of false negatives."""
    plan = plan_of([0] * 64, batching, sources=[0] * 64, weights=[2.0])
    for epoch in range(3):
        assert plan.counts(epoch).shared_text == 0
        assert all(len(set(batch)) == len(batch) for batch in epoch_of(plan, epoch))


def test_reference_takes_each_row_once():
    """The authors' windows know no weights."""
    with pytest.raises(ValueError, match="weights must be 1"):
        plan_of([0] * 16, "reference", sources=[0] * 16, weights=[2.0])
