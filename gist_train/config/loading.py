"""YAML and `--set` -> a Config, or all faults at once.

Text becomes plain values that remember where they were written (`_plain`, `_override`); pydantic judges the values; each of its
errors becomes one Fault in the user's words (`faults.py`).
"""

import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from gist_train.config.errors import Fault, UserError, shown
from gist_train.config.faults import KeyPath, Origins, dotted, fault_of, found_words, where_written
from gist_train.config.schema import Config
from gist_train.config.secrets import without_secrets

_MAX_DEPTH = 50

# The scalars of YAML 1.2's core schema. PyYAML's own are 1.1's, which read 1e-5 as text, `no` as false, 1:30 as 90 and 010 as 8.
_SCALARS = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    "float": (r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", list("-+.0123456789")),
}


class _Refused(yaml.MarkedYAMLError):
    """YAML that is valid but not taken here: the problem says what is there, the note how to fix it."""


class _Loader(yaml.SafeLoader):
    """Composes plain scalars, lists and mappings: no aliases (so no alias bombs), no tags, no endless nesting."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  (PyYAML's own attribute)
    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            raise _Refused(
                problem="an anchor (&) or alias (*)", problem_mark=event.start_mark, note="write the value out in each place"
            )
        if event.tag is not None:
            raise _Refused(problem="a tag (!)", problem_mark=event.start_mark, note="leave the tag out")
        if self.depth == _MAX_DEPTH:
            raise _Refused(problem=f"nesting deeper than {_MAX_DEPTH}", problem_mark=event.start_mark, note="remove levels")
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


class _Dumper(yaml.SafeDumper):
    """Quotes text that a reader of YAML 1.1 or of 1.2 would take for something else."""

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002  (PyYAML's signature)
        return True


for _kind, (_pattern, _first) in _SCALARS.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(rf"(?:{_pattern})\Z"), _first)


def load_config(
    source: str | Path | Mapping[str, object], overrides: str | Sequence[str] = (), *, selects: bool = True
) -> Config:
    """The config in a YAML file, changed by `overrides` (`key.sub=value`, or several); UserError names every fault there is.

    Args:
        source: the file's path, or what would be in it, as nested dicts and lists.
        selects: whether `selection` counts; where it does not, its faults are told in a warning, and it is as if left out.
    """
    given: object = source
    if not isinstance(given, str | Path | Mapping):
        fix = "name a YAML, or give what would be in it"
        raise UserError(Fault("load_config", shown(given), "the path of a YAML, or nested dicts", fix))
    changes: object = overrides
    if not isinstance(changes, str | Sequence):
        fix = 'write a list such as ["training.epochs=2"]'
        raise UserError(Fault("load_config: overrides", shown(changes), "key=value, or a list of such", fix))
    faults = list[Fault]()
    if isinstance(source, Mapping):
        origins: Origins = {(): ("config", None)}
        values: dict[str, object] | None = deepcopy(dict(source))
    else:
        origins = {(): (str(source), None)}
        values = _read_file(Path(source), faults, origins)
    for override in [overrides] if isinstance(overrides, str) else overrides:
        _override(override, values, faults, origins)
    if values is None:
        raise UserError(*faults)
    try:
        config = Config.model_validate(values, context={"selects": selects})
    except ValidationError as error:
        faults += [fault_of(details, origins) for details in error.errors(include_url=False)]
    if faults:
        raise UserError(*faults)
    return config


def resolved_yaml(config: Config) -> str:
    """The whole config, defaults included, as YAML that loads back to an equal Config, but for passwords and tokens in paths."""
    return yaml.dump(without_secrets(config.model_dump()), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000)


def _read_file(path: Path, faults: list[Fault], origins: Origins) -> dict[str, object] | None:
    """The file's mapping, or None and a fault."""
    where, a_file, a_mapping = str(path), "a YAML file, in UTF-8", "a mapping with at least name, model and data"
    from_a_recipe = "start from a copy of one of the recipes in configs/"
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        faults.append(Fault(where, "no such file", a_file, "correct the path: it starts from the folder where the command runs"))
    except IsADirectoryError:
        faults.append(Fault(where, "a folder", a_file, "give the path of the YAML file inside the folder"))
    except UnicodeDecodeError as error:
        found = f"a byte that is not UTF-8 (0x{error.object[error.start]:02x} at byte {error.start + 1})"
        faults.append(Fault(where, found, a_file, "save the file as UTF-8"))
    except OSError as error:
        faults.append(Fault(where, error.strerror or str(error), a_file, "make the file readable"))
    else:
        node = _compose(text, where, faults)
        if isinstance(node, yaml.MappingNode):
            return dict(_plain(node, (), where, faults, origins))
        if isinstance(node, yaml.SequenceNode):
            faults.append(Fault(where, "a list", a_mapping, f"write key: value, without a dash before it; or {from_a_recipe}"))
        elif isinstance(node, yaml.ScalarNode):
            faults.append(
                Fault(where, found_words(node.value), a_mapping, f"write key: value, a space after the colon; or {from_a_recipe}")
            )
        elif not faults:
            faults.append(Fault(where, "an empty file", a_mapping, from_a_recipe))
    return None


