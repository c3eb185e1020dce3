"""Sources -> a corpus on disk. Arrays of ids grow in memory, texts go straight to the disk.

Legend: R rows, N unique texts, S sources.
"""

import json
from collections import Counter
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from gist_train.config.errors import Fault, UserError, shown
from gist_train.config.schema import DataConfig
from gist_train.config.secrets import hidden
from gist_train.config.sources import ClassificationSource, Source
from gist_train.data.collecting import TEXTS, Collector
from gist_train.data.corpus import FORMAT
from gist_train.data.files import naming, read_json, whole_folder, write_text
from gist_train.data.fingerprints import DOCUMENTS
from gist_train.data.manifests import damage_in, seal
from gist_train.data.mining import mine_triplets
from gist_train.data.opening import origin_of
from gist_train.data.overlap import Exclusion
from gist_train.data.rows import Labelled, Row
from gist_train.data.sharing import shared_out
from gist_train.data.sources import prompts_of, read_labelled, read_rows, read_texts

SHOWN_FAULTS = 10
"""Bad rows that an error message names; the others are counted."""

SKIPPED, READING = "skipped.jsonl", "reading.json"
"""Files of a corpus and of a part of one: bad rows that were skipped, and what reading a source came to."""

Embeddings = Callable[[int, Sequence[str]], NDArray[np.float32]]
"""(source, its N texts) -> (N, G), what triplets of a source of labelled texts are mined with."""


@dataclass(slots=True)
class SourceCounts:
    """What became of the rows of one source."""

    read: int = 0
    """Rows read, bad ones included."""
    bad: int = 0
    """Rows that can't be used."""
    alone: int = 0
    """Labelled texts without another of their class, so without a positive."""
    same_text: int = 0
    """Labelled texts whose mined positive or negative is the same text."""
    excluded: int = 0
    """Rows left out for their evaluation texts."""
    not_drawn: int = 0
    """Rows left out by max_rows and max_rows_per_task."""
    filtered: int = 0
    """Rows that `where` left out."""
    unread: list[str] = field(default_factory=list)
    """Columns that are not read."""


def build_corpus(
    folder: Path,
    data: DataConfig,
    fingerprint: str,
    embeddings: Embeddings,
    settled: Callable[[], None],
    excluded: Collection[bytes] = (),
    parts: Path | None = None,
) -> Iterator[int]:
    """Reads all sources into a new corpus at `folder`; yields the number of rows read so far, now and then.

    Memory grows with the ids (some 150 bytes a unique text), not with the texts; but the texts of one source of labelled texts,
    and their embeddings, are in memory at a time.

    Args:
        embeddings: asked once for each source of labelled texts.
        settled: called when all is read: it raises where a source is not what `fingerprint` was made of any more.
        excluded: `overlap.normalized_hash` of each text that no row may hold. Left out before triplets are mined and rows drawn.
        parts: where `read_together` has put sources; those that are not there, or damaged, are read here. Same corpus either way.

    Raises:
        UserError: a file can't be read, no row is left, or a row is bad and data.on_bad_row is "fail"; nothing is left behind.
    """
    with naming(folder), whole_folder(folder) as beside:
        with (beside / TEXTS).open("wb") as texts, (beside / SKIPPED).open("w", encoding="utf-8") as skipped:
            collector = Collector(texts)
            exclusion = Exclusion(excluded)
            faults: list[Fault] = []
            counts: list[SourceCounts] = []
            read = 0
            for index, source in enumerate(data.train):
                part = None if parts is None else parts / str(index)
                if part is not None and part.is_dir() and damage_in(part) is None:
                    collector.absorb(part)
                    reading = _absorbed(part, exclusion, skipped)
                else:
                    reading = yield from _read_source(data, index, embeddings, exclusion, collector, skipped, read)
                read += reading.counts.read
                yield read
                faults += reading.faults[: SHOWN_FAULTS - len(faults)]
                counts.append(replace(reading.counts, not_drawn=collector.end_source(source)))
            documents = yield from _read_documents(data, exclusion, collector, skipped, read)
            faults += documents.faults[: SHOWN_FAULTS - len(faults)]
        settled()
        bad = sum(count.bad for count in (*counts, documents.counts))
        left_out = sum(count.excluded for count in counts)
        refuse_bad(data, faults, read + documents.counts.read, bad, len(collector.anchor), left_out)
        if not bad:
            (beside / SKIPPED).unlink()
        meta = {"format": FORMAT, "fingerprint": fingerprint, "skipped_rows": bad, "data": data.model_dump(mode="json")}
        meta |= {"excluded_rows": left_out, "excluded_texts": len(exclusion.met)}
        origins = [origin_of(source, f"data.train[{index}]") for index, source in enumerate(data.train)]
        meta |= {"sources": [asdict(count) for count in counts], "documents": documents.counts.read}
        collector.save(beside, {**meta, "origins": origins})
        seal(beside, {})
        yield read


