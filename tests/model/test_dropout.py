"""Dropout against its definition: the rate, the scale, the gradient, and which layers of a model get it."""

import pytest
import torch
from support.families import transformer_of
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from gist_train.model.dropout import Dropout, dropout, use_cheap_dropout

MANY = 1_000_000


def drawn(x: Tensor, p: float, seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    return dropout(x, p)


@pytest.mark.parametrize("p", [0.1, 0.3])
def test_rate_and_expectation(p):
    """A threshold that is off by one level of 16 bits passes; one that takes signed numbers for unsigned drops at another
    rate, and a scale other than the rate's makes every activation larger in training than in evaluation."""
    out = drawn(torch.ones(MANY), p)
    kept = out[out != 0]
    # The standard deviation of a million draws is 0.0005 at most, and the seed is fixed.
    assert 1 - len(kept) / MANY == pytest.approx(p, abs=1e-3)
    assert len(kept.unique()) == 1
    # A rate has 65,536 levels. The scale is that of the level, so that level and scale give exactly 1.
    assert kept[0].item() == pytest.approx(1 / (1 - round(p * 65536) / 65536), rel=1e-6)
    assert kept[0].item() == pytest.approx(1 / (1 - p), rel=1e-5)
    assert out.mean().item() == pytest.approx(1, abs=2e-3)


@pytest.mark.parametrize("position", range(4))
def test_each_element_of_a_draw_has_the_rate(position):
    """One draw decides four elements: bytes that overlap, or a number's sign in one of them, would skew one in four."""
    out = drawn(torch.ones(MANY), 0.3)[position::4]
    assert (out == 0).float().mean().item() == pytest.approx(0.3, abs=2e-3)


@pytest.mark.parametrize("distance", [1, 2, 3, 4])
def test_neighbours_are_independent(distance):
    """Four elements share a draw: a mask in which neighbours fall together is a stronger dropout than was asked for."""
    gone = drawn(torch.ones(MANY), 0.3) == 0
    together = (gone[:-distance] & gone[distance:]).float().mean().item()
    assert together == pytest.approx(0.09, abs=2e-3)


def test_gradient_is_the_mask_times_the_scale():
    """Were the mask drawn anew in the backward pass, or left out there, training would go on with wrong gradients."""
    x = torch.randn(257, requires_grad=True)
    out = drawn(x, 0.3)
    weights = torch.randn(257)
    (out * weights).sum().backward()
    torch.testing.assert_close(x.grad, weights * (out / x).detach())
    assert 0 < (x.grad == 0).sum() < 257


@pytest.mark.parametrize("size", [0, 1, 2, 3, 5, 7, 4, 1023])
def test_sizes_that_are_no_multiple_of_four(size):
    """The last draw is used in part: a view one element short, or one too long, raises."""
    out = drawn(torch.ones(size), 0.5)
    assert out.shape == (size,)
    assert set(out.tolist()) <= {0.0, 2.0}


def test_same_seed_same_mask():
    """A resumed step repeats the interrupted one bit by bit only if the mask comes from the seed and nothing else."""
    x = torch.ones(33, 7)
    assert torch.equal(drawn(x, 0.3, 1), drawn(x, 0.3, 1))
    assert not torch.equal(drawn(x, 0.3, 1), drawn(x, 0.3, 2))
    torch.manual_seed(1)
    assert not torch.equal(dropout(x, 0.3), dropout(x, 0.3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype_is_kept(dtype):
    """A mask in float32 would turn the bf16 of autocast into float32 for all that follows."""
    out = drawn(torch.ones(4, 9, dtype=dtype), 0.3)
    assert out.dtype == dtype
    assert torch.equal(out == 0, drawn(torch.ones(4, 9), 0.3) == 0)


def test_not_contiguous():
    """A transposed attention matrix must be masked element by element, and not copied back in another order."""
    x = torch.arange(1.0, 31.0).view(5, 6)
    out = drawn(x.t(), 0.3)
    mask = drawn(torch.ones(6, 5), 0.3)
    torch.testing.assert_close(out, x.t() * mask)


def test_rate_of_zero_draws_nothing():
    """A rate of 0 that still draws would shift the generator, and with it every later mask of a model."""
    torch.manual_seed(0)
    before = torch.get_rng_state()
    x = torch.randn(5)
    state = torch.get_rng_state()
    assert dropout(x, 0.0) is x
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(before, state)


def test_module_is_the_identity_in_eval():
    """Embeddings of an evaluated model must not depend on chance."""
    layer = Dropout(0.5)
    x = torch.randn(100)
    assert layer.eval()(x) is x
    assert (layer.train()(x) == 0).any()


@pytest.mark.parametrize("p", [None, 0.25, 0.0])
def test_every_dropout_of_a_model_is_replaced(p):
    """A layer that keeps torch's dropout costs ten times as much and says nothing; one that keeps its own rate trains with
    another dropout than the config names. The attention reads its rate off its dropout module."""
    config = BertConfig(
        vocab_size=10,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=8,
        hidden_dropout_prob=0.1,
        attention_probs_dropout_prob=0.4,
    )
    model = BertModel(config)
    count = sum(isinstance(m, nn.Dropout) for m in model.modules())
    use_cheap_dropout(model, p)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Dropout)}
    assert len(layers) == count == 7  # the embeddings', and 3 of each layer
    assert {type(m) for m in layers.values()} == {Dropout}
    for name, layer in layers.items():
        assert layer.p == (p if p is not None else 0.4 if "attention.self" in name else 0.1)
    use_cheap_dropout(model, 0.9)  # what is cheap already is left alone
    assert {m.p for m in layers.values()} == {m.p for m in model.modules() if isinstance(m, nn.Dropout)}


@pytest.mark.parametrize(("family", "numbers"), [("modernbert", 2), ("llama", 2), ("bert", 0)])
def test_attention_that_keeps_its_rate_as_a_number_gets_it_too(family, numbers):
    """A decoder has no other dropout than this: `dropout: 0.1` would change nothing and say nothing."""
    model = transformer_of(family, dropout=0.3)
    for given, expected in ((None, 0.3), (0.25, 0.25), (0.0, 0.0)):
        use_cheap_dropout(model, given)
        assert [vars(m)["attention_dropout"] for m in model.modules() if "attention_dropout" in vars(m)] == [expected] * numbers
