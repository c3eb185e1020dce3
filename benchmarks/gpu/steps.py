"""Stage 4 of `check_gpu.sh`: times of the training step, ours and sentence-transformers' on the very same rows."""

import time
from dataclasses import dataclass
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from transformers.utils import is_flash_attn_2_available

from benchmarks.gpu.models import NotAvailableError, Opened, free_memory, model_folder, modes_for, open_all, repeated, synchronise
from benchmarks.gpu.peer import time_peer
from benchmarks.gpu.report import Report, Setup
from benchmarks.proof import compare
from benchmarks.sides import Bench
from gist_train.model.encoder import Encoder
from gist_train.training.inputs import inputs_of
from gist_train.training.loop import metrics_of, steps
from gist_train.training.throughput import peak_memory, training_flops

H100_TFLOPS = 989.0
"""Of bf16 tensor cores, dense, as NVIDIA says."""


@dataclass(frozen=True, slots=True)
class Size:
    """A size of batch, and how long it is timed."""

    triplets: int
    batches: int
    """Different ones."""
    passes: int
    """That are timed, over all of them."""
    peer_untimed: int
    """Batches that the peer warms up on."""


SIZES = {16: Size(16, 24, 6, 12), 128: Size(128, 8, 3, 4), 1024: Size(1024, 2, 6, 1)}
TINY_SIZES = {4: Size(4, 2, 1, 1)}
INPUTS = 10
"""Batches that are made ready alone, for the time of that."""


def run(setup: Setup, report: Report) -> None:
    """Times what is worth most first."""
    rows: list[dict[str, Any]] = []
    report.note(rows=rows, ratios={})
    opened = open_all(setup, report)
    rate = product_rate(opened.device, 512 if setup.tiny else 8192, setup.precision)
    report.note(product_tflops=rate)
    report.say(f"a product of {setup.precision} matrices: {rate:.1f} TFLOP/s")
    stage = _Stage(opened, report, rows, rate)
    small, middle, large = (4, None, None) if setup.tiny else (16, 128, 1024)
    modes = modes_for(setup)
    for mode in modes[:2]:
        stage.ours(small, mode, guided=True)
    if large:
        for mode in modes[1::-1]:
            stage.ours(large, mode, guided=True)
    stage.prove()
    stage.theirs(small, guided=True)
    if large:
        stage.theirs(large, guided=True)
    stage.ours(small, modes[:2][-1], guided=False)
    stage.theirs(small, guided=False)
    if middle:
        stage.ours(middle, "graph", guided=True)
    if large:
        stage.ours(large, "graph", guided=False)
        stage.theirs(large, guided=False)
    for mode in modes[:1:-1]:  # what is compiled takes most of a minute first
        stage.ours(small, mode, guided=True)
        if large:
            stage.ours(large, mode, guided=True)
    if not rows or not any(row["side"] == "ours" for row in rows):
        report.fail("no step of ours was timed")


