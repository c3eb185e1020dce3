"""Models as people keep them: a local folder or hub id, in sentence-transformers' layout or transformers' alone.

sentence-transformers reads and writes the folders, so that what we save is what it opens. The forward pass is `Encoder`'s.
"""

import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import hf_hub_download
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from transformers import PreTrainedTokenizerFast
from transformers.tokenization_utils_base import TruncationStrategy
from transformers.utils.generic import PaddingStrategy

from gist_train.config.errors import Fault, UserError, shown
from gist_train.config.models import GuideConfig, ModelConfig
from gist_train.model.dropout import use_cheap_dropout
from gist_train.model.encoder import Encoder, Tokens, embed
from gist_train.model.families import in_embedding, kin_of
from gist_train.model.layers import keep_layers

TOKENISED = 4096
"""Texts that are tokenised at a time."""
NO_LIMIT = 1 << 20
"""Tokens that a model without a limit of its own may read."""
POOLING_MODES = {"cls": "cls", "mean": "mean", "last": "lasttoken"}
"""Our poolings -> what sentence-transformers calls them."""


@dataclass(frozen=True, slots=True)
class Pretrained:
    """A model ready to run: the encoder shares its weights with the sentence-transformers model that saves it."""

    sentence_transformer: SentenceTransformer
    encoder: Encoder
    tokenizer: PreTrainedTokenizerFast
    max_length: int
    """Tokens after which a text is cut, special tokens included."""
    positions: int
    """The most tokens that the model can read."""
    truncate_dim: int | None = None
    """How many of an embedding's dimensions `encode` gives, counted from the first; None for all."""

    @property
    def width(self) -> int:
        """D, dimensions of an embedding, before any are cut off."""
        return int(self.encoder.transformer.config.hidden_size)

    def tokens(self, texts: Sequence[str]) -> list[Tokens]:
        """Token ids of each text, special tokens included, cut to `max_length`."""
        if not texts:
            return []
        self.tokenizer.set_truncation_and_padding(
            PaddingStrategy.DO_NOT_PAD, TruncationStrategy.LONGEST_FIRST, self.max_length, 0, None, None
        )
        # Past the tokenizer's own call, which makes offsets and masks that nobody reads: 1.6 times as fast.
        encode = self.tokenizer.backend_tokenizer.encode_batch_fast
        # Some thousand at a time: an Encoding, with what was cut off, takes a hundred times the bytes of its ids.
        chunks = (encode(list(texts[first : first + TOKENISED])) for first in range(0, len(texts), TOKENISED))
        return [np.array(encoding.ids or [self._nothing], dtype=np.int32) for chunk in chunks for encoding in chunk]

    @property
    def _nothing(self) -> int:
        """The token for an empty text where the tokenizer adds none of its own, as many a decoder's does not."""
        return next(id_ for id_ in (self.tokenizer.eos_token_id, self.tokenizer.pad_token_id, 0) if id_ is not None)

    def encode(self, texts: Sequence[str], batch_tokens: int = 16_384) -> NDArray[np.float32]:
        """(N, D) embeddings of `texts` in eval mode, `batch_tokens` tokens at a time, texts of one length together.

        With `truncate_dim` d they are (N, d): the first d dimensions, of length 1 again where the model normalises.
        """
        training = self.encoder.training
        self.encoder.eval()
        count = self.truncate_dim or self.width
        out = np.empty((len(texts), count), np.float32)
        for indices, embeddings in embed(self.encoder, self.tokens(texts), batch_tokens):
            out[indices] = embeddings[:, :count]
        self.encoder.train(training)
        if count < self.width and self.encoder.normalized:
            out /= np.linalg.norm(out, axis=1, keepdims=True).clip(min=1e-12)
        return out

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
        return replace(self, truncate_dim=truncate_dim)

    def vocabulary_size(self) -> int:
        """One more than the largest token id. A tokenizer may have gaps, so that it is not the number of tokens."""
        return max(self.tokenizer.get_vocab().values()) + 1

    def tokenizer_fingerprint(self) -> str:
        """32 hex digits over all that decides the token ids of a text."""
        backend = json.loads(self.tokenizer.backend_tokenizer.to_str())
        # Truncation and padding are settings of the last call, not of the vocabulary.
        backend.pop("truncation", None)
        backend.pop("padding", None)
        content = json.dumps([backend, self.max_length], sort_keys=True)
        return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()

    def fingerprint(self) -> str:
        """32 hex digits over all that decides the embedding of a text: weights, tokens, pooling, normalisation, truncation."""
        parts = [type(self.encoder.transformer).__name__, self.encoder.pooling, self.encoder.normalized, self.truncate_dim]
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
        try:
            self.sentence_transformer.save_pretrained(str(folder), create_model_card=False)
        except Exception as error:
            if type(error) is not Exception:
                raise
            raise OSError(f"{folder}: {error}") from error  # tokenizers has no class of its own for a full disk


