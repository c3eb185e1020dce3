"""Models as people keep them: a local folder or hub id, in sentence-transformers' layout or transformers' alone.

What the folder says counts: pooling, length, default prompt, truncation. What can't be run as it says is refused by name.
"""

import hashlib
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from gist_train.config.errors import Fault, UserError, shown
from gist_train.config.models import ModelConfig, StoredModelConfig
from gist_train.data.files import read_json
from gist_train.model import adapters
from gist_train.model.adapters import add_adapters, load_adapters, merge_adapters, refuse_other_base
from gist_train.model.dropout import use_cheap_dropout
from gist_train.model.encoder import Encoder
from gist_train.model.families import in_embedding, kin_of
from gist_train.model.hub import commit_of, whole
from gist_train.model.layers import keep_layers
from gist_train.model.pretrained import Pretrained
from gist_train.model.whole import TextModel, WholeModel

logger = logging.getLogger(__name__)

NO_LIMIT = 1 << 20
"""Tokens that a model without a limit of its own may read."""
PROMPTS_FILE = "config_sentence_transformers.json"
MODEL_FILE = re.compile(
    r"(?:config|config_sentence_transformers|modules|sentence_\w+_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens"
    r"|vocab|generation_config|preprocessor_config|processor_config|chat_template|(?:model|pytorch_model)\S*\.index)\.json"
    r"|(?:vocab|merges)\.txt|\S+\.model|(?:model|pytorch_model)\S*\.(?:safetensors|bin)"
)
"""Names of the files that loading a model reads."""
POOLING_MODES = {"cls": "cls", "mean": "mean", "last": "lasttoken"}
"""Our poolings -> what sentence-transformers calls them."""


def load_student(config: ModelConfig, prompts: Mapping[str, str] | None = None) -> Pretrained:
    """The model to train, cut to `layers` and with `dropout` where these are given.

    Args:
        prompts: by name, for what its folder has none: the model is saved with them.

    Raises:
        UserError: no such model, or one that this package can't run.
    """
    student = _load("model", config, encodes_only=False)
    assert isinstance(student, Pretrained)
    transformer = student.encoder.transformer
    if config.layers is not None:
        keep_layers(transformer, config.layers)
    use_cheap_dropout(transformer, config.dropout)
    own = student.sentence_transformer.prompts
    own.update({name: prompt for name, prompt in (prompts or {}).items() if not own.get(name)})
    if (
        student.sentence_transformer.default_prompt_name is None
        and len({*(prompts or {}).values()}) == 1
        and len(prompts or {}) == 2
    ):
        student.sentence_transformer.default_prompt_name = "query"  # every text is trained with it
    for name, parameter in transformer.named_parameters():
        parameter.requires_grad_(in_embedding(name) and config.lora is None)
    if config.lora is not None:
        add_adapters(transformer, config.lora)
    return student


def load_guide(config: StoredModelConfig, where: str = "guide") -> TextModel:
    """A frozen model, in eval mode: the guide, or what triplets are mined with.

    Args:
        where: its key in the YAML.

    Raises:
        UserError: no such model, or one that neither this package nor sentence-transformers can run.
    """
    return _frozen(_load(where, config, encodes_only=True))


def load_finished(folder_or_id: str, *, trust_remote_code: bool = False) -> TextModel:
    """A model to evaluate, as it is: an export, or any model of the hub, in eval mode.

    Args:
        trust_remote_code: whether Python code from its folder may run.
    """
    config = ModelConfig(name=folder_or_id, trust_remote_code=trust_remote_code)
    return _frozen(_load("--model", config, encodes_only=True))