def product_rate(device: torch.device, size: int, precision: str) -> float:
    """TFLOP/s of a product of square matrices."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    for _ in range(3):
        a @ b
    synchronise(device)
    began, count = time.perf_counter(), 20
    for _ in range(count):
        a @ b
    synchronise(device)
    return 2 * size**3 * count / (time.perf_counter() - began) / 1e12


class _Stage:
    """What is timed goes to `rows`, and so to the report."""

    def __init__(self, opened: Opened, report: Report, rows: list[dict[str, Any]], rate: float):
        self._opened, self._report, self._rows, self._rate = opened, report, rows, rate
        self._sizes = TINY_SIZES if opened.setup.tiny else SIZES
        self._plans: dict[int, Any] = {}
        self._peer_guide: SentenceTransformer | None = None
        self._ratios: dict[str, float] = {}

    def _plan(self, triplets: int) -> Any:
        if triplets not in self._plans:
            self._plans[triplets] = self._opened.chosen(triplets, self._sizes[triplets].batches)
        return self._plans[triplets]

    def _bench(self, triplets: int, precision: str) -> Bench:
        opened = self._opened
        return Bench(opened.student, opened.corpus, opened.tokens, self._plan(triplets), precision, opened.device)

    def prove(self) -> None:
        """That both sides do the same work, without a guide, in float32."""
        triplets = next(iter(self._sizes))
        proof = compare(self._bench(triplets, "float32").first(2, triplets))
        self._report.note(proof=proof)
        told = f"losses {proof['largest_loss_difference']:.1e} apart, the same tokens: {proof['same_rows']}"
        self._report.say(f"proof of equal work: {proof['equal']}; {told}")
        if not proof["equal"]:
            self._report.fail(f"the two sides did not do the same work: {told}")

    def ours(self, triplets: int, mode: str, *, guided: bool) -> None:
        """Times our step."""
        row: dict[str, Any] = {"side": "ours", "guided": guided, "triplets": triplets, "mode": mode}
        size = self._sizes[triplets]
        try:
            row |= time_ours(self._opened, self._plan(triplets), mode, guided=guided, passes=size.passes)
        except NotAvailableError as error:
            row["not_available"] = str(error)
        except torch.OutOfMemoryError as error:
            row["out_of_memory"] = str(error).splitlines()[0]
        except Exception as error:  # one mode that fails must not cost the others
            row["error"] = f"{type(error).__name__}: {str(error).strip()[:1000]}"
        free_memory()
        if "milliseconds" in row:
            row["mfu_of_product"] = row["tflops"] / self._rate
            row["mfu_of_989"] = row["tflops"] / H100_TFLOPS
        self._add(row)

    def theirs(self, triplets: int, *, guided: bool) -> None:
        """Times the peer's step, with its cached loss where it runs out of memory without."""
        if guided and self._peer_guide is None:
            flash = {"attn_implementation": "flash_attention_2"} if self._flash else {}
            folder = str(model_folder(self._opened.setup, "uae-large"))
            self._peer_guide = SentenceTransformer(folder, device=str(self._opened.device), model_kwargs=flash)
            self._report.say("the peer's guide made and loaded")
        bench = self._bench(triplets, self._opened.setup.precision)
        untimed = self._sizes[triplets].peer_untimed
        guide = self._peer_guide if guided else None
        for cached in (None, 128):
            row = time_peer(bench, guide, untimed=untimed, flash=self._flash, cached=cached)
            free_memory()
            self._add({"side": "theirs", "guided": guided, "triplets": triplets, **row})
            if "out_of_memory" not in row:
                break

    @property
    def _flash(self) -> bool:
        return self._opened.setup.device == "cuda" and is_flash_attn_2_available()

    def _add(self, row: dict[str, Any]) -> None:
        self._rows.append(row)
        name = f"{row['side']} {'guided' if row['guided'] else 'unguided'} {row['triplets']} {row['mode']}"
        bad = [key for key in ("not_available", "out_of_memory", "error") if key in row]
        if bad:
            self._report.say(f"{name}: {bad[0].replace('_', ' ')}: {row[bad[0]]}")
        else:
            figures = ", ".join(f"{key} {_shown(value)}" for key, value in row.items() if isinstance(value, int | float))
            self._report.say(f"{name}: {figures}")
        if "error" in row:
            self._report.fail(f"{name}: {row['error']}")
        self._compare(row)
        self._report.note(rows=self._rows, ratios=self._ratios, summary=self._summary())

    def _compare(self, row: dict[str, Any]) -> None:
        """The ratio of the peer's time to the best of ours, at the size and guidance of `row`."""
        same = [r for r in self._rows if all(r[k] == row[k] for k in ("guided", "triplets")) and "milliseconds" in r]
        best = min((r for r in same if r["side"] == "ours"), key=lambda r: r["milliseconds"], default=None)
        peer = min((r["milliseconds"] for r in same if r["side"] == "theirs"), default=None)
        if best is not None and peer is not None:
            name = f"{'guided' if row['guided'] else 'unguided'} {row['triplets']}"
            self._ratios[name] = peer / best["milliseconds"]
            told = f"ours ({best['mode']}) {best['milliseconds']:.2f} ms, theirs {peer:.2f} ms"
            self._report.say(f"{name}: {told}: {self._ratios[name]:.2f} times as fast")

    def _summary(self) -> str:
        return "times as fast: " + ", ".join(f"{name} {ratio:.1f}" for name, ratio in self._ratios.items())


def time_ours(opened: Opened, plan: Any, mode: str, *, guided: bool, passes: int) -> dict[str, Any]:
    """Figures of our step over the batches of `plan`: all of them untimed first, then `passes` times.

    It is one run of the loop, whose graphs would not outlive it. With graphs there are two untimed passes: the first step of a
    size runs without a graph, and the second is recorded.
    """
    device, count = opened.device, plan.steps_per_epoch
    untimed, timed = count * (2 if "graph" in mode else 1), count * passes
    training = opened.training(mode, repeated(plan, untimed // count + passes), guided=guided)
    made = min(INPUTS, count)
    began = time.perf_counter()
    for step in range(1, made + 1):
        inputs_of(training, step)
    inputs_seconds = (time.perf_counter() - began) / made
    running = steps(training, 0, untimed + timed)
    began = time.perf_counter()
    for _ in range(untimed):
        next(running)
    synchronise(device)
    untimed_seconds = time.perf_counter() - began
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    began = time.perf_counter()
    records = [next(running) for _ in range(timed)]
    issued = time.perf_counter() - began
    synchronise(device)
    seconds = time.perf_counter() - began
    for _ in running:
        pass
    found = [row["loss"] for row in metrics_of(records, opened.corpus)]
    encoder: Encoder = training.accelerator.unwrap_model(training.model)[0]
    flops = sum(training_flops(getattr(encoder, "encoder", encoder), record.groups) for record in records)
    tokens = sum(record.tokens for record in records)
    clocks = [record.clock.seconds() for record in records]
    return {
        "milliseconds": 1000 * seconds / timed,
        "host_milliseconds": 1000 * issued / timed,
        "inputs_milliseconds": 1000 * inputs_seconds,
        "untimed_seconds": untimed_seconds,
        "steps": timed,
        "tokens_a_step": tokens / timed,
        "computed_tokens_a_step": sum(record.computed_tokens for record in records) / timed,
        "tokens_a_second": tokens / seconds,
        "triplets_a_second": timed * plan.triplets / seconds,
        "tflops": flops / seconds / 1e12,
        "peak_gb": peak_memory(device) / 1e9,
        # What graphs keep for themselves counts as reserved alone.
        "peak_reserved_gb": torch.cuda.max_memory_reserved(device) / 1e9 if device.type == "cuda" else None,
        "loss": sum(found) / len(found),
        "parts_milliseconds": {part: 1000 * sum(clock[part] for clock in clocks) / timed for part in clocks[0]},
    }


def _shown(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.3g}" if abs(value) < 1000 else f"{value:,.0f}"