def load_student(config: ModelConfig) -> Pretrained:
    """The model to train, cut to `layers` and with `dropout` where these are given.

    Raises:
        UserError: no such model, or one that this package can't run.
    """
    student = _load("model", config)
    transformer = student.encoder.transformer
    if config.layers is not None:
        keep_layers(transformer, config.layers)
    use_cheap_dropout(transformer, config.dropout)
    for name, parameter in transformer.named_parameters():
        parameter.requires_grad_(in_embedding(name))
    return student


def load_guide(config: GuideConfig, where: str = "guide") -> Pretrained:
    """A frozen model, in eval mode: the guide, or what triplets are mined with.

    Args:
        where: its key in the YAML.

    Raises:
        UserError: no such model, or one that this package can't run.
    """
    guide = _load(where, config)
    guide.encoder.eval().requires_grad_(False)
    return guide


def load_finished(folder_or_id: str) -> Pretrained:
    """A model to evaluate, as it is: a checkpoint, an export or any model of the hub, in eval mode."""
    model = _load("--model", ModelConfig(name=folder_or_id))
    model.encoder.eval().requires_grad_(False)
    return model


def identity(name: str, revision: str | None, where: str, hash_of: Callable[[Path], str]) -> str:
    """What tells this model's weights from any other's: the hub's commit, or a hash over a local folder's files.

    Args:
        where: the model's key in the YAML.
        hash_of: a file's content as a hash.

    Raises:
        UserError: neither a folder nor a model of the hub.
    """
    folder = Path(name)
    if not folder.is_dir():
        return f"{name}@{_commit(where, name, revision)}"
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted(p for p in folder.rglob("*") if p.suffix in {".json", ".safetensors", ".bin", ".txt", ".model"}):
        digest.update(str(file.relative_to(folder)).encode())
        digest.update(hash_of(file).encode())
    return digest.hexdigest()


def _commit(where: str, name: str, revision: str | None) -> str:
    """The commit of a model of the hub that `revision` names now.

    Raises:
        UserError: there is no such model, or no network and no copy of it in the cache.
    """
    try:
        return Path(hf_hub_download(name, "config.json", revision=revision)).parent.name
    except (OSError, ValueError) as error:
        raise _not_found(where, name, error) from None


