"""Commands beside a run's own: what a field is, and what is in the cache."""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table

from gist_train.commands.completion import first_argument, paths
from gist_train.commands.options import AsJson
from gist_train.config.errors import Fault, UserError, shown
from gist_train.config.reference import Explained, Key, explained, kinds_in_words
from gist_train.config.schema import cache_folder
from gist_train.data.caches import KINDS, Cached, cached, clear, days_unused
from gist_train.progress import Terminal, say, terminal
from gist_train.run_folder import Run, config_and_run

tools = typer.Typer()


@tools.command()
def explain(
    field: Annotated[
        str,
        typer.Argument(
            help="A key such as loss.margin, or a section such as loss.",
            metavar="FIELD",
            autocompletion=paths,
            show_default=False,
        ),
    ] = "",
) -> None:
    """Say what a key of the YAML is, may be, and is by default."""
    Terminal().print(_explanation(explained(field)), highlight=False)


def _explanation(of_field: Explained) -> RenderableType:
    """A key, and the keys of the mapping that stands there; of several mappings the keys' names alone."""
    parts: list[RenderableType] = [_one_key(key, kinds) for key, kinds in of_field.keys.items()]
    if len(of_field.inside) == 1:
        (group,) = of_field.inside
        grid = _grid([(_name(key), key.default, key.about) for key in group.keys])
        parts += [*([""] if parts else []), _heading(group.path, group.kind), _inset(grid)]
        return Group(*parts)
    kinds_by_names: dict[tuple[str, str], list[str]] = {}
    for group in of_field.inside:
        kinds_by_names.setdefault((group.path, ", ".join(map(_name, group.keys))), []).append(group.kind)
    for (path, names), kinds in kinds_by_names.items():
        parts += [*([""] if parts else []), _heading(path, kinds_in_words(kinds)), _inset(names)]
    return Group(*parts)


def _name(key: Key) -> str:
    return key.path.rpartition(".")[2]


def _heading(path: str, kind: str) -> str:
    return f"Keys of {path or 'the YAML'}{f' ({kind})' if kind else ''}:"


def _inset(content: RenderableType) -> Padding:
    return Padding(content, (0, 0, 0, 2))


def _one_key(key: Key, kinds: list[str]) -> RenderableType:
    rows = [("default", key.default), ("allowed", key.allowed)]
    if where := kinds_in_words(kinds):
        rows.append(("where", where))
    return Group(key.path, _inset(Group(key.about, "", _grid(rows))))


def _grid(rows: Sequence[Sequence[str]]) -> Table:
    """Columns without lines; the last one takes the room that is left."""
    table = Table.grid(padding=(0, 2))
    for row in rows:
        table.add_row(*row)
    return table


def _names(context: typer.Context) -> list[str]:
    """What a shell completes a `--clear` to."""
    try:
        return ["all", *(entry.name for entry in cached(_cache_at(first_argument(context) or Path())))]
    except (OSError, UserError):
        return ["all"]


@tools.command()
def cache(
    where: Annotated[Path, typer.Argument(help="A YAML, a run folder, an output_dir or a cache_dir.", metavar="WHERE")] = Path(
        "runs"
    ),
    unused_for: Annotated[float, typer.Option(help="Only what no run has used for so many days.", min=0, metavar="DAYS")] = 0.0,
    clearing: Annotated[
        list[str] | None,
        typer.Option(
            "--clear",
            help="Delete this one (a name, or its beginning), or all; may be repeated.",
            metavar="NAME",
            autocompletion=_names,
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List or clear corpora and guides' stores.

    The largest first, with their last use. A run that needs one makes it anew.
    """
    folder = _cache_at(where)
    entries = [entry for entry in cached(folder) if days_unused(entry) >= unused_for]
    if clearing:
        entries = _cleared(entries, clearing)
    if as_json:
        print(json.dumps({"cache": str(folder), "entries": [_as_json(entry) for entry in entries]}, ensure_ascii=False))
    elif not clearing:
        out = Terminal()
        say(out, f"{folder}: {len(entries)} found, {_size(sum(entry.bytes for entry in entries))}")
        out.print(_cache_table(entries), highlight=False)


def _cache_at(where: Path) -> Path:
    """The cache folder that a YAML, a run folder, an output_dir or the folder itself names."""
    for folder in (where, where / ".cache"):
        if any((folder / kind).is_dir() for kind in KINDS):
            return folder
    if where.is_file() or Run(where).config.is_file():
        return cache_folder(config_and_run(where, [])[0])
    expected = "a YAML, a run folder, or a folder with a cache in it"
    raise UserError(Fault("WHERE", f"{shown(where)}, which has no cache", expected, "name the YAML of a run"))


def _cleared(entries: list[Cached], names: list[str]) -> list[Cached]:
    """Deletes the entries of these names, or beginnings of names; returns those that are left. Nothing is deleted where a name
    is nobody's, or that of an entry in use."""
    chosen, faults, err = list[Cached](), list[Fault](), terminal()
    for name in names:
        of_name = [entry for entry in entries if name == "all" or entry.name.startswith(name)]
        busy = [entry for entry in of_name if entry.holder is not None]
        if not of_name and name != "all":
            faults.append(
                Fault("--clear", shown(name), "a name of the list, its beginning, or all", "gist-train cache lists them")
            )
        elif busy and name != "all":
            faults += [Fault("--clear", f"{one.name}, in use by {one.holder}", "one that is not", "wait for it") for one in busy]
        for entry in busy if name == "all" else ():
            say(err, f"left, in use by {entry.holder}: {entry.kind} {entry.name}")
        chosen += [entry for entry in of_name if entry.holder is None and entry not in chosen]
    if faults:
        raise UserError(*faults)
    for entry in chosen:
        clear(entry)
        say(err, f"cleared, {_size(entry.bytes)}: {entry.kind} {entry.name}")
    say(err, f"{_size(sum(entry.bytes for entry in chosen))} are free again")
    return [entry for entry in entries if entry not in chosen]


def _cache_table(entries: list[Cached]) -> RenderableType:
    table = Table.grid(padding=(0, 2))
    for _ in range(4):
        table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for entry in entries:
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.used)) if entry.holder is None else "in use"
        table.add_row(entry.name[:8], _size(entry.bytes), used, entry.kind, entry.about)
    return Padding(table, (0, 0, 0, 2))


def _as_json(entry: Cached) -> dict[str, object]:
    holder = None if entry.holder is None else str(entry.holder)
    return {**asdict(entry), "folder": str(entry.folder), "name": entry.name, "holder": holder}


def _size(count: int) -> str:
    """Bytes as a person reads them."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 2**10:.1f} KiB"
