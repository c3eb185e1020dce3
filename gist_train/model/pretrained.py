"""A model that our encoder runs: the student, and every other whose layers we know.

sentence-transformers reads and writes the folders, so that what we save is what it opens. The forward pass is `Encoder`'s.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from gist_train.config.errors import Fault, UserError, shown
from gist_train.model.encoder import Encoder, Tokens, batches_of, embed_batches, tokens_at_a_time

if TYPE_CHECKING:  # they take seconds to import
    from sentence_transformers import SentenceTransformer
    from transformers import PreTrainedTokenizerFast

DECIDING = (
    *("hidden_act", "hidden_activation", "activation", "layer_norm_eps", "rms_norm_eps", "norm_eps"),
    *("rope_parameters", "rope_scaling", "rope_theta", "sliding_window", "local_attention"),
)
"""What of a transformer's config decides embeddings and is told by no weight."""
TOKENISED = 4096
"""Texts that are tokenised at a time."""


@dataclass(frozen=True, slots=True)
class Pretrained:
    """A model ready to run: the encoder shares its weights with the sentence-transformers model that saves it."""

    sentence_transformer: "SentenceTransformer"
    encoder: Encoder
    tokenizer: "PreTrainedTokenizerFast"
    max_length: int
    """Tokens after which a text is cut, special tokens included."""
    positions: int
    """The most tokens that the model can read."""
    truncate_dim: int | None = None
    """How many of an embedding's dimensions `encode` gives, counted from the first; None for all."""
    normalizes_cut: bool = False
    """Whether what is left of a cut embedding is normalised anew, where the model normalises."""

    @property
    def width(self) -> int:
        """D, dimensions of an embedding, before any are cut off."""
        return int(self.encoder.transformer.config.hidden_size)

    @property
    def dimensions(self) -> int:
        """Of what `encode` and `embed` give."""
        return self.truncate_dim or self.width

    @property
    def normalized(self) -> bool:
        """Whether embeddings have length 1, before any are cut."""
        return self.encoder.normalized

    @property
    def prompts(self) -> dict[str, str]:
        """Those of the model's folder, by name."""
        return prompts_of(self.sentence_transformer)

    @property
    def default_prompt(self) -> str:
        """What the folder puts before every text; "" for nothing."""
        return default_prompt_of(self.sentence_transformer)

    def to(self, device: torch.device) -> "Pretrained":
        """The same model, moved there."""
        self.encoder.to(device)
        return self

    def tokens(self, texts: Sequence[str]) -> list[Tokens]:
        """Token ids of each text, special tokens included, cut to `max_length`."""
        if not texts:
            return []
        self._do_not_pad(cut=True)
        # Past the tokenizer's own call, which makes offsets and masks that nobody reads: 1.6 times as fast.
        encode = self.tokenizer.backend_tokenizer.encode_batch_fast
        # Some thousand at a time: an Encoding, with what was cut off, takes a hundred times the bytes of its ids.
        chunks = (encode(list(texts[first : first + TOKENISED])) for first in range(0, len(texts), TOKENISED))
        return [np.array(encoding.ids or [self._nothing], dtype=np.int32) for chunk in chunks for encoding in chunk]

    def lengths_uncut(self, texts: Sequence[str]) -> NDArray[np.int64]:
        """(N,) tokens of each text, special tokens included, however long it is."""
        self._do_not_pad(cut=False)
        encodings = self.tokenizer.backend_tokenizer.encode_batch_fast(list(texts))
        return np.array([len(encoding.ids) for encoding in encodings], np.int64)

    def _do_not_pad(self, *, cut: bool) -> None:
        from transformers.tokenization_utils_base import TruncationStrategy
        from transformers.utils.generic import PaddingStrategy

        truncation = TruncationStrategy.LONGEST_FIRST if cut else TruncationStrategy.DO_NOT_TRUNCATE
        self.tokenizer.set_truncation_and_padding(PaddingStrategy.DO_NOT_PAD, truncation, self.max_length, 0, None, None)

    @property
    def _nothing(self) -> int:
        """The token for an empty text where the tokenizer adds none of its own, as many a decoder's does not."""
        return next(id_ for id_ in (self.tokenizer.eos_token_id, self.tokenizer.pad_token_id, 0) if id_ is not None)

    def encode(self, texts: Sequence[str], prompt: str | None = None, batch_tokens: int = 16_384) -> NDArray[np.float32]:
        """(N, D) embeddings of `texts` in eval mode, `batch_tokens` tokens at a time, texts of one length together.

        With `truncate_dim` d they are (N, d): the first d dimensions, of length 1 again where `normalizes_cut`.

        Args:
            prompt: before every text; None for the folder's default.
        """
        out = np.empty((len(texts), self.dimensions), np.float32)
        with self.evaluating():
            for indices, embeddings in self.embed_batches(*self.batches(texts, prompt, batch_tokens)):
                out[indices] = embeddings
        return out

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Within it the encoder is in eval mode."""
        training = self.encoder.training
        self.encoder.eval()
        try:
            yield
        finally:
            self.encoder.train(training)

    def batches(
        self, texts: Sequence[str], prompt: str | None = None, batch_tokens: int = 16_384
    ) -> tuple[list[Tokens], list[NDArray[np.int64]]]:
        """The tokens of each text, and which texts are embedded at a time, for `embed_batches`.

        Args:
            prompt: before every text; None for the folder's default.
        """
        before = self.default_prompt if prompt is None else prompt
        tokens = self.tokens([before + text for text in texts])
        return tokens, batches_of(tokens, tokens_at_a_time(batch_tokens, self.encoder.device))

    def embed(self, texts: Sequence[str], batch_tokens: int) -> Iterator[tuple[Tokens, NDArray[np.float32]]]:
        """Yields (indices into texts (n,), embeddings (n, D)) of texts as they are, without a prompt, in the present mode."""
        yield from self.embed_batches(*self.batches(texts, "", batch_tokens))

    def embed_batches(
        self, tokens: Sequence[Tokens], batches: Sequence[NDArray[np.int64]]
    ) -> Iterator[tuple[Tokens, NDArray[np.float32]]]:
        """Yields (indices into tokens (n,), embeddings (n, D)) of some batches, in the present mode."""
        for indices, embeddings in embed_batches(self.encoder, tokens, batches):
            cut = embeddings[:, : self.dimensions]
            if self.dimensions < self.width and self.normalizes_cut and self.normalized:
                cut = cut / np.linalg.norm(cut, axis=1, keepdims=True).clip(min=1e-12)
            yield indices, cut

    def with_max_length(self, max_length: int | None) -> "Pretrained":
        """The same model, cutting texts at `max_length` tokens; None for as it is.

        Raises:
            UserError: the model has fewer positions.
        """
        if max_length is None:
            return self
        if max_length > self.positions:
            expected = f"at most {self.positions} tokens, the positions of {self.encoder.transformer.name_or_path}"
            raise UserError(Fault("evaluation.max_length", shown(max_length), expected, "lower it"))
        return replace(self, max_length=max_length)

    def with_truncation(self, truncate_dim: int | None) -> "Pretrained":
        """The same model, whose embeddings are cut to `truncate_dim` dimensions; None for as it is.

        Where the model ends in a Normalize module, what is left is normalised anew: such a model promises vectors of length 1,
        and a loss over `dimensions` was taken over these. sentence-transformers' `truncate_dim` alone cuts after that module and
        leaves them shorter; `encode(..., normalize_embeddings=True)` gives there what this does here. No cosine can tell the
        two apart, a logistic regression can. What is saved and trained stays whole.

        Raises:
            UserError: the model's embeddings have fewer dimensions.
        """
        if truncate_dim is None:
            return self
        if not 1 <= truncate_dim <= self.width:
            expected = f"from 1 to {self.width}, the dimensions of an embedding of {self.encoder.transformer.name_or_path}"
            raise UserError(Fault("evaluation.truncate_dim, or --truncate-dim", shown(truncate_dim), expected, "lower it"))
        return replace(self, truncate_dim=truncate_dim, normalizes_cut=True)

    def vocabulary_size(self) -> int:
        """One more than the largest token id. A tokenizer may have gaps, so that it is not the number of tokens."""
        return max(self.tokenizer.get_vocab().values()) + 1

    def tokenizer_fingerprint(self) -> str:
        """32 hex digits over all that decides the token ids of a text."""
        backend, *side = tokens_by(self.tokenizer)
        content = json.dumps([backend, self.max_length, *side], sort_keys=True)
        return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()

    def fingerprint(self) -> str:
        """32 hex digits over all that decides the embedding of a text: weights, tokens, pooling, normalisation, truncation."""
        parts: list[object] = [
            type(self.encoder.transformer).__name__,
            self.encoder.pooling,
            self.encoder.normalized,
            self.truncate_dim,
        ]
        if self.default_prompt or (self.truncate_dim is not None and not self.normalizes_cut):  # as few folders say
            parts += [self.default_prompt, self.normalizes_cut]
        if any(self.prompts.values()):
            parts.append(sorted(self.prompts.items()))
        config = self.encoder.transformer.config
        given, usual = config.to_dict(), type(config)().to_dict()
        if unusual := {name: given[name] for name in DECIDING if name in given and given[name] != usual.get(name)}:
            parts.append(unusual)
        digest = hashlib.blake2b(json.dumps([*parts, self.tokenizer_fingerprint()]).encode(), digest_size=16)
        for name, weight in self.encoder.transformer.state_dict().items():
            digest.update(name.encode())
            digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy())
        return digest.hexdigest()

    def save(self, folder: Path) -> None:
        """Writes a sentence-transformers folder: modules.json, weights as safetensors, tokenizer, pooling.

        Raises:
            OSError: there is no room for it, or it can't be written there.
            SafetensorError: the same, met at the weights.
        """
        self._do_not_pad(cut=True)  # tokenizer.json has it, and must not have what this process happened to do before
        try:
            self.sentence_transformer.save_pretrained(str(folder), create_model_card=False)
        except Exception as error:
            if type(error) is not Exception:
                raise
            raise OSError(f"{folder}: {error}") from error  # tokenizers has no class of its own for a full disk


def tokens_by(tokenizer: Any) -> list[object]:
    """All that decides the token ids of a text but the length that it is cut to: how a fast tokenizer works, or the vocabulary
    of another one; and the side that is cut, where it is the unusual one."""
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

    kept: object = sorted(tokenizer.get_vocab().items())
    if isinstance(tokenizer, PreTrainedTokenizerFast):
        backend = json.loads(tokenizer.backend_tokenizer.to_str())
        # Truncation and padding are settings of the last call, not of the vocabulary.
        kept = {name: value for name, value in backend.items() if name not in ("truncation", "padding")}
    left = isinstance(tokenizer, PreTrainedTokenizerBase) and tokenizer.truncation_side == "left"
    return [kept, *(["left"] if left else [])]


def prompts_of(model: "SentenceTransformer") -> dict[str, str]:
    """The prompts of a model's folder, by name."""
    return {name: prompt or "" for name, prompt in model.prompts.items()}


def default_prompt_of(model: "SentenceTransformer") -> str:
    """What `SentenceTransformer.encode` puts before every text when it is asked for no prompt; "" for nothing."""
    return "" if model.default_prompt_name is None else model.prompts.get(model.default_prompt_name) or ""
