"""Data sets of the Hugging Face hub, or local folders of the same shape, read through `datasets`."""

import errno
import itertools
import logging
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import cache
from pathlib import Path

from huggingface_hub import HfApi, constants

from gist_train.config.errors import Fault, UserError, shown
from gist_train.config.sources import HubSource, TextFileSource
from gist_train.data.asking import SECONDS_TO_ANSWER, HubError, asked, silent
from gist_train.data.files import read_json, write_json
from gist_train.data.formats import ROWS_AT_A_TIME, Cells, arrow_cells
from gist_train.data.tables import Field, Table, column_of

logger = logging.getLogger(__name__)


def hub_table(source: HubSource | TextFileSource, where: str) -> Table:
    """What the data set's rows have in common; `where` is the source's key, e.g. `data.train[2]`."""
    label = f"{where}: {source.path}" + (f" ({source.subset})" if source.subset else "")
    return Table(label, os.path.basename(os.path.normpath(source.path)))


def hub_cells(table: Table, source: HubSource | TextFileSource, where: str, fields: Sequence[Field]) -> Iterator[Cells]:
    """Cells of the data set's rows. What the hub has is read at the commit that `commit_of` names.

    Raises:
        UserError: there is no such data set, subset or split, or it can't be read.
    """
    import datasets  # slow to import, so only where it is needed

    path = source.path
    # A local folder is read where it is: the copy that `datasets` would make knows files by their times, not by their content.
    streaming = os.path.isdir(path) or (isinstance(source, HubSource) and source.streaming)
    revision = cache_dir = None
    if not os.path.isdir(path):
        revision = commit_of(source.path, source.revision, where)
        # A cache of its own: without a network `datasets` takes the newest copy in its cache, of whatever commit.
        cache_dir = str(_copies() / revision)
    try:
        with bars_off(), _as_offline() if revision is not None and silent() else nullcontext():
            if is_saved(Path(path)):
                rows = datasets.load_from_disk(path)
                if isinstance(rows, datasets.DatasetDict):
                    rows = rows[source.split]
            else:
                rows = datasets.load_dataset(
                    path, source.subset, revision=revision, split=source.split, streaming=streaming, cache_dir=cache_dir
                )
            batches = iter(rows.with_format("arrow").iter(ROWS_AT_A_TIME))
            first = next(batches, None)
            if first is None or first.num_rows == 0:
                return
            # Asked of a batch: a streamed data set may not know its columns before it is read.
            columns = column_of(fields, first.column_names)
            table.refuse_missing(fields, columns, first.column_names)
            table.note_unread(fields, columns, first.column_names)
            yield from arrow_cells(table, itertools.chain([first], batches), columns)
    except UserError:
        raise
    except Exception as error:  # of `datasets`, of pyarrow, or of the HTTP library of the day, which share no class
        if machine_failed(error):
            raise
        raise _unread(source.path, where, error) from error


def is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` of `datasets` wrote the folder."""
    return (folder / "dataset_dict.json").is_file() or ((folder / "state.json").is_file() and any(folder.glob("*.arrow")))


@cache
def commit_of(path: str, revision: str | None, where: str) -> str:
    """The commit (40 hex digits) of the hub's data set that `revision` names, asked once a process.

    Raises:
        UserError: there is no such data set or revision, or no network to ask and no copy.
    """
    if revision is not None and re.fullmatch(r"[0-9a-f]{40}", revision):
        return revision  # a copy in the cache needs no network
    kept = _commit_kept(path, revision)
    if kept is not None and silent():
        return kept
    try:
        named = asked(lambda: HfApi().dataset_info(path, revision=revision, timeout=SECONDS_TO_ANSWER).sha, once=kept is not None)
    except HubError as error:
        if kept is None:
            raise _unread(path, where, error) from error
        if not error.as_wished:
            logger.warning("%s: %s; the copy in the cache is taken, commit %s", path, error, kept)
        return kept
    _keep_commit(path, revision, named)
    return named


def _copies() -> Path:
    """Where copies of data sets are, by commit."""
    import datasets  # slow to import, so only where it is needed

    return Path(datasets.config.HF_DATASETS_CACHE) / "by-commit"


def _commit_kept(path: str, revision: str | None) -> str | None:
    """The commit that the hub named last time, if there is a copy of it."""
    try:
        commit = read_json(_copies() / "commits.json")[f"{path}@{revision}"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return commit if isinstance(commit, str) and (_copies() / commit).is_dir() else None


def _keep_commit(path: str, revision: str | None, commit: str) -> None:
    """Keeps what the hub said: a copy without the name that it was asked for is found by nobody."""
    file = _copies() / "commits.json"
    try:
        known = read_json(file)
    except (OSError, ValueError):
        known = {}
    if not isinstance(known, dict) or known.get(f"{path}@{revision}") != commit:
        with suppress(OSError):  # a cache that can't be written to is the next one's trouble
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, {**(known if isinstance(known, dict) else {}), f"{path}@{revision}": commit})


@contextmanager
def _as_offline() -> Iterator[None]:
    """Has `datasets` read the copy in its cache and wait for nobody: it would ask for each file, and each would take its time."""
    import datasets  # slow to import, so only where it is needed

    before = datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = before


def _unread(path: str, where: str, error: Exception) -> UserError:
    return UserError(
        Fault(
            f"{where}.path",
            f"{shown(path)}, which can't be read: {reason_of(error)}",
            "a data set of the Hugging Face hub with this revision, subset and split, or a local folder of data files",
            "check the spelling, the network and, for a private or gated data set, your login; "
            "with a commit of 40 digits in revision, a copy in the cache needs no network",
        )
    )


def reason_of(error: Exception) -> str:
    """Why a data set can't be read, in a line: `datasets` says that generation failed, and the reason only behind it."""
    cause = error.__cause__ or error
    return shown(str(cause) or type(cause).__name__, 300)


def machine_failed(error: Exception) -> bool:
    """Whether memory or disk ran out: no fault of the data set."""
    return isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT))


@contextmanager
def bars_off() -> Iterator[None]:
    """No progress bars of `datasets`: they would tear ours."""
    import datasets  # slow to import, so only where it is needed

    bars = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if bars:
            datasets.enable_progress_bars()
