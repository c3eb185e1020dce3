"""Whether all ranks are about to train the same: config and software before anything slow, content before the first step."""

import platform
from importlib.metadata import version

from gist_train.config.schema import Config, cache_folder
from gist_train.config.secrets import without_secrets
from gist_train.training.guides import StoredGuide
from gist_train.training.ranks import Ranks
from gist_train.training.run_description import PACKAGES
from gist_train.training.setup import Prepared
from gist_train.version import __version__

PLACES = ("output_dir", "cache_dir", "path", "vectors")
"""Last parts of keys that say where something is: a host may have it elsewhere, and its content is compared."""


def refuse_unlike_configs(ranks: Ranks, config: Config) -> None:
    """Raises UserError where ranks were started with other configs, packages or Pythons: it would be no one training, or hang."""
    packages = {"gist-train": __version__, "Python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
    facts = {
        **_flat(without_secrets(config.model_dump()), ""),
        **{f"version of {name}": found for name, found in packages.items()},
    }
    ranks.agree("configs", facts, "start all ranks with one YAML, the same --set and one environment")


def refuse_unlike_content(ranks: Ranks, config: Config, prepared: Prepared, precision: str) -> None:
    """Raises UserError where ranks would start from other weights, or read other rows or another guide's embeddings.

    Args:
        precision: float32, bf16 or fp16.
    """
    if ranks.size == 1:
        return
    student, guide = prepared.student, prepared.guide
    stored = [part for texts in guide.columns for part in texts.parts] if isinstance(guide, StoredGuide) else []
    facts = {
        "tokenizer of the student": student.tokenizer_fingerprint(),
        "weights of the student": student.fingerprint(),
        "precision": precision,
        "rows and texts": prepared.corpus.content,
        "guide": guide.fingerprint if isinstance(guide, StoredGuide) else type(guide).__name__,
        "embeddings of the guide": [part.store.content(part.positions) for part in stored],
        "weights of guides": guide.anchor.weights if isinstance(guide, StoredGuide) else (),
    }
    fix = f"have cache_dir ({cache_folder(config)}), models and data on a disk that all hosts share, or the same on each"
    ranks.agree("content", facts, fix)


def _flat(value: object, above: str) -> dict[str, object]:
    """Dotted key -> value of all that is no place."""
    match value:
        case dict():
            parts = {f"{above}.{key}" if above else str(key): part for key, part in value.items() if key not in PLACES}
        case list() | tuple():
            parts = {f"{above}[{index}]": part for index, part in enumerate(value)}
        case _:
            return {above: value}
    return {key: leaf for name, part in parts.items() for key, leaf in _flat(part, name).items()}
