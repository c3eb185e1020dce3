"""The table of several models: every score of every model is in it, under the name that was given."""

import pytest

from gist_train.progress import Terminal
from gist_train.results.comparison import SIDE_BY_SIDE, comparison_table


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
