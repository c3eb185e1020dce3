"""What a person sees of an audit: kinds of bad rows with the worst of each, and what the guide would mask."""

from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from gist_train.auditing.audit import Audit
from gist_train.auditing.masking import Masked
from gist_train.config.errors import visible
from gist_train.config.suspects import KINDS
from gist_train.model.loss import BLOCKS

SHOWN_CHARACTERS = 60
"""Of a text."""
SHOWN_TASKS, SHOWN_TASK = 20, 22
"""Tasks that are shown, and characters of a name."""


def audit_page(found: Audit) -> RenderableType:
    """The page: a line a kind, the worst row of each, and shares of masked candidates by task."""
    rows, suspects = found.corpus.row_count, len(found.all_suspects())
    title = Text(f"{suspects:,} of {rows:,} rows may be bad ({suspects / rows:.1%}). Look at them before you drop them.", "bold")
    parts: list[RenderableType] = [title, _kinds(found), *_worst(found)]
    if found.masking is not None:
        parts.append(_masking(found))
    return Group(*parts)


def _kinds(found: Audit) -> RenderableType:
    table = Table(box=None, pad_edge=False)
    for column in ("rows", "share"):
        table.add_column(column, justify="right")
    table.add_column("kind", no_wrap=True)
    table.add_column("what it is")
    table.add_column("from", justify="right")
    counts = {kind: len(found.suspects(kind)) for kind in found.scores}
    for kind in sorted(counts, key=lambda kind: -counts[kind]):
        if count := counts[kind]:
            share = f"{count / found.corpus.row_count:.1%}"
            table.add_row(f"{count:,}", share, kind, KINDS[kind].about, f"{found.thresholds[kind]:g}")
    none = [kind for kind, count in counts.items() if not count]
    return Group(table, Text(f"no row: {', '.join(none)}")) if none else table


def _worst(found: Audit) -> Iterator[Text]:
    for kind in found.scores:
        if len(suspects := found.suspects(kind)):
            one = found.suspect(kind, int(suspects[0]))
            of_row = f"{_cut(one.anchor)} -> {_cut(one.positives[0])}"
            negative = f", not {_cut(one.negatives[0])}" if kind == "negative_nearer" else ""
            yield Text(f"{kind} {one.score:.3g}: {of_row}{negative} ({one.source}, row {one.row:,})")


def _masking(found: Audit) -> RenderableType:
    assert found.masking is not None
    margins = found.masking.margins
    first = found.masking.by_task[margins[0]]
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("task", no_wrap=True, max_width=SHOWN_TASK)
    for column in ("batches", *BLOCKS, *(f"at {margin:g}" for margin in margins), "none left"):
        table.add_column(column, justify="right", no_wrap=True)
    by_rows = sorted(first, key=lambda task: -first[task].batches)
    for task in by_rows[:SHOWN_TASKS]:
        table.add_row(*_of_task(task, [found.masking.by_task[margin][task] for margin in margins]))
    if len(by_rows) > SHOWN_TASKS:
        table.add_row(f"and {len(by_rows) - SHOWN_TASKS:,} tasks more")
    about = (
        "What the guide would mask of a batch's candidates: positives (ap), negatives (an) and anchors (aa) against anchors, "
        f"positives against positives (pp), at margin {margins[0]:g}; all of them at each margin; "
        "rows of which every candidate is masked, which teach nothing (none left). "
    )
    sampled, epoch = found.masking.batches, found.masking.epoch
    about += f"{sampled:,} of the {epoch:,} batches of the first epoch were looked at"
    about += "; a task without a line has no batch of its own among them." if sampled < epoch else "."
    return Group(Text(about, "bold"), table)


def _of_task(task: str, by_margin: list[Masked]) -> Iterator[str | Text]:
    one = by_margin[0]
    yield Text(task)  # whose brackets are no markup
    yield f"{one.batches:,}"
    for block in BLOCKS:
        yield f"{one.masked[block] / one.candidates[block]:.0%}" if one.candidates[block] else "-"
    for of_margin in by_margin:
        yield f"{of_margin.share:.1%}"
    yield f"{one.bare / max(1, one.rows):.1%}"


def _cut(text: str) -> str:
    line = visible(" ".join(text.split()))
    return f'"{line}"' if len(line) <= SHOWN_CHARACTERS else f'"{line[: SHOWN_CHARACTERS - 3]}..."'
