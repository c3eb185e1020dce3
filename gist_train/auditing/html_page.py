"""An audit as an HTML file: shares by kind, the worst rows of each with their texts, and what the guide would mask."""

from pathlib import Path

from gist_train.auditing.record import AuditRecord, write_audit
from gist_train.model.loss import BLOCKS
from gist_train.pages.rendering import rendered, write_page
from gist_train.run_folder import Run

SHOWN_TASKS = 500
"""Of the table of masked candidates."""


def audit_html(record: AuditRecord) -> str:
    """The page."""
    return rendered(
        "auditing/page.html.jinja", title=record.name, audit=record, blocks=BLOCKS, tasks=record.by_task(), shown=SHOWN_TASKS
    )


def keep_audit(run: Run, record: AuditRecord, page: Path | None) -> Path:
    """Writes the file that the run's report reads, and the page. Returns where the page is.

    Args:
        page: where to write it; None for beside the run's folder.

    Raises:
        UserError: `page` is in no folder, or is one.
    """
    to = page or run.audit_page
    write_audit(run, record)
    write_page(audit_html(record), to, "--page")
    return to