def _compose(text: str, where: str, faults: list[Fault]) -> yaml.Node | None:
    """The tree of the only document in `text`; None where it is empty or at fault."""
    expected = "one YAML document of mappings, lists and plain values"
    try:
        return _Loader(text).get_single_node()
    except _Refused as error:
        mark, found, fix = error.problem_mark, str(error.problem), str(error.note)
    except yaml.MarkedYAMLError as error:
        mark, found = error.problem_mark, str(error.problem).removeprefix("found ")
        if found.startswith("character '\\t'"):
            found = "a tab"
        fix = "correct the line, or the one before: a colon without a space, a bracket or quote left open, or uneven indentation"
        if found == "but found another document":
            found, fix = "a second document", "remove the line --- and what follows it"
        elif mark is not None and re.match(r" *\t", re.split("\r\n|[\n\r\x85\u2028\u2029]", text)[mark.line]):
            fix = "indent with spaces in place of tabs"
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        faults.append(Fault(f"{where} (line {line})", f"the character #x{error.character:04x}", expected, "remove the character"))
        return None
    except (ValueError, OverflowError):  # PyYAML on an escape such as "\UFFFFFFFF", in words of each version of Python
        found = "an escape of no character (the last is \\U0010FFFF)"
        faults.append(Fault(where, found, expected, 'correct the escape (a backslash in "...")'))
        return None
    line_words = "" if mark is None or where.startswith("--set ") else f" (line {mark.line + 1})"
    faults.append(Fault(where + line_words, found, expected, fix))
    return None


def _plain(node: yaml.Node, path: KeyPath, where: str, faults: list[Fault], origins: Origins) -> Any:
    """`node` as dict, list or scalar; notes where each value was written, and a fault for each key that can't be one."""

    def origin(written: yaml.Node) -> tuple[str, int | None]:
        return where, None if where.startswith("--set ") else written.start_mark.line + 1

    if isinstance(node, yaml.SequenceNode):
        origins.update({(*path, index): origin(item) for index, item in enumerate(node.value)})
        return [_plain(item, (*path, index), where, faults, origins) for index, item in enumerate(node.value)]
    if not isinstance(node, yaml.MappingNode):
        return _scalar(node)
    values: dict[str, object] = {}
    for key_node, value_node in node.value:
        key = _scalar(key_node) if isinstance(key_node, yaml.ScalarNode) else None
        if isinstance(key, str) and key not in values:
            origins[*path, key] = origin(key_node)
            values[key] = _plain(value_node, (*path, key), where, faults, origins)
            continue
        place = (*path, key_node.value if isinstance(key_node, yaml.ScalarNode) else "?")
        here = where_written(place, {place: origin(key_node)})
        if isinstance(key, str):
            line = origins[*path, key][1]
            found = "the same key a second time" + (f" (first on line {line})" if line else "")
            faults.append(Fault(here, found, "every key once", "remove one of the two"))
        else:
            found = found_words(key) if isinstance(key_node, yaml.ScalarNode) else "a list or a mapping as a key"
            faults.append(Fault(here, found, "a key that is text", "correct the key; if it is meant as text, put it in quotes"))
    return values


def _scalar(node: yaml.Node) -> str | int | float | bool | None:
    text: str = node.value
    match node.tag.removeprefix("tag:yaml.org,2002:"):
        case "null":
            return None
        case "bool":
            return text.lower() == "true"
        case "int" if len(text) < 1000:  # a longer one stays text, and is refused as such: Python won't read it
            return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
        case "float":
            return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    return text


def _override(override: str, values: dict[str, object] | None, faults: list[Fault], origins: Origins) -> None:
    """Puts the value of `key.sub=value` in its place in `values` (None: only looks whether it can be read)."""
    where = f"--set {override}" if len(override) <= 80 else f"--set {override[:79]}…"
    key, equals, text = override.partition("=")
    if not equals or not re.fullmatch(r"[\w-]+(\.[\w-]+|\[\d+\])*", key):
        faults.append(
            Fault(where, shown(override), "key.sub=value or key[0].sub=value", "for instance --set training.batch_size=32")
        )
        return
    before = len(faults)
    node = _compose(text, where, faults)
    if len(faults) > before or values is None:
        return
    path: KeyPath = ()
    parts = re.findall(r"[\w-]+", key)
    spot: Any = values
    for part, after in zip(parts, [*parts[1:], None], strict=True):
        if isinstance(spot, list):
            if not part.isdecimal() or int(part) >= len(spot):
                expected = f"a number from 0 to {len(spot) - 1}" if spot else "nothing: the list is empty"
                faults.append(Fault(f"{where}: {dotted(path)}", shown(part), expected, "count the items of the list from 0"))
                return
        elif not isinstance(spot, dict):
            fix = f"set the whole of it: --set '{dotted(path)}={{{part}: ...}}'"
            faults.append(Fault(f"{where}: {dotted(path)}", found_words(spot), "a mapping or a list to set it in", fix))
            return
        step: str | int = int(part) if isinstance(spot, list) else part
        path = (*path, step)
        if after is not None:
            if isinstance(spot, dict) and spot.get(part) is None:
                spot[step] = {}
                origins[path] = (where, None)
            spot = spot[step]
    for replaced in [other for other in origins if other[: len(path)] == path]:
        del origins[replaced]
    origins[path] = (where, None)
    spot[path[-1]] = None if node is None else _plain(node, path, where, faults, origins)
