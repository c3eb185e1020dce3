"""One stage of `check_gpu.sh`, or the table of all stages that ran.

    python -m benchmarks.gpu STAGE --out OUT [--device cuda|cpu] [--tiny]
    python -m benchmarks.gpu table --out OUT

A stage prints what it finds, and writes OUT/<number>-<stage>.json after every figure, so that a time limit loses little.
Exit code: 0; 1 where the stage failed; 2 where its input is wrong.
"""

import argparse
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu.report import STAGES, Report, Setup, show_table
from benchmarks.machine import ROOT


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a stage and returns the exit code."""
    options = _options(arguments)
    if options.stage == "table":
        return show_table(options.out)
    # A shell's background job is born deaf to it, and the time limit speaks so.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if options.device == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    options.out.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.gettempdir()) / "check_gpu" / ("tiny" if options.tiny else "full")
    work.mkdir(parents=True, exist_ok=True)
    setup = Setup(options.out, options.device, options.tiny, options.data, work)
    with Report(options.stage, setup) as report:
        _run(options.stage, setup, report)
    return 0 if report.ok else 1


def _run(stage: str, setup: Setup, report: Report) -> None:
    """Each stage's module is imported where it runs: most bring libraries along that take seconds."""
    if setup.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            report.fail("there is no CUDA device: give --device cpu")
            return
    match stage:
        case "versions":
            from benchmarks.gpu.versions import run
        case "tests":
            from benchmarks.gpu.tests import run
        case "training":
            from benchmarks.gpu.training import run
        case "step":
            from benchmarks.gpu.steps import run
        case "profile":
            from benchmarks.gpu.profile import run
        case _:
            from benchmarks.gpu.passes import run
    run(setup, report)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=(*STAGES, "table"))
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="models and counts so small that a CPU is done in seconds")
    default = Path(os.environ.get("GIST_TRAIN_DATA", ROOT.parent / "shared" / "data"))
    parser.add_argument("--data", type=Path, default=default, help="folder of the test data (default: $GIST_TRAIN_DATA)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
