"""What a guide reads of a batch of sentence-transformers' trainer.

Their collator hands a loss token ids alone. `collator` below leaves the texts beside them, as bytes in a tensor: a tensor is
sliced, moved and pinned as all others of a batch are. Without it, the guide reads what the student reads, as it does in their
GISTEmbedLoss: the very tokens where both tokenize alike, else the text that the student's tokens decode to.

Legend: N texts of a column, L bytes of the longest, T tokens of a text.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator
from torch import Tensor

from gist_train.config.errors import Fault, UserError, listed, shown
from gist_train.data.corpus import text_hashes
from gist_train.model.encoder import Tokens

TEXTS = "text_bytes"
"""Key of the texts among the features of a column."""
LOSS = "GuidedContrastiveLoss"
"""Where messages say that something is wrong."""
USE_COLLATOR = "give the trainer the data_collator that this loss makes: its method collator(args)"
"""What to do where the texts are wanted."""
_END = 0xFF
"""No byte of UTF-8: it fills the shorter texts of a batch up."""


@dataclass(frozen=True, slots=True)
class Column:
    """What a guide reads of one column of a batch."""

    hashes: NDArray[np.uint8]
    """(N, 16): under which a store has each text. Token ids have other hashes than the text that they come from."""
    texts: list[str] | None
    """N texts; None where the guide reads token ids."""
    tokens: list[Tokens] | None
    """The token ids of N texts; None where the guide reads texts."""
    exact: bool
    """Whether the texts are the user's own, and not decoded."""

    def shown(self, which: int) -> str:
        """One text for a message."""
        return self.texts[which] if self.texts is not None else "token ids"


class KeepsTexts:
    """A model's `preprocess` that leaves the texts beside their tokens.

    Args:
        preprocess: of the model.
    """

    def __init__(self, preprocess: Callable[..., Any]):
        self._preprocess = preprocess

    def __call__(self, inputs: Sequence[Any], **options: Any) -> Any:
        """What `preprocess` gives, with one feature more where all inputs are texts.

        Raises:
            UserError: an input is a list of texts, which sentence-transformers would join to one.
        """
        if lists := next((one for one in inputs if isinstance(one, list) and one and isinstance(one[0], str)), None):
            raise refused_list(f"{LOSS}: a batch", shown(lists))
        features = self._preprocess(inputs, **options)
        if all(isinstance(one, str) for one in inputs):
            features[TEXTS] = to_bytes(inputs)
        return features


def refused_list(where: str, found: str) -> UserError:
    """Of a column that holds lists of texts."""
    fix = "give each text of the list a column of its own: negative_1, negative_2, ..."
    return UserError(Fault(where, found, "a text in each column of each row", fix))


def collator(preprocess: Callable[..., Any], prompts: Any = None, router_mapping: Any = None) -> SentenceTransformerDataCollator:
    """The trainer's own collator, whose batches hold their texts.

    Args:
        preprocess: of the model.
        prompts, router_mapping: as in the trainer's arguments.
    """
    return SentenceTransformerDataCollator(
        preprocess_fn=KeepsTexts(preprocess), prompts=prompts or {}, router_mapping=router_mapping or {}
    )


def to_bytes(texts: Sequence[str]) -> Tensor:
    """(N, L) uint8 of N texts."""
    encoded = [text.encode() for text in texts]
    longest = max(map(len, encoded), default=0)
    filled = b"".join(text.ljust(longest, bytes([_END])) for text in encoded)
    return torch.from_numpy(np.frombuffer(filled, np.uint8).reshape(len(encoded), longest).copy())


def from_bytes(texts: Tensor) -> list[str]:
    """N texts of (N, L) uint8."""
    return [row.tobytes().rstrip(bytes([_END])).decode() for row in texts.cpu().numpy()]


def column_of(features: Mapping[str, Any], decode: Callable[[list[Tokens]], list[str]] | None) -> Column:
    """What the guide reads of the features of one column.

    Args:
        decode: gives the texts of token ids, where the guide can't read the student's; None for the ids themselves.

    Raises:
        UserError: there are neither texts nor token ids.
    """
    if TEXTS in features:
        texts = from_bytes(features[TEXTS])
        return Column(text_hashes(texts), texts, None, True)
    tokens = _tokens_of(features)
    if decode is not None:
        texts = decode(tokens)
        return Column(text_hashes(texts), texts, None, False)
    joined = b"".join(hashlib.blake2b(ids.tobytes(), digest_size=16, person=b"token ids").digest() for ids in tokens)
    return Column(np.frombuffer(joined, np.uint8).reshape(-1, 16), None, tokens, False)


def _tokens_of(features: Mapping[str, Any]) -> list[Tokens]:
    """The token ids of each text, padding left out."""
    ids = features.get("input_ids")
    if isinstance(ids, Tensor) and "cu_seq_lens_q" in features:  # laid end to end
        return np.split(ids[0].cpu().numpy(), features["cu_seq_lens_q"][1:-1].cpu().numpy())
    if isinstance(ids, Tensor) and isinstance(mask := features.get("attention_mask"), Tensor) and ids.ndim == 2:
        return [row[real] for row, real in zip(ids.cpu().numpy(), mask.bool().cpu().numpy(), strict=True)]
    found = f"neither texts nor padded token ids, but {listed(sorted(features))}"
    raise UserError(Fault(f"{LOSS}: a batch", found, "the texts of each column, or their token ids", USE_COLLATOR))
