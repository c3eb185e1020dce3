"""Stage 3 of `check_gpu.sh`: a training by the command line, killed and resumed, exported, evaluated, and like the CPU's."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks.gpu.models import be_quiet, model_folder
from benchmarks.gpu.report import Report, Setup
from benchmarks.machine import ROOT
from gist_train.run_folder import Run

TOLERANCE = 0.03
"""Largest difference of a step's loss from the CPU's, as a share of that."""
LINES = 25
"""Of what a command printed, the last so many are shown."""


@dataclass(frozen=True, slots=True)
class Length:
    """Of the training, in steps."""

    steps: int
    every: int
    """Between two checkpoints."""
    compared: int
    """With the CPU."""
    rows: int


USUAL, TINY = Length(200, 50, 20, 4_000), Length(40, 4, 6, 640)


def run(setup: Setup, report: Report) -> None:
    """Trains, kills, goes on, exports and evaluates; the CPU's run is beside it once the guide's pass is done."""
    be_quiet()
    length = TINY if setup.tiny else USUAL
    folder = setup.work / "training"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    commands = _Commands(folder, setup, report)
    ours = _write_config(folder, setup, length, "run", setup.precision, None)
    on_cpu = _write_config(folder, setup, length, "cpu", "float32", length.compared)
    run_folder = folder / "runs" / "run"
    report.say("models made")

    killed = _kill(commands.start("train", ours), run_folder, length, report)
    beside = commands.start("train", on_cpu, on_cpu=True)
    commands.end(commands.start("train", ours))
    if killed is not None and not any("resuming from step" in line for line in commands.said(commands.log("train", ours))):
        report.fail("the second training began anew")
    rows = _metrics(run_folder)
    _check_rows(rows, length, report)
    exporting, evaluating = commands.start("export", ours), commands.start("evaluate", ours, "--json")
    commands.end(exporting)
    missing = [name for name in ("modules.json", "model.safetensors") if not (run_folder / "export" / name).exists()]
    if missing:
        report.fail(f"the export has no {', '.join(missing)}")
    if commands.end(evaluating):
        figures = json.loads(commands.log("evaluate", ours).read_text(encoding="utf-8").strip().splitlines()[-1])
        report.note(evaluation=figures)
        report.say(f"evaluation: {json.dumps(figures)}")
    if commands.end(beside):
        _compare(rows, _metrics(folder / "runs" / "cpu"), length, report)


@dataclass(slots=True)
class _Running:
    """A command that runs."""

    words: tuple[str, ...]
    process: subprocess.Popen[bytes]
    log: Path
    began: float


@dataclass(slots=True)
class _Commands:
    """Starts `gist-train`; what it prints goes to files in `folder`."""

    folder: Path
    setup: Setup
    report: Report

    def log(self, command: str, config: Path) -> Path:
        """Where a command's newest run prints."""
        return self.folder / f"{command}-{config.stem}.log"

    @staticmethod
    def said(log: Path) -> list[str]:
        """The lines of a command: what it printed as results, and what it said to people."""
        parts = [path.read_text(encoding="utf-8", errors="replace") for path in (log, log.with_suffix(".err"))]
        return [line for part in parts for line in part.splitlines()]

    def start(self, command: str, config: Path, *words: str, on_cpu: bool = False) -> _Running:
        """Starts a command over a config."""
        environment = {**os.environ, **({"ACCELERATE_USE_CPU": "true"} if on_cpu else {})}
        log = self.log(command, config)
        given = (command, str(config), *words)
        # Two files: JSON goes to stdout, and what is said to people to stderr.
        argv = [sys.executable, "-m", "gist_train", *given]
        with log.open("wb") as out, log.with_suffix(".err").open("wb") as errors:
            process = subprocess.Popen(argv, cwd=ROOT, env=environment, stdout=out, stderr=errors)
        return _Running(given, process, log, time.perf_counter())

    def end(self, running: _Running) -> bool:
        """Waits for a command and shows what it said; whether it ended well."""
        code = running.process.wait()
        seconds = time.perf_counter() - running.began
        name = f"{running.words[0]} {Path(running.words[1]).stem}"
        self.report.say(f"{name}: ended with {code} after {seconds:.1f} s")
        for line in self.said(running.log)[-LINES:]:
            print(f"    {line}", flush=True)
        self.report.note(**{f"{name.replace(' ', '_')}_seconds": seconds})
        if code:
            self.report.fail(f"gist-train {name} ended with {code}")
        return code == 0


