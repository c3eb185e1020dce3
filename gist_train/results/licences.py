"""Where the parts of a model come from: whether a name is the hub's, and the licence that a part's own card names."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import metadata_load, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # documented, but not marked as exported


@dataclass(frozen=True, slots=True)
class Licence:
    """What the front matter of a model's or data set's README.md says of its licence."""

    id: str | list[str]
    """The hub's identifier, e.g. apache-2.0; `other` where `name` says which."""
    name: str | None
    """Name of a licence that has no identifier."""

    def __str__(self) -> str:
        names = self.id if isinstance(self.id, str) else ", ".join(self.id)
        return f"{names} ({self.name})" if self.name else names


def unfit_for_hub(name: str) -> str | None:
    """Why no repository of the hub can have this name; None where one can."""
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        return str(error)
    return None


def on_hub(name: str) -> bool:
    """Whether `name` is an id of the hub's, and no folder of this machine's."""
    return unfit_for_hub(name) is None and not Path(name).exists()


def licence_of(name: str, revision: str | None, repo_type: str = "model") -> Licence | None:
    """The licence of a local folder, or of a repository of the hub as its copy in the cache tells it; None where none is named.

    Nothing is asked of the network: what trained the model has been read already, and its README.md with it.

    Args:
        revision: commit, tag or branch on the hub; None for main.
        repo_type: "model" or "dataset".
    """
    readme: Any = Path(name) / "README.md"
    if on_hub(name):
        readme = try_to_load_from_cache(name, "README.md", revision=revision, repo_type=repo_type)
    if not isinstance(readme, str | Path) or not Path(readme).is_file():
        return None
    try:
        front = metadata_load(readme) or {}
    except (ValueError, yaml.YAMLError):  # a README.md without front matter that can be read names no licence
        return None
    licence, called = front.get("license"), front.get("license_name")
    if isinstance(licence, list):
        licence = [str(one) for one in licence if one]
    elif licence is not None:
        licence = str(licence)
    return Licence(licence, str(called) if called else None) if licence else None
