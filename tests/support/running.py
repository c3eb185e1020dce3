"""Runs of the package for tests: the command line in this process, and real processes that cost 0.2 s to start in place of 7."""

import contextlib
import io
import json
import multiprocessing
import os
import shutil
import socket
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor, nn

from gist_train import cli
from gist_train.config.schema import Config
from gist_train.data.corpus import Corpus
from gist_train.evaluation.metrics import Score
from gist_train.evaluation.score_file import Terms, append_scores
from gist_train.model.pretrained import Pretrained
from gist_train.run_folder import TRAINING_STATE, Run
from gist_train.training.distributed import make_accelerator
from gist_train.training.loop import StepRecord, metrics_of
from gist_train.training.step_context import Training
from gist_train.training.throughput import PARTS
from gist_train.training_run import open_job

QUIET = Console(quiet=True)
WHOLE = Terms(None, None)
"""Scores of embeddings as they are."""
SECONDS = (f"{part}_seconds" for part in PARTS)
MEASURED = {
    "time",
    "triplets_per_second",
    "tokens_per_second",
    "mfu",
    "checkpoint_share",
    "step_seconds",
    "peak_memory_bytes",
    "gradient_seconds",
    "communication_share",
    *SECONDS,
}
"""Columns of metrics.jsonl that the clock decides; all others are a function of the config and the data."""
_SERVER = multiprocessing.get_context("forkserver")
# The server's children have these imported when they begin. It does not know this folder, so that `running` can't stand here.
# Commands import some of these only when they load a model: a child that has to takes 4 s of computing more.
_SERVER.set_forkserver_preload(
    [
        "gist_train.cli",
        "gist_train.training_run",
        "gist_train.results.export",
        "sentence_transformers.sentence_transformer.modules",
        "transformers.models.bert.modeling_bert",
        "transformers.models.auto.modeling_auto",
        "peft",
        "torch._dynamo",
        "pytest",
    ]
)
PATIENCE = 120.0
"""Seconds after which a process counts as hanging."""


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str


def gist(*words: object) -> Ended:
    """`gist-train WORDS` in this process. Any exception that is no message to the user comes through, as a traceback would."""
    out, err = io.StringIO(), io.StringIO()
    argv = ["gist-train", *map(str, words)]
    with mock.patch.object(sys, "argv", argv), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
    return Ended(code, out.getvalue(), err.getvalue())


def metrics(run: Path) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl without what the clock decides."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in row.items() if key not in MEASURED} for row in rows]


def losses(records: Sequence[StepRecord], corpus: Corpus) -> list[float]:
    return [row["loss"] for row in metrics_of(records, corpus)]


def tensors(run: Path, step: int) -> dict[str, Tensor]:
    """Weights and moments of a checkpoint."""
    folder = Run(run).checkpoint(step)
    return {**load_file(folder / "model.safetensors"), **load_file(folder / TRAINING_STATE)}


def assert_same_run(found: Path, expected: Path, step: int) -> None:
    """Every weight, moment and row of metrics is the same, bit for bit."""
    ours, theirs = tensors(found, step), tensors(expected, step)
    assert ours.keys() == theirs.keys()
    assert len(ours) > 60  # of the tiny model: weights, and two moments of each that is trained
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert metrics(found) == metrics(expected)


def add_scores(run: Path, step: int, values: Mapping[str, float], *, terms: Terms = WHOLE, content: str = "content") -> None:
    """Appends scores of two items each, which are the value."""
    scores = {key: Score(value, np.array([value, value])) for key, value in values.items()}
    contents = {key.split("/")[0]: content for key in values}
    append_scores(Run(run), step, scores, terms=terms, normalized=True, length=64, contents=contents)


def training_of(config: Config) -> tuple[Training, Pretrained, torch.optim.AdamW]:
    """What `train` hands to the loop, the student and its optimizer, at step 0."""
    accelerator, _ = make_accelerator(config.training.precision)
    job = open_job(config, accelerator, QUIET)
    return job.training, job.student, job.training.optimizer


class _Kept:
    """A tensor that autograd keeps, counted while it does."""

    def __init__(self, tensor: Tensor, live: Counter[int], sizes: dict[int, int]):
        self.tensor, self._live = tensor, live
        self._at = tensor.untyped_storage().data_ptr()
        live[self._at] += 1
        sizes[self._at] = tensor.untyped_storage().nbytes()

    def __del__(self) -> None:
        self._live[self._at] -= 1


