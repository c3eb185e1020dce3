"""The student's encoder as one compiled graph, for CUDA: with 16 triplets a batch a small model waits for kernels to be launched.

One graph serves batches of any size: the number of tokens and the number of texts are symbols in it, and attention reads borders
from a tensor. The other way is a graph for each of some totals of tokens, to which batches are padded: in steps of 1/8 of an
octave, which is 5% of padding, the batches of 16 of MEDI-like data have 25 totals, each of which would be compiled.

Not `mode="reduce-overhead"`: what one run of torch's own graphs leaves in memory the next overwrites, and gradients live there:
over several backward passes, as gradient caching has them, they are refused or, worse, wrong (pytorch/pytorch issues 169545 and
96693). `training/graphs.py` records whole steps.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gist_train.model.attention import Borders, Spans
from gist_train.model.encoder import Encoder, Pack

MULTIPLE = 8
"""Of which the number of tokens is made a multiple: what tensor cores like best in half precision. It also keeps tokens and texts
above 1: to torch.compile a size of 1 is no symbol."""


class BorderedEncoder(nn.Module):
    """`Pack` -> (N, D), as `Encoder` has it. What it does depends on how many tokens and texts there are, and on nothing else
    that the host knows of a batch: a graph of it serves every batch of that size.

    The encoder must run packed, through its own forward (so not MPNet), and on flash attention: see `flash_runs`.

    Args:
        encoder: whose weights these are; it may be used beside this, and is not changed.
        longest: tokens of the longest text that will come.
    """

    packed = True

    def __init__(self, encoder: Encoder, longest: int):
        super().__init__()
        self.encoder, self._longest = encoder, max(longest, MULTIPLE)
        self._states: Callable[..., Tensor] = _states

    def forward(self, texts: Pack) -> Tensor:
        """(N, D) float32 embeddings in the order in which the texts were given to `pack`.

        Raises:
            ValueError: a text is longer than was said.
        """
        longest = texts.lengths.longest
        if longest > self._longest:
            raise ValueError(f"a text of {longest} tokens, where the longest was to have {self._longest}")
        if not texts.filled:
            tokens = texts.input_ids.shape[1]
            texts = texts.filled_to(tokens + MULTIPLE - tokens % MULTIPLE)
        return self.encoder.pooled(self._hidden(texts), texts)

    def _hidden(self, texts: Pack) -> Tensor:
        cumulative, position_ids = texts.lengths.cumulative, self.encoder.position_ids(texts)
        spans = self.encoder.spans(cumulative, texts.input_ids.shape[1])
        return self._states(self.encoder, texts.input_ids, position_ids, cumulative, self._longest, spans)


class CompiledEncoder(BorderedEncoder):
    """The same with the transformer compiled. Dropout draws other elements than it does there.

    Args:
        backend: as `torch.compile` takes it.
    """

    def __init__(self, encoder: Encoder, longest: int, *, backend: str | Callable[..., Any] = "inductor"):
        super().__init__(encoder, longest)
        self._states = partial(_of_any_size, torch.compile(_states, backend=backend, fullgraph=True, dynamic=False))

    def _hidden(self, texts: Pack) -> Tensor:
        # Gradient caching wants embeddings without a graph first. The same graph makes them, so that dropout draws the same
        # elements both times: one without a backward pass would be another, whose draws nobody promises.
        with torch.enable_grad():
            hidden = super()._hidden(texts)
        return hidden if torch.is_grad_enabled() else hidden.detach()


def _states(
    encoder: Encoder, input_ids: Tensor, position_ids: Tensor, cumulative: Tensor, longest: int, spans: Spans | None
) -> Tensor:
    """(T, D) last hidden states: what is compiled."""
    return encoder.states(input_ids, position_ids, Borders(cumulative, longest), spans)


def _of_any_size(compiled: Callable[..., Tensor], *given: Any) -> Tensor:
    """`_states` compiled, with symbols for the numbers of tokens and of texts."""
    _, input_ids, position_ids, cumulative, _, spans = given
    sized = [(input_ids, 1), (position_ids, 1), (cumulative, 0)]
    for x, dimension in sized if spans is None else [*sized, (spans.begin, 0), (spans.end, 0)]:
        torch._dynamo.mark_dynamic(x, dimension)
    return compiled(*given)