def read_together(
    folder: Path, data: DataConfig, embeddings: Embeddings, excluded: Collection[bytes], parts: Path
) -> Iterator[int]:
    """Reads all sources, together with all processes that call this too, each source into a folder of its own in `parts`.

    Yields how many rows this process has read so far, now and then. Arguments and what is raised are those of `build_corpus`.
    """
    read = 0
    for index in shared_out(folder, parts, len(data.train)):
        yield read
        if index is None:
            continue
        with naming(parts), whole_folder(parts / str(index)) as beside:
            exclusion = Exclusion(excluded)
            with (beside / TEXTS).open("wb") as texts, (beside / SKIPPED).open("w", encoding="utf-8") as skipped:
                collector = Collector(texts)
                reading = yield from _read_source(data, index, embeddings, exclusion, collector, skipped, read)
            collector.dump(beside)
            write_text(beside / READING, json.dumps({**asdict(reading), "met": sorted(exclusion.met)}))
            seal(beside, {})
        read += reading.counts.read
    yield read


@dataclass(frozen=True, slots=True)
class _Reading:
    """What reading a source came to."""

    counts: SourceCounts
    faults: list[Fault]
    """The first of the bad rows."""


def _read_source(
    data: DataConfig,
    index: int,
    embeddings: Embeddings,
    exclusion: Exclusion,
    collector: Collector,
    skipped: IO[str],
    before: int,
) -> Generator[int, None, _Reading]:
    """Collects the rows of a source; yields how many rows of all sources are read, now and then.

    Args:
        before: rows of the sources before it.
    """
    source, where, unread = data.train[index], f"data.train[{index}]", dict[str, None]()
    count, faults = SourceCounts(), list[Fault]()
    if isinstance(source, ClassificationSource):
        rows = _mined_rows(source, where, partial(embeddings, index), count, exclusion, unread)
    else:
        table_rows = read_rows(source, where, keep_instructions=data.keep_instructions, unread=unread)
        rows = _rest(table_rows, source, count, exclusion)
    for read, row in enumerate(rows, start=1):
        if isinstance(row, Fault):
            count.bad += 1
            if len(faults) < SHOWN_FAULTS:
                faults.append(row)
            skipped.write(_skipped(row))
        else:
            collector.add(row)
        if read % 4096 == 0:
            yield before + read
    count.read += collector.rows_of_source + count.bad + count.excluded + count.filtered
    count.unread = list(unread)
    return _Reading(count, faults)


def _read_documents(
    data: DataConfig, exclusion: Exclusion, collector: Collector, skipped: IO[str], before: int
) -> Generator[int, None, _Reading]:
    """Collects the further texts that negatives are taken from; yields how many rows and texts are read, now and then.

    Args:
        before: rows of the sources.
    """
    count, faults = SourceCounts(), list[Fault]()
    documents = None if data.hard_negatives is None else data.hard_negatives.documents
    for one in () if documents is None else read_texts(documents.source, DOCUMENTS):
        count.read += 1
        if isinstance(one, Fault):
            count.bad += 1
            faults += [one] if len(faults) < SHOWN_FAULTS else []
            skipped.write(_skipped(one))
        elif one not in exclusion:
            collector.add_document(one)
        if count.read % 4096 == 0:
            yield before + count.read
    return _Reading(count, faults)


def _skipped(row: Fault) -> str:
    return json.dumps({"where": hidden(row.where), "found": row.found}, ensure_ascii=False) + "\n"


def _absorbed(part: Path, exclusion: Exclusion, skipped: IO[str]) -> _Reading:
    """What reading a source came to that another process has read, as if it had been read here."""
    reading = read_json(part / READING)
    exclusion.met.update(reading["met"])
    skipped.write((part / SKIPPED).read_text(encoding="utf-8"))
    return _Reading(SourceCounts(**reading["counts"]), [Fault(**fault) for fault in reading["faults"]])


