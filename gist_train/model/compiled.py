"""The student's encoder as one compiled graph, for CUDA: with 16 triplets a batch a small model waits for kernels to be launched.

One graph serves batches of any size: the number of tokens and the number of texts are symbols in it, and attention reads borders
from a tensor. The other way is a graph for each of some totals of tokens, to which batches are padded: in steps of 1/8 of an
octave, which is 5% of padding, the batches of 16 of MEDI-like data have 25 totals, each of which would be compiled.

No CUDA graphs (`mode="reduce-overhead"`). What one run leaves in its memory the next overwrites, and gradients live there: over
several backward passes, as gradient caching has them, they are refused or, worse, wrong (pytorch/pytorch issues 169545, 96693).
Each total of tokens would be a recording, and torch kept expandable segments out of them for a time (its pull request 194767).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from gist_train.model.attention import Borders
from gist_train.model.encoder import Encoder, Pack

MULTIPLE = 8
"""Of which the number of tokens is made a multiple: what tensor cores like best in half precision."""


class CompiledEncoder(nn.Module):
    """`Pack` -> (N, D), as `Encoder` has it, with the transformer compiled. Dropout draws other elements than it does there.

    The encoder must run packed, through its own forward (so not MPNet), and on flash attention: see `flash_runs`.

    Args:
        encoder: whose weights these are; it may be used beside this, and is not changed.
        longest: tokens of the longest text that will come.
        backend: as `torch.compile` takes it.
    """

    packed = True

    def __init__(self, encoder: Encoder, longest: int, *, backend: str | Callable[..., Any] = "inductor"):
        super().__init__()
        self.encoder, self._longest = encoder, longest
        self._states = torch.compile(_states, backend=backend, fullgraph=True, dynamic=False)

    def forward(self, texts: Pack) -> Tensor:
        """(N, D) float32 embeddings in the order in which the texts were given to `pack`.

        Raises:
            ValueError: a text is longer than was said.
        """
        longest, tokens = texts.lengths.longest, texts.input_ids.shape[1]
        if longest > self._longest:
            raise ValueError(f"a text of {longest} tokens, where the longest was to have {self._longest}")
        # One more text of 1 to 8 tokens, which nobody sees and nothing is pooled from. It also keeps both numbers above 1: a size
        # of 1 is no symbol.
        more = MULTIPLE - tokens % MULTIPLE
        input_ids, position_ids = pad(texts.input_ids, (0, more)), pad(self.encoder.position_ids(texts), (0, more))
        cumulative = pad(texts.lengths.cumulative, (0, 1), value=tokens + more)
        for x, dimension in ((input_ids, 1), (position_ids, 1), (cumulative, 0)):
            torch._dynamo.mark_dynamic(x, dimension)
        # Gradient caching wants embeddings without a graph first. The same graph makes them, so that dropout draws the same
        # elements both times: one without a backward pass would be another, whose draws nobody promises.
        with torch.enable_grad():
            hidden = self._states(self.encoder, input_ids, position_ids, cumulative, max(self._longest, MULTIPLE))
        return self.encoder.pooled((hidden if torch.is_grad_enabled() else hidden.detach())[:tokens], texts)


def _states(encoder: Encoder, input_ids: Tensor, position_ids: Tensor, cumulative: Tensor, longest: int) -> Tensor:
    """(T, D) last hidden states: what is compiled."""
    return encoder.states(input_ids, position_ids, Borders(cumulative, longest))
