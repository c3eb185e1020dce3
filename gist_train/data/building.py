"""Sources -> a corpus on disk. Arrays of ids grow in memory, texts go straight to the disk.

Legend: R rows, N unique texts, S sources.
"""

import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from gist_train.config.errors import Fault, UserError, shown
from gist_train.config.schema import DataConfig
from gist_train.config.secrets import hidden
from gist_train.config.sources import AnySource, ClassificationSource, Source
from gist_train.data.corpus import FORMAT, Int64, text_hash, view_key
from gist_train.data.drawing import drawn_rows, leave_out_unused_tasks, leave_out_unused_texts, of_rows, offsets
from gist_train.data.files import naming, whole_folder, write_json
from gist_train.data.manifests import seal
from gist_train.data.mining import mine_triplets
from gist_train.data.overlap import Exclusion
from gist_train.data.sources import Labelled, Row, origin_of, prompts_of, read_labelled, read_rows

SHOWN_FAULTS = 10
"""Bad rows that an error message names; the others are counted."""
DRAW_SEED = 42
"""Of the draws of max_rows, with the source's place in the list. No setting, so that trainings of all seeds share a corpus."""

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
) -> Iterator[int]:
    """Reads all sources into a new corpus at `folder`; yields the number of rows read so far, now and then.

    Memory grows with the ids (some 150 bytes a unique text), not with the texts; but the texts of one source of labelled texts,
    and their embeddings, are in memory at a time.

    Args:
        embeddings: asked once for each source of labelled texts.
        settled: called when all is read: it raises where a source is not what `fingerprint` was made of any more.
        excluded: `overlap.normalized_hash` of each text that no row may hold. Left out before triplets are mined and rows drawn.

    Raises:
        UserError: a file can't be read, no row is left, or a row is bad and data.on_bad_row is "fail"; nothing is left behind.
    """
    with naming(folder), whole_folder(folder) as beside:
        with (beside / "texts.utf8").open("wb") as texts, (beside / "skipped.jsonl").open("w", encoding="utf-8") as skipped:
            builder = _Builder(texts)
            faults: list[Fault] = []
            counts = [SourceCounts() for _ in data.train]
            exclusion = Exclusion(excluded)
            read = 0
            for index, (source, count) in enumerate(zip(data.train, counts, strict=True)):
                where, unread = f"data.train[{index}]", dict[str, None]()
                if isinstance(source, ClassificationSource):
                    rows = _mined_rows(source, where, partial(embeddings, index), count, exclusion)
                else:
                    table_rows = read_rows(source, where, keep_instructions=data.keep_instructions, unread=unread)
                    rows = _rest(table_rows, source, count, exclusion)
                for row in rows:
                    read += 1
                    if isinstance(row, Fault):
                        count.bad += 1
                        if len(faults) < SHOWN_FAULTS:
                            faults.append(row)
                        skipped.write(json.dumps({"where": hidden(row.where), "found": row.found}, ensure_ascii=False) + "\n")
                    else:
                        builder.add(row)
                    if read % 4096 == 0:
                        yield read
                count.read += builder.rows_of_source + count.bad + count.excluded + count.filtered
                count.not_drawn = builder.end_source(source)
                count.unread = list(unread)
        settled()
        read, bad = sum(count.read for count in counts), sum(count.bad for count in counts)
        left_out = sum(count.excluded for count in counts)
        refuse_bad(data, faults, read, bad, len(builder.anchor), left_out)
        if not bad:
            (beside / "skipped.jsonl").unlink()
        meta = {"format": FORMAT, "fingerprint": fingerprint, "skipped_rows": bad, "data": data.model_dump(mode="json")}
        meta |= {"excluded_rows": left_out, "excluded_texts": len(exclusion.met)}
        origins = [origin_of(source, f"data.train[{index}]") for index, source in enumerate(data.train)]
        builder.save(beside, {**meta, "sources": [asdict(count) for count in counts], "origins": origins})
        seal(beside, {})
        yield read