def none_usable(faults: Sequence[Fault], read: int, excluded: int = 0) -> UserError:
    """That no row can be trained on, with the first fault of a row."""
    fix, found = "look at source: and columns: of data.train: are the files what they say?", f"{read:,} rows"
    if excluded:
        found += f", {excluded:,} of them left out with the texts that evaluation judges on"
        fix = "train on other texts than those of evaluation.tasks"
    return UserError(*faults[:1], Fault("data.train", f"{found}, none of them usable", "at least one usable row", fix))


def refuse_bad(data: DataConfig, faults: Sequence[Fault], read: int, bad: int, usable: int, excluded: int) -> None:
    """UserError where no row is usable, or where a bad one is not to be skipped."""
    if not usable:
        raise none_usable(faults, read, excluded)
    if bad and data.on_bad_row == "fail":
        share = f"{bad:,} of {read:,} rows"
        fix = f"fix them, or set skip: {share} are left out"
        raise UserError(*faults, Fault("data.on_bad_row", f"fail, and {share} can't be used", "fail or skip", fix))


def labelled_texts(
    source: ClassificationSource, where: str, exclusion: Exclusion, unread: dict[str, None] | None = None
) -> tuple[list[Labelled], list[Fault], int]:
    """All rows of a source of labelled texts, what is wrong with the others, and how many were left out as excluded.

    Args:
        unread: the names of columns that are not read are added to it.

    Raises:
        UserError: a file is broken, or all rows have one label, or each its own.
    """
    rows: list[Labelled] = []
    faults: list[Fault] = []
    left_out = 0
    for row in read_labelled(source, where, unread):
        if isinstance(row, Fault):
            faults.append(row)
        elif exclusion and row.text in exclusion:
            left_out += 1
        else:
            rows.append(row)
    labels = Counter(row.label for row in rows)
    if len(labels) == 1:
        found = f"only {shown(next(iter(labels)))} in {len(rows):,} rows"
        fix = "add rows of another class: a negative is one of those"
    elif labels and max(labels.values()) == 1:
        found = f"{len(labels):,} labels of one row each"
        fix = "name the column of classes: a positive is another row of the class"
    else:
        return rows, faults, left_out
    if left_out:
        found += f", {left_out:,} more left out with the texts that evaluation judges on"
    column = f"{where}: {source.path}: {source.columns.label}"
    expected = "two different labels or more, one of them on two rows or more"
    raise UserError(*faults[:SHOWN_FAULTS], Fault(column, found, expected, fix))


def _rest(rows: Iterator[Row | Fault | None], source: Source, count: SourceCounts, exclusion: Exclusion) -> Iterator[Row | Fault]:
    """The rows without excluded texts; counts those of which nothing is left, and those that `where` left out."""
    for row in rows:
        if row is None:
            count.filtered += 1
        elif isinstance(row, Fault) or not exclusion:
            yield row
        elif (rest := exclusion.rest_of(row, in_batch_negatives=source.in_batch_negatives)) is not None:
            yield rest
        else:
            count.excluded += 1


def _mined_rows(
    source: ClassificationSource,
    where: str,
    embeddings: Callable[[Sequence[str]], NDArray[np.float32]],
    count: SourceCounts,
    exclusion: Exclusion,
    unread: dict[str, None],
) -> Iterator[Row | Fault]:
    """The triplets of a source of labelled texts; counts the rows that gave none, as read too."""
    rows, faults, count.excluded = labelled_texts(source, where, exclusion, unread)
    yield from faults
    if not rows:
        return
    numbers: dict[str, int] = {}
    text_ids = np.array([numbers.setdefault(row.text, len(numbers)) for row in rows])
    classes = {label: number for number, label in enumerate(sorted({row.label for row in rows}))}
    labels = np.array([classes[row.label] for row in rows])
    mining = source.mining
    mined = mine_triplets(
        embeddings([row.text for row in rows]),
        labels,
        text_ids,
        seed=mining.seed,
        positives=mining.positives,
        temperature=mining.temperature,
        negatives=mining.negatives,
        negative_pool=mining.negative_pool,
    )
    count.alone, count.same_text = mined.alone, mined.same_text
    count.read = mined.alone + mined.same_text
    prompts = prompts_of(source.prompts)
    for a, p, n in zip(mined.anchor.tolist(), mined.positive.tolist(), mined.negative.tolist(), strict=True):
        anchor, negative = rows[a], rows[n]
        yield Row(
            anchor.text,
            (rows[p].text,),
            (negative.text,),
            anchor.task,
            prompts,
            anchor.label,
            (negative.label,),
            file=anchor.file,
            number=anchor.number,
        )
