"""What a person sees of a training: step, loss, learning rate, score and time left, in 80 columns. metrics.jsonl has the rest."""

from collections import deque
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

from gist_train.progress import bar_on, clock, in_points
from gist_train.training.loop import StepRecord

STEPS_LOOKED_BACK = 1000
"""The time left goes by their mean: one step takes several times as long as another, by the lengths of its texts."""


class Display:
    """A line for the first step, the last and each row of metrics; on a terminal a bar below them."""

    def __init__(self, console: Console, start: int, stop: int):
        self._console, self._stop = console, stop
        columns = (
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=10),  # all columns fit into a terminal of 80
            TextColumn("mean loss {task.fields[loss]}  {task.fields[speed]} rows/s"),
            TimeRemainingColumn(),
        )
        self._bar = bar_on(console, *columns)
        self._task: TaskID = self._bar.add_task("training", total=stop, completed=start, loss="-", speed="-")
        self._score: tuple[float, float | None] | None = None
        self._seconds = deque[float](maxlen=STEPS_LOOKED_BACK)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def judge(self, score: float, base: float | None) -> None:
        """Takes in the score of the newest step that was measured, and the base model's, where that is known; fractions."""
        self._score = score, base

    def show(self, record: StepRecord, row: dict[str, float] | None) -> None:
        """Takes a step in, and the row of metrics that was due after it."""
        self._seconds.append(record.seconds)
        self._bar.update(self._task, completed=record.step, speed=f"{len(record.rows) / record.seconds:,.1f}")
        if row is not None:
            self._bar.update(self._task, loss=f"{row['loss_mean']:.4f}")
            self._console.print(self._line(record.step, row), highlight=False)
        elif record.step in (1, self._stop):
            self._console.print(f"step {record.step:,}  loss {record.loss:.4f}", highlight=False)

    def _line(self, step: int, row: dict[str, float]) -> Text:
        line = Text(f"step {step:,}  mean loss {row['loss_mean']:.4f}  lr {row['lr']:.1e}")
        if self._score is not None:
            score, base = self._score
            line.append(f"  score {100 * score:.1f}")
            if base is not None:
                line.append(" (").append(in_points(score, base)).append(")")
        return line.append(f"  {clock((self._stop - step) * sum(self._seconds) / len(self._seconds))} left")
