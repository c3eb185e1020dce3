"""The Triton kernels against plain torch in float64 under the same draws of dropout.

On a GPU; elsewhere under Triton's interpreter, where TRITON_INTERPRET=1 is set and Triton is there.
"""

import os

import numpy as np
import pytest
import torch
from support.families import assert_same_gradients, gradients, texts_of, transformer_of
from torch import Tensor

from gist_train.model.attention import run_packed
from gist_train.model.encoder import Encoder, pack

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (torch.cuda.is_available() or INTERPRETED), reason="needs CUDA, or TRITON_INTERPRET=1 and Triton"),
]
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
HALF = [] if INTERPRETED else [torch.bfloat16, torch.float16]
WORD = 0xFFFFFFFF
MIXED = (3, 7, 7, 12, 30, 64, 70)
CASES = [(16, MIXED), (64, MIXED), *((32, lengths) for lengths in (MIXED, (1,), (150, 130), (1, 1, 1, 1, 60), (512, 20)))]
"""Width of a head, and tokens of each text."""


def stirred(x: np.ndarray) -> np.ndarray:
    """MurmurHash3's last steps on 32 bits."""
    x = x ^ (x >> 16)
    x = (x * 0x85EBCA6B) & WORD
    x = x ^ (x >> 13)
    x = (x * 0xC2B2AE35) & WORD
    return x ^ (x >> 16)


def kept(seed: int, head: int, tokens: int, heads: int, dropout: float) -> Tensor:
    """(T, T) whether the weight of a query on a key stays."""
    numbers = np.arange(tokens, dtype=np.uint64)
    of_query = stirred(stirred((numbers * heads + head + (seed & WORD)) & WORD) ^ ((seed >> 32) & WORD))
    draws = stirred(of_query[:, None] ^ ((numbers * 0x9E3779B1) & WORD)[None, :]) >> 1
    return torch.from_numpy(draws >= round(dropout * 2**31))


def written_out(qkv: Tensor, owner: Tensor, seed: int, heads: int, dropout: float) -> Tensor:
    """(T, D) in the precision of `qkv`."""
    q, k, v = qkv.view(len(qkv), 3, heads, -1).unbind(1)
    outs = []
    for head in range(heads):
        scores = (q[:, head] @ k[:, head].T * q.shape[-1] ** -0.5).masked_fill(owner[:, None] != owner, -torch.inf)
        weights = scores.softmax(dim=1)
        if dropout:
            weights = weights * kept(seed, head, len(qkv), heads, dropout) / (1 - dropout)
        outs.append(weights @ v[:, head])
    return torch.stack(outs, dim=1).flatten(1)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize(("width", "lengths"), CASES, ids=str)
def test_it_is_attention_written_out(width, lengths, dropout, dtype):
    """A neighbour's token that is seen, or another draw backward than forward, trains all the same."""
    from gist_train.model.attention import spans_of
    from gist_train.model.attention_kernel import attention

    heads, tokens, seed = 3, sum(lengths), -1_234_567_890_123
    torch.manual_seed(0)
    given = (1.5 * torch.randn(tokens, 3 * heads * width)).to(dtype)
    gradient, bias = torch.randn(tokens, heads * width).to(dtype), torch.randn(3 * heads * width)
    spans = spans_of(torch.tensor([0, *lengths], dtype=torch.int32, device=DEVICE).cumsum(0, dtype=torch.int32), tokens, 1)
    ours, our_bias = (x.to(DEVICE, copy=True).requires_grad_() for x in (given, bias))
    out = attention(ours, our_bias, spans.begin, spans.end, torch.tensor([seed], device=DEVICE), heads, dropout)
    out.backward(gradient.to(DEVICE))
    exact, exact_bias = given.double().requires_grad_(), bias.double().requires_grad_()
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    expected = written_out(exact + exact_bias, owner, seed, heads, dropout)
    expected.backward(gradient.double())
    assert_near(dtype, (out, expected), (ours.grad, exact.grad), (our_bias.grad, exact_bias.grad))


def assert_near(dtype: torch.dtype, *pairs: tuple[Tensor, Tensor]) -> None:
    """What was found and what is exact differ by rounding, over all of a tensor."""
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}[dtype]
    for found, wanted in pairs:
        difference = found.detach().cpu().double() - wanted.detach()
        assert difference.norm() <= tolerance * wanted.norm().clamp(min=1)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize(("tokens", "width"), [(1, 16), (70, 48), (1500, 32)])
