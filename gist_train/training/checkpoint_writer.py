"""Checkpoints beside the training: a copy in host memory, which one thread writes, hashes and syncs while the loop continues."""

import copy
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from gist_train.data.files import no_room
from gist_train.model.adapters import adapted
from gist_train.model.pretrained import Pretrained
from gist_train.run_folder import Run
from gist_train.training import checkpoint as checkpoints
from gist_train.training.checkpoint import Facts, LogSums, moments_of
from gist_train.training.update import UpdateState

TRIES, SECONDS_BETWEEN_TRIES = 3, 5.0
"""At a checkpoint for which there is no room."""


class HostCopy:
    """Weights, moments and what updates know as they were at one step, in host memory, page-locked where they come from a GPU.

    The memory is kept from copy to copy: the first write to fresh memory takes many times as long as the copy itself.
    """

    def __init__(self, student: Pretrained, optimizer: torch.optim.Optimizer, state: UpdateState):
        self._live, self._optimizer, self._state = student, optimizer, state
        parameters = list(student.encoder.parameters())
        frozen = [weight for weight in parameters if adapted(student.encoder.transformer) and not weight.requires_grad]
        shared = {id(weight): weight for weight in frozen}
        weights: list[Tensor] = [*(p for p in parameters if id(p) not in shared), *student.encoder.buffers()]
        self._weights = [(weight, _host_memory_for(weight)) for weight in weights]
        # A model of its own, in which our memory takes the place of the weights: it is saved the way that the live one would be.
        # The tokenizer is the live one: it is large, and nothing is tokenised while a checkpoint is written.
        # So are weights under adapters, which no step changes, and which may be billions.
        memo: dict[int, Any] = {id(student.tokenizer): student.tokenizer, **shared}
        for weight, host in self._weights:
            memo[id(weight)] = nn.Parameter(host, requires_grad=False) if isinstance(weight, nn.Parameter) else host
        self.student = copy.deepcopy(student, memo)
        """The model that has the copied weights."""
        self.moments: dict[str, Tensor] = {}
        """The copied moments, by the names that a checkpoint gives them."""

    @torch.no_grad()
    def take(self) -> None:
        """Copies weights and moments as they are now; the copies before are overwritten."""
        live = moments_of(self._live, self._optimizer, self._state)
        for name, moment in live.items():  # the first step makes them
            if name not in self.moments:
                self.moments[name] = _host_memory_for(moment)
        for tensor, host in [*self._weights, *((live[name], host) for name, host in self.moments.items())]:
            host.copy_(tensor, non_blocking=True)
        if any(tensor.is_cuda for tensor, _ in self._weights):
            torch.cuda.synchronize()


def _host_memory_for(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)


class CheckpointWriter:
    """Writes a run's checkpoints in a thread, one at a time. When it closes, the one under way is whole.

    Args:
        run: None on ranks that write nothing.
        facts: as `save_checkpoint` takes them.
    """

    def __init__(
        self,
        run: Run | None,
        student: Pretrained,
        optimizer: torch.optim.Optimizer,
        facts: Facts,
        state: UpdateState,
    ):
        self._run, self._facts = run, facts
        self._copy = HostCopy(student, optimizer, state) if run is not None else None
        self._thread = ThreadPoolExecutor(1, "checkpoints")
        self._writing: Future[None] | None = None
        self.count = 0
        """Checkpoints that were handed over."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        failure = self.wait()
        self._thread.shutdown()
        if failure is not None and error is not None:
            error.add_note(f"the checkpoint that was being written failed too: {failure}")
        elif failure is not None:
            raise failure

    def save(self, sums: LogSums, *, before: Callable[[], None], after: Callable[[], None]) -> None:
        """Has the checkpoint of `sums.step` written, and returns as soon as weights and moments are copied.

        Args:
            before: what the thread does first: the rows that the checkpoint vouches for must not come after it.
            after: what the thread does once the checkpoint is whole.

        Raises:
            OSError: the checkpoint before, which is waited for, could not be written.
        """
        if (failure := self.wait()) is not None:
            raise failure
        if self._run is None or self._copy is None:
            return
        self._copy.take()
        self._writing = self._thread.submit(self._write, self._run, self._copy, sums, before, after)
        self.count += 1

    def _write(self, run: Run, copied: HostCopy, sums: LogSums, before: Callable[[], None], after: Callable[[], None]) -> None:
        before()
        for tries_left in reversed(range(TRIES)):
            try:
                checkpoints.save_checkpoint(run, copied.student, copied.moments, sums, self._facts)
            except (OSError, SafetensorError) as error:
                if tries_left and no_room(error):
                    time.sleep(SECONDS_BETWEEN_TRIES)  # whoever fills the disk may be cleaning up
                    continue
                fix = "Earlier checkpoints are whole: make room for it and run the same command to resume"
                raise OSError(f"checkpoint {run.checkpoint(sums.step)}: {error}. {fix}") from error
            break
        after()

    def wait(self) -> BaseException | None:
        """Waits for the checkpoint under way; returns the error that it ended with, which is told once."""
        if self._writing is None:
            return None
        failure = self._writing.exception()
        self._writing = None
        return failure

    @property
    def failed(self) -> bool:
        """Whether the checkpoint under way has ended with an error. Does not wait."""
        return self._writing is not None and self._writing.done() and self._writing.exception() is not None
