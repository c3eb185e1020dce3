"""Stage 5 of `check_gpu.sh`: which kernels a training step is, and how long the GPU waits between them."""

import time
from collections.abc import Sequence
from typing import Any

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.models import NotAvailableError, Opened, free_memory, open_all, repeated, synchronise
from benchmarks.gpu.report import Report, Setup
from gist_train.training.loop import steps

UNTIMED, TIMED, SHOWN = 6, 8, 30


def run(setup: Setup, report: Report) -> None:
    """Profiles one step of each size and mode."""
    opened = open_all(setup, report)
    rows: list[dict[str, Any]] = []
    report.note(rows=rows)
    modes = ["eager"] if setup.device == "cpu" else ["graph", "eager"]
    for mode in modes:
        for triplets in [4] if setup.tiny else [16, 1024]:
            row: dict[str, Any] = {"triplets": triplets, "mode": mode}
            try:
                row |= _profiled(opened, triplets, mode)
            except NotAvailableError as error:
                row["not_available"] = str(error)
            except Exception as error:  # one that fails must not cost the others
                row["error"] = f"{type(error).__name__}: {str(error).strip()[:1000]}"
                report.fail(f"{triplets} {mode}: {row['error']}")
            free_memory()
            rows.append(row)
            report.note(rows=rows, summary=_summary(rows))
            _show(row, report)


def _profiled(opened: Opened, triplets: int, mode: str) -> dict[str, Any]:
    """Figures of one guided step, the same batch again and again: timed without the profiler, and then seen by it."""
    device = opened.device
    plan = repeated(opened.chosen(triplets, 1), UNTIMED + TIMED + 3)
    running = steps(opened.training(mode, plan, guided=True), 0, plan.steps_per_epoch)
    tokens = next(running).tokens
    for _ in range(UNTIMED - 1):
        next(running)
    synchronise(device)
    began = time.perf_counter()
    for _ in range(TIMED):
        next(running)
    synchronise(device)
    wall = (time.perf_counter() - began) / TIMED
    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as seen:
        next(running)
        synchronise(device)
    for _ in running:
        pass
    if cuda:
        on_gpu = [e for e in seen.events() if e.device_type == DeviceType.CUDA and not _is_label(e)]
        events = [(e.name, e.time_range.start, e.time_range.end) for e in on_gpu]
        kernels = _by_name([(name, end - start) for name, start, end in events])
        busy = _covered([(start, end) for _, start, end in events])
    else:  # operators, by their own time
        operators = [(e.name, e.self_cpu_time_total) for e in seen.events()]
        kernels, busy = _by_name(operators), sum(took for _, took in operators)
    return {
        "tokens": tokens,
        "kernels_a_step": sum(kernel["count"] for kernel in kernels),
        "different_kernels": len(kernels),
        "busy_milliseconds": busy / 1000,
        "wall_milliseconds": 1000 * wall,
        "share_of_gaps": max(0.0, 1 - busy / 1e6 / wall),
        "kernels": kernels[:SHOWN],
    }


def _is_label(event: Any) -> bool:
    """Whether it is a stretch of time that somebody named, such as the optimizer's step, and no kernel."""
    return bool(getattr(event, "is_user_annotation", False)) or "#" in event.name.split("(")[0]


def _by_name(events: Sequence[tuple[str, float]]) -> list[dict[str, Any]]:
    """(name, microseconds) -> counts and milliseconds by name, the longest first."""
    found: dict[str, list[float]] = {}
    for name, took in events:
        found.setdefault(name, []).append(took)
    rows = [{"name": name, "count": len(times), "milliseconds": sum(times) / 1000} for name, times in found.items()]
    return sorted(rows, key=lambda row: -row["milliseconds"])


def _covered(spans: Sequence[tuple[float, float]]) -> float:
    """The time that at least one of some spans covers."""
    covered, until = 0.0, float("-inf")
    for start, end in sorted(spans):
        covered += max(0.0, end - max(start, until))
        until = max(until, end)
    return covered


def _show(row: dict[str, Any], report: Report) -> None:
    name = f"{row['triplets']} {row['mode']}"
    if "kernels" not in row:
        report.say(f"{name}: {row.get('not_available', row.get('error'))}")
        return
    report.say(
        f"{name}: {row['tokens']:,} tokens, {row['kernels_a_step']:,} kernels a step, busy {row['busy_milliseconds']:.3f} ms of "
        f"{row['wall_milliseconds']:.3f} ms, {100 * row['share_of_gaps']:.1f} % gaps"
    )
    for kernel in row["kernels"]:
        print(f"    {kernel['milliseconds']:9.4f} ms {kernel['count']:6} x  {kernel['name'][:110]}", flush=True)


def _summary(rows: Sequence[dict[str, Any]]) -> str:
    told = [row for row in rows if "kernels" in row]
    return "; ".join(f"{r['triplets']} {r['mode']}: {r['kernels_a_step']:,} kernels, {r['share_of_gaps']:.0%} gaps" for r in told)
