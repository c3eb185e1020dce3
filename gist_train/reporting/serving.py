"""The page of runs that still train, served on this machine alone and made anew at each load."""

import re
import sys
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from markupsafe import escape
from rich.console import Console

from gist_train.config.errors import UserError
from gist_train.reporting.figures import begun, figures_of
from gist_train.reporting.page import check_library, page_of
from gist_train.run_folder import Run

SECONDS = 15
"""After which a browser loads the page again."""
HERE = re.compile(r"(127\.0\.0\.1|localhost|\[::1\])(:\d+)?", re.IGNORECASE)
"""What a browser of this machine asks for. A site whose name was made to lead here has another: it could read the texts."""


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """Says nothing of a browser that has gone: a tab is closed, a page is left while it is made."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


def server_of(runs: Sequence[Run]) -> ThreadingHTTPServer:
    """A server on a free port of the loopback address."""

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if not HERE.fullmatch(self.headers.get("Host", "")):
                self.send_error(403, "asked for under a name that is not this machine's own")
                return
            if self.path != "/":
                self.send_error(404)
                return
            content = _page(runs).encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            """Says nothing of requests."""

    return _Server(("127.0.0.1", 0), Page)


def serve(runs: Sequence[Run], console: Console) -> None:
    """Serves the page until Ctrl-C; of runs that have not begun, once they have.

    Raises:
        UserError: the chart library is not installed, or a file of a run that has begun can't be read.
    """
    check_library()
    for run in runs:
        if begun(run):
            figures_of(run)  # refuses what it can't show before anybody looks
        else:
            console.print(f"{run} has not begun: the page shows it once it has", highlight=False, soft_wrap=True)
    with server_of(runs) as server:
        console.print(f"http://127.0.0.1:{server.server_port}/ until Ctrl-C", highlight=False)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            console.print("Stopped. Nothing was written.")


def _page(runs: Sequence[Run]) -> str:
    """The page as it is now, or one that says why there is none. A browser loads it again until all runs have ended."""
    over = all(run.ended.exists() for run in runs)  # asked before the files are read: what was written before the end is seen
    try:
        return page_of([figures_of(run) for run in runs], refresh=None if over else SECONDS)
    except (UserError, OSError) as error:  # a run that has not begun yet, or a file that is being replaced
        head = f'<meta charset="utf-8"><meta http-equiv="refresh" content="{SECONDS}"><title>gist-train report</title>'
        return f'<!doctype html><html lang="en"><head>{head}</head><body><pre>{escape(error)}</pre></body></html>'
