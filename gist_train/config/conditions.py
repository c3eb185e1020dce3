"""`where` of a source: a small expression over a row's columns, such as `label == 1 and lang in ["en", "de"]`."""

import ast
import re
from collections.abc import Callable, Mapping
from typing import Any

from gist_train.config.errors import shown

_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: lambda a, b: bool(a == b),
    ast.NotEq: lambda a, b: bool(a != b),
    ast.Lt: lambda a, b: bool(a < b),
    ast.LtE: lambda a, b: bool(a <= b),
    ast.Gt: lambda a, b: bool(a > b),
    ast.GtE: lambda a, b: bool(a >= b),
    ast.In: lambda a, b: a in b,
    ast.NotIn: lambda a, b: a not in b,
}
_QUOTED = re.compile(r"`([^`]+)`")


class UnlikeError(ValueError):
    """A cell can't be compared with what the condition compares it with."""

    def __init__(self, what: str, found: str, expected: str):
        super().__init__(what)
        self.what, self.found, self.expected = what, found, expected


class Condition:
    """A condition on rows.

    Args:
        text: comparisons (== != < <= > >= in, not in) of columns with numbers, texts, true, false and null, joined by and, or and
            not. A column whose name is no plain word is written in backticks.

    Raises:
        ValueError: it is no such expression.
    """

    def __init__(self, text: str):
        self._quoted: list[str] = []
        plain = _QUOTED.sub(self._placeholder, text)
        try:
            self._tree = ast.parse(plain.strip(), mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            raise ValueError(f"{shown(text)} is no condition") from None
        self._columns: dict[str, None] = {}
        self._check(self._tree)
        if not self._columns:
            raise ValueError(f"{shown(text)} names no column")

    @property
    def columns(self) -> list[str]:
        """The columns that it asks for."""
        return list(self._columns)

    def holds(self, row: Mapping[str, object]) -> bool:
        """Whether it holds of a row, whose cells are as its table has them; a column that the row lacks is null.

        Raises:
            UnlikeError: a cell that is compared with a number is none.
        """
        return self._truth(self._tree, row)

    def _placeholder(self, match: re.Match[str]) -> str:
        self._quoted.append(match[1])
        return f"_column_{len(self._quoted) - 1}"

    def _column(self, node: ast.Name) -> str:
        number = re.fullmatch(r"_column_(\d+)", node.id)
        return self._quoted[int(number[1])] if number and int(number[1]) < len(self._quoted) else node.id

    def _check(self, node: ast.expr) -> None:
        match node:
            case ast.BoolOp(values=values):
                for value in values:
                    self._check(value)
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                self._check(operand)
            case ast.Compare(left=left, ops=ops, comparators=comparators) if all(type(op) in _COMPARISONS for op in ops):
                for value in (left, *comparators):
                    self._check_value(value)
            case ast.Name(id=name) if name not in _CONSTANTS:
                self._columns[self._column(node)] = None
            case _:
                raise ValueError(f"{shown(ast.unparse(node))} can't be part of a condition")

    def _check_value(self, node: ast.expr) -> None:
        match node:
            case ast.Name(id=name) if name in _CONSTANTS:
                pass
            case ast.Name():
                self._columns[self._column(node)] = None
            case ast.Constant(value=str() | int() | float() | bool() | None):
                pass
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float())):
                pass
            case ast.List(elts=values) | ast.Tuple(elts=values):
                for value in values:
                    self._check_value(value)
            case _:
                raise ValueError(f"{shown(ast.unparse(node))} can't be part of a condition")

    def _truth(self, node: ast.expr, row: Mapping[str, object]) -> bool:
        match node:
            case ast.BoolOp(op=ast.And(), values=values):
                return all(self._truth(value, row) for value in values)
            case ast.BoolOp(values=values):
                return any(self._truth(value, row) for value in values)
            case ast.UnaryOp(operand=operand):
                return not self._truth(operand, row)
            case ast.Compare(left=left, ops=ops, comparators=comparators):
                values = [self._value(value, row) for value in (left, *comparators)]
                names = [self._column(value) if isinstance(value, ast.Name) else "" for value in (left, *comparators)]
                pairs = zip(ops, zip(names, values, strict=True), zip(names[1:], values[1:], strict=True), strict=False)
                return all(_compared(op, one, other) for op, one, other in pairs)
        value = self._value(node, row)  # a column alone: click logs have true and false
        return value.strip().lower() not in ("", "0", "0.0", "false", "no") if isinstance(value, str) else bool(value)

    def _value(self, node: ast.expr, row: Mapping[str, object]) -> Any:
        match node:
            case ast.Name(id=name) if name in _CONSTANTS:
                return _CONSTANTS[name]
            case ast.Name():
                return row.get(self._column(node))
            case ast.Constant(value=value):
                return value
            case ast.UnaryOp(operand=ast.Constant(value=int() | float() as value)):
                return -value
            case ast.List(elts=values) | ast.Tuple(elts=values):
                return [self._value(value, row) for value in values]
        raise AssertionError(node)


_CONSTANTS: dict[str, object] = {"true": True, "false": False, "null": None, "none": None}
"""As YAML and JSON write them; Python's own are constants already."""


def _compared(op: ast.cmpop, left: tuple[str, Any], right: tuple[str, Any]) -> bool:
    """Whether `left op right` holds, each a column's name, or "", and its value. CSV has numbers and truths as text."""
    (name, a), (other, b) = left, right
    if isinstance(op, ast.In | ast.NotIn):
        if isinstance(b, list):
            inside = any(_compared(ast.Eq(), left, ("", one)) for one in b)
        else:
            inside = a is not None and b is not None and str(a) in str(b)
        return inside == isinstance(op, ast.In)
    a, b = _like(name, a, b), _like(other, b, a)
    if not isinstance(op, ast.Eq | ast.NotEq) and (a is None or b is None):
        return False
    try:
        return _COMPARISONS[type(op)](a, b)
    except TypeError:
        raise UnlikeError(
            f'"{name or other}" can\'t be compared', f"{shown(a)} and {shown(b)}", "two numbers, or two texts"
        ) from None


def _like(name: str, value: Any, other: Any) -> Any:
    """`value` as what it is compared with is: a number or a truth that a CSV file has as text."""
    if not isinstance(value, str) or not isinstance(other, int | float):
        return value
    written = value.strip().lower()
    if isinstance(other, bool):
        return {"true": True, "1": True, "false": False, "0": False}.get(written, value)
    if written in ("", "null", "none", "nan"):
        return None
    if written in ("true", "false"):
        return written == "true"
    try:
        return float(written)
    except ValueError:
        raise UnlikeError(f'"{name}" is not a number', shown(value), "a number, since where compares it with one") from None
