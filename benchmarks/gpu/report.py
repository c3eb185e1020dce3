"""What every stage of `check_gpu.sh` is given, and the JSON file that it writes."""

import json
import os
import time
import traceback
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any, Self

STAGES = ("versions", "tests", "training", "step", "profile", "passes")
"""In the order in which they run, cheapest first; counted from 1."""


@dataclass(frozen=True, slots=True)
class Setup:
    """What all stages share."""

    out: Path
    """Where results go."""
    device: str
    """cuda or cpu."""
    tiny: bool
    """Whether models and counts are so small that a CPU is done in seconds."""
    data: Path
    """Folder of the test data."""
    work: Path
    """Where models and corpora stay for later stages."""

    @property
    def source(self) -> Path:
        """The training rows."""
        return self.data / "medi" / "medi_like_train.json.gz"

    @property
    def sts(self) -> Path:
        """The scored pairs."""
        return self.data / "sts" / "stsb_dev.tsv"

    @property
    def precision(self) -> str:
        """That of the training."""
        return "bf16" if self.device == "cuda" else "float32"


class Report:
    """A stage's figures, written to its JSON file whenever some are added. A context: an error inside is told and noted.

    Args:
        stage: its name.
        setup: says where the file goes.
    """

    def __init__(self, stage: str, setup: Setup):
        self._began = time.perf_counter()
        number = STAGES.index(stage) + 1
        self._path = setup.out / f"{number}-{stage}.json"
        self._faults: list[str] = []
        self._finished = False
        self._head = {"stage": stage, "number": number}
        self._tail = {"device": setup.device, "torch": version("torch"), "tiny": setup.tiny}
        self._figures: dict[str, Any] = {}

    @property
    def ok(self) -> bool:
        """Whether the stage came to its end without a fault."""
        return self._finished and not self._faults

    def note(self, **figures: Any) -> None:
        """Adds figures, or puts newer ones in their place, and writes the file."""
        self._figures |= figures
        self._write()

    def say(self, text: str) -> None:
        """Prints a line with the seconds so far."""
        print(f"[{time.perf_counter() - self._began:6.1f}] {text}", flush=True)

    def fail(self, fault: str) -> None:
        """Says that something is not as it should be. The stage may go on."""
        self._faults.append(fault)
        self.say(f"FAULT: {fault}")
        self._write()

    def _write(self) -> None:
        seconds = round(time.perf_counter() - self._began, 2)
        head = {**self._head, "ok": self.ok, "seconds": seconds, **self._tail, "faults": self._faults}
        partial = self._path.with_name(self._path.name + ".partial")
        partial.write_text(json.dumps({**head, **self._figures}, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, self._path)

    def __enter__(self) -> Self:
        self._write()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> bool:
        self._finished = error is None
        if isinstance(error, KeyboardInterrupt):
            self.fail("stopped, by the time limit or by hand")
        elif error is not None:
            traceback.print_exception(kind, error, trace)
            self.fail(f"{type(error).__name__}: {str(error).strip()[:2000]}")
        self._write()
        self.say(f"{'ok' if self.ok else 'FAILED'}: {self._path}")
        return isinstance(error, Exception | KeyboardInterrupt)


def show_table(out: Path) -> int:
    """Prints a line for each stage whose text file is there; returns 1 where none is, else 0."""
    ran = [(number, name) for number, name in enumerate(STAGES, 1) if (out / f"{number}-{name}.txt").exists()]
    print(f"{'stage':<12} {'result':<7} {'seconds':>8}  of which")
    for number, name in ran:
        path = out / f"{number}-{name}.json"
        told = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        result = "ok" if told.get("ok") else "FAILED"
        # Without a fault it was killed before it could say so.
        faults = told.get("faults") or ([] if told.get("ok") else ["ended before it could say why"])
        about = "; ".join(faults) if faults else told.get("summary", "")
        first = about.splitlines()[0][:150] if about else ""
        print(f"{f'{number} {name}':<12} {result:<7} {told.get('seconds', float('nan')):>8.1f}  {first}")
    return 0 if ran else 1
