"""Vectors that were computed elsewhere -> a guide's store, so that any model can be the guide, also one behind an API.

Legend: N texts with a vector each, G numbers of a vector.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gist_train.config.errors import Fault, UserError, listed, shown
from gist_train.config.models import GuideVectorsConfig
from gist_train.data.corpus import text_hashes
from gist_train.data.files import whole_folder, write_json, write_text
from gist_train.data.fingerprints import ContentHashes
from gist_train.data.formats import ROWS_AT_A_TIME, jsonl_cells, parquet_cells, parquet_of
from gist_train.data.leases import locked
from gist_train.data.tables import BadRow, Field, TableFile, read_errors, text
from gist_train.model.checksums import checksums, header
from gist_train.model.filling import CHECKSUMS, FORMAT
from gist_train.model.guide import GuideStore

SHOWN_TEXTS = 3
ROUNDING = 0.01
"""That numbers of two vectors of one text, of length 1, may differ by."""
Part = tuple[list[str], NDArray[Any]]
"""n texts, and their vectors (n, G) as they are in the file."""


def vector_store(cache: Path, config: GuideVectorsConfig, where: str) -> GuideStore:
    """The store with the file's vectors, brought to length 1; it is made once for a file's content.

    Args:
        where: the guide's key in the YAML.

    Raises:
        UserError: the file is missing or broken, or holds a vector that is not finite, of no direction or of another length.
    """
    files = vector_files(config, where)
    hashes = ContentHashes(cache / "content-hashes.json")
    parts = [FORMAT, *map(hashes.of, files), config.columns.model_dump(), config.dtype]
    hashes.save()
    name = hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()
    folder = cache / "guides" / name
    with locked(cache / "guides", f".{name}.lock"):
        whole = folder.exists() and _is_whole(folder)
        if not whole:
            with whole_folder(folder, replace=True) as made:
                _write(made, config, _parts(files, config, where), where)
    return GuideStore(folder)


def _is_whole(folder: Path) -> bool:
    """Whether the store is as it was written; else it is made anew of the file."""
    try:
        store = GuideStore(folder)
    except UserError:
        return False
    return len(store) > 0 and not store.damaged(np.arange(len(store))).any()


def refuse_missing(store: GuideStore, texts: list[str], all_texts: int, where: str) -> None:
    """Raises UserError where `texts` of the corpus have no vector; it lists them in a file."""
    if texts:
        listed = store.folder / "missing.jsonl"
        write_text(listed, "".join(json.dumps({"text": one}, ensure_ascii=False) + "\n" for one in texts))
        first = ", ".join(map(shown, texts[:SHOWN_TEXTS])) + (", ..." if len(texts) > SHOWN_TEXTS else "")
        found = f"no vector for {len(texts):,} of {all_texts:,} texts: {first}"
        raise UserError(
            Fault(f"{where}.vectors", found, "a vector for every text", f"compute those of the texts in {listed}, and add them")
        )


def vector_files(config: GuideVectorsConfig, where: str) -> list[Path]:
    """The files that hold vectors and texts, which may be one; UserError where one is missing or of another format."""
    path = Path(config.vectors)
    if path.suffix not in (".parquet", ".npy"):
        raise _fault(where, shown(path), "a file that ends in .parquet or .npy", "write the vectors in one of these formats")
    files = [path] if path.suffix == ".parquet" else [path, path.with_suffix(".jsonl")]
    for file in files:
        if not os.path.isfile(file):
            what = "a file that exists" if file == path else "the texts of the vectors, one object a line"
            raise _fault(where, f"{shown(file)}, which is not there", what, "correct the path, or write the file")
    return files


def _parts(files: list[Path], config: GuideVectorsConfig, where: str) -> Iterator[Part]:
    """What the files hold, some rows at a time."""
    texts = TableFile(files[-1], f"{where}.vectors: {files[-1].name}")
    if len(files) == 1:
        yield from _of_parquet(texts, config, where)
    else:
        yield from _beside(texts, files[0], config, where)


def _of_parquet(file: TableFile, config: GuideVectorsConfig, where: str) -> Iterator[Part]:
    import pyarrow as pa  # type: ignore[import-untyped]  # slow to import
    import pyarrow.compute as pc  # type: ignore[import-untyped]

    column = config.columns.vector
    texts = _texts(file, parquet_cells, config)
    with parquet_of(file) as table:
        if column not in table.schema_arrow.names:
            found = f"the columns {listed(map(shown, table.schema_arrow.names))}"
            raise _fault(where, found, f"a column {shown(column)}", f"name the right column in {where}.columns.vector")
        for batch in table.iter_batches(batch_size=ROWS_AT_A_TIME, columns=[column]):
            vectors = batch.column(0)
            lists = isinstance(vectors.type, pa.ListType | pa.LargeListType | pa.FixedSizeListType)
            if not lists or vectors.null_count or not pa.types.is_floating(vectors.type.value_type):
                raise _fault(where, f"{shown(column)} of type {vectors.type}", "lists of floating-point numbers", "write them so")
            widths = np.unique(pc.list_value_length(vectors).to_numpy(zero_copy_only=False))
            if len(widths) > 1:
                raise _fault(
                    where, f"vectors of {widths[0]} and of {widths[-1]} numbers", "vectors of one length", "write them again"
                )
            numbers = vectors.flatten().to_numpy(zero_copy_only=False)
            yield [next(texts) for _ in range(len(vectors))], numbers.reshape(len(vectors), -1)


def _beside(file: TableFile, path: Path, config: GuideVectorsConfig, where: str) -> Iterator[Part]:
    try:
        vectors = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise _fault(where, f"{path.name} cannot be read: {error}", "an array that numpy.save wrote", "write it again") from error
    if vectors.ndim != 2 or vectors.dtype.kind != "f":
        found = f"an array of {vectors.dtype} and shape {vectors.shape}"
        raise _fault(where, found, "floating-point numbers of shape (N, G)", "write them so")
    texts = list(_texts(file, jsonl_cells, config))
    if len(texts) != len(vectors):
        expected = "as many texts as vectors"
        raise _fault(
            where, f"{len(vectors):,} vectors, and {len(texts):,} texts in {file.path.name}", expected, "write both again"
        )
    for first in range(0, len(texts), ROWS_AT_A_TIME):
        yield texts[first : first + ROWS_AT_A_TIME], vectors[first : first + ROWS_AT_A_TIME]


def _texts(file: TableFile, reader: Any, config: GuideVectorsConfig) -> Iterator[str]:
    """The text of each row; a bad row raises UserError."""
    name = config.columns.text
    with read_errors(file):
        for cells in reader(file, [Field("text", (name,), True, True)]):
            try:
                if isinstance(cells, BadRow):
                    raise cells
                yield text(cells[1][0], name)
            except BadRow as bad:
                row = f"{file.label}, row {file.row:,}: {bad.what}"
                raise UserError(Fault(row, bad.found, bad.expected, "drop the row and its vector")) from None


def _write(folder: Path, config: GuideVectorsConfig, parts: Iterator[Part], where: str) -> None:
    width = 0
    with (
        (folder / "embeddings.bin").open("wb") as embeddings,
        (folder / CHECKSUMS).open("wb") as checks,
        (folder / "hashes.bin").open("wb") as hashes,
    ):
        for texts, vectors in parts:
            if width and vectors.shape[1] != width:
                raise _fault(
                    where, f"vectors of {width} and of {vectors.shape[1]} numbers", "vectors of one length", "write them again"
                )
            if not width:
                checks.write(header(vectors.shape[1], np.dtype(config.dtype).itemsize))
            width = vectors.shape[1]
            exact = vectors.astype(np.float64)
            lengths = np.linalg.norm(exact, axis=1, keepdims=True)
            if (bad := np.flatnonzero(~(np.isfinite(lengths[:, 0]) & (lengths[:, 0] > 0)))).size:
                found = f"a vector of length {lengths[bad[0], 0]} for {shown(texts[int(bad[0])])}"
                raise _fault(where, found, "finite numbers that are not all 0", "compute it again")
            rows = (exact / lengths).astype(config.dtype)
            embeddings.write(rows.tobytes())
            checks.write(checksums(rows).tobytes())
            hashes.write(text_hashes(texts).tobytes())
    if not width:
        raise _fault(where, "no vectors", "one for every text", "fill the file")
    if two := _unlike_vectors(folder, width, config):
        found = f"two vectors for one text that differ, number {two[0] + 1:,} and number {two[1] + 1:,}"
        raise _fault(where, found, "one vector for a text", "drop one of them")
    write_json(folder / "meta.json", {"format": FORMAT, **config.model_dump(), "width": width})


def _unlike_vectors(folder: Path, width: int, config: GuideVectorsConfig) -> tuple[int, int] | None:
    """Places of two vectors that one text has and that differ by more than rounding; None where no text has such."""
    hashes = np.fromfile(folder / "hashes.bin", "<u8").reshape(-1, 2)
    _, first, which = np.unique(hashes, axis=0, return_index=True, return_inverse=True)
    again = np.flatnonzero(first[which.ravel()] != np.arange(len(hashes)))
    if not len(again):
        return None
    vectors = np.memmap(folder / "embeddings.bin", config.dtype, "r").reshape(-1, width)
    for place in again.tolist():
        before = int(first[which.ravel()[place]])
        if np.abs(vectors[place].astype(np.float64) - vectors[before]).max() > ROUNDING:
            return before, place
    return None


def _fault(where: str, found: str, expected: str, fix: str) -> UserError:
    return UserError(Fault(f"{where}.vectors", found, expected, fix))
