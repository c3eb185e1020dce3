"""The table of several models: every score of every model is in it, under the name that was given."""

import json

import pytest
from support.running import gist

from gist_train.progress import Terminal, in_points
from gist_train.results.comparison import SIDE_BY_SIDE, comparison_table
from gist_train.results.selection_table import Change


def printed(models, capsys):
    Terminal(width=200).print(comparison_table(models))
    return capsys.readouterr().out


@pytest.mark.parametrize("models", [1, SIDE_BY_SIDE + 1])
@pytest.mark.parametrize("name", ["models/[v2]", "models/[/v2]", "a:b:", "[red]x", ":smile:"])
def test_names_are_no_markup(name, models, capsys):
    """After hours of measuring, `[/v2]` ended the command with a traceback, and `[v2]` was shown as another folder's name."""
    text = printed({f"{name}{number}": {f"{name}/spearman": 0.5} for number in range(models)}, capsys)
    assert all(f"{name}{number}" in text for number in range(models))


def test_a_score_that_the_first_model_lacks_is_shown(capsys):
    """Of more models than there is room for side by side, the first one's scores would be all that is seen of the others."""
    models = {f"model {number}": {"pairs/spearman": 0.5} for number in range(SIDE_BY_SIDE)}
    models["last"] = {"pairs/pearson": 0.625, "others/ndcg@10": 0.75}
    text = printed(models, capsys)
    assert "pearson" in text
    assert "62.5" in text
    assert "75.0" in text


@pytest.mark.parametrize(("after", "before"), [(0.80125, 0.8025), (0.80135, 0.8025), (0.5, 0.5), (0.99995, 1.0)])
def test_tables_and_report_say_one_difference(after, before):
    """-0.13 in one and -0.12 in the other, for the place where each had rounded: which of the two is one to believe?"""
    difference = Change("pairs/spearman", before, after).difference
    assert f"{100 * difference:+.2f}" == in_points(after, before, decimals=2).plain


@pytest.mark.usefixtures("on_cpu")
def test_tasks_of_one_name_that_ask_something_else_are_two(write_config, write_pairs, tmp_path):
    """Held-out rows of two files, or texts cut at another length: side by side in one row, one score would look better."""
    other, configs = write_pairs(["two", "three"]), []
    other["tasks"][0]["path"] = str((tmp_path / "pairs.tsv").rename(tmp_path / "other.tsv"))
    same = write_pairs(["one", "two"])
    for name, evaluation in (("one", same), ("two", other), ("three", {**same, "max_length": 9}), ("four", same)):
        path = write_config(name, evaluation=evaluation, training={"batch_size": 8, "max_steps": 1})
        assert gist("train", path).code == 0
        configs.append(path)
    ended = gist("evaluate", *configs, "--json")
    scores = json.loads(ended.out)
    assert [key for one in ("one", "two", "three", "four") for key in scores[one] if "spearman" in key] == [
        "pairs/spearman",
        "pairs (2)/spearman",
        "pairs (3)/spearman",
        "pairs/spearman",
    ]
    assert "two: base" in scores
    assert "four: base" not in scores
    assert "pairs (2): two is judged by other texts" in ended.err


@pytest.mark.parametrize(("length", "said"), [(24, True), (64, False), (None, False)])
def test_models_that_read_unlike_lengths_are_told(write_config, make_model, tmp_path, length, said):
    """A model alone by its folder's length, against a run's at its own: the difference is taken for one of the models."""
    tasks = [{"type": "sts", "name": "s", "path": str(tmp_path / "s.tsv")}]
    (tmp_path / "s.tsv").write_text("text1\ttext2\tscore\na\tb\t1\na\tc\t0\nb\tc\t0.5\n")
    model = {"name": str(make_model()), **({"max_length": length} if length else {})}
    ended = gist("evaluate", write_config(model=model, evaluation={"tasks": tasks}), "--model", model["name"])
    assert ended.code == 0, ended.err
    assert ("reads 64 tokens of a text, and this run's model 24" in ended.err) is said
