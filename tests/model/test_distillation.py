"""The distillation loss against a double loop, in blocks, by ranks and over dimensions, in value and gradient.

Legend: B rows, M negatives, D width of the student, G of the guide. Batches are drawn in float64 unless a test says otherwise.
"""

import itertools
import math

import numpy as np
import pytest
import torch

from gist_train.model.distillation import distillation_loss, map_to_width, regression_loss
from gist_train.training.distributed import share

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = ("anchor", "positive", "negative")


def draw(rows=5, pool=7, *, ids=False, alone=False, seed=0, dtype=torch.float64):
    """Arguments of the loss by name, of random vectors of random length; the student's are leaves."""
    random = torch.Generator().manual_seed(seed)
    sizes = dict(zip(NAMES, (rows, rows, pool), strict=True))
    batch = {name: (3 * torch.randn(n, 4, generator=random, dtype=dtype)).requires_grad_() for name, n in sizes.items()}
    batch |= {f"guide_{name}": torch.randn(n, 6, generator=random, dtype=dtype) for name, n in sizes.items()}
    if ids:
        batch |= {f"{name}_ids": torch.randint(0, 9, (n,), generator=random) for name, n in sizes.items()}
    if alone:
        batch["own_negatives_only"] = torch.arange(rows) % 2 == 0
        batch["negative_rows"] = torch.randint(0, rows, (pool,), generator=random)
    return batch


def gradients(loss, batch):
    return torch.autograd.grad(loss, [batch[name] for name in NAMES])


def slow_loss(batch, temperature=0.05, guide_temperature=None, width=None):
    """A row and a candidate at a time, in Python's numbers where no gradient is needed."""

    def cosine(x, y):
        return torch.nn.functional.cosine_similarity(x, y, dim=0)

    def is_candidate(row, side, number):
        if side == "anchor" and number == row:
            return False
        if f"{side}_ids" in batch and batch[f"{side}_ids"][number] == batch["anchor_ids"][row]:
            return False
        if "own_negatives_only" in batch and batch["own_negatives_only"][row]:
            return row == (batch["negative_rows"][number] if side == "negative" else number)
        return True

    losses = []
    for row in range(len(batch["anchor"])):
        candidates = [(side, n) for side in NAMES for n in range(len(batch[side])) if is_candidate(row, side, n)]
        guides = [cosine(batch["guide_anchor"][row], batch[f"guide_{side}"][n]).item() for side, n in candidates]
        exponentials = [math.exp(g / (guide_temperature or temperature)) for g in guides]
        anchor = batch["anchor"][row][:width]
        logits = [cosine(anchor, batch[side][n][:width]) / temperature for side, n in candidates]
        loss = batch["anchor"].new_zeros(())
        if candidates:
            found = torch.stack(logits) - torch.logsumexp(torch.stack(logits), dim=0)
            for p, log_q in zip((e / sum(exponentials) for e in exponentials), found, strict=True):
                loss = loss + p * (math.log(p) - log_q)
        losses.append(loss)
    return torch.stack(losses).mean()


