"""evaluations.jsonl: what is appended is read back, whatever happened in between."""

from gist_train.results.figures import FIGURES, append_figures, read_figures


def test_figures_come_back_by_step(tmp_path):
    """Values of a step that is evaluated again replace the older ones."""
    append_figures(tmp_path, 0, {"sts/spearman": 0.5, "b77/f1": 0.25})
    append_figures(tmp_path, 4, {"sts/spearman": 0.6})
    append_figures(tmp_path, 4, {"sts/spearman": 0.7})
    assert read_figures(tmp_path) == {0: {"sts/spearman": 0.5, "b77/f1": 0.25}, 4: {"sts/spearman": 0.7}}
    assert read_figures(tmp_path / "elsewhere") == {}


def test_a_torn_line_spoils_no_other(tmp_path):
    """The power went in the middle of a line: it is lost, those before and after it are not."""
    append_figures(tmp_path, 0, {"sts/spearman": 0.5})
    with (tmp_path / FIGURES).open("a") as file:
        file.write('{"step": 4, "ta')
    assert read_figures(tmp_path) == {0: {"sts/spearman": 0.5}}
    append_figures(tmp_path, 8, {"sts/spearman": 0.6})
    assert read_figures(tmp_path) == {0: {"sts/spearman": 0.5}, 8: {"sts/spearman": 0.6}}
