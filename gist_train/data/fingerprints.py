"""What a corpus is made of, as 32 hex digits: the content of all sources, and the settings that shape rows."""

import hashlib
import json
import time
from collections.abc import Collection, Mapping
from pathlib import Path

from gist_train.config.schema import DataConfig
from gist_train.config.secrets import hidden
from gist_train.config.sources import OUTSIDE_CORPUS, ClassificationSource, Source
from gist_train.data.corpus import FORMAT
from gist_train.data.files import read_json, write_json
from gist_train.data.hub import commit_of
from gist_train.data.opening import files_of, is_data_set
from gist_train.data.overlap import NORMALIZATION

SETTLED_SECONDS = 2.0
"""A file that was written less than this before it was hashed may be written again within one tick of its time stamp."""


def content_hash(path: Path) -> str:
    """BLAKE2b-128 of the file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


DOCUMENTS = "data.hard_negatives.documents"
"""Their key in the YAML."""
READERS = 2
"""Version of the readers: what they make of the same file is another corpus under another one."""


class ContentHashes:
    """Hashes of files, remembered on disk: a data set of gigabytes is not read again by each command.

    Args:
        path: the JSON file to remember them in, made where there is none; a file of the same size, times and inode as when it
            was hashed is taken to be the same, as git has it.
    """

    def __init__(self, path: Path):
        self._path = path
        try:
            known = read_json(path)
        except (OSError, ValueError):  # none yet, or a broken one: it is only a saving
            known = {}
        self._known: dict[str, list[object]] = known if isinstance(known, dict) else {}
        self._changed = False
        self.seen: dict[str, list[object]] = {}
        """Size, times and inode of the files asked for: what another look at them can be held against."""

    def of(self, path: Path) -> str:
        """`content_hash` of the file."""
        stat, name = path.stat(), hidden(str(path.resolve()).encode("utf-8", "backslashreplace").decode())
        state: list[object] = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
        self.seen[name] = state
        remembered = self._known.get(name)
        if isinstance(remembered, list) and remembered[:-1] == state:
            return str(remembered[-1])
        began, content = time.time(), content_hash(path)
        if began - max(stat.st_mtime, stat.st_ctime) > SETTLED_SECONDS:
            self._known[name] = [*state, content]
            self._changed = True
        return content

    def save(self) -> None:
        """Writes what was learnt, if anything was."""
        if self._changed:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self._path, self._known)
            self._changed = False


def corpus_fingerprint(
    data: DataConfig, hashes: ContentHashes, mined_with: Mapping[int, str], excluded: Collection[bytes] = ()
) -> str:
    """32 hex digits over the content of all sources and the settings that shape the rows.

    Args:
        hashes: of files, remembered.
        mined_with: by source of labelled texts, the fingerprint of the store of embeddings that its triplets are mined with.
        excluded: the normalised hashes of the texts that are left out, since evaluation judges on them.

    Raises:
        UserError: a source names no file, or a data set that is not there.
    """
    parts: list[object] = [FORMAT, READERS, data.keep_instructions, data.on_bad_row]
    for index, source in enumerate(data.train):
        # Not the path: a file that was moved is the same corpus. Its name counts, as the task of rows that name none.
        settings = source.model_dump(exclude={"path", "streaming", "revision", *OUTSIDE_CORPUS})
        if isinstance(source, ClassificationSource):
            settings["mining"]["model"] = mined_with[index]
        parts.append([settings, _content(source, f"data.train[{index}]", hashes)])
    if excluded:  # and else nothing: corpora of before there was this key are found
        texts = hashlib.blake2b(b"".join(sorted(excluded)), digest_size=16).hexdigest()
        # A row that keeps to its own negatives goes with the last of them: so here, the rows depend on it.
        parts.append([NORMALIZATION, texts, [source.in_batch_negatives for source in data.train]])
    if data.hard_negatives is not None and (documents := data.hard_negatives.documents) is not None:
        settings = documents.model_dump(exclude={"path", "revision"})
        parts.append(["documents", settings, _content(documents.source, DOCUMENTS, hashes)])
    hashes.save()
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()


def _content(source: Source, where: str, hashes: ContentHashes) -> list[object]:
    if not is_data_set(source):
        return [(path.name, hashes.of(path)) for path in files_of(source, where)]
    folder = Path(source.path)
    if not folder.is_dir():
        return [source.path, commit_of(source.path, source.revision, where)]
    # What git, the hub's client and others keep beside the data shapes no row.
    names = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    names = [name for name in names if not any(part.startswith(".") for part in name.parts)]
    return [folder.name, *[(str(name), hashes.of(folder / name)) for name in names]]
