"""The loss on a GPU against the loss on the CPU, in float32: value, gradients and counts."""

from dataclasses import fields, replace

import pytest
import torch
from test_loss import WEIGHTED, draw, labelled, with_own_negatives

DEVICE = torch.device("cuda")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


def moved(batch):
    """The batch on the GPU, its students leaves again."""

    def of(tensors, grad):
        return tuple(None if x is None else x.detach().to(DEVICE).requires_grad_(grad) for x in tensors)

    return replace(batch, **{field.name: of(getattr(batch, field.name), field.name == "students") for field in fields(batch)})


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("rows", [None, (40, 100)])
@pytest.mark.parametrize("block_size", [None, 48])
@pytest.mark.parametrize("options", [{}, {"negatives": "hard", "margin": 0.05}, WEIGHTED], ids=["all", "hard", "dimensions"])
def test_the_loss_on_cuda_equals_the_cpus(options, block_size, rows, autocast):
    """TF32 in a similarity is a tenth of a logit, bf16 of an autocast around it ten times that; masks then differ too."""
    batch = with_own_negatives(labelled(draw(160, 200, ids=True, seed=1, dim=8).to(torch.float32)))
    there = moved(batch)
    expected = batch.loss(temperature=0.05, block_size=block_size, rows=rows, **options)
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        found = there.loss(temperature=0.05, block_size=block_size, rows=rows, **options)
    torch.testing.assert_close(found.loss.cpu(), expected.loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.row_losses.cpu(), expected.row_losses, rtol=1e-4, atol=1e-4)
    assert torch.equal(found.candidates.cpu(), expected.candidates)
    assert (found.masked.cpu() - expected.masked).abs().max() <= 2  # a similarity may lie within rounding of its threshold
    for ours, theirs in zip(there.gradients(found.loss), batch.gradients(expected.loss), strict=True):
        assert (ours.cpu() - theirs).abs().max() <= 1e-4 * theirs.abs().max()
    assert found.loss.device.type == DEVICE.type
