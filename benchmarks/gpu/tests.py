"""Stage 2 of `check_gpu.sh`: the tests that need a GPU."""

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec

from benchmarks.gpu.report import Report, Setup
from benchmarks.machine import ROOT

COUNTS = ("passed", "failed", "skipped", "errors", "deselected", "warnings")
PLACES = ("tests/inside", "tests/model", "tests/training")
"""Where tests of a GPU are."""
NOTHING_RAN = 5
"""Exit code of pytest where no test was chosen."""


def run(setup: Setup, report: Report) -> None:
    """Runs pytest, shows what it prints, and notes counts and failures."""
    places = ["tests/model/test_loss_cuda.py"] if setup.tiny else PLACES
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "--override-ini=addopts=", "-q", "--durations=20"]
    command += ["-p", "no:cacheprovider", *places]
    if find_spec("xdist") and not setup.tiny:
        command += ["-n", "4"]  # each imports the libraries, which takes a slow host longest
    report.say(" ".join(command))
    report.note(command=command)
    # Threads of several processes on tiny models only get into each other's way.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines: list[str] = []
    stopped = False
    while True:
        try:
            assert process.stdout is not None
            for line in process.stdout:
                print(line, end="", flush=True)
                lines.append(line.rstrip("\n"))
            code = process.wait()
            break
        except KeyboardInterrupt:  # pytest got it too, and prints its summary
            stopped = True
    figures = summary_of(lines)
    report.note(**figures, exit_code=code, summary=_told(figures))
    if stopped:
        report.fail(f"stopped by the time limit: {_told(figures)}")
    elif code not in (0, NOTHING_RAN):
        report.fail(f"pytest ended with {code}: {_told(figures)}; {', '.join(figures['failures'][:8])}")


def summary_of(lines: Sequence[str]) -> dict[str, object]:
    """Counts, seconds and failures, from the lines that pytest printed."""
    figures: dict[str, object] = dict.fromkeys(COUNTS, 0)
    figures["pytest_seconds"] = None
    for line in reversed(lines):
        took = re.search(r" in ([\d.]+)s", line)
        if took and (re.search(r"\d+ \w+", line) or "no tests ran" in line):
            figures["pytest_seconds"] = float(took[1])
            for count, kind in re.findall(r"(\d+) (passed|failed|skipped|errors?|deselected|warnings?)", line):
                figures[{"error": "errors", "warning": "warnings"}.get(kind, kind)] = int(count)
            break
    figures["failures"] = [line for line in lines if line.startswith(("FAILED ", "ERROR "))]
    return figures


def _told(figures: dict[str, object]) -> str:
    return ", ".join(f"{figures[name]} {name}" for name in COUNTS[:4])
