"""What a person sees of a training while it runs."""

import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from gist_train.training.display import Display

ROW = {"loss_mean": 12.34567, "lr": 4.98e-06}


@pytest.mark.parametrize("base", [None, 0.7899])
def test_rows_fit_a_terminal(base):
    """A row that breaks over two lines is read by nobody: 80 columns, at the steps of the published recipe and beyond."""
    stream = io.StringIO()
    display = Display(Console(file=stream, width=80), 1_000_000, 1_175_000)
    display.judge(0.8012, base)
    display.show(SimpleNamespace(step=1_102_000, rows=range(16), seconds=0.61), ROW)
    (line,) = stream.getvalue().splitlines()
    score = "score 80.1" if base is None else "score 80.1 (+1.1)"
    assert line == f"step 1,102,000  mean loss 12.3457  lr 5.0e-06  {score}  12:22:10 left"
    assert len(line) <= 80


def test_the_time_left_does_not_jump_from_row_to_row():
    """Batches of long texts take several times as long as others: a run had a minute left, and then a quarter of one."""
    stream = io.StringIO()
    display = Display(Console(file=stream, width=80), 0, 3600)
    for step in range(1, 41):
        display.show(SimpleNamespace(step=step, rows=range(16), seconds=1.9 if step % 2 else 0.1), ROW)
    lines = stream.getvalue().splitlines()
    assert lines[-1].endswith("0:59:20 left")
    assert lines[-2].endswith("1:00:43 left")
