"""What programs pass to a call: of the kinds that its signature names, and faults that call them as the program does."""

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from functools import wraps
from numbers import Integral, Real
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, ParamSpec, TypeVar, Union, get_args, get_origin, get_type_hints

from gist_train.config.errors import Fault, UserError, listed, shown

P = ParamSpec("P")
R = TypeVar("R")
CHECKED_ELSEWHERE = ("self", "config")
"""Arguments whose faults say how to make what is expected."""
OPTION = re.compile(r"--([a-z][a-z-]*)")
CALLED_OTHERWISE = {"model": "models", "truncate_dim": "dimensions"}
"""Options of the command line whose argument has another name."""
KINDS: dict[Any, tuple[Any, str]] = {
    str: (str, "a text"),
    Path: (Path, "a path"),
    bool: (bool, "True or False"),
    int: (Integral, "a whole number"),
    float: (Real, "a number"),
    NoneType: (NoneType, "None"),
}
"""By annotation, what a value must be, numpy's numbers too, and how that is called."""


def arguments_checked(call: Callable[P, R]) -> Callable[P, R]:
    """A call that refuses an argument of another kind than its annotation, and whose faults name arguments and no options.

    Raises:
        UserError: one is of another kind.
    """
    signature = inspect.signature(call)

    @wraps(call)
    def checked(*given: P.args, **named: P.kwargs) -> R:
        hints = get_type_hints(call, localns={"DataFrame": object})
        for name, value in signature.bind(*given, **named).arguments.items():
            if name not in CHECKED_ELSEWHERE and not _is_one(value, hints[name]):
                raise UserError(Fault(f"{call.__name__}: {name}", shown(value), _words(hints[name]), "give one of these"))
        try:
            return call(*given, **named)
        except UserError as error:
            raise UserError(*[_by_arguments(fault, call.__name__, signature.parameters) for fault in error.faults]) from None

    return checked


def _is_one(value: object, hint: Any) -> bool:
    """Whether a value is of the kind that an annotation says."""
    # pydantic, where it is strict, refuses numpy's numbers, and takes "2" for a number and "yes" for a truth where it is not.
    kind, parts = get_origin(hint), get_args(hint)
    if kind in (Union, UnionType):
        return any(_is_one(value, part) for part in parts)
    if kind is Literal:
        return value in parts
    if kind is tuple:
        return isinstance(value, tuple) and len(value) == len(parts) and all(map(_is_one, value, parts))
    if kind is Sequence:
        return isinstance(value, Sequence) and not isinstance(value, str) and all(_is_one(one, parts[0]) for one in value)
    if kind is Mapping:
        return isinstance(value, Mapping) and all(_is_one(key, parts[0]) and _is_one(one, parts[1]) for key, one in value.items())
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, KINDS[hint][0] if hint in KINDS else hint)


def _words(hint: Any) -> str:
    """How the kind is called that an annotation says."""
    kind, parts = get_origin(hint), get_args(hint)
    if kind in (Union, UnionType):
        return " or ".join(map(_words, parts))
    if kind is Literal:
        return listed(parts)
    if kind is tuple:
        return f"a tuple of {' and '.join(map(_words, parts))}"
    if kind is Sequence:
        return f"a list, each {_words(parts[0])}"
    if kind is Mapping:
        return f"a dict, each value {_words(parts[1])}"
    return KINDS[hint][1] if hint in KINDS else f"a {hint.__name__}"


def _by_arguments(fault: Fault, call: str, arguments: Mapping[str, object]) -> Fault:
    """The fault with every option that is an argument of the call under the argument's name."""

    def named(option: re.Match[str]) -> str:
        name = option[1].replace("-", "_")
        name = CALLED_OTHERWISE.get(name, name)
        return name if name in arguments else option[0]

    texts = {field.name: getattr(fault, field.name) for field in fields(fault)}
    changed = {name: OPTION.sub(named, text) for name, text in texts.items() if isinstance(text, str)}
    if fault.where.startswith("--") and changed["where"] != fault.where:
        changed["where"] = f"{call}: {changed['where']}"
    return replace(fault, **changed)
