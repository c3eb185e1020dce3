"""The loss in blocks against the whole one, and what it keeps in memory.

Whatever option the loss has, blocks change no value, no gradient and no count. Batches are those of test_loss.py.
"""

import itertools
from dataclasses import replace

import pytest
import torch
from test_loss import (
    SWITCHES,
    WEIGHTED,
    Largest,
    Products,
    assert_same,
    draw,
    guided_by_itself,
    labelled,
    with_duplicates,
    with_own_negatives,
)
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from gist_train.model.blockwise import pack_bits, unpack_bits

pytestmark = pytest.mark.usefixtures("one_thread")

# Values and gradients


def assert_equals_whole(batch, block_size, *, to=1e-11, **options):
    """Value, gradients, losses of the rows and counts; the gradients of both are of three times the loss."""
    whole, blocks = batch.loss(**options), batch.loss(block_size=block_size, **options)
    gradients = [[3 * x for x in batch.gradients(whole.loss)], batch.gradients(3 * blocks.loss)]
    assert_same((blocks.loss, gradients[1]), (whole.loss, gradients[0]), to=to)
    torch.testing.assert_close(blocks.row_losses, whole.row_losses, rtol=to, atol=to)
    assert torch.equal(blocks.masked, whole.masked)
    assert torch.equal(blocks.candidates, whole.candidates)
    return whole


@pytest.mark.parametrize("block_size", [1, 4, 100])
@pytest.mark.parametrize("pool", [None, 14], ids=["M=0", "M>B"])
@pytest.mark.parametrize("negatives", ["all", "hard"])
@pytest.mark.parametrize("dimensions", [{}, WEIGHTED], ids=["whole width", "dimensions"])
@pytest.mark.parametrize("guide", ["unguided", "guided", "self"])
def test_tiles_equal_the_whole_under_all_rules_at_once(guide, dimensions, negatives, pool, block_size):
    """A tile that takes another's columns for its own, or a mask of forward that meets another tile in backward."""
    batch = draw(9, pool, guide=guide == "guided", ids=True, seed=3, dim=6)
    batch = with_own_negatives(labelled(guided_by_itself(batch) if guide == "self" else batch))
    options = {"temperature": 0.1, "negatives": negatives, **dimensions}
    found = assert_equals_whole(batch, block_size, **options)
    # Of the student's own guide, hard negatives are those that the other rule leaves out.
    assert 0 < found.masked.sum() < found.candidates.sum() or (guide, negatives) == ("self", "hard")
    assert_equals_whole(batch, block_size, rows=(2, 7), **options)


@pytest.mark.parametrize("switches", SWITCHES, ids=["aa+pp", "aa", "pp", "none"])
@pytest.mark.parametrize(("margin", "strategy"), [(0.1, "absolute"), (-0.1, "relative")])
@pytest.mark.parametrize("negatives", ["all", "hard"])
def test_tiles_equal_the_whole_whichever_blocks_take_part(negatives, margin, strategy, switches):
    """Bits of a block that is switched off, or none of one that is on, shift all that follow."""
    options = {"margin": margin, "margin_strategy": strategy, "negatives": negatives}
    batch = draw(11, 7, ids=True, seed=5)
    assert_equals_whole(batch, 3, temperature=0.1, contrast_anchors=switches[0], contrast_positives=switches[1], **options)


@pytest.mark.parametrize("negatives", ["all", "hard"])
def test_tiles_equal_the_whole_in_float32(negatives):
    """Logits near 100 leave few digits: a sum that is not taken less its largest has none, or is infinite."""
    batch = draw(160, 160, ids=True, seed=1, dim=32).to(torch.float32)
    whole, blocks = batch.loss(negatives=negatives), batch.loss(negatives=negatives, block_size=48)
    torch.testing.assert_close(blocks.loss, whole.loss, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(batch.gradients(blocks.loss), batch.gradients(whole.loss), strict=True):
        assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()
    assert torch.equal(blocks.masked, whole.masked)


def test_logits_that_are_far_above_the_rows_own_do_not_overflow():
    """An untrained student, or a wrong pair, has others at 1 and its own at -1: 200 apart, and e^200 is infinite in float32."""
    batch = draw(40, 40, guide=False, dim=2)
    anchor, _, negative = (x.detach() for x in batch.students)
    batch = replace(batch, students=(anchor, -anchor, negative)).to(torch.float32)
    found = assert_equals_whole(batch, 16, to=1e-5)
    assert found.row_losses.max() > 190


@pytest.mark.parametrize("block_size", [5, 7])
def test_exact_duplicates_of_the_positive_stay_hard(block_size):
    """Their similarity is the row's own, computed in another way: without a tolerance the last bit throws some of them out."""
    batch = replace(with_duplicates(torch.float32), ids=(None,) * 3, guides=(None,) * 3)
    assert_equals_whole(batch, block_size, to=1e-4, negatives="hard")


def test_gradients_over_dimensions_equal_finite_differences():
    """The weight of a dimension belongs to its gradient too, and so do the numbers that another dimension shares with it."""
    batch = with_own_negatives(labelled(draw(5, 6, ids=True, seed=2, dim=6)))

    def loss(*students: Tensor) -> Tensor:
        return replace(batch, students=students).loss(temperature=0.1, block_size=2, rows=(1, 5), **WEIGHTED).loss

    assert torch.autograd.gradcheck(loss, batch.students, eps=1e-6, atol=1e-6)


def test_backward_under_autocast_changes_nothing():
    """Backward makes its similarities anew: in bf16, if called there, at temperature 0.01 with logits that are off by 0.4."""
    batch = draw(8, 8, seed=4, dim=32).to(torch.float32)
    expected = batch.gradients(batch.loss(block_size=3).loss)
    found = batch.loss(block_size=3).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        gradients = batch.gradients(found)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(gradients, expected, strict=True))