def assert_equal(fast, slow, batch):
    """Value and every gradient."""
    torch.testing.assert_close(fast, slow, rtol=1e-12, atol=1e-12)
    for found, expected in zip(gradients(fast, batch), gradients(slow, batch), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("block_size", [None, 1, 2, 3, 100])
@pytest.mark.parametrize(("ids", "alone"), [(False, False), (True, False), (False, True), (True, True)])
def test_equals_the_double_loop(block_size, ids, alone, seed):
    """A candidate that is one in the loss and none in the formula, or a tile that is taken twice, teaches another order."""
    batch = draw(ids=ids, alone=alone, seed=seed)
    assert_equal(distillation_loss(**batch, block_size=block_size).loss, slow_loss(batch), batch)


@pytest.mark.parametrize("block_size", [None, 2])
def test_two_temperatures(block_size):
    """A guide whose similarities lie between 0.7 and 1 needs another scale than the student."""
    batch = draw(seed=4)
    out = distillation_loss(**batch, temperature=0.1, guide_temperature=0.02, block_size=block_size)
    assert_equal(out.loss, slow_loss(batch, 0.1, 0.02), batch)


@pytest.mark.parametrize("block_size", [None, 3])
def test_dimensions_are_a_weighted_sum(block_size):
    """The first dimensions alone learn the order too, from the whole guide."""
    batch = draw(seed=5)
    out = distillation_loss(**batch, dimensions=[2, 4], dimension_weights=[0.5, 2.0], block_size=block_size)
    assert_equal(out.loss, 0.5 * slow_loss(batch, width=2) + 2.0 * slow_loss(batch), batch)


@pytest.mark.parametrize(("ranks", "block_size"), list(itertools.product([2, 3, 8], [None, 2])))
def test_ranks_add_up_to_the_batch(ranks, block_size):
    """Each computes its rows against all candidates; some of eight have none of five rows."""
    batch = draw(ids=True, seed=6)
    whole = distillation_loss(**batch)
    parts = [distillation_loss(**batch, rows=share(5, rank, ranks), block_size=block_size) for rank in range(ranks)]
    torch.testing.assert_close(sum(part.loss for part in parts), whole.loss)
    torch.testing.assert_close(torch.cat([part.row_losses for part in parts]), whole.row_losses)
    of_parts = [sum(each) for each in zip(*(gradients(part.loss, batch) for part in parts), strict=True)]
    for found, expected in zip(of_parts, gradients(whole.loss, batch), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("block_size", [None, 2])
def test_a_student_that_is_the_guide_has_nothing_to_learn(block_size):
    """The divergence is 0 there, to rounding, and so is its gradient."""
    batch = draw(seed=7)
    batch |= {name: batch[f"guide_{name}"].clone().requires_grad_() for name in NAMES}
    out = distillation_loss(**batch, block_size=block_size)
    assert abs(out.loss.item()) < 1e-12
    assert max(gradient.abs().max().item() for gradient in gradients(out.loss, batch)) < 1e-12


@pytest.mark.parametrize("block_size", [None, 1, 2])
def test_a_row_without_candidates_is_0(block_size):
    """All texts of the batch are one: a softmax over nothing would be NaN, and end the run."""
    batch = draw(rows=3, pool=2, ids=True)
    for name in NAMES:
        batch[f"{name}_ids"] = torch.zeros_like(batch[f"{name}_ids"])
    out = distillation_loss(**batch, block_size=block_size)
    assert out.row_losses.tolist() == [0.0, 0.0, 0.0]
    for gradient in gradients(out.loss, batch):
        assert gradient.abs().max().item() == 0.0


@pytest.mark.parametrize("block_size", [None, 2])
def test_without_negatives(block_size):
    batch = draw(seed=8)
    batch |= {"negative": None, "guide_negative": None, "guide_anchor": batch["guide_anchor"].requires_grad_()}
    out = distillation_loss(**batch, block_size=block_size)
    empty = {**batch, "negative": batch["anchor"][:0].detach(), "guide_negative": batch["guide_anchor"][:0].detach()}
    torch.testing.assert_close(out.loss, distillation_loss(**empty).loss)
    out.loss.backward()
    assert torch.isfinite(batch["anchor"].grad).all()


@pytest.mark.parametrize("block_size", [None, 2])
def test_half_precision_is_taken_in_float32(block_size):
    """In bf16 similarities of 0.90 and 0.902 are one number, and a temperature of 0.05 makes 4 % of that."""
    batch = {name: value.detach().bfloat16().requires_grad_(name in NAMES) for name, value in draw(seed=9).items()}
    exact = {name: value.detach().double() for name, value in batch.items()}
    with torch.autocast("cpu", torch.bfloat16):
        out = distillation_loss(**batch, block_size=block_size)
    assert out.loss.dtype == torch.float32
    torch.testing.assert_close(out.loss.double(), distillation_loss(**exact).loss, rtol=1e-5, atol=1e-6)
    assert batch["anchor"].dtype == torch.autograd.grad(out.loss, batch["anchor"])[0].dtype


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperatures must be greater than 0"),
        ({"guide_temperature": -1.0}, "temperatures must be greater than 0"),
        ({"block_size": 0}, "block_size must be 1 or more"),
        ({"rows": (0, 9)}, "rows must be"),
        ({"dimensions": [9]}, "dimensions must be different numbers from 1 to 4"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        distillation_loss(**draw(), **options)


def test_regression_equals_a_loop_and_adds_up():
    """Texts that several ranks share are counted once."""
    random = torch.Generator().manual_seed(0)
    students = torch.randn(9, 4, generator=random, dtype=torch.float64, requires_grad=True)
    guides, guide_map = (torch.randn(*shape, generator=random, dtype=torch.float64) for shape in ((9, 6), (6, 4)))
    whole = regression_loss(students, guides, guide_map)
    expected = sum(
        1 - torch.nn.functional.cosine_similarity(s, g @ guide_map, dim=0) for s, g in zip(students, guides, strict=True)
    )
    torch.testing.assert_close(whole, expected, rtol=1e-12, atol=1e-12)
    parts = sum(regression_loss(students[part], guides[part], guide_map) for part in (slice(0, 4), slice(4, 4), slice(4, 9)))
    torch.testing.assert_close(parts, whole)
    for one, other in zip(torch.autograd.grad(whole, students), torch.autograd.grad(parts, students), strict=True):
        torch.testing.assert_close(one, other)


def test_the_map_keeps_what_fits():
    """Vectors that lie in fewer dimensions keep all their similarities; those of as many are left alone, of fewer filled up."""
    drawn = np.random.default_rng(0)
    flat = (drawn.normal(size=(50, 3)) @ drawn.normal(size=(3, 8))).astype(np.float32)
    mapped = flat @ map_to_width(flat, 3).numpy()
    np.testing.assert_allclose(mapped @ mapped.T, flat @ flat.T, atol=1e-4)
    assert map_to_width(flat, 8) is None
    wider = flat @ map_to_width(flat, 10).numpy()
    np.testing.assert_array_equal(wider[:, :8], flat)
    assert not wider[:, 8:].any()
    assert torch.equal(map_to_width(flat, 3), map_to_width(flat.copy(), 3))
