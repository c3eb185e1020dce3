"""A folder's manifest: size and SHA-256 of every file in it and of itself, written last.

A folder whose manifest is right is whole: safetensors loads a flipped bit without a word, and an array of ids is any array.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from gist_train.config.errors import Fault, UserError
from gist_train.config.secrets import without_secrets
from gist_train.data.files import read_json, write_json
from gist_train.run_folder import MANIFEST

FORMAT = 1
LOOKED_AT = 1 << 30
"""Bytes of a cached folder that are read to see whether it is whole: a second's work."""


def seal(folder: Path, facts: dict[str, Any]) -> None:
    """Writes manifest.json with `facts` and the size and SHA-256 of every file that is in the folder now, and of itself.

    Sizes and hashes that `facts` may bring from another manifest are replaced.
    """
    files = {
        str(path.relative_to(folder)): {"size": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    manifest = {**without_secrets(facts), "format": FORMAT, "files": files}
    write_json(folder / MANIFEST, {**manifest, "sha256": _own_hash(manifest)})


def _own_hash(manifest: dict[str, Any]) -> str:
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _stays_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts


def verified_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, every file of which has been read and compared with it.

    Raises:
        UserError: a file is missing, longer, shorter or altered.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise _damaged(folder, "no manifest.json", "one, written last")
    try:
        manifest = read_json(path)
        own, files = manifest["sha256"], manifest["files"]
        inside = all(_stays_inside(name) for name in files)
    except (ValueError, KeyError, TypeError):
        raise _damaged(folder, "a manifest.json that can't be read", "the one that was written") from None
    if own != _own_hash(manifest):
        raise _damaged(folder, "a manifest.json that was altered", "the one that was written")
    if manifest["format"] != FORMAT:
        fix = "use the version of gist-train that wrote it"
        raise UserError(Fault(f"checkpoint {folder}", f"format {manifest['format']}", f"format {FORMAT}", fix))
    if not inside:
        raise _damaged(folder, "a manifest.json that names files outside of the folder", "names of files in it")
    if (damage := _damage(folder, files)) is not None:
        raise _damaged(folder, *damage)
    return manifest  # type: ignore[no-any-return]


def damage_in(folder: Path) -> str | None:
    """What is wrong with a cached folder that was sealed, in words; None where it is whole, or of before such folders were.

    Of more than LOOKED_AT bytes the files' sizes alone are looked at.
    """
    if not (folder / MANIFEST).exists():
        return None
    try:
        manifest = read_json(folder / MANIFEST)
        whole = manifest["sha256"] == _own_hash(manifest)
        files = manifest["files"]
        damage = _damage(folder, files, sizes_only=sum(file["size"] for file in files.values()) > LOOKED_AT) if whole else None
    except (ValueError, KeyError, TypeError, AttributeError):
        whole, damage = False, None
    if not whole:
        return f"{folder / MANIFEST} is not as it was written"
    return None if damage is None else f"{folder}: {damage[0]}; it should be {damage[1]}"


def _damage(folder: Path, files: Mapping[str, Any], *, sizes_only: bool = False) -> tuple[str, str] | None:
    """What is wrong with the first file that is not as it was written, and how it was; None where all are whole."""
    for name, expected in files.items():
        file = folder / name
        if not file.is_file():
            return f"no {name}", f"the file, of {expected['size']:,} bytes"
        size = file.stat().st_size
        if size != expected["size"] or not (sizes_only or _sha256(file) == expected["sha256"]):
            return f"{name} of {size:,} bytes with another SHA-256", f"{expected['size']:,} bytes, unaltered"
    return None


def foreign_files(folder: Path, manifest: dict[str, Any]) -> list[str]:
    """What is in the folder beside the manifest and the files that it names: nobody vouches for it."""
    there = {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir() or path.is_symlink()}
    return sorted(there - {MANIFEST, *manifest["files"]})


def _damaged(folder: Path, found: str, expected: str) -> UserError:
    return UserError(
        Fault(f"checkpoint {folder}", found, expected, "name another step, or none: the newest whole checkpoint is taken")
    )
