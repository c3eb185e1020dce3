"""Texts of a task -> vectors, and their cosines. Every task type measures on what these functions give."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class TextEncoder(Protocol):
    """Anything that turns texts into vectors."""

    @property
    def prompts(self) -> Mapping[str, str]:
        """Those of the model's folder, by name."""
        ...

    def encode(self, texts: Sequence[str], prompt: str | None = None) -> NDArray[np.float32]:
        """(N, D), a vector of any length for each of N texts, in their order.

        Args:
            prompt: before every text; None for the model's default.
        """
        ...


def finite_vectors(encoder: TextEncoder, texts: Sequence[str], task: str, prompt: str | None = None) -> NDArray[np.float32]:
    """(N, D) of the encoder, checked.

    Args:
        task: its name, for messages.
        prompt: before every text; None for the model's default.

    Raises:
        FloatingPointError: an embedding holds a value that is not finite.
        ValueError: the encoder gave another number of vectors than texts.
    """
    vectors = np.asarray(encoder.encode(texts, prompt), dtype=np.float32)
    if vectors.ndim != 2 or len(vectors) != len(texts):
        raise ValueError(f"{task}: the encoder gave an array of shape {vectors.shape} for {len(texts)} texts")
    if broken := int((~np.isfinite(vectors)).any(axis=1).sum()):
        raise FloatingPointError(f"{task}: {broken:,} of {len(vectors):,} embeddings hold a value that is not finite")
    return vectors


def encode_lists(encoder: TextEncoder, task: str, *lists: Sequence[str], prompt: str | None = None) -> list[NDArray[np.float32]]:
    """(texts, D) for each of the lists, every unique text among them encoded once. Raises as `finite_vectors`.

    Args:
        prompt: before every text; None for the model's default.
    """
    number: dict[str, int] = {}
    rows = [[number.setdefault(text, len(number)) for text in texts] for texts in lists]
    vectors = finite_vectors(encoder, list(number), task, prompt)
    return [vectors[of_list] for of_list in rows]


def side_prompt(encoder: TextEncoder, *names: str) -> str | None:
    """The first prompt by these names that the model's folder has, as `encode_query` and `encode_document` of
    sentence-transformers look for it; None for the model's default."""
    return next((encoder.prompts[name] for name in names if name in encoder.prompts), None)


def unit(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """The same (N, D), each brought to length 1 in place; a vector of length 0 stays as it is, and its cosines are 0."""
    lengths: NDArray[np.float32] = np.linalg.norm(vectors, axis=1, keepdims=True)
    lengths[lengths == 0] = 1
    vectors /= lengths
    return vectors


def cosines(first: NDArray[np.float32], second: NDArray[np.float32]) -> NDArray[np.float64]:
    """(N,) cosine similarities of row i of both (N, D)."""
    products: NDArray[np.float64] = np.einsum("nd,nd->n", unit(first.copy()), unit(second.copy()), dtype=np.float64)
    return products