def test_add_norm_is_what_its_name_says(tokens, width, dropout, dtype):
    """Bias, dropout, residual and norm in one pass, and five gradients in another: each of them has its own way to be wrong."""
    from gist_train.model.layer_kernels import add_norm

    seed, eps = -1_234_567_890_123, 1e-3
    torch.manual_seed(0)
    x, residual, *gradients = (torch.randn(tokens, width) for _ in range(4))
    x, gradients[1] = x.to(dtype), gradients[1].to(dtype)
    vectors = [torch.randn(width) for _ in range(3)]
    given = [x, vectors[0], residual, *vectors[1:]]
    ours = [value.to(DEVICE, copy=True).requires_grad_() for value in given]
    out, half = add_norm(*ours, torch.tensor([seed], device=DEVICE), eps, dropout)
    assert (out.dtype, half.dtype) == (torch.float32, dtype)
    torch.autograd.backward([out, half], [gradient.to(DEVICE) for gradient in gradients])

    exact = [value.double().requires_grad_() for value in given]
    added = exact[0] + exact[1]
    if dropout:
        added = added * kept(seed, 0, max(tokens, width), 1, dropout)[:tokens, :width] / (1 - dropout)
    expected = torch.nn.functional.layer_norm(added + exact[2], (width,), exact[3], exact[4], eps)
    expected.backward(sum(gradient.double() for gradient in gradients))
    grads = [(a.grad, b.grad) for a, b in zip(ours, exact, strict=True)]
    assert_near(dtype, (out, expected), (half, expected), *grads)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize(("tokens", "width"), [(1, 16), (70, 300), (2100, 64)])
def test_bias_gelu_is_what_its_name_says(tokens, width, dtype):
    """The approximation by tanh is near enough to pass for it, and is another model."""
    from gist_train.model.layer_kernels import bias_gelu

    torch.manual_seed(0)
    given, gradient = [2 * torch.randn(tokens, width).to(dtype), torch.randn(width)], torch.randn(tokens, width).to(dtype)
    ours = [value.to(DEVICE, copy=True).requires_grad_() for value in given]
    out = bias_gelu(*ours)
    out.backward(gradient.to(DEVICE))
    exact = [value.double().requires_grad_() for value in given]
    expected = torch.nn.functional.gelu(exact[0] + exact[1])
    expected.backward(gradient.double())
    assert_near(dtype, (out, expected), *((a.grad, b.grad) for a, b in zip(ours, exact, strict=True)))


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_layers_of_kernels_are_transformers_own(family, checkpointed):
    """Every weight gets its gradient, and gets it from where transformers' layers take it."""
    from gist_train.model.attention import spans_of
    from gist_train.model.bert import bert_hidden

    texts = pack(texts_of((3, 7, 1, 7, 12, 3, 3, 9))).to(DEVICE)
    ours, twin = (transformer_of(family, hidden_size=64).to(DEVICE).train() for _ in range(2))
    run_packed(twin)
    for layer in ours.encoder.layer:
        layer.gradient_checkpointing = checkpointed
    positions = Encoder(ours, pooling="cls", normalized=True).position_ids(texts)
    spans = spans_of(texts.lengths.cumulative, texts.input_ids.shape[1], len(ours.encoder.layer))
    out = bert_hidden(ours, texts.input_ids, positions, texts.lengths, spans)
    expected = twin(input_ids=texts.input_ids, position_ids=positions, packed=texts.lengths).last_hidden_state[0]
    torch.testing.assert_close(out, expected, rtol=0, atol=2e-5)
    assert_same_gradients(gradients(ours, out), gradients(twin, expected), tolerance=2e-5)


def test_draws_are_even_and_have_nothing_to_do_with_each_other():
    """Draws that queries, heads or steps share would drop the same words again and again."""
    first = kept(42, 0, 512, 3, 0.1).double()
    assert first.mean() == pytest.approx(0.9, abs=0.003)
    for rows in (first, first.T):
        correlations = np.corrcoef(rows.numpy())[np.triu_indices(512, 1)]
        assert correlations.std() == pytest.approx(512**-0.5, rel=0.05)
        assert np.abs(correlations).max() < 0.35
    for other in (kept(43, 0, 512, 3, 0.1), kept(42, 1, 512, 3, 0.1), kept(42 + (1 << 32), 0, 512, 3, 0.1)):
        assert abs(np.corrcoef(first.flatten().numpy(), other.double().flatten().numpy())[0, 1]) < 0.01