def test_a_second_backward_gives_the_same_gradients():
    """With the graph kept, which gradient clipping by rows or a look at single gradients needs, nothing may be used up."""
    batch = draw(7, 5, ids=True)
    loss = batch.loss(block_size=3).loss
    first, second = batch.gradients(loss, retain_graph=True), batch.gradients(loss)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_a_second_derivative_is_refused():
    """There is none of the tiles: without a word it would be that of the normalisation alone."""
    batch = draw(5, 5)
    with pytest.raises(RuntimeError, match="no second derivative"):
        batch.gradients(batch.loss(block_size=2).loss, create_graph=True)


# Bits


@pytest.mark.parametrize("shape", [(1, 1), (1, 8), (3, 5), (4, 16), (7, 9), (64, 33)], ids=str)
def test_bits_come_back_as_they_went(shape):
    """A bit that moves lets a false negative in and throws another candidate out, in backward alone."""
    flags = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.3
    bits = pack_bits(flags)
    assert bits.dtype == torch.uint8
    assert len(bits) == -(-flags.numel() // 8)
    assert torch.equal(unpack_bits(bits, *shape), flags)
    assert torch.equal(unpack_bits(pack_bits(~flags), *shape), ~flags)


# Memory and work


class LargestOfAny(Largest):
    """The number of elements of the largest tensor, flags too; but for the bits that are kept, of which see below."""

    def counts(self, tensor: Tensor) -> bool:
        return tensor.dtype != torch.uint8


@pytest.mark.parametrize("options", [{}, {"negatives": "hard", "dimensions": [4, 2]}], ids=["plain", "hard over dimensions"])
def test_no_tensor_grows_with_the_square_of_the_batch(options):
    """One that does is beyond any memory soon, forward or backward, be it of floats or of flags."""
    rows = 64
    batch = with_own_negatives(labelled(draw(rows, rows, ids=True)))
    with LargestOfAny() as largest:
        batch.loss(block_size=8, **options).loss.backward()
    assert largest.numel <= 256 * 8 < rows * rows  # the flags of every byte; an embedding of all rows is 64 x 4


def saved_bytes(rows, **options):
    """Bytes of all tensors that wait for backward, by dtype; the widths of those that are embeddings; those that are bits."""
    total, widths, bits = {}, set(), []

    def keep(tensor):
        total[tensor.dtype] = total.get(tensor.dtype, 0) + tensor.numel() * tensor.element_size()
        widths.update(tensor.shape[1:])
        bits.extend([tensor] if tensor.dtype == torch.uint8 else [])
        return tensor

    batch = draw(rows, rows, ids=True)  # the student's width is 4, the guide's 3
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        batch.loss(**options)
    return total, widths, bits


def test_backward_keeps_a_bit_a_candidate():
    """A tile's floats or flags that its graph keeps add up to the whole matrix."""
    sizes = [saved_bytes(rows, block_size=16)[0] for rows in (32, 64, 128)]
    assert all(set(size) == {torch.float64, torch.uint8} for size in sizes)
    a, b, c = (size[torch.float64] for size in sizes)
    assert c - b == 2 * (b - a)
    assert c < 16 * 128 * 4 * 8  # some copies of the embeddings, where one matrix of all candidates is 128 x 512 numbers
    # One tensor: one a tile, between tiles that are freed, would hold the heap at many times of what is in it.
    assert all(len(bits) == 1 for bits in (saved_bytes(rows, block_size=16)[2] for rows in (32, 64)))
    assert [size[torch.uint8] for size in sizes] == [4 * rows * rows // 8 for rows in (32, 64, 128)]


def test_dimensions_keep_own_bits_only_for_hard_negatives():
    """The guide's mask is one for all dimensions: kept for each, it is the largest thing in memory."""
    rows, one = 32, 4 * 32 * 32 // 8
    dimensions = {"block_size": 16, "dimensions": [4, 3, 2]}
    assert saved_bytes(rows, **dimensions)[0][torch.uint8] == one
    assert saved_bytes(rows, negatives="hard", **dimensions)[0][torch.uint8] == 3 * one


def test_the_guide_is_asked_once_and_let_go():
    """Its products are most of the work and its embeddings most of the memory: backward must need neither."""
    assert 3 not in saved_bytes(10, block_size=5)[1]
    batch = draw(10, 10, ids=True)
    with Products() as products:
        batch.loss(block_size=5).loss.backward()
    assert products.of_width[3] == 2 * 4 * 2  # parts of the rows, blocks, parts of the columns


@pytest.mark.parametrize("block_size", [3, 8])
def test_parts_of_the_rows_in_tiles_sum_to_the_whole(block_size):
    """Two processes whose tiles do not begin where one process's do."""
    batch = with_own_negatives(labelled(draw(17, 9, ids=True, dim=6)))
    whole = batch.loss(temperature=0.1, negatives="hard", **WEIGHTED)
    cuts = itertools.pairwise((0, 5, 5, 17))
    options = {"temperature": 0.1, "negatives": "hard", "block_size": block_size, **WEIGHTED}
    parts = [batch.loss(rows=rows, **options) for rows in cuts]
    total = torch.stack([part.loss for part in parts]).sum()
    assert_same((total, batch.gradients(total)), (whole.loss, batch.gradients(whole.loss)), to=1e-11)
    assert torch.equal(sum(part.masked for part in parts), whole.masked)
