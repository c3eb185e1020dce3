"""Writes a training set of the published one's size and shape, to measure `prepare` and `plan` at full size.

    python -m benchmarks.synthetic_corpus OUT --like medi_like_train.json.gz              # a folder of Parquet shards
    python -m benchmarks.synthetic_corpus OUT.json --like medi_like_train.json.gz --format medi --windows 12500

By default 1,818,688 triplets: 113,668 windows of 16 rows of one task each, 341 tasks of unlike sizes, 4,000,000 unique texts.
The texts mean nothing: words and lengths are drawn from the --like file (a MEDI file, gzipped or not), to have about as many
tokens as real ones. Anchors and positives are all different, negatives new or the positive of another row of their task.
OUT is whole or not there. Exit code: 0; 2 where an argument is wrong.
"""

import argparse
import gzip
import json
import math
import sys
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

WINDOWS, TASKS, TEXTS = 113_668, 341, 4_000_000  # of the published data set
WINDOW = 16  # rows of one task that follow each other: the published batch size
RUN = 4  # windows of one task that follow each other, as far as it has so many
SHARD_WINDOWS = 12_500  # at most
TASK_SPREAD = 1.5  # standard deviation of the logarithm of a task's share
OPENERS = 4096  # words that a text may open with, at most
FIELDS = ("query", "pos", "neg")


class ArgumentError(Exception):
    """What the caller got wrong, in one line."""


class Like(NamedTuple):
    """The --like file; all but the words is by field."""

    words: pa.Array  # the different ones, the most frequent first
    lengths: list[np.ndarray]  # (texts,) int32, words
    streams: list[np.ndarray]  # (all words,) int32, places in `words`
    instructions: list[pa.Array]  # (tasks,) str


def read_like(path: Path) -> Like:
    """Reads a MEDI file; ArgumentError where it is missing, of another form or without texts."""
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
            rows = json.load(file)
        by_task = {row["task_name"]: [row[field][0] for field in FIELDS] for row in rows}
        instructions = [pa.array(column, pa.string()) for column in zip(*by_task.values(), strict=True)]
        texts = [[text.split() for _, text in (row[field] for row in rows)] for field in FIELDS]
        counts = Counter(word for column in texts for text in column for word in text)
        words = pa.array([word for word, _ in counts.most_common()], pa.string())
    except (OSError, EOFError, zlib.error, ValueError, TypeError, LookupError, AttributeError) as error:
        raise ArgumentError(f"--like: {path} cannot be read as a MEDI file: {type(error).__name__}: {error}") from error
    lengths = [np.array([len(text) for text in column if text], np.int32) for column in texts]
    if not all(map(len, lengths)):
        raise ArgumentError(f"--like: {path} has a field without any text")
    place = {word: at for at, word in enumerate(words.to_pylist())}
    streams = [np.array([place[word] for text in column for word in text], np.int32) for column in texts]
    return Like(words, lengths, streams, instructions)


def window_tasks(windows: int, tasks: int, rng: np.random.Generator) -> np.ndarray:
    """(windows,) int64: the task of each window; log-normal shares, every task at least once, in shuffled runs."""
    shares = rng.lognormal(sigma=TASK_SPREAD, size=tasks)
    sizes = 1 + rng.multinomial(windows - tasks, shares / shares.sum())
    runs = [(task, min(RUN, size - at)) for task, size in enumerate(sizes.tolist()) for at in range(0, size, RUN)]
    return np.repeat(*rng.permutation(runs).T)


def place_texts(row_tasks: np.ndarray, texts: int, rng: np.random.Generator) -> np.ndarray:
    """(rows, 3) int64: the texts' numbers: all anchors come first, then all positives, then the negatives that are new."""
    rows = len(row_tasks)
    by_task = np.argsort(row_tasks, kind="stable")
    first = np.searchsorted(row_tasks[by_task], row_tasks[by_task])
    count = np.bincount(row_tasks)[row_tasks[by_task]]
    # A step of 1 to count - 1 round the task's own rows never comes back to the same row.
    other = first + (np.arange(rows) - first + rng.integers(1, count)) % count
    negative = np.empty(rows, np.int64)
    negative[by_task] = rows + by_task[other]
    negative[rng.choice(rows, texts - 2 * rows, replace=False)] = np.arange(2 * rows, texts)
    return np.stack([np.arange(rows), np.arange(rows, 2 * rows), negative], axis=1)


def draw_texts(like: Like, rows: int, texts: int, rng: np.random.Generator) -> tuple[pa.Array, pa.ListArray]:
    """The words, and by text, numbered as in `place_texts`, its places in them; ArgumentError where the file has too few.

    All texts are different: no two open with the same two words. Short ones drawn by frequency alone would often be the same.
    """
    openers = np.flatnonzero(pc.match_substring_regex(like.words, "^[a-z]+$"))[:OPENERS].astype(np.int32)
    if len(openers) ** 2 < texts:
        raise ArgumentError(f"--like: {len(openers):,} words of a to z alone, but {math.isqrt(texts - 1) + 1:,} are needed")
    pairs = openers[np.stack(np.divmod(rng.choice(len(openers) ** 2, texts, replace=False), len(openers)))]
    drawn = [rng.choice(like.lengths[at], size) for at, size in enumerate((rows, rows, texts - 2 * rows))]
    ids = np.concatenate([like.streams[at][rng.integers(len(like.streams[at]), size=drawn[at].sum())] for at in range(3)])
    lengths = np.concatenate(drawn)
    starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    longer, single = np.flatnonzero(lengths > 1), np.flatnonzero(lengths == 1)
    ids[starts[longer]], ids[starts[longer] + 1] = pairs[:, longer]
    # A text of one word is its pair written as one, likeThis: the capital says where the second begins, so it is unique too.
    ids[starts[single]] = len(like.words) + np.arange(len(single))
    one, two = (like.words.take(pa.array(half)) for half in pairs[:, single])
    joined = pc.binary_join_element_wise(one, pc.utf8_capitalize(two), "")
    return pa.concat_arrays([like.words, joined]), pa.ListArray.from_arrays(pa.array(starts, pa.int32()), pa.array(ids))


