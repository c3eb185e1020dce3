"""The table of the ablation: what is compared with what. Its trainings take minutes each and are not run here."""

import io
import re

from rich.console import Console

from benchmarks.ablation import SCORES, fastest, main, show


def line(row, seed, score):
    return {"row": row, "seed": seed, "steps": 450, "scores": dict.fromkeys(SCORES, score)}


def test_a_row_is_compared_with_guided_of_its_seeds():
    """Seed 3 of guided alone would move the difference from 2 points to 1."""
    lines = [
        line("guided", 1, 0.50),
        line("guided", 2, 0.52),
        line("guided", 3, 0.56),
        line("mined", 1, 0.53),
        line("mined", 2, 0.53),
    ]
    times = [{"row": "guided", "step_seconds": [1.0, 3.0]}, {"row": "guided", "step_seconds": [2.0, 1.0]}]
    times += [{"row": "mined", "step_seconds": [1.5, 1.5]}]
    console = Console(file=io.StringIO(), width=200)
    show(lines, times, console)
    cells = next(text for text in console.file.getvalue().splitlines() if "mined" in text).split("│")
    assert [cell.strip() for cell in cells[-5:-1]] == ["53.00", "53.00 - 53.00", "+2.00", "1.50"]


def test_a_step_counts_at_its_fastest():
    assert fastest([[1.0, 5.0], [2.0, 1.0]]) == 2.0
    assert fastest([]) == 0


def test_without_the_data_nothing_is_trained(tmp_path, capsys):
    assert main(["--work", str(tmp_path / "work"), "--data", str(tmp_path)]) == 2
    assert re.match(r"--data: no folder \S+ with medi/medi_like_train.json.gz in it", capsys.readouterr().err)
    assert not (tmp_path / "work").exists()
