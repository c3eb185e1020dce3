"""Commands beside a run's own: what a field is."""

from collections.abc import Sequence
from typing import Annotated

import typer
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table

from gist_train.config.reference import Explained, Key, all_paths, explained
from gist_train.progress import Terminal

tools = typer.Typer()


def _paths(incomplete: str) -> list[str]:
    """What a shell completes a field to."""
    return [path for path in all_paths() if path.startswith(incomplete)]


@tools.command()
def explain(
    field: Annotated[
        str,
        typer.Argument(
            help="A key such as loss.margin, or a section such as loss.",
            metavar="FIELD",
            autocompletion=_paths,
            show_default=False,
        ),
    ] = "",
) -> None:
    """Say what a field of the YAML is, what it may be and what it is where nothing is said."""
    Terminal(markup=False).print(_explanation(explained(field)), highlight=False)


def _explanation(of_field: Explained) -> RenderableType:
    """A key, and the keys of the mapping that stands there; of several mappings the keys' names alone."""
    parts: list[RenderableType] = [_one_key(key, kinds) for key, kinds in of_field.keys.items()]
    for group in of_field.inside:
        heading = f"Keys of {group.path or 'the YAML'}{f' ({group.kind})' if group.kind else ''}:"
        names = [key.path.rpartition(".")[2] for key in group.keys]
        rows = [(name, key.default, key.about) for name, key in zip(names, group.keys, strict=True)]
        inside = _grid(rows) if len(of_field.inside) == 1 else ", ".join(names)
        parts += [*([""] if parts else []), heading, Padding(inside, (0, 0, 0, 2))]
    return Group(*parts)


def _one_key(key: Key, kinds: list[str]) -> RenderableType:
    rows = [("default", key.default), ("allowed", key.allowed)]
    if any(kinds):
        rows.append(("where", ", ".join(kind for kind in kinds if kind)))
    return Group(key.path, Padding(Group(key.about, "", _grid(rows)), (0, 0, 0, 2)))


def _grid(rows: Sequence[Sequence[str]]) -> Table:
    """Columns without lines; the last one takes the room that is left."""
    table = Table.grid(padding=(0, 2))
    for row in rows:
        table.add_row(*row)
    return table
