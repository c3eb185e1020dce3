"""A model before it is loaded: which one it is, its default prompt, and what is told of one that can't be loaded."""

import hashlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from huggingface_hub import hf_hub_download

from gist_train.config.errors import Fault, UserError, shown
from gist_train.data.files import read_json
from gist_train.model.hub import commit_of, whole

PROMPTS_FILE = "config_sentence_transformers.json"
MODEL_FILE = re.compile(
    r"(?:config|config_sentence_transformers|modules|sentence_\w+_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens"
    r"|vocab|generation_config|preprocessor_config|processor_config|chat_template|(?:model|pytorch_model)\S*\.index)\.json"
    r"|(?:vocab|merges)\.txt|\S+\.model|(?:model|pytorch_model)\S*\.(?:safetensors|bin)"
)
"""Names of the files that loading a model reads."""


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
        return f"{name}@{commit_in(where, name, revision)}"
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted(files_of(folder)):
        digest.update(str(file.relative_to(folder)).encode())
        digest.update(hash_of(file).encode())
    return digest.hexdigest()


def files_of(folder: Path) -> Iterator[Path]:
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


def commit_in(where: str, name: str, revision: str | None) -> str:
    """The commit of a model of the hub that `revision` names now.

    Raises:
        UserError: there is no such model, or no network and no copy of it in the cache.
    """
    try:
        return commit_of(name, revision)
    except (OSError, ValueError) as error:
        raise not_loaded(where, name, error) from None


def not_loaded(where: str, name: str, error: Exception) -> UserError:
    reason = next(iter(str(error).splitlines()), type(error).__name__)
    if (pointer := _pointer_in(Path(name))) is not None:
        found = f"{pointer.name} of {pointer.stat().st_size} bytes: a pointer of git-lfs, and not the weights"
        return unfit(where, name, found, "the file itself", f"run git lfs pull in {name}, or download the model again")
    fix = "check the spelling, the network and, for a private model, your login"
    if Path(name).is_dir():
        fix = "name a folder that holds a whole model: config.json, weights and tokenizer; or fetch this one again"
    elif name.startswith((".", "/", "~")):
        reason, fix = "no such folder", f"correct the path of the folder: it starts from {Path.cwd()}"
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
    for file in files_of(folder) if folder.is_dir() else ():
        if file.stat().st_size < 1024 and file.read_bytes().startswith(b"version https://git-lfs"):
            return file
    return None


def unfit(where: str, name: str, found: str, expected: str, fix: str) -> UserError:
    return UserError(Fault(f"{where}.name: {name}", found, expected, fix))
