"""Cells of rows that the guide finds alike, against a tree that is split a row at a time in Python's whole numbers.

Legend: R rows, G width of the guide.
"""

import numpy as np
import pytest

from gist_train.data import cells
from gist_train.data.batches import BatchPlan
from gist_train.data.cells import SCALE, Likeness, cells_of

SIZES = (40, 7, 1, 64, 2)


def unit_vectors(rows, width=6, seed=0):
    vectors = np.random.default_rng(seed).normal(size=(rows, width)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def scattered(seed=0):
    """Tasks of `SIZES` rows, anywhere, and the rows in random order."""
    random = np.random.default_rng(seed)
    task = random.permutation(np.repeat(np.arange(len(SIZES), dtype=np.int32), SIZES))
    return task, random.permutation(len(task))


def slow_cells(vectors, depth, task, rows, random):
    """One split after the other. A direction is drawn for each level of each task, as the fast one draws them."""
    whole = [[round(x) for x in row] for row in (vectors * np.float32(SCALE)).astype(np.float64).tolist()]
    by_task = {int(one): [row for row in rows.tolist() if task[row] == one] for one in np.unique(task)}
    ends = random.integers(0, [[len(of_one)] for of_one in by_task.values()], (len(by_task), 2 * depth)).tolist()
    cell_of = {}
    for of_one, drawn in zip(by_task.values(), ends, strict=True):
        leaves = [of_one]
        for level in range(depth):
            a, b = (of_one[drawn[place]] for place in (level, depth + level))
            direction = [round(float(x)) for x in (vectors[a] - vectors[b]) * np.float32(SCALE)]
            halves = []
            for leaf in leaves:
                split = sorted(leaf, key=lambda row: sum(x * y for x, y in zip(whole[row], direction, strict=True)))
                middle = len(leaf) - len(leaf) // 2
                # A leaf keeps its random order, in which the next split finds what projects alike.
                halves += [[row for row in leaf if row in part] for part in (set(split[:middle]), set(split[middle:]))]
            leaves = halves
        cell_of |= {row: number for number, leaf in enumerate(leaves) for row in leaf}
    return [cell_of[row] for row in rows.tolist()]


@pytest.mark.parametrize("read_rows", [5, 1000])
@pytest.mark.parametrize("depth", [1, 2, 4])
def test_equals_a_tree_split_row_by_row(depth, read_rows, monkeypatch):
    """A row in the cell of another one, or a task split by another's direction, would still give batches."""
    monkeypatch.setattr(cells, "READ_ROWS", read_rows)
    task, rows = scattered()
    vectors = unit_vectors(len(rows))
    found = cells_of(Likeness(depth, vectors.__getitem__), task, rows, np.random.default_rng(3))
    assert found.tolist() == slow_cells(vectors, depth, task, rows, np.random.default_rng(3))
    for one, size in enumerate(SIZES):
        counts = np.bincount(found[task[rows] == one], minlength=2**depth)
        assert counts.sum() == size
        assert counts.max() <= -(-size // 2**depth) + 1


@pytest.mark.parametrize("width", [3, 384, 1024])
def test_cells_do_not_depend_on_the_order_of_sums(width):
    """Ranks on other machines sum products in another order: were they rounded, one rank would train on other rows."""
    task, rows = scattered()
    vectors = unit_vectors(len(rows), width)
    order = np.random.default_rng(1).permutation(width)
    one, other = (
        cells_of(Likeness(4, some.__getitem__), task, rows, np.random.default_rng(3)) for some in (vectors, vectors[:, order])
    )
    assert one.tolist() == other.tolist()


def plan_of(vectors, depth, batching="similar"):
    rows = len(vectors)
    return BatchPlan(
        task=np.zeros(rows, np.int32),
        anchor=np.arange(rows, dtype=np.int32),
        positive=np.arange(rows, 2 * rows, dtype=np.int32),
        positive_offsets=np.arange(rows + 1),
        batching=batching,
        batch_size=8,
        seed=0,
        likeness=Likeness(depth, vectors.__getitem__),
    )


def likeness_in_batches(plan, vectors, epoch):
    """The mean similarity of two rows of a batch."""
    rows = plan.epoch(epoch)
    products = np.einsum("bik,bjk->bij", vectors[rows], vectors[rows])
    size = rows.shape[1]
    return (products.sum() - products.trace(axis1=1, axis2=2).sum()) / (len(rows) * size * (size - 1))


def test_deeper_trees_have_rows_more_alike_in_a_batch():
    """That is what they are for."""
    vectors = unit_vectors(2048)
    alike = [likeness_in_batches(plan_of(vectors, depth), vectors, 1) for depth in (0, 2, 4, 8)]
    assert alike == sorted(alike)
    assert alike[0] < 0.01
    assert alike[-1] > 0.3


def test_a_tree_of_no_splits_is_task_batching():
    """Bit for bit: what depth does is told from where it does nothing."""
    vectors = unit_vectors(300)
    for epoch in (0, 3):
        assert np.array_equal(plan_of(vectors, 0).epoch(epoch), plan_of(vectors, 0, "task").epoch(epoch))


def test_each_epoch_has_a_tree_of_its_own():
    """Else the same rows would meet in each epoch, and the others never."""
    vectors = unit_vectors(512)
    plan = plan_of(vectors, 5)
    first, second = ({frozenset(batch) for batch in plan.epoch(epoch).tolist()} for epoch in (0, 1))
    assert len(first & second) < 3
    assert np.array_equal(plan_of(vectors, 5).epoch(1), plan.epoch(1))