def _write_config(folder: Path, setup: Setup, length: Length, name: str, precision: str, stop: int | None) -> Path:
    config = {
        "name": name,
        "output_dir": str(folder / "runs"),
        "cache_dir": str(folder / "cache"),
        "model": {"name": str(model_folder(setup, "small")), "dropout": 0.0},
        "guide": {"name": str(model_folder(setup, "small-guide"))},
        "data": {"train": [{"source": "medi", "path": str(setup.source), "max_rows": length.rows}]},
        # At 0.01 the rounding of bf16 is a tenth of a logit and more, with random weights above all.
        "loss": {"temperature": 0.05},
        "training": {"batch_size": 16, "max_steps": length.steps, "precision": precision, "stop_at_step": stop},
        "optimizer": {"lr": 1e-4},
        "checkpoint": {"every": length.every, "keep_last": 10},
        "evaluation": {"tasks": [{"type": "sts", "name": "stsb", "path": str(setup.sts)}]},
        "tracking": {"log_every": 1},
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    return path


def _kill(running: _Running, run_folder: Path, length: Length, report: Report) -> int | None:
    """Sends SIGKILL once a checkpoint is there; the last row of metrics then, or None where the training was over before."""
    while running.process.poll() is None and not Run(run_folder).saved_steps():
        time.sleep(0.002)
    running.process.send_signal(signal.SIGKILL)
    code = running.process.wait()
    rows = _metrics(run_folder)
    last, saved = (rows[-1]["step"] if rows else 0), Run(run_folder).saved_steps()
    report.say(f"the first training: ended with {code} after step {last}, checkpoints {saved}")
    report.note(first_exit_code=code, killed_after_step=last, checkpoints_when_killed=saved)
    if code != -signal.SIGKILL:
        print("\n".join(_Commands.said(running.log)[-LINES:]))
        report.fail(f"the first training ended with {code} before it could be killed")
        return None
    if last >= length.steps:
        report.fail("the first training was over before it could be killed")
    return last


def _metrics(run_folder: Path) -> list[dict[str, Any]]:
    """Whole rows of metrics.jsonl; a kill may cut the last one short."""
    path = run_folder / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    rows = []
    for line in lines:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def _check_rows(rows: list[dict[str, Any]], length: Length, report: Report) -> None:
    """That every step has one row, and that the loss fell."""
    if [row["step"] for row in rows] != list(range(1, length.steps + 1)):
        report.fail(f"metrics.jsonl has {len(rows)} rows, and not one for each of {length.steps} steps")
        return
    tenth = max(1, length.steps // 10)
    first, last = (sum(row["loss"] for row in some) / tenth for some in (rows[:tenth], rows[-tenth:]))
    report.note(first_loss=first, last_loss=last, last_row=rows[-1])
    report.say(f"mean loss of the first {tenth} steps {first:.4f}, of the last {last:.4f}")
    # After the resume; the first steps of a process make what the others use.
    settled = rows[-len(rows) // 4 :]
    means = {key: sum(row[key] for row in settled) / len(settled) for key in ("step_seconds", "mfu", "tokens_per_second")}
    report.note(late_steps=means)
    report.say(f"late steps: {json.dumps(means)}")
    if not last < first and length is USUAL:
        report.fail(f"the loss did not fall: {first:.4f} at first, {last:.4f} at last")


def _compare(here: list[dict[str, Any]], on_cpu: list[dict[str, Any]], length: Length, report: Report) -> None:
    """That losses are the CPU's, step by step."""
    pairs = [(a["loss"], b["loss"]) for a, b in zip(here, on_cpu, strict=False)][: length.compared]
    apart = [abs(a - b) / abs(b) for a, b in pairs]
    report.note(losses=[a for a, _ in pairs], losses_on_cpu=[b for _, b in pairs], apart=apart)
    if len(pairs) < length.compared:
        report.fail(f"{len(pairs)} steps to compare with the CPU's, and not {length.compared}")
        return
    largest = max(apart)
    told = f"losses of {len(pairs)} steps: at most {100 * largest:.3f} % from the CPU's in float32"
    report.note(largest_difference=largest, summary=told)
    report.say(told)
    if not largest <= TOLERANCE:
        report.fail(told)