def load_trained(folder: Path, config: ModelConfig) -> Pretrained:
    """A checkpoint or an average of some, in eval mode: what was trained from `config` runs the same code.

    Adapters are merged.
    """
    if (folder / adapters.WEIGHTS).is_file():
        trained = load_student(config)
        refuse_other_base(trained.encoder.transformer, folder)
        load_adapters(trained.encoder.transformer, folder)
        merge_adapters(trained.encoder.transformer)
        names = read_json(folder / PROMPTS_FILE)
        trained.sentence_transformer.prompts = names["prompts"]
        trained.sentence_transformer.default_prompt_name = names["default_prompt_name"]
        _frozen(trained)
        return trained
    model = load_finished(str(folder), trust_remote_code=config.trust_remote_code)
    if not isinstance(model, Pretrained):
        raise _unfit("--model", str(folder), "modules that no training wrote", "a checkpoint", "name a checkpoint of the run")
    return model


def _frozen(model: TextModel) -> TextModel:
    if isinstance(model, Pretrained):
        model.encoder.eval()
    model.sentence_transformer.eval().requires_grad_(False)
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
    for file in sorted(_files_of(folder)):
        digest.update(str(file.relative_to(folder)).encode())
        digest.update(hash_of(file).encode())
    return digest.hexdigest()


def _files_of(folder: Path) -> Iterator[Path]:
    """What loading a model reads of its folder; notes, logs and results beside it are none of the model."""
    modules = folder / "modules.json"
    try:
        parts = [str(module["path"]) for module in read_json(modules)] if modules.is_file() else []
    except (ValueError, TypeError, KeyError):  # loading it will say what is wrong with it
        parts = []
    for part in {folder, *(folder / part for part in parts)}:
        yield from (file for file in part.glob("*") if MODEL_FILE.fullmatch(file.name) and file.is_file())


def folder_prompt(name: str, revision: str | None) -> str:
    """The default prompt that a model's folder sets, without loading the model; "" for none."""
    file = Path(name) / PROMPTS_FILE
    if not Path(name).is_dir():
        try:
            commit = commit_of(name, revision)
            file = Path(hf_hub_download(name, PROMPTS_FILE, revision=commit, local_files_only=whole(name, commit)))
        except (OSError, ValueError):  # it has no such file
            return ""
    try:
        config = read_json(file) if file.is_file() else {}
        return str(config.get("prompts", {}).get(config.get("default_prompt_name")) or "")
    except (ValueError, AttributeError):  # loading it will say what is wrong with it
        return ""


def _commit(where: str, name: str, revision: str | None) -> str:
    """The commit of a model of the hub that `revision` names now.

    Raises:
        UserError: there is no such model, or no network and no copy of it in the cache.
    """
    try:
        return commit_of(name, revision)
    except (OSError, ValueError) as error:
        raise _not_found(where, name, error) from None


def _load(where: str, config: ModelConfig | StoredModelConfig, *, encodes_only: bool) -> TextModel:
    """The model in `config`.

    Args:
        where: its key in the YAML.
        encodes_only: whether sentence-transformers may run it where our encoder does not.
    """
    _refuse_adapter(where, config.name)
    _refuse_pickles(where, config.name)
    revision = None if Path(config.name).is_dir() else _commit(where, config.name, config.revision)
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
        raise _not_found(where, config.name, error) from None
    if missing := _missing_weights(reports):
        found = f"no weights for {', '.join(missing[:5])}{' and others' if len(missing) > 5 else ''}"
        expected = "weights for every layer: random ones would take their place"
        raise _unfit(where, config.name, found, expected, "get the whole model")
    _check_code(where, config, model)
    _check_tokenizer(where, config.name, model)
    modules: list[Any] = list(model)
    if config.pooling is not None:
        index = next((index for index, module in enumerate(modules) if isinstance(module, Pooling)), None)
        if index is None:
            found = f"{config.pooling}, and a model without a pooling layer"
            raise _unfit(where, config.name, found, "null: the model pools in its own way", f"take {where}.pooling out")
        model[index] = Pooling(modules[index].embedding_dimension, POOLING_MODES[config.pooling])
        modules = list(model)
    max_length, longest = _lengths(where, config, model)
    model.max_seq_length = max_length
    if (unfit := _why_not_ours(where, modules, model.tokenizer)) is not None:
        if not encodes_only:
            raise _unfit(where, config.name, *unfit)
        logger.warning("%s: %s, so that sentence-transformers runs it, padded", config.name, unfit[0])
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
        raise _unfit(where, name, found, "a whole model", fix)


