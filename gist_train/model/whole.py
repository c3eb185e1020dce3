"""A model that only encodes and that our encoder does not run: sentence-transformers runs it, whatever modules it has."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from gist_train.config.errors import Fault, UserError, shown
from gist_train.model.encoder import Tokens
from gist_train.model.pretrained import Pretrained, default_prompt_of, prompts_of, tokens_by

if TYPE_CHECKING:  # it takes seconds to import
    from sentence_transformers import SentenceTransformer

SAYS_NOTHING = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version")
"""What of a transformer's config decides no embedding."""
BATCH_TEXTS = 32
"""Texts that are encoded together, of like length."""


@dataclass(frozen=True, slots=True)
class WholeModel:
    """A guide, a model to mine with or one to evaluate, as `SentenceTransformer.encode` runs it."""

    sentence_transformer: "SentenceTransformer"
    name: str
    max_length: int
    """Tokens after which a text is cut."""
    positions: int
    """The most tokens that the model can read."""
    truncate_dim: int | None = None
    """How many of an embedding's dimensions `encode` gives; None for as many as the folder says."""

    @property
    def width(self) -> int:
        """D, dimensions of an embedding as the folder gives them."""
        return int(self.sentence_transformer.get_embedding_dimension() or 0)

    @property
    def dimensions(self) -> int:
        """Of what `encode` and `embed` give."""
        return self.truncate_dim or self.width

    @property
    def normalized(self) -> bool:
        """Whether embeddings have length 1, before any are cut."""
        from sentence_transformers.sentence_transformer.modules import Normalize

        return isinstance(list(self.sentence_transformer)[-1], Normalize)

    @property
    def prompts(self) -> dict[str, str]:
        """Those of the model's folder, by name."""
        return prompts_of(self.sentence_transformer)

    @property
    def default_prompt(self) -> str:
        """What the folder puts before every text; "" for nothing."""
        return default_prompt_of(self.sentence_transformer)

    def to(self, device: torch.device) -> "WholeModel":
        """The same model, moved there."""
        self.sentence_transformer.to(device)
        return self

    def tokens(self, texts: Sequence[str]) -> list[Tokens]:
        """Token ids of each text, as its tokenizer cuts them, for counting."""
        tokenizer: Any = self.sentence_transformer.tokenizer
        read = tokenizer(list(texts), truncation=True, max_length=self.max_length)["input_ids"] if texts else []
        return [np.array(ids, dtype=np.int32) for ids in read]

    def lengths_uncut(self, texts: Sequence[str]) -> NDArray[np.int64]:
        """(N,) tokens of each text, special tokens included, however long it is."""
        tokenizer: Any = self.sentence_transformer.tokenizer
        read = tokenizer(list(texts), truncation=False, verbose=False)["input_ids"] if texts else []
        return np.array([len(ids) for ids in read], np.int64)

    def encode(self, texts: Sequence[str], prompt: str | None = None) -> NDArray[np.float32]:
        """(N, D) embeddings of `texts`.

        Args:
            prompt: before every text; None for the folder's default.
        """
        vectors = self.sentence_transformer.encode(
            list(texts), prompt=prompt, batch_size=BATCH_TEXTS, show_progress_bar=False, convert_to_numpy=True
        )
        out: NDArray[np.float32] = np.asarray(vectors, np.float32).reshape(len(texts), -1)[:, : self.dimensions]
        if self.truncate_dim is not None and self.normalized:
            out = out / np.linalg.norm(out, axis=1, keepdims=True).clip(min=1e-12)
        return out

    def embed(self, texts: Sequence[str], batch_tokens: int) -> Iterator[tuple[Tokens, NDArray[np.float32]]]:
        """Yields (indices into texts (n,), embeddings (n, D)) of texts as they are, without a prompt."""
        at_a_time = max(BATCH_TEXTS, batch_tokens // max(self.max_length, 1) // BATCH_TEXTS * BATCH_TEXTS)
        order = np.argsort([len(text) for text in texts], kind="stable")[::-1]
        for first in range(0, len(order), at_a_time):
            indices = order[first : first + at_a_time]
            yield indices.astype(np.int64), self.encode([texts[i] for i in indices.tolist()], prompt="")

    def with_max_length(self, max_length: int | None) -> "WholeModel":
        """The same model, cutting texts at `max_length` tokens; None for as it is.

        Raises:
            UserError: the model has fewer positions.
        """
        if max_length is None:
            return self
        if max_length > self.positions:
            expected = f"at most {self.positions} tokens, the positions of {self.name}"
            raise UserError(Fault("evaluation.max_length", shown(max_length), expected, "lower it"))
        self.sentence_transformer.max_seq_length = max_length
        return replace(self, max_length=max_length)

    def with_truncation(self, truncate_dim: int | None) -> "WholeModel":
        """The same model, whose embeddings are cut to `truncate_dim` dimensions, as `Pretrained.with_truncation` cuts them.

        Raises:
            UserError: the model's embeddings have fewer dimensions.
        """
        if truncate_dim is None:
            return self
        if not 1 <= truncate_dim <= self.width:
            expected = f"from 1 to {self.width}, the dimensions of an embedding of {self.name}"
            raise UserError(Fault("evaluation.truncate_dim, or --truncate-dim", shown(truncate_dim), expected, "lower it"))
        return replace(self, truncate_dim=truncate_dim)

    def fingerprint(self) -> str:
        """32 hex digits over all that decides the embedding of a text: modules, configs, weights, tokens, prompts, truncation."""
        from transformers import PreTrainedModel

        model = self.sentence_transformer
        parts = [str(model), self.max_length, self.truncate_dim, model.truncate_dim, self.default_prompt]
        configs = [
            {key: value for key, value in module.config.to_dict().items() if key not in SAYS_NOTHING}
            for module in model.modules()
            if isinstance(module, PreTrainedModel)
        ]
        content = json.dumps([*parts, configs, *tokens_by(model.tokenizer)], sort_keys=True, default=str)
        digest = hashlib.blake2b(content.encode(), digest_size=16)
        for name, weight in model.state_dict().items():
            digest.update(name.encode())
            digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy())
        return digest.hexdigest()


TextModel: TypeAlias = Pretrained | WholeModel
"""A model that encodes texts, whoever runs it."""