def _load(where: str, config: ModelConfig | GuideConfig) -> Pretrained:
    if not Path(config.name).is_dir():
        # Asked once: a misspelt name or a missing network shows here, and not after a dozen requests with retries each.
        _commit(where, config.name, config.revision)
    try:
        # float32 whatever the folder says: master weights for the student, exact similarities for the guide.
        with _load_reports() as reports:
            model = SentenceTransformer(
                config.name,
                revision=config.revision,
                trust_remote_code=config.trust_remote_code,
                device="cpu",
                model_kwargs={"dtype": torch.float32},
            )
    except (OSError, ValueError, ImportError) as error:
        raise _not_found(where, config.name, error) from None
    if missing := _missing_weights(reports):
        found = f"no weights for {', '.join(missing[:5])}{' and others' if len(missing) > 5 else ''}"
        raise _unfit(
            where, config.name, found, "weights for every layer: random ones would take their place", "get the whole model"
        )
    modules: list[Any] = list(model)
    kinds = [type(module) for module in modules]
    if kinds[:2] != [Transformer, Pooling] or kinds[2:] not in ([], [Normalize]):
        raise _unfit(
            where,
            config.name,
            " -> ".join(kind.__name__ for kind in kinds),
            "Transformer -> Pooling, then Normalize or nothing",
            "take a model without further layers",
        )
    transformer, pooling = modules[0], modules[1]
    if config.pooling is not None:
        pooling = Pooling(pooling.embedding_dimension, POOLING_MODES[config.pooling])
        model[1] = pooling
    ours = [name for name, mode in POOLING_MODES.items() if mode == pooling.pooling_mode]
    if not ours or not pooling.include_prompt:
        found = f"pooling {pooling.pooling_mode}{'' if pooling.include_prompt else ' that leaves the prompt out'}"
        expected = "pooling cls, mean or last over all tokens"
        raise _unfit(where, config.name, found, expected, f"set {where}.pooling to cls, mean or last")
    if not isinstance(model.tokenizer, PreTrainedTokenizerFast):
        raise _unfit(
            where, config.name, "a slow tokenizer", "a fast tokenizer (tokenizer.json)", "convert it once with transformers"
        )
    max_length = config.max_length or model.max_seq_length
    if max_length is None:
        raise _unfit(where, config.name, "no maximum length", "a number of tokens", f"set {where}.max_length")
    longest = _longest(transformer.auto_model)
    if max_length > longest:
        raise _unfit(where, config.name, f"max_length {max_length}", f"at most {longest} tokens", f"lower {where}.max_length")
    model.max_seq_length = max_length
    encoder = Encoder(transformer.auto_model, pooling=ours[0], normalized=len(modules) == 3)
    return Pretrained(model, encoder, model.tokenizer, max_length, longest)


@contextmanager
def _load_reports() -> Iterator[list[str]]:
    """What transformers reports about weights while it loads a model: it continues with random ones where some are missing."""
    reports: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: reports.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("transformers.modeling_utils")
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING)
    logger.propagate = False
    try:
        yield reports
    finally:
        logger.removeHandler(handler)
        logger.level, logger.propagate = before


def _missing_weights(reports: Sequence[str]) -> list[str]:
    """Names of weights that were not in the files and have a part in embeddings."""
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line) for report in reports for line in report.splitlines()]
    names = [line.split("|")[0].strip() for line in lines if "|" in line and "MISSING" in line.split("|")[1]]
    return [name for name in names if in_embedding(name)]


def _longest(transformer: Any) -> int:
    """Positions that the model has, in tokens."""
    family = kin_of(transformer)
    unused = transformer.embeddings.padding_idx + 1 if family is not None and family.positions_after_padding else 0
    # Models with relative positions alone (T5) have no such limit.
    positions = transformer.config.to_dict().get("max_position_embeddings", NO_LIMIT)
    return int(positions) - int(unused)


def _not_found(where: str, name: str, error: Exception) -> UserError:
    reason = next(iter(str(error).splitlines()), type(error).__name__)
    fix = "check the spelling, the network and, for a private model, your login"
    if name.startswith((".", "/", "~")):
        fix = f"correct the path of the folder: it starts from {Path.cwd()}"
    if Path(name).is_dir():
        fix = "name a folder that holds a model: config.json, weights and tokenizer"
    return UserError(
        Fault(
            f"{where}.name" if not where.startswith("--") else where,
            f"{shown(name)}, which could not be loaded: {reason}",
            "a local model folder or a model of the Hugging Face hub",
            fix,
        )
    )


def _unfit(where: str, name: str, found: str, expected: str, fix: str) -> UserError:
    return UserError(Fault(f"{where}.name: {name}", found, expected, fix))
