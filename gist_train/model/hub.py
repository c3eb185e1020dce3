"""Models of the Hugging Face hub: which commit is meant, and whether its copy in the cache is whole.

The hub is asked once for each model, with time limits of our own: what loads a model asks a dozen times, and waits each time.
"""

import logging
from contextlib import suppress
from functools import cache
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache

from gist_train.data.asking import SECONDS_TO_ANSWER, HubError, asked, silent
from gist_train.data.files import read_json

_WEIGHTS = "model.safetensors"
_INDEX = f"{_WEIGHTS}.index.json"
_TOKENIZERS = ("tokenizer.json", "vocab.txt", "tokenizer.model", "sentencepiece.bpe.model")
logger = logging.getLogger(__name__)


@cache
def commit_of(name: str, revision: str | None) -> str:
    """The commit (40 hex digits) of a model of the hub that `revision` names now, asked once a process.

    Where the hub does not tell, the copy in the cache is taken, and a line says so.

    Raises:
        OSError: the hub does not tell it, in words, and there is no copy.
    """
    kept = _cached(name, "config.json", revision)
    commit = None if kept is None else kept.parent.name
    if commit is not None and (commit == revision or silent()) and whole(name, commit):
        return commit
    try:
        named = asked(lambda: HfApi().model_info(name, revision=revision, timeout=SECONDS_TO_ANSWER).sha, once=commit is not None)
    except HubError as error:
        if commit is None:
            raise
        if not whole(name, commit):  # it would be loaded without the parts that are missing, and pool in another way
            raise HubError(f"{error}; its copy in the cache, commit {commit}, lacks a part") from None
        if not error.as_wished:
            logger.warning("%s: %s; the copy in the cache is taken, commit %s", name, error, commit)
        return commit
    _keep_name_of(name, revision)
    return named


def _keep_name_of(name: str, revision: str | None) -> None:
    """Has the cache know the commit by this revision's name, as others who read it offline ask for it."""
    with suppress(OSError, ValueError):  # a model without this file is loaded all the same, or what loads it says why not
        hf_hub_download(name, "config.json", revision=revision, etag_timeout=SECONDS_TO_ANSWER)


def whole(name: str, commit: str) -> bool:
    """Whether the cache has all that loading a model reads: without its list of modules it would be pooled otherwise."""
    parts = try_to_load_from_cache(name, "modules.json", revision=commit)
    if parts is None:  # nobody has looked whether the hub has one
        return False
    paths = [""]
    if isinstance(parts, str):
        try:
            paths = [str(module["path"]) for module in read_json(Path(parts)) if module["type"].split(".")[-1] != "Normalize"]
        except (ValueError, TypeError, KeyError, OSError):
            return False
    places = [f"{path}/" if path else "" for path in paths]
    configured = all(_cached(name, f"{place}config.json", commit) for place in places)
    return configured and _has_weights(name, places[0], commit) and any(_cached(name, places[0] + f, commit) for f in _TOKENIZERS)


def folder_on_disk(name: str, revision: str | None) -> Path | None:
    """A model's folder where it is on this machine: its own, or the hub's copy in the cache, if that is whole. Asks nobody."""
    if Path(name).is_dir():
        return Path(name)
    kept = _cached(name, "config.json", revision)
    return kept.parent if kept is not None and whole(name, kept.parent.name) else None


def _has_weights(name: str, place: str, commit: str) -> bool:
    if _cached(name, place + _WEIGHTS, commit) is not None:
        return True
    index = _cached(name, place + _INDEX, commit)
    if index is None:
        return False
    try:
        shards = {*read_json(index)["weight_map"].values()}
    except (ValueError, TypeError, KeyError, AttributeError):
        return False
    return all(_cached(name, f"{place}{shard}", commit) for shard in shards)


def _cached(name: str, file: str, revision: str | None) -> Path | None:
    """A file of the model in the cache, if it is there and not of a download that was cut: those have another name."""
    path = try_to_load_from_cache(name, file, revision=revision)
    return Path(path) if isinstance(path, str) and Path(path).is_file() else None
