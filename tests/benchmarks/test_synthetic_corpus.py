"""benchmarks/synthetic_corpus.py: what it writes has the published data set's shape, and real data's lengths."""

import gzip
import importlib
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

FIELDS = ("query", "pos", "neg")
WINDOWS, TASKS = 200, 7
LENGTHS = {"query": (1, 4), "pos": (1, 9), "neg": (2, 30)}
"""Words of the like file's texts, by field, one half of the rows each."""

Rows = list[dict[str, str]]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module, with shards so small that the tests' rows fill several."""
    module = importlib.import_module("benchmarks.synthetic_corpus")
    monkeypatch.setattr(module, "SHARD_WINDOWS", 64)
    return module


@pytest.fixture
def like(tmp_path: Path) -> Path:
    """A MEDI file of 400 rows, two tasks and 400 words."""
    rng = np.random.default_rng(0)
    words = [a + b for a in "abcdefghijklmnopqrst" for b in "abcdefghijklmnopqrst"]
    rows = [
        {f: [f"{f} of {'xy'[i % 2]}: ", " ".join(rng.choice(words, LENGTHS[f][i % 2]))] for f in FIELDS}
        | {"task_name": "xy"[i % 2]}
        for i in range(400)
    ]
    path = tmp_path / "like.json.gz"
    with gzip.open(path, "wt", encoding="utf-8") as file:
        json.dump(rows, file)
    return path


@pytest.fixture
def make(script: ModuleType, like: Path, tmp_path: Path) -> Callable[..., Path]:
    """Runs the script at the tests' size, with more arguments, and returns what it wrote."""

    def run(name: str, *more: str) -> Path:
        size = ["--windows", str(WINDOWS), "--tasks", str(TASKS)]
        assert script.main([str(tmp_path / name), "--like", str(like), *size, *more]) == 0
        return tmp_path / name

    return run


def rows_of(folder: Path) -> Rows:
    """The rows of all shards, in file order."""
    return [row for path in sorted(folder.iterdir()) for row in pq.read_table(path).to_pylist()]


def texts_of(rows: Rows) -> set[str]:
    """The different texts of all fields."""
    return {row[field] for row in rows for field in FIELDS}


def test_windows_are_whole_and_of_one_task(make: Callable[..., Path]) -> None:
    """Without it `reference` batching would drop windows that the published data keeps, or tasks would not come in runs."""
    tasks = np.array([row["task_name"] for row in rows_of(make("out"))]).reshape(-1, 16)
    assert (tasks == tasks[:, :1]).all()
    assert len(tasks) == WINDOWS
    assert len(set(tasks[:, 0])) == TASKS
    changes = (tasks[1:, 0] != tasks[:-1, 0]).sum()
    assert TASKS < changes < WINDOWS / 2


def test_every_task_has_a_window_where_there_are_no_more(make: Callable[..., Path]) -> None:
    """Without it a task of a small share could get no rows, and the number of tasks be another than asked for."""
    rows = rows_of(make("out", "--windows", str(TASKS)))
    assert len(rows) == TASKS * 16
    assert len({row["task_name"] for row in rows}) == TASKS


@pytest.mark.parametrize("texts", [None, 6400, 9600], ids=["as published", "fewest", "most"])
def test_unique_texts(make: Callable[..., Path], texts: int | None) -> None:
    """Without it the guide's pass would be measured on a number of texts that is not the one printed."""
    rows = rows_of(make("out", *([] if texts is None else ["--texts", str(texts)])))
    wanted = 4_000_000 * WINDOWS / 113_668 if texts is None else texts
    assert len(texts_of(rows)) == pytest.approx(wanted, rel=0.01)


def test_texts_of_a_row_differ_and_recur_in_their_task_only(make: Callable[..., Path]) -> None:
    """Without it rows could be refused or masked for duplicates that the published data do not have."""
    rows = rows_of(make("out"))
    assert all(len({row[field] for field in FIELDS}) == 3 for row in rows)
    assert len({(row["task_name"], row[field]) for row in rows for field in FIELDS}) == len(texts_of(rows))


def test_words_and_lengths_are_the_like_files(make: Callable[..., Path], like: Path) -> None:
    """Without it token counts, and with them time, memory and disk, would say nothing about real data."""
    with gzip.open(like, "rt", encoding="utf-8") as file:
        vocabulary = {word for row in json.load(file) for field in FIELDS for word in row[field][1].split()}
    rows = rows_of(make("out", "--texts", "9600"))
    for field in FIELDS:
        texts = [row[field].split(" ") for row in rows]
        assert {len(text) for text in texts} == set(LENGTHS[field])
        assert np.mean([len(text) for text in texts]) == pytest.approx(np.mean(LENGTHS[field]), rel=0.05)
        assert {word for text in texts if len(text) > 1 for word in text} <= vocabulary


