"""The guide inside sentence-transformers' trainer: the embeddings of a batch's columns, from whatever the user names.

It is a model whose embeddings are kept in a store, each text's once, or a store or a file of vectors that nothing is added to. In
none of them a weight of the guide is a part of the loss, its state or its optimizer.

Legend: N texts of a column, G width of the guide.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from sentence_transformers import SentenceTransformer
from transformers import PreTrainedTokenizerBase

from gist_train.config.errors import Fault, UserError, listed, shown
from gist_train.config.faults import fault_of
from gist_train.config.fields import Section
from gist_train.config.models import GuideConfig, GuideVectorsConfig, StoredModelConfig
from gist_train.data.caches import KINDS, use_while_alive
from gist_train.inside.growing import GrowingStore, Vectors
from gist_train.inside.texts import LOSS, USE_COLLATOR, Column
from gist_train.model.encoder import Tokens, batches_of, tokens_at_a_time
from gist_train.model.filling import FORMAT
from gist_train.model.guide import GuideStore, prompted, store_folder
from gist_train.model.loading import load_guide
from gist_train.model.opening import NO_LIMIT
from gist_train.model.pretrained import Pretrained
from gist_train.model.vectors import refuse_missing, vector_store
from gist_train.model.whole import BATCH_TEXTS, TextModel, WholeModel

GuideSource: TypeAlias = SentenceTransformer | str | Path | Mapping[str, Any] | None
"""What `guide` may be: a model, the name or folder of one, a store's folder, a file of vectors, the YAML's section, "self", or no
guide."""
Prompts: TypeAlias = str | Mapping[str, str] | None
ROLES = 3
"""Anchors, positives and negatives: all columns from the third on."""
_WHERE = f"{LOSS}: guide"
S = TypeVar("S", bound=Section)


class ModelGuide:
    """A frozen model. It is run for a text that its store has not, and loaded only then.

    Args:
        name: for people.
        load: the model, in eval mode.
        configs: how it reads anchors, positives and negatives: they differ in the prompt.
        folders: of the stores of these.
    """

    def __init__(self, name: str, load: Callable[[], TextModel], configs: Sequence[StoredModelConfig], folders: Sequence[Path]):
        self.name, self.configs = name, tuple(configs)
        self._load = load
        stores = {folder: GrowingStore(folder, config) for folder, config in zip(folders, configs, strict=True)}
        self.stores = tuple(stores[folder] for folder in folders)

    @cached_property
    def model(self) -> TextModel:
        """The guide itself."""
        return self._load()

    def tokenizes_like(self, student: SentenceTransformer) -> bool:
        """Whether the guide would read the student's token ids: GISTEmbedLoss then hands them on. It wants the text where it has
        other tokens, reads less, or puts a prompt before the text."""
        if any(prompted(self.model, config, [""]) != [""] for config in self.configs):
            return False
        own, theirs = self.model.sentence_transformer.tokenizer, student.tokenizer
        if not (isinstance(own, PreTrainedTokenizerBase) and isinstance(theirs, PreTrainedTokenizerBase)):
            return False
        longest = student.max_seq_length or NO_LIMIT
        return own.get_vocab() == theirs.get_vocab() and longest <= self.model.max_length

    def embeddings(self, column: Column, role: int, device: torch.device) -> Vectors:
        """(N, G) of a column's texts, of length 1.

        Args:
            role: 0 for anchors, 1 for positives, 2 for negatives.
            device: to run the guide on, where it must be run.

        Raises:
            FloatingPointError: one is not finite, or has no direction.
        """
        config = self.configs[role]

        def embed(which: NDArray[np.int64]) -> Vectors:
            model = self.model.to(device)
            with torch.no_grad(), torch.autocast(device.type, enabled=False):
                if column.texts is not None:
                    parts = model.embed(prompted(model, config, [column.texts[i] for i in which.tolist()]), config.batch_tokens)
                else:
                    assert column.tokens is not None
                    parts = _embed_tokens(model, [column.tokens[i] for i in which.tolist()], config.batch_tokens, device)
                vectors = np.empty((len(which), model.dimensions), np.float32)
                for places, embeddings in parts:
                    vectors[places] = embeddings
            with np.errstate(invalid="ignore"):  # raised below, with the text
                vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
            if not (finite := np.isfinite(vectors).all(axis=1)).all():
                broken = shown(column.shown(int(which[int(np.argmin(finite))])))
                raise FloatingPointError(f"the guide {self.name} gives no finite embedding of length 1 to the text {broken}")
            return vectors

        return self.stores[role].vectors(column.hashes, embed)


class FixedGuide:
    """Embeddings that are there, and no model to make others with.

    Args:
        store: of them.
        file: where they come from, for people.
        of_vectors: whether that is a file of vectors.
    """

    def __init__(self, store: GuideStore, file: str, *, of_vectors: bool):
        self.name, self._store, self._of_vectors = file, store, of_vectors
        self._index = store.index()
        if store.folder.parent.name in KINDS:  # in a cache, and not where the user copied it to
            use_while_alive(self, store.folder)

    def tokenizes_like(self, student: SentenceTransformer) -> bool:  # noqa: ARG002
        """No: what is there are texts."""
        return False

    def embeddings(self, column: Column, role: int, device: torch.device) -> Vectors:  # noqa: ARG002
        """As of `ModelGuide`.

        Raises:
            UserError: a text has none.
        """
        positions = self._index.positions(column.hashes)
        missing = [column.shown(i) for i in np.flatnonzero(positions < 0).tolist()]
        if missing and column.exact and self._of_vectors:
            refuse_missing(self._store, missing, len(positions), "guide")
        if missing:
            fix = "embed them too: gist-train prepare, with the YAML that made the store"
            if not column.exact:
                fix = f"{USE_COLLATOR}; without it, texts are decoded from the student's tokens"
            found = f"no embedding for {len(missing)} of {len(positions)} texts of a batch: {listed(map(shown, missing), 3)}"
            raise UserError(Fault(f"{_WHERE}: {self.name}", found, "one for every text", fix))
        return self._store.read(positions)


Guide: TypeAlias = ModelGuide | FixedGuide | Literal["self"] | None
"""Where embeddings come from: "self" for the student's own, None for no guide."""