def joined_texts(words: pa.Array, texts: pa.ListArray, numbers: np.ndarray) -> pa.Array:
    """The texts of these numbers, (n,) int64, as n strings."""
    chosen = texts.take(pa.array(numbers))
    return pc.binary_join(pa.ListArray.from_arrays(chosen.offsets, words.take(chosen.values)), " ")


def tables(like: Like, windows: int, tasks: int, texts: int, seed: int) -> Iterator[pa.Table]:
    """The rows, a shard at a time; all columns are strings."""
    rng = np.random.default_rng(seed)
    row_tasks = np.repeat(window_tasks(windows, tasks, rng), WINDOW)
    places = place_texts(row_tasks, texts, rng)
    words, drawn = draw_texts(like, len(row_tasks), texts, rng)
    like_task = pa.array(np.arange(tasks) % len(like.instructions[0]))
    of_task = {"task_name": pa.array([f"synthetic_{task:03d}" for task in range(tasks)])}
    of_task |= {f"{field}_instruct": like.instructions[at].take(like_task) for at, field in enumerate(FIELDS)}
    shards = math.ceil(windows / SHARD_WINDOWS)
    for low, high in pairwise(windows * shard // shards * WINDOW for shard in range(shards + 1)):
        columns = {field: joined_texts(words, drawn, places[low:high, at]) for at, field in enumerate(FIELDS)}
        columns |= {name: values.take(pa.array(row_tasks[low:high])) for name, values in of_task.items()}
        yield pa.table(columns)


def write_parquet(shards: Iterator[pa.Table], count: int, folder: Path) -> None:
    """Writes `count` shards into a new folder, under the names that datasets.load_dataset knows."""
    folder.mkdir()
    for at, table in enumerate(shards):
        few = [name for name in table.column_names if name not in FIELDS]  # a dictionary of texts would be built for nothing
        pq.write_table(table, folder / f"train-{at:05d}-of-{count:05d}.parquet", use_dictionary=few)


def write_medi(shards: Iterator[pa.Table], path: Path) -> None:
    """Writes one JSON array, a row a line."""
    with path.open("w", encoding="utf-8") as file:
        for at, row in enumerate(row for table in shards for row in table.to_pylist()):
            pairs = {field: [row[f"{field}_instruct"], row[field]] for field in FIELDS}
            file.write((",\n" if at else "[") + json.dumps({**pairs, "task_name": row["task_name"]}, ensure_ascii=False))
        file.write("]\n")


def write(out: Path, like: Path, windows: int, tasks: int, texts: int, seed: int, form: str) -> str:
    """Writes OUT and returns the line that says what is in it; ArgumentError where an argument is wrong."""
    rows = windows * WINDOW
    for right, wrong in (
        (1 <= tasks <= windows, f"--windows: {windows}, --tasks: {tasks}, but a task or more is needed, and a window for each"),
        (2 * rows <= texts <= 3 * rows, f"--texts: {texts:,}, but {rows:,} rows can have {2 * rows:,} to {3 * rows:,}"),
        (seed >= 0, f"--seed: {seed}, but 0 or more is needed"),
        (out.parent.is_dir() and not out.exists(), f"OUT: {out} must not be there, but its folder must"),
    ):
        if not right:
            raise ArgumentError(wrong)
    shards = tables(read_like(like), windows, tasks, texts, seed)
    with TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as beside:
        part = Path(beside) / out.name
        if form == "medi":
            write_medi(shards, part)
        else:
            write_parquet(shards, math.ceil(windows / SHARD_WINDOWS), part)
        size = sum(file.stat().st_size for file in ([part] if part.is_file() else part.iterdir()))
        part.rename(out)
    return f"{rows:,} rows, {windows:,} windows, {tasks:,} tasks, {texts:,} unique texts, {size:,} bytes"


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the data set and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT", help="a folder, or a file with --format medi; must not exist")
    parser.add_argument("--like", type=Path, required=True, help="MEDI file that words, lengths and instructions come from")
    parser.add_argument("--windows", type=int, default=WINDOWS, help=f"of {WINDOW} rows (default %(default)s)")
    parser.add_argument("--tasks", type=int, default=TASKS, help="(default %(default)s)")
    parser.add_argument("--texts", type=int, help=f"unique ones (default {TEXTS}, in proportion for fewer windows)")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same content (default %(default)s)")
    parser.add_argument("--format", choices=("parquet", "medi"), default="parquet")
    told = parser.parse_args(arguments)
    texts = round(TEXTS * told.windows / WINDOWS) if told.texts is None else told.texts
    try:
        print(write(told.out, told.like, told.windows, told.tasks, texts, told.seed, told.format))
    except ArgumentError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
