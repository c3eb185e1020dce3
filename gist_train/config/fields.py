"""Kinds of values that the YAML's fields have, and what all its sections share.

A string inside `Annotated` is what an error message says is allowed there. The docstring under a field says what the field is,
with its unit, and is shown in error messages too.
"""

import os
import re
from itertools import pairwise
from typing import Annotated

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from gist_train.config.conditions import Condition
from gist_train.config.secrets import hidden

LONGEST_NAME = 200
"""Characters: file systems take 255, of which our own endings need some."""
SHORTEST, FEWEST_TOKENS = 8, 512
"""The least `max_length` of a model, and the fewest tokens that are computed at a time."""
LARGEST_WEIGHT = 1_000_000
"""Of a metric: sums of larger ones would overflow."""
LARGEST_SHARE_HELD_OUT = 0.5
"""Of the rows: a model is trained on the others."""


def _no_secret(text: str) -> str:
    if hidden(text) != text:
        raise ValueError("take the password or token out: this text stands in files, in the model or on pages that others read")
    return text


def _no_wandb_key(text: str) -> str:
    if hidden(f"wandb {text}") != f"wandb {text}":
        raise ValueError("take the key out and run wandb login, or put it into the environment as WANDB_API_KEY")
    return text


def _plain_folder_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9._-]+", name) or name in (".", ".."):
        raise ValueError("write a name that can be one folder: no spaces, slashes or other signs")
    if len(name) > LONGEST_NAME:
        raise ValueError(f"write a shorter name, of at most {LONGEST_NAME} characters: lock files are called by it too")
    return name


def expanded(path: str) -> str:
    """A path with `~` and environment variables filled in, as a shell fills them in. A hub id has neither, and stays."""
    return os.path.expandvars(os.path.expanduser(path))


def _as_text(path: object) -> object:
    """A `pathlib.Path`, as programs have them, as text."""
    return os.fspath(path) if isinstance(path, os.PathLike) else path


def _condition(text: str) -> str:
    Condition(text)
    return text


def _ascending(layers: list[int]) -> list[int]:
    if any(later <= earlier for earlier, later in pairwise(layers)):
        raise ValueError("sort the layer numbers and name each once")
    return layers


def _each_once(values: list[int]) -> list[int]:
    if len(set(values)) < len(values):
        raise ValueError("name each number once")
    return values


def _whole_characters(text: str) -> str:
    if text.encode("utf-8", "ignore").decode() != text:
        raise ValueError("it holds half of a surrogate pair: write the whole character")
    return text


def _weights(metric: object) -> object:
    """One metric's name counts alone."""
    if isinstance(metric, str):
        return {metric: 1.0}
    if not isinstance(metric, dict) or not metric:
        raise ValueError(
            "name a metric, such as stsb/spearman, or several with a weight each: {stsb/spearman: 1, b77/accuracy: 2}"
        )
    for name, weight in metric.items():
        number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not isinstance(name, str) or not number or not 0 < weight <= LARGEST_WEIGHT:
            raise ValueError(f"give each metric a weight above 0, at most {LARGEST_WEIGHT:,}: {name} has {weight}")
    return {name: float(weight) for name, weight in metric.items()}


def _held_out(amount: object) -> object:
    """1.0 may be meant as one row or as all of them: neither."""
    share = isinstance(amount, float) and 0 < amount <= LARGEST_SHARE_HELD_OUT
    rows = isinstance(amount, int) and not isinstance(amount, bool) and amount >= 1
    if amount is not None and not share and not rows:
        raise ValueError("name a share with a point, such as 0.05, a number of rows without one, such as 500, or null for none")
    return amount


Prompt = Annotated[str, AfterValidator(_whole_characters), AfterValidator(_no_secret), "text"]
Text = Annotated[str, Field(min_length=1), "text that is not empty"]
Title = Annotated[str, Field(min_length=1), AfterValidator(_no_secret), "text that is not empty"]
"""What something is called in files and on pages."""
WandbName = Annotated[str, Field(min_length=1), AfterValidator(_no_wandb_key), "text that is not empty"]
PathText = Annotated[str, Field(min_length=1), BeforeValidator(_as_text), AfterValidator(expanded), "text that is not empty"]
"""A file or folder, or a hub id in its place."""
Delimiter = Annotated[str, Field(min_length=1, max_length=1), "one character"]
Where = Annotated[str, AfterValidator(_condition), 'a condition over columns, such as label == 1 and lang in ["en", "de"]']
MtebName = Annotated[str, Field(min_length=1, pattern="^[^/]*$"), "a name without a slash, which parts it from its metrics"]
FolderName = Annotated[
    str, AfterValidator(_plain_folder_name), AfterValidator(_no_secret), "letters, digits and . _ - only; not . or .."
]
Count = Annotated[int, Field(ge=1), "a whole number of at least 1"]
CountOrZero = Annotated[int, Field(ge=0), "a whole number of at least 0"]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1), f"a whole number from 0 to {2**32 - 1}"]
MaxLength = Annotated[int, Field(ge=SHORTEST), f"a whole number of at least {SHORTEST}"]
BatchTokens = Annotated[int, Field(ge=FEWEST_TOKENS), f"a whole number of at least {FEWEST_TOKENS}"]
Positive = Annotated[float, Field(gt=0), "a number above 0"]
Weight = Annotated[float, Field(gt=0, le=1000), "a number above 0 and at most 1,000"]
PositiveOrZero = Annotated[float, Field(ge=0), "a number of at least 0"]
AboveOne = Annotated[float, Field(gt=1), "a number above 1"]
Share = Annotated[float, Field(ge=0, le=1), "a number from 0 to 1"]
BelowOne = Annotated[float, Field(ge=0, lt=1), "a number of at least 0 and below 1"]
Layers = Annotated[
    list[CountOrZero],
    Field(min_length=1),
    AfterValidator(_ascending),
    "a list of layer numbers from 0, in ascending order, such as [0, 2, 4]",
]
Dimensions = Annotated[
    list[Count],
    Field(min_length=1),
    AfterValidator(_each_once),
    "a list of whole numbers of at least 1, each once, at least one",
]
Weights = Annotated[list[Positive], Field(min_length=1), "a list of numbers above 0, at least one"]
MetricWeights = Annotated[
    dict[str, float], BeforeValidator(_weights), "a metric such as stsb/spearman, or a mapping of metrics to their weights"
]
HeldOut = Annotated[
    float | int, BeforeValidator(_held_out), "a share of the rows, above 0 and at most 0.5, or a whole number of rows, at least 1"
]
Betas = Annotated[list[BelowOne], Field(min_length=2, max_length=2), "a list of two numbers of at least 0 and below 1"]


class MisplacedError(ValueError):
    """What is wrong between keys, told at the deeper one of them.

    Args:
        fix: what to do about it.
        path: from the key that the check belongs to down to the one to fix; or from the top of the YAML.
        found: what is there.
        expected: what may be there.
        from_top: whether the path begins at the top.
    """

    def __init__(self, fix: str, *, path: tuple[str | int, ...], found: str, expected: str, from_top: bool = False):
        super().__init__(fix)
        self.path, self.found, self.expected, self.from_top = path, found, expected, from_top


class Section(BaseModel):
    """What all sections of the YAML share: strict, frozen, no unknown keys."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)