def refuse_bad(data: DataConfig, faults: Sequence[Fault], read: int, bad: int, usable: int, excluded: int) -> None:
    """UserError where no row is usable, or where a bad one is not to be skipped."""
    if not usable:
        fix, found = "look at source: and columns: of data.train: are the files what they say?", f"{read:,} rows"
        if excluded:
            found += f", {excluded:,} of them left out with the texts that evaluation judges on"
            fix = "train on other texts than those of evaluation.tasks"
        raise UserError(*faults[:1], Fault("data.train", f"{found}, none of them usable", "at least one usable row", fix))
    if bad and data.on_bad_row == "fail":
        share = f"{bad:,} of {read:,} rows"
        fix = f"fix them, or set skip: {share} are left out"
        raise UserError(*faults, Fault("data.on_bad_row", f"fail, and {share} can't be used", "fail or skip", fix))


def labelled_texts(source: ClassificationSource, where: str, exclusion: Exclusion) -> tuple[list[Labelled], list[Fault], int]:
    """All rows of a source of labelled texts, what is wrong with the others, and how many were left out as excluded.

    Raises:
        UserError: a file is broken, or all rows have one label, or each its own.
    """
    rows: list[Labelled] = []
    faults: list[Fault] = []
    left_out = 0
    for row in read_labelled(source, where):
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
) -> Iterator[Row | Fault]:
    """The triplets of a source of labelled texts; counts the rows that gave none, as read too."""
    rows, faults, count.excluded = labelled_texts(source, where, exclusion)
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
        yield Row(anchor.text, (rows[p].text,), (negative.text,), anchor.task, prompts, anchor.label, (negative.label,))


