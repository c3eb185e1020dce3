"""What a person sees of a training: step, loss, speed, memory and time left."""

from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from gist_train.training.loop import StepRecord
from gist_train.training.throughput import PARTS


class Display:
    """A line for the first step, the last and each row of metrics; on a terminal a bar below them."""

    def __init__(self, console: Console, start: int, stop: int):
        self._console, self._stop = console, stop
        columns = (
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=10),  # all columns fit into a terminal of 80
            TextColumn("loss {task.fields[loss]}  {task.fields[speed]} triplets/s"),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, console=console, disable=not console.is_terminal)
        self._task: TaskID = self._bar.add_task("training", total=stop, completed=start, loss="-", speed="-")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def show(self, record: StepRecord, row: dict[str, float] | None) -> None:
        """Takes a step in, and the row of metrics that was due after it."""
        # To read a loss waits for the device: on a CPU that is nothing, elsewhere it is left to the rows.
        if row is not None or record.metrics.device.type == "cpu":
            self._bar.update(self._task, loss=f"{record.loss:.4f}")
        self._bar.update(self._task, completed=record.step, speed=f"{len(record.rows) / record.seconds:,.1f}")
        if row is not None:
            self._console.print(f"{self._place(record)}  {row_line(row)}", highlight=False, soft_wrap=True)
        elif record.step in (1, self._stop):
            self._console.print(f"{self._place(record)}  loss {record.loss:.4f}", highlight=False)

    def _place(self, record: StepRecord) -> str:
        return f"step {record.step:,}/{self._stop:,}"


def row_line(row: dict[str, float]) -> str:
    """A row of metrics in a line."""
    speed = f"{row['triplets_per_second']:,.1f} triplets/s  {row['tokens_per_second']:,.0f} tokens/s  mfu {row['mfu']:.0%}"
    used = f"padding {row['padding_share']:.0%}  peak {row['peak_memory_bytes'] / 2**30:.1f} GiB"
    shares = {part: row[f"{part}_seconds"] / row["step_seconds"] for part in PARTS}
    split = ", ".join(f"{part} {share:.0%}" for part, share in shares.items() if share >= 0.005)
    return f"loss {row['loss_mean']:.4f}  {speed}  {used}  {row['step_seconds']:.3g} s a step: {split}"
