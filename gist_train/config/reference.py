"""Every key of the YAML with its default, what is allowed and what it is, made from the schema: docs/config.md, and `explain`.

python -m gist_train.config.reference > docs/config.md
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from gist_train.config.errors import Fault, UserError, listed, shown
from gist_train.config.faults import ELSEWHERE, allowed_words, hints_of, joined, models_in, options_of, tag_field, tag_of
from gist_train.config.schema import Config

HEAD = """\
# All keys of the YAML

Made from the schema by `python -m gist_train.config.reference`; a test holds it to be current. Only `name`, `model.name` and
`data.train` must be given. Unknown keys are refused. `--set key.sub=value` on the command line rules over the file, and
`gist-train explain loss.margin` prints what is said here of a key.
"""


@dataclass(frozen=True, slots=True)
class Key:
    """A key of the YAML."""

    path: str
    """Dotted; [] stands for each item of a list."""
    default: str
    """As YAML writes it."""
    allowed: str
    about: str
    values: tuple[str, ...]
    """Words, where it takes nothing but one of a few."""


@dataclass(frozen=True, slots=True)
class Group:
    """The keys of a mapping of the YAML."""

    path: str
    """Dotted; "" for the whole."""
    kind: str
    """Which it is, or what it is in, where one of several may stand there: "source: csv"; "" where there is one."""
    about: str
    keys: list[Key]


def groups() -> Iterator[Group]:
    """All mappings, each before those that are inside it."""
    yield Group("", "", "", [_key(name, Config, name) for name in Config.model_fields])
    for name, field in Config.model_fields.items():
        models = models_in(hints_of(Config)[name])
        for number, model in enumerate(models):  # one of another kind is known by its first key
            about = field.description if number == 0 else model.__doc__
            yield from _inside(name, f"{tag_field(model)}" if number else "", model, about or model.__doc__ or "")


def _inside(path: str, kind: str, model: type[BaseModel], about: str) -> Iterator[Group]:
    yield Group(path, kind, about, [_key(f"{path}.{name}", model, name) for name in model.model_fields])
    for name in model.model_fields:
        hint = hints_of(model)[name]
        inner = models_in(hint) or [m for part in _elements(hint) for m in models_in(part)]
        deeper = f"{path}.{name}" if models_in(hint) else f"{path}.{name}[]"
        for one in inner:
            # Of a union each model has a key of its own that says which it is.
            which = f"{tag_field(one)}: {tag_of(one)}" if len(inner) > 1 else kind
            yield from _inside(deeper, which, one, str(one.__doc__ or ""))


def merged(groups: Iterable[Group]) -> list[Group]:
    """Groups that say the same become one, at the first one's place, with all their kinds."""
    kinds: dict[tuple[str, str, tuple[Key, ...]], list[str]] = {}
    for group in groups:
        kinds.setdefault((group.path, group.about, tuple(group.keys)), []).append(group.kind)
    return [Group(path, kinds_in_words(of_same), about, [*keys]) for (path, about, keys), of_same in kinds.items()]


def kinds_in_words(kinds: Sequence[str]) -> str:
    """Several kinds: "source: csv or xlsx"; "" where all that may stand there are among them."""
    if "" in kinds:
        return ""
    tag, colon, _ = kinds[0].partition(": ")
    return f"{tag}{colon}{joined([kind.removeprefix(f'{tag}: ') for kind in kinds])}" if colon else joined(kinds)


def _elements(hint: Any) -> list[Any]:
    """What the lists of a type hold."""
    return [get_args(option)[0] for option in options_of(hint) if get_origin(option) is list]


def _key(path: str, model: type[BaseModel], name: str) -> Key:
    field = model.model_fields[name]
    # Which keys a mapping has is under its own heading.
    allowed = [word.split(" (keys:")[0] for word in allowed_words(hints_of(model)[name])]
    about, values = _one_line(field.description or ""), _words(hints_of(model)[name])
    return Key(path, _shown(field.get_default()), joined(list(dict.fromkeys(allowed))), about, values)


def _words(hint: Any) -> tuple[str, ...]:
    """What a type allows, where that is a few words."""
    options = options_of(hint)
    if not all(option in (bool, type(None)) or get_origin(option) is Literal for option in options):
        return ()
    return tuple(word for option in options for word in allowed_words(option)) if options != [type(None)] else ()


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _shown(default: Any) -> str:
    """A default as YAML writes it."""
    if default is PydanticUndefined:
        return "must be given"
    if isinstance(default, BaseModel):
        return "its keys' defaults"
    if default is None:
        return "null"
    return str(default).lower() if isinstance(default, bool) else str(default) or '""'


def page() -> str:
    """The whole page, as Markdown."""
    parts = [HEAD]
    for group in merged(groups()):
        if group.path:
            level = "###" if "." in group.path else "##"
            kind = f" ({group.kind})" if group.kind else ""
            parts += [f"\n{level} {group.path}{kind}\n", f"{group.about}\n"]
        parts += ["| key | default | allowed | what it is |", "|---|---|---|---|", *map(_row, group.keys)]
    return "\n".join(parts) + "\n"


def _row(key: Key) -> str:
    default = key.default if key.default in ("must be given", "its keys' defaults") else f"`{key.default}`"
    cells = [f"`{key.path}`", default, key.allowed, key.about]
    return "| " + " | ".join(_one_line(cell).replace("|", "\\|").replace("<", "&lt;") for cell in cells) + " |"


@dataclass(frozen=True, slots=True)
class Explained:
    """What is known of a key, or of the mapping there."""

    keys: dict[Key, list[str]]
    """The key, and the kinds of mappings that have it; several where they have it with unlike defaults or meanings."""
    inside: list[Group]
    """The mappings that may stand there, with their keys; those that say the same are one."""


def explained(name: str) -> Explained:
    """What `name` is.

    Args:
        name: a dotted path; [], [0] or nothing may stand where the YAML has a list. "" for the keys at the top.

    Raises:
        UserError: the YAML has no such key.
    """
    wanted, every = without_indices(name), list(groups())
    keys: dict[Key, list[str]] = {}
    for group in every:
        for key in group.keys:
            if wanted and without_indices(key.path) == wanted:
                keys.setdefault(key, []).append(group.kind)
    inside = merged(group for group in every if without_indices(group.path) == wanted)
    if not keys and not inside:
        raise UserError(Fault("FIELD", shown(name), "a key of the YAML, such as loss.margin", _nearest(wanted)))
    return Explained(keys, inside)


def all_paths() -> list[str]:
    """Every key's path, as `--set` and `explain` take it."""
    return list(dict.fromkeys(without_indices(key.path) for group in groups() for key in group.keys))


def fixed_values(name: str) -> list[str]:
    """The words that may stand at a key, as YAML writes them; none where others may, too. `name` is as `explained` has it."""
    keys = [key for group in groups() for key in group.keys if without_indices(key.path) == without_indices(name)]
    return list(dict.fromkeys(value for key in keys for value in key.values))


def without_indices(path: str) -> str:
    """A path as all items of lists have it."""
    return re.sub(r"\[\d*\]", "", path)


def _nearest(wanted: str) -> str:
    """Which key may have been meant."""
    last, paths = wanted.rpartition(".")[2], all_paths()
    if last in ELSEWHERE:
        return f"here it is {ELSEWHERE[last]}"
    same = [path for path in paths if path.rpartition(".")[2] == last]
    close = same or get_close_matches(wanted, paths, 3) or get_close_matches(last, paths, 3)
    return f"did you mean {listed(close, 5)}?" if close else "gist-train explain, without a name, lists the keys at the top"


if __name__ == "__main__":
    print(page(), end="")