class _Builder:
    """Rows -> ids."""

    def __init__(self, texts: IO[bytes]):
        self._texts = texts
        self._ids: dict[bytes, int] = {}
        self._tasks: dict[str, int] = {}
        self._prompts: dict[str, int] = {"": 0}
        self._labels: dict[tuple[int, str], int] = {}
        self._hashes = bytearray()
        self._text_offsets = array("q", [0])
        self.anchor, self._task, self._row_prompts = array("i"), array("i"), array("i")
        self._positive, self._positive_offsets = array("i"), array("q", [0])
        self._negative, self._negative_offsets = array("i"), array("q", [0])
        self._label, self._negative_label = array("i"), array("i")
        self._ends: list[int] = []
        """Rows in all at the end of each source, before any draw."""
        self._kept: list[Int64] = []
        """By source, the rows that were drawn, numbered from its first."""

    @property
    def rows_of_source(self) -> int:
        """Rows of the present source so far."""
        return len(self.anchor) - (self._ends[-1] if self._ends else 0)

    def add(self, row: Row) -> None:
        self.anchor.append(self._text_id(row.anchor))
        self._positive.extend(self._text_id(text) for text in row.positives)
        self._positive_offsets.append(len(self._positive))
        self._negative.extend(self._text_id(text) for text in row.negatives)
        self._negative_offsets.append(len(self._negative))
        self._task.append(self._tasks.setdefault(row.task, len(self._tasks)))
        self._row_prompts.extend(self._prompts.setdefault(prompt, len(self._prompts)) for prompt in row.prompts)
        self._label.append(-1 if row.label is None else self._label_id(row.label))
        self._negative_label.extend(self._label_id(label) for label in row.negative_labels)
        self._negative_label.extend([-1] * (len(self._negative) - len(self._negative_label)))

    def end_source(self, source: AnySource) -> int:
        """Draws what max_rows and max_rows_per_task say, and returns how many rows were left out."""
        rows = self.rows_of_source
        task = np.asarray(self._task[len(self._task) - rows :], np.int32)
        drawn = source.max_rows is not None or source.max_rows_per_task is not None
        seed = [DRAW_SEED, len(self._ends)]
        kept = drawn_rows(task, source.max_rows, source.max_rows_per_task, seed) if drawn else np.arange(rows)
        self._ends.append(len(self.anchor))
        self._kept.append(kept)
        return rows - len(kept)

    def _label_id(self, label: str) -> int:
        """A number that no label of another source has."""
        return self._labels.setdefault((len(self._ends), label), len(self._labels))

    def _text_id(self, text: str) -> int:
        key = text_hash(text)
        known = self._ids.get(key)
        if known is not None:
            return known
        self._ids[key] = new = len(self._ids)
        encoded = text.encode()
        self._texts.write(encoded)
        self._text_offsets.append(self._text_offsets[-1] + len(encoded))
        self._hashes += key
        return new

    def save(self, folder: Path, meta: dict[str, Any]) -> None:
        """Writes the arrays of the rows that were drawn, and leaves the texts of the others out of texts.utf8."""
        self._ids.clear()  # the largest thing in memory, and done with
        rows = np.concatenate([kept + start for kept, start in zip(self._kept, [0, *self._ends], strict=False)])
        positive_offsets, negative_offsets = (np.asarray(x, np.int64) for x in (self._positive_offsets, self._negative_offsets))
        arrays: dict[str, NDArray[Any]] = {
            "anchor": np.asarray(self.anchor, np.int32)[rows],
            "task": np.asarray(self._task, np.int32)[rows],
            "source": np.repeat(np.arange(len(self._kept), dtype=np.int32), [len(kept) for kept in self._kept]),
            "label": np.asarray(self._label, np.int32)[rows],
            "row_prompts": np.asarray(self._row_prompts, np.int32).reshape(-1, 3)[rows],
            "positive": of_rows(np.asarray(self._positive, np.int32), positive_offsets, rows),
            "positive_offsets": offsets(np.diff(positive_offsets)[rows]),
            "negative": of_rows(np.asarray(self._negative, np.int32), negative_offsets, rows),
            "negative_label": of_rows(np.asarray(self._negative_label, np.int32), negative_offsets, rows),
            "negative_offsets": offsets(np.diff(negative_offsets)[rows]),
            "text_offsets": np.asarray(self._text_offsets, np.int64),
            "text_hashes": np.frombuffer(bytes(self._hashes), np.uint8).reshape(-1, 16),
        }
        tasks = list(self._tasks)
        if len(rows) < len(self.anchor):
            leave_out_unused_texts(folder / "texts.utf8", arrays)
            tasks = leave_out_unused_tasks(tasks, arrays)
        prompts, counts = arrays["row_prompts"], (np.diff(arrays["positive_offsets"]), np.diff(arrays["negative_offsets"]))
        arrays["views"] = np.unique(
            np.concatenate(
                [
                    view_key(prompts[:, 0], arrays["anchor"]),
                    view_key(np.repeat(prompts[:, 1], counts[0]), arrays["positive"]),
                    view_key(np.repeat(prompts[:, 2], counts[1]), arrays["negative"]),
                ]
            )
        )
        for name, values in arrays.items():
            np.save(folder / f"{name}.npy", values)
        sizes = {name: values.size for name, values in arrays.items()}
        lengths = {"rows": len(rows), "texts": len(arrays["text_hashes"]), "views": len(arrays["views"])}
        write_json(
            folder / "meta.json",
            {
                **meta,
                "content": _content_hash(arrays, [tasks, list(self._prompts)]),
                **lengths,
                "tasks": tasks,
                "prompts": list(self._prompts),
                "sizes": sizes,
            },
        )


def _content_hash(arrays: dict[str, NDArray[Any]], names: list[list[str]]) -> str:
    """32 hex digits over rows and texts as they are; the texts count by their hashes."""
    content = hashlib.blake2b(json.dumps(names).encode(), digest_size=16)
    for values in arrays.values():
        content.update(values.tobytes())
    return content.hexdigest()
