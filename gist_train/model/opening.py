"""Opens a model with sentence-transformers, and refuses by name what can't be run as its folder says.

Nothing else imports sentence-transformers and transformers' models when it is imported: a command that loads no model need not
wait seconds for them.
"""

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from torch import nn
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from gist_train.config.errors import UserError, shown
from gist_train.config.models import ModelConfig, StoredModelConfig
from gist_train.data.files import read_json
from gist_train.model import adapters
from gist_train.model.encoder import Encoder
from gist_train.model.families import in_embedding, kin_of
from gist_train.model.folders import commit_in, files_of, not_loaded, unfit
from gist_train.model.hub import whole
from gist_train.model.pretrained import Pretrained
from gist_train.model.whole import TextModel, WholeModel

logger = logging.getLogger(__name__)

NO_LIMIT = 1 << 20
"""Tokens that a model without a limit of its own may read."""
POOLING_MODES = {"cls": "cls", "mean": "mean", "last": "lasttoken"}
"""Our poolings -> what sentence-transformers calls them."""


def open_model(where: str, config: ModelConfig | StoredModelConfig, *, encodes_only: bool) -> TextModel:
    """The model in `config`.

    Args:
        where: its key in the YAML.
        encodes_only: whether sentence-transformers may run it where our encoder does not.
    """
    _refuse_adapter(where, config.name)
    _refuse_pickles(where, config.name)
    revision = None if Path(config.name).is_dir() else commit_in(where, config.name, config.revision)
    try:
        # float32 whatever the folder says: master weights for the student, exact similarities for the guide.
        with _load_reports() as reports, _no_pickle():
            model = SentenceTransformer(
                config.name,
                revision=revision,
                local_files_only=revision is not None and whole(config.name, revision),
                trust_remote_code=config.trust_remote_code,
                device="cpu",
                model_kwargs={"dtype": torch.float32, "use_safetensors": True},
            )
    except _PickleError as error:
        raise _a_pickle(where, config.name, str(error)) from None
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise not_loaded(where, config.name, error) from None
    missing, first = _missing_weights(reports), cast(Any, model[0])
    for name in missing:
        if not in_embedding(name):  # drawn at random each time, they would make another model of it in each process
            nn.init.zeros_(first.auto_model.get_parameter(name))
    if missing := [name for name in missing if in_embedding(name)]:
        found = f"no weights for {', '.join(missing[:5])}{' and others' if len(missing) > 5 else ''}"
        expected = "weights for every layer: random ones would take their place"
        raise unfit(where, config.name, found, expected, "get the whole model")
    _check_code(where, config, model)
    _check_tokenizer(where, config.name, model)
    modules: list[Any] = list(model)
    if config.pooling is not None:
        index = next((index for index, module in enumerate(modules) if isinstance(module, Pooling)), None)
        if index is None:
            found = f"{config.pooling}, and a model without a pooling layer"
            raise unfit(where, config.name, found, "null: the model pools in its own way", f"take {where}.pooling out")
        model[index] = Pooling(modules[index].embedding_dimension, POOLING_MODES[config.pooling])
        modules = list(model)
    max_length, longest = _lengths(where, config, model)
    model.max_seq_length = max_length
    if (why := _why_not_ours(where, modules, model.tokenizer)) is not None:
        if not encodes_only:
            raise unfit(where, config.name, *why)
        logger.warning("%s: %s, so that sentence-transformers runs it, padded", config.name, why[0])
        return WholeModel(model, config.name, max_length, longest)
    pooling = next(name for name, mode in POOLING_MODES.items() if mode == modules[1].pooling_mode)
    encoder = Encoder(modules[0].auto_model, pooling=pooling, normalized=len(modules) == 3)
    return Pretrained(model, encoder, model.tokenizer, max_length, longest, truncate_dim=model.truncate_dim)


def _refuse_adapter(where: str, name: str) -> None:
    """Raises UserError where a folder holds a LoRA adapter, whose weights the packed encoder would pass by."""
    file = Path(name) / adapters.CONFIG
    if file.is_file():
        try:
            base = shown(read_json(file)["base_model_name_or_path"])
        except (ValueError, KeyError, TypeError):
            base = "another model"
        found = f"a LoRA adapter of {base} (adapter_config.json)"
        fix = "merge it: peft's PeftModel.from_pretrained(...).merge_and_unload(), and save the model to a folder of its own"
        raise unfit(where, name, found, "a whole model", fix)


class _PickleError(Exception):
    """A loader was about to unpickle this file."""


def _refuse_pickles(where: str, name: str) -> None:
    """Raises UserError where a local folder, or that of a module in it, has its weights as a pickle alone."""
    for file in files_of(Path(name)) if Path(name).is_dir() else ():
        if file.suffix == ".bin" and not any(file.parent.glob("model*.safetensors")):
            raise _a_pickle(where, name, str(file.relative_to(name)))