class _PickleError(Exception):
    """A loader was about to unpickle this file."""


def _refuse_pickles(where: str, name: str) -> None:
    """Raises UserError where a local folder, or that of a module in it, has its weights as a pickle alone."""
    for file in _files_of(Path(name)) if Path(name).is_dir() else ():
        if file.suffix == ".bin" and not any(file.parent.glob("model*.safetensors")):
            raise _a_pickle(where, name, str(file.relative_to(name)))


def _a_pickle(where: str, name: str, file: str) -> UserError:
    fix = "python scripts/convert_to_safetensors.py FOLDER, of gist-train's checkout; or take a model with model.safetensors"
    return _unfit(where, name, f"{file}: weights as a pickle, which can run code", "weights as safetensors", fix)


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
        raise _unfit(
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
        raise _unfit(where, name, found, "the tokenizer's files beside the weights", "copy them from the model's origin")
    transformer: Any = module.auto_model
    embedding = transformer.get_input_embeddings()
    largest, rows = max(vocabulary.values()), len(embedding.weight)
    if largest >= rows:
        token = next(token for token, number in vocabulary.items() if number == largest)
        found = f"token ids up to {largest:,} ({shown(token)}), and an embedding of {rows:,} rows"
        fix = "load it with transformers, call model.resize_token_embeddings(len(tokenizer)) and save it again"
        raise _unfit(where, name, found, "an embedding for every token", fix)


def _lengths(where: str, config: ModelConfig | StoredModelConfig, model: SentenceTransformer) -> tuple[int, int]:
    """Tokens that a text is cut to, and the most that the model can read."""
    module: Any = model[0]
    longest = _longest(module.auto_model) if hasattr(module, "auto_model") else NO_LIMIT
    max_length = config.max_length or model.max_seq_length
    if max_length is None:
        raise _unfit(where, config.name, "no maximum length", "a number of tokens", f"set {where}.max_length")
    if max_length > longest:
        if where.startswith("--"):  # it has no key for a length of its own, and no longer text can be read
            logger.warning(
                "%s: texts are cut to %d tokens, as many as it has positions, and not to %d", config.name, longest, max_length
            )
            return longest, longest
        raise _unfit(where, config.name, f"max_length {max_length}", f"at most {longest} tokens", f"lower {where}.max_length")
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
    if (pointer := _pointer_in(Path(name))) is not None:
        found = f"{pointer.name} of {pointer.stat().st_size} bytes: a pointer of git-lfs, and not the weights"
        return _unfit(where, name, found, "the file itself", f"run git lfs pull in {name}, or download the model again")
    fix = "check the spelling, the network and, for a private model, your login"
    if name.startswith((".", "/", "~")):
        reason, fix = "no such folder", f"correct the path of the folder: it starts from {Path.cwd()}"
    if Path(name).is_dir():
        fix = "name a folder that holds a model: config.json, weights and tokenizer"
    return UserError(
        Fault(
            f"{where}.name" if not where.startswith("--") else where,
            f"{shown(name, 300)}, which could not be loaded: {reason}",
            "a local model folder or a model of the Hugging Face hub",
            fix,
        )
    )


def _pointer_in(folder: Path) -> Path | None:
    """A file of the model that git-lfs has not fetched: it names the content that should be there."""
    for file in _files_of(folder) if folder.is_dir() else ():
        if file.stat().st_size < 1024 and file.read_bytes().startswith(b"version https://git-lfs"):
            return file
    return None


def _unfit(where: str, name: str, found: str, expected: str, fix: str) -> UserError:
    return UserError(Fault(f"{where}.name: {name}", found, expected, fix))