def guide_of(guide: GuideSource, prompts: Prompts, cache: Path) -> Guide:
    """What `guide` names.

    Args:
        prompts: before every text, or by "anchor", "positive" and "negative"; None as the model's folder says.
        cache: where stores are.

    Raises:
        UserError: it names nothing, or something that can't be a guide.
    """
    if isinstance(guide, SentenceTransformer):
        return _of_object(guide, prompts, cache)
    if guide is None or guide == "self" or isinstance(guide, Mapping):
        _refuse_prompts(guide, prompts)
        return _of_section(guide, cache) if isinstance(guide, Mapping) else "self" if guide else None
    try:
        path = Path(guide)
    except TypeError:
        expected = "a SentenceTransformer, a model's name, a folder, a file of vectors, or the section guide of a YAML"
        fix = "give one of these, or None for no guide"
        raise UserError(Fault(_WHERE, f"a {type(guide).__name__}", expected, fix)) from None
    if (path / "hashes.bin").is_file():
        return FixedGuide(GuideStore(path), str(guide), of_vectors=False)
    if path.suffix in (".parquet", ".npy"):
        return _of_section({"vectors": str(guide)}, cache)
    asked = {"prompt": prompts} if isinstance(prompts, str) else {"prompts": prompts}
    return _of_section({"name": str(guide), **asked}, cache)


def _refuse_prompts(guide: GuideSource, prompts: Prompts) -> None:
    """Raises UserError where prompts come beside a guide that takes none."""
    if prompts is not None:
        found = f"prompts, and {shown(guide)} as guide"
        fix = "leave guide_prompts out; a section has keys of its own for them"
        raise UserError(Fault(f"{LOSS}: guide_prompts", found, "prompts for a SentenceTransformer or a model's name", fix))


def _of_section(given: Mapping[str, Any], cache: Path) -> Guide:
    """What the YAML's section guide gives, in float32 unless it says otherwise."""
    values = {"dtype": "float32", **given}
    if "vectors" in values:
        vectors = checked_section(GuideVectorsConfig, values, "guide", "GuideVectorsConfig")
        return FixedGuide(vector_store(cache, vectors, "guide"), vectors.vectors, of_vectors=True)
    config = checked_section(GuideConfig, values, "guide", "GuideConfig")
    configs = config.of_roles
    folders = [store_folder(cache, one, "guide") for one in configs]
    return ModelGuide(config.name, lambda: load_guide(config), configs, folders)


def _of_object(guide: SentenceTransformer, prompts: Prompts, cache: Path) -> ModelGuide:
    length = guide.max_seq_length or NO_LIMIT
    fingerprint = WholeModel(guide, "", length, length).fingerprint()
    model = WholeModel(guide, f"SentenceTransformer-{fingerprint[:8]}", length, length)
    asked = {"prompt": prompts} if isinstance(prompts, str) else {"prompts": prompts}
    config = checked_section(GuideConfig, {"name": model.name, "dtype": "float32", **asked}, "guide", "GuideConfig")
    folders = []
    for one in config.of_roles:
        key = json.dumps([FORMAT, "object", fingerprint, one.prompt, one.dtype])
        folders.append(cache / "guides" / hashlib.blake2b(key.encode(), digest_size=16).hexdigest())
    return ModelGuide(model.name, lambda: model, config.of_roles, folders)


def checked_section(kind: type[S], values: Mapping[str, Any], *key: str) -> S:
    """A section of the config from an argument of the loss.

    Args:
        key: where it stands in a config.

    Raises:
        UserError: names every fault there is.
    """
    try:
        return kind.model_validate({name: dict(value) if isinstance(value, Mapping) else value for name, value in values.items()})
    except ValidationError as error:
        details = [{**one, "loc": (*key, *one["loc"])} for one in error.errors(include_url=False)]
        raise UserError(*[fault_of(one, {(): (LOSS, None)}) for one in details]) from None  # type: ignore[arg-type]


def default_cache() -> Path:
    """Where stores are unless the user says: gist-train in the user's folder for caches."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gist-train"


def _embed_tokens(
    model: TextModel, tokens: Sequence[Tokens], batch_tokens: int, device: torch.device
) -> Iterator[tuple[Tokens, Vectors]]:
    """Yields (indices into tokens (k,), embeddings (k, G)) of token ids as they are."""
    if isinstance(model, Pretrained):
        yield from model.embed_batches(tokens, batches_of(tokens, tokens_at_a_time(batch_tokens, device)))
        return
    whole: Any = model.sentence_transformer.eval()
    order = np.argsort([len(ids) for ids in tokens], kind="stable")
    for indices in np.array_split(order, -(-len(order) // BATCH_TEXTS)):
        padded = whole.tokenizer.pad({"input_ids": [tokens[i].tolist() for i in indices.tolist()]}, return_tensors="pt")
        embeddings = whole({name: value.to(device) for name, value in padded.items()})["sentence_embedding"]
        yield indices, embeddings.float().cpu().numpy()