def test_columns_and_shards(make: Callable[..., Path]) -> None:
    """Without it neither `datasets` nor the hub recipe would find the shards and their columns."""
    shards = sorted(make("out").iterdir())
    assert [path.name for path in shards] == [f"train-{at:05d}-of-00004.parquet" for at in range(4)]
    columns = ["query", "pos", "neg", "task_name", "query_instruct", "pos_instruct", "neg_instruct"]
    for path in shards:
        schema = pq.read_schema(path)
        assert schema.names == columns
        assert {str(kind) for kind in schema.types} == {"string"}
    row = pq.read_table(shards[0]).to_pylist()[0]
    assert {row[f"{field}_instruct"].split(" ")[0] for field in FIELDS} == set(FIELDS)


def test_same_seed_same_bytes(make: Callable[..., Path]) -> None:
    """Without it two measurements would not be of the same data."""
    one, same, other = (
        [path.read_bytes() for path in sorted(make(f"out{at}", "--seed", s).iterdir())] for at, s in enumerate("001")
    )
    assert one == same
    assert one != other


def test_medi_form_has_the_same_rows(make: Callable[..., Path]) -> None:
    """Without it the MEDI reader and the Parquet reader would be measured on different data."""
    medi: list[dict[str, Any]] = json.loads(make("out.json", "--format", "medi").read_text(encoding="utf-8"))
    rows = rows_of(make("out"))
    pairs = [{f: [row[f"{f}_instruct"], row[f]] for f in FIELDS} | {"task_name": row["task_name"]} for row in rows]
    assert medi == pairs


def test_the_printed_line(make: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    """Without it a measurement could be told with figures of another data set."""
    folder = make("out")
    size = sum(path.stat().st_size for path in folder.iterdir())
    unique = len(texts_of(rows_of(folder)))
    line = f"3,200 rows, 200 windows, 7 tasks, {unique:,} unique texts, {size:,} bytes\n"
    assert capsys.readouterr().out == line


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--like", "absent.json"], "absent.json"),
        (["--windows", "6"], "--windows: 6"),
        (["--tasks", "0"], "--tasks: 0"),
        (["--windows", "-5"], "--windows: -5"),
        (["--texts", "6399"], "--texts: 6,399"),
        (["--texts", "9601"], "--texts: 9,601"),
        (["--seed", "-1"], "--seed: -1"),
        (["--windows", "80000"], "--like: 400 words"),
    ],
)
def test_wrong_arguments(
    script: ModuleType, like: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], named: str
) -> None:
    """Without it a slip would end in a traceback, or in half a data set."""
    size = ["--windows", str(WINDOWS), "--tasks", str(TASKS)]
    assert script.main([str(tmp_path / "out"), "--like", str(like), *size, *more]) == 2
    said = capsys.readouterr()
    assert named in said.err
    assert said.err.count("\n") == 1
    assert said.out == ""
    assert list(tmp_path.iterdir()) == [like]


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "{}", "[1]", '[{"query": ["i", "t"]}]', '[{"query": "t", "pos": "t", "neg": "t", "task_name": "a"}]'],
)
def test_a_like_file_of_another_form(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    """Without it a JSONL file given by mistake would end in a traceback."""
    path = tmp_path / "other.json"
    path.write_text(content, encoding="utf-8")
    assert script.main([str(tmp_path / "out"), "--like", str(path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"--like: {path} ")
    assert said.count("\n") == 1


def test_what_is_there_is_left_alone(script: ModuleType, like: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without it a data set that took an hour to embed could be replaced by another."""
    (tmp_path / "out").mkdir()
    assert script.main([str(tmp_path / "out"), "--like", str(like)]) == 2
    assert "must not be there" in capsys.readouterr().err
    assert script.main([str(tmp_path / "absent" / "out"), "--like", str(like)]) == 2


def test_nothing_is_left_of_a_run_that_breaks(
    script: ModuleType, make: Callable[..., Path], like: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without it a full disk would leave a folder that reads like a whole, smaller data set."""
    written = []
    write_table = script.pq.write_table

    def breaks(table: object, path: Path, **options: object) -> None:
        written.append(path)
        write_table(table, path, **options)
        if len(written) == 2:
            raise OSError("no space left on device")

    monkeypatch.setattr(script.pq, "write_table", breaks)
    with pytest.raises(OSError, match="no space"):
        make("out")
    assert len(written) == 2
    assert list(tmp_path.iterdir()) == [like]
