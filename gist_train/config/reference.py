"""docs/config.md, made from the schema: every key of the YAML with its default, what is allowed and what it is.

python -m gist_train.config.reference > docs/config.md
"""

from collections.abc import Iterator
from typing import Any, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from gist_train.config.faults import allowed_words, hints_of, joined, models_in, options_of, tag_field, tag_of
from gist_train.config.schema import Config

HEAD = """\
# All keys of the YAML

Made from the schema by `python -m gist_train.config.reference`; a test holds it to be current. Only `name`, `model.name` and
`data.train` must be given. Unknown keys are refused. `--set key.sub=value` on the command line rules over the file.
"""


def page() -> str:
    """The whole page, as Markdown."""
    top, sections = [], []
    for name, field in Config.model_fields.items():
        models = models_in(hints_of(Config)[name])
        top.append(_row(name, Config, name))
        if models:
            sections += [f"\n## {name}\n", *_section(name, models[0], str(field.description or models[0].__doc__ or ""))]
            for other in models[1:]:  # of another kind, which its first key says
                sections += [f"\n## {name} ({tag_field(other)})\n", *_section(name, other, str(other.__doc__ or ""))]
    return "\n".join([HEAD, *_table(top), *sections]) + "\n"


def _section(path: str, model: type[BaseModel], about: str) -> Iterator[str]:
    """A model's own keys, and then those of what is inside it."""
    yield f"{about}\n"
    yield from _table([_row(f"{path}.{name}", model, name) for name in model.model_fields])
    for name in model.model_fields:
        hint = hints_of(model)[name]
        inner = models_in(hint) or [m for part in _elements(hint) for m in models_in(part)]
        deeper = f"{path}.{name}" if models_in(hint) else f"{path}.{name}[]"
        for one in inner:
            # Of a union each model has a key of its own that says which it is.
            which = f" ({tag_field(one)}: {tag_of(one)})" if len(inner) > 1 else ""
            yield f"\n### {deeper}{which}\n"
            yield from _section(deeper, one, str(one.__doc__ or ""))


def _elements(hint: Any) -> list[Any]:
    """What the lists of a type hold."""
    return [get_args(option)[0] for option in options_of(hint) if get_origin(option) is list]


def _table(rows: list[str]) -> list[str]:
    return ["| key | default | allowed | what it is |", "|---|---|---|---|", *rows]


def _row(path: str, model: type[BaseModel], name: str) -> str:
    field = model.model_fields[name]
    # Which keys a mapping has is under its own heading.
    allowed = [word.split(" (keys:")[0] for word in allowed_words(hints_of(model)[name])]
    cells = [f"`{path}`", _shown(field.get_default()), joined(list(dict.fromkeys(allowed))), field.description or ""]
    return "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |"


def _shown(default: Any) -> str:
    """A default as YAML writes it."""
    if default is PydanticUndefined:
        return "must be given"
    if isinstance(default, BaseModel):
        return "its keys' defaults"
    if default is None:
        return "`null`"
    return f"`{str(default).lower() if isinstance(default, bool) else default}`"


if __name__ == "__main__":
    print(page(), end="")
