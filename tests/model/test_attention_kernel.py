"""The Triton kernel of attention against attention written out text by text under the same draws of dropout.

On a GPU; elsewhere under Triton's interpreter, where TRITON_INTERPRET=1 is set and Triton is there.
"""

import os

import numpy as np
import pytest
import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (torch.cuda.is_available() or INTERPRETED), reason="needs CUDA, or TRITON_INTERPRET=1 and Triton"),
]
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
HALF = [] if INTERPRETED else [torch.bfloat16, torch.float16]
WORD = 0xFFFFFFFF
LENGTHS = [(3, 7, 7, 12, 30, 64, 70), (1,), (150, 130), (1, 1, 1, 1, 60), (512, 20)]


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
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("width", [16, 32, 64])
def test_it_is_attention_written_out(width, lengths, dropout, dtype):
    """A neighbour's token that is seen, or another draw backward than forward, trains all the same."""
    from gist_train.model.attention import spans_of
    from gist_train.model.attention_kernel import attention

    heads, tokens, seed = 3, sum(lengths), -1_234_567_890_123
    torch.manual_seed(0)
    given = (1.5 * torch.randn(tokens, 3 * heads * width)).to(dtype)
    gradient = torch.randn(tokens, heads * width).to(dtype)
    spans = spans_of(torch.tensor([0, *lengths], dtype=torch.int32, device=DEVICE).cumsum(0, dtype=torch.int32), tokens, 1)
    ours = given.to(DEVICE, copy=True).requires_grad_()
    out = attention(ours, spans.begin, spans.end, torch.tensor([seed], device=DEVICE), heads, dropout)
    out.backward(gradient.to(DEVICE))
    exact = given.double().requires_grad_()
    expected = written_out(
        exact, torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)), seed, heads, dropout
    )
    expected.backward(gradient.double())
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for found, wanted in ((out, expected), (ours.grad, exact.grad)):
        difference = found.detach().cpu().double() - wanted.detach()
        assert difference.norm() <= tolerance * wanted.norm().clamp(min=1)


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