def _a_pickle(where: str, name: str, file: str) -> UserError:
    fix = "python scripts/convert_to_safetensors.py FOLDER, of gist-train's checkout; or take a model with model.safetensors"
    return unfit(where, name, f"{file}: weights as a pickle, which can run code", "weights as safetensors", fix)


@contextmanager
def _no_pickle() -> Iterator[None]:
    """Has whatever loads a model within the block raise `_PickleError` in place of unpickling a file."""

    def refuse(file: object, *_: object, **__: object) -> None:
        raise _PickleError(Path(file).name if isinstance(file, str | Path) else "a file")

    before = torch.load
    vars(torch)["load"] = refuse  # modules of sentence-transformers have no switch for it
    try:
        yield
    finally:
        vars(torch)["load"] = before


def _why_not_ours(where: str, modules: Sequence[Any], tokenizer: Any) -> tuple[str, str, str] | None:
    """Why our encoder does not run a model: what was found, what is expected, and how to fix it; None where it does."""
    kinds = [type(module) for module in modules]
    if kinds[:2] != [Transformer, Pooling] or kinds[2:] not in ([], [Normalize]):
        names = " -> ".join(kind.__name__ for kind in kinds)
        return names, "Transformer -> Pooling, then Normalize or nothing", "take a model without further layers"
    if modules[1].pooling_mode not in POOLING_MODES.values() or not modules[1].include_prompt:
        found = f"pooling {modules[1].pooling_mode}{'' if modules[1].include_prompt else ' that leaves the prompt out'}"
        return found, "pooling cls, mean or last over all tokens", f"set {where}.pooling to cls, mean or last"
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        return "a slow tokenizer", "a fast tokenizer (tokenizer.json)", "convert it once with transformers"
    return None


def _check_code(where: str, config: ModelConfig | StoredModelConfig, model: SentenceTransformer) -> None:
    """Raises UserError where a folder has code of its own that may not run: transformers would run its own in its place."""
    module: Any = model[0]
    code = (getattr(module.auto_model.config, "auto_map", None) or {}).get("AutoModel") if hasattr(module, "auto_model") else None
    if code is not None and not config.trust_remote_code:
        key = "model" if where.startswith("--") else where
        raise unfit(
            where,
            config.name,
            f"code of its own ({code}), which may not run",
            "code that you trust, or a model of transformers' own",
            f"read that code, then set {key}.trust_remote_code: true (in a command: --set {key}.trust_remote_code=true)",
        )


def _check_tokenizer(where: str, name: str, model: SentenceTransformer) -> None:
    """Raises UserError where texts would be read as unknown tokens, or as ids that the model has no embedding for."""
    tokenizer, module = model.tokenizer, model[0]
    if not isinstance(tokenizer, PreTrainedTokenizerBase) or not hasattr(module, "auto_model"):
        return
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    special = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}
    if vocabulary.keys() <= special:
        found = f"a tokenizer of {len(vocabulary)} special tokens: its files are missing"
        raise unfit(where, name, found, "the tokenizer's files beside the weights", "copy them from the model's origin")
    transformer: Any = module.auto_model
    embedding = transformer.get_input_embeddings()
    largest, rows = max(vocabulary.values()), len(embedding.weight)
    if largest >= rows:
        token = next(token for token, number in vocabulary.items() if number == largest)
        found = f"token ids up to {largest:,} ({shown(token)}), and an embedding of {rows:,} rows"
        fix = "load it with transformers, call model.resize_token_embeddings(len(tokenizer)) and save it again"
        raise unfit(where, name, found, "an embedding for every token", fix)


def _lengths(where: str, config: ModelConfig | StoredModelConfig, model: SentenceTransformer) -> tuple[int, int]:
    """Tokens that a text is cut to, and the most that the model can read."""
    module: Any = model[0]
    longest = _longest(module.auto_model) if hasattr(module, "auto_model") else NO_LIMIT
    max_length = config.max_length or model.max_seq_length
    if max_length is None:
        raise unfit(where, config.name, "no maximum length", "a number of tokens", f"set {where}.max_length")
    if max_length > longest:
        if where.startswith("--"):  # it has no key for a length of its own, and no longer text can be read
            logger.warning(
                "%s: texts are cut to %d tokens, as many as it has positions, and not to %d", config.name, longest, max_length
            )
            return longest, longest
        raise unfit(where, config.name, f"max_length {max_length}", f"at most {longest} tokens", f"lower {where}.max_length")
    return int(max_length), longest


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
    """Names of weights that were not in the files."""
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line) for report in reports for line in report.splitlines()]
    return [line.split("|")[0].strip() for line in lines if "|" in line and "MISSING" in line.split("|")[1]]


def _longest(transformer: Any) -> int:
    """Positions that the model has, in tokens."""
    family = kin_of(transformer)
    unused = transformer.embeddings.padding_idx + 1 if family is not None and family.positions_after_padding else 0
    # Models with relative positions alone (T5) have no such limit.
    positions = transformer.config.to_dict().get("max_position_embeddings", NO_LIMIT)
    return int(positions) - int(unused)
