"""What a person sees of a training: step, loss, tokens per second and time left."""

from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from gist_train.training.loop import StepRecord


class Display:
    """A bar on a terminal; elsewhere a line for the first step, the last and each row of metrics."""

    def __init__(self, console: Console, start: int, stop: int):
        self._console, self._stop = console, stop
        columns = (
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=20),  # all columns fit into a terminal of 80
            TextColumn("loss {task.fields[loss]}  {task.fields[speed]} tokens/s"),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, console=console, disable=not console.is_terminal)
        self._task: TaskID = self._bar.add_task("training", total=stop, completed=start, loss="-", speed="-")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def show(self, record: StepRecord, row: dict[str, Any] | None) -> None:
        """Takes a step in, and the row of metrics that was due after it."""
        speed = record.tokens / record.seconds
        self._bar.update(self._task, completed=record.step, loss=f"{record.loss:.4f}", speed=f"{speed:,.0f}")
        if self._console.is_terminal or (row is None and record.step not in (1, self._stop)):
            return
        loss, speed = (row["loss_mean"], row["tokens_per_second"]) if row else (record.loss, speed)
        self._console.print(f"step {record.step:,}/{self._stop:,}  loss {loss:.4f}  {speed:,.0f} tokens/s", highlight=False)