def kept_at_once(module: nn.Module, work: Callable[[], object]) -> int:
    """The most bytes that autograd keeps at any time while `work` runs, the weights of `module` left out."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    live: Counter[int] = Counter()
    sizes: dict[int, int] = {}
    most = 0

    def keep(tensor: Tensor) -> Tensor | _Kept:
        nonlocal most
        if tensor.untyped_storage().data_ptr() in weights:
            return tensor
        kept = _Kept(tensor, live, sizes)
        most = max(most, sum(sizes[at] for at, count in live.items() if count > 0))
        return kept

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept.tensor if isinstance(kept, _Kept) else kept):
        work()
    return most


def in_processes(count: int, function: Callable[..., Any], *args: Any, patience: float = PATIENCE) -> list[tuple[int, Any]]:
    """Calls `function(*args)` in `count` processes and returns (world size, result) of each, in rank order.

    `function` starts gloo through an Accelerator of its own. Tensors don't travel: return numpy arrays.
    """
    port = free_port()
    pipes = [_SERVER.Pipe(duplex=False) for _ in range(count)]
    processes = [
        _SERVER.Process(target=_as_rank, args=(function, args, rank, count, port, pipes[rank][1])) for rank in range(count)
    ]
    for process in processes:
        process.start()
    results: list[tuple[int, Any]] = []
    try:
        for rank, (receiving, sending) in enumerate(pipes):
            sending.close()
            if not receiving.poll(patience):
                raise TimeoutError(f"rank {rank} of {count} says nothing")
            worked, result = receiving.recv()
            if not worked:
                raise AssertionError(f"rank {rank} of {count}:\n{result}")
            results.append(result)
    finally:
        for process in processes:
            process.join(5 if len(results) == count else 0)
            process.kill()
    return results


def _as_rank(function: Callable[..., Any], args: Sequence[Any], rank: int, count: int, port: int, sending: Any) -> None:
    _become_rank(rank, count, port)
    try:
        result = function(*args)
        size = dist.get_world_size() if dist.is_initialized() else 1
        sending.send((True, (size, result)))
        if dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()
    except BaseException:
        sending.send((False, traceback.format_exc()))


@dataclass
class Rank:
    """A process of a launch that a test started."""

    process: Any
    log: Path
    """What it writes to stderr."""

    def ended(self, within: float = PATIENCE) -> Ended:
        """How it ended. One that is not done `within` so many seconds is killed, with code -9."""
        self.process.join(within)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
        return Ended(self.process.exitcode, "", self.log.read_text(encoding="utf-8"))


@contextlib.contextmanager
def launched(folder: Path, *words_of_ranks: Sequence[object], before: Callable[[], object] | None = None) -> Iterator[list[Rank]]:
    """`gist-train WORDS` on as many ranks as there are words, as a launcher starts them; those that are left are killed.

    Args:
        folder: for what they write to stderr.
        before: is called in each of them first.
    """
    count, port, ranks = len(words_of_ranks), free_port(), []
    for rank, words in enumerate(words_of_ranks):
        log = folder / f"rank-{rank}.log"
        process = _SERVER.Process(target=_command_as_rank, args=(log, [*map(str, words)], rank, count, port, before))
        process.start()
        ranks.append(Rank(process, log))
    try:
        yield ranks
    finally:
        for rank in ranks:
            rank.process.kill()
            rank.process.join()


def free_port() -> int:
    """One that nobody listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _become_rank(rank: int, count: int, port: int) -> None:
    here = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in here.items()}, MASTER_ADDR="127.0.0.1", ACCELERATE_USE_CPU="true")
    torch.set_num_threads(1)


def _command_as_rank(
    log: Path, words: Sequence[str], rank: int, count: int, port: int, before: Callable[[], object] | None
) -> None:
    _become_rank(rank, count, port)
    with log.open("wb") as stream:
        os.dup2(stream.fileno(), 2)
    sys.stderr = open(2, "w", encoding="utf-8", buffering=1)  # noqa: SIM115 (for good)
    sys.argv = ["gist-train", *words]
    if before is not None:
        before()
    cli.main()


def exit_code_of(function: Callable[..., Any], *args: Any, within: float = PATIENCE) -> int | None:
    """Calls `function(*args)` in a process of its own and returns its exit code, -9 where it was killed.

    One that is not done `within` so many seconds is killed, and its code is None.
    """
    process = _SERVER.Process(target=_alone, args=(function, args))
    process.start()
    process.join(within)
    code = process.exitcode
    process.kill()
    process.join()
    return code


def _alone(function: Callable[..., Any], args: Sequence[Any]) -> NoReturn:
    os.environ["ACCELERATE_USE_CPU"] = "true"
    torch.set_num_threads(1)
    sys.exit(function(*args))


def copied(run: Path, name: str) -> Path:
    """A copy of a run folder beside it, as if its YAML had that name."""
    return Path(shutil.copytree(run, run.with_name(name)))
