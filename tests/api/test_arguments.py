"""Arguments of another kind are faults of the user's, and messages call arguments and no options of the command line."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from gist_train import UserError, load_config
from gist_train.api.arguments import arguments_checked
from gist_train.config.errors import Fault


@arguments_checked
def call(
    to: str | Path | None = None,
    *,
    step: int | None = None,
    share: float = 0.0,
    rule: tuple[str, float] | None = None,
    thresholds: Mapping[str, float] | None = None,
    models: str | Sequence[str] = (),
    average_of: Literal["best", "last"] | None = None,
    private: bool = False,
) -> dict[str, object]:
    """What it was given, but for a path of its own."""
    if to == "fault":
        raise UserError(
            Fault("--average-of", "--step 3", "both --model and --other", "add --average-of"), Fault("a file", "", "", "")
        )
    return {name: value for name, value in locals().items() if name != "to"}


@pytest.mark.parametrize(
    ("name", "wrong", "expected"),
    [
        ("to", 5, "a text or a path or None"),
        ("step", "2", "a whole number or None"),
        ("step", 1.5, "a whole number or None"),
        ("step", True, "a whole number or None"),
        ("share", "0.5", "a number"),
        ("rule", "loss", "a tuple of a text and a number or None"),
        ("rule", ("loss", "0.1"), "a tuple of a text and a number or None"),
        ("thresholds", ["a"], "a dict, each value a number or None"),
        ("thresholds", {"a": "b"}, "a dict, each value a number or None"),
        ("models", 5, "a text or a list, each a text"),
        ("models", ["a", 5], "a text or a list, each a text"),
        ("average_of", "all", "best, last or None"),
        ("private", "yes", "True or False"),
    ],
)
def test_another_kind_is_refused_by_name(name, wrong, expected):
    """A traceback from the depths would name a function that the user never called."""
    with pytest.raises(UserError) as caught:
        call(**{name: wrong})
    (fault,) = caught.value.faults
    assert (fault.where, fault.expected) == (f"call: {name}", expected)


def test_the_right_kinds_go_through():
    """numpy's numbers too, as a table's index has them."""
    given = {
        "step": np.int64(3),
        "share": np.float32(0.5),
        "rule": ("loss-percentile", 1),
        "thresholds": {"a": np.float64(0.5)},
        "models": ["a", "b"],
        "average_of": "last",
        "private": True,
    }
    assert call(Path("x"), **given) == given
    assert call("x")["models"] == ()


def test_faults_name_arguments():
    """Who calls a function has no option to add; what is no argument of it stays."""
    with pytest.raises(UserError) as caught:
        call("fault")
    first, second = caught.value.faults
    assert (first.where, first.found, first.fix) == ("call: average_of", "step 3", "add average_of")
    assert first.expected == "both models and --other"
    assert second.where == "a file"


def test_changes_of_a_config_are_texts(tmp_path):
    """The path of a second file, say."""
    with pytest.raises(UserError, match="key=value"):
        load_config(tmp_path / "run.yaml", 5)
