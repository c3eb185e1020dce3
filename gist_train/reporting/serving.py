"""The page of runs that still train, served on this machine alone and made anew at each load."""

from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from rich.console import Console

from gist_train.config.errors import UserError
from gist_train.reporting.figures import figures_of
from gist_train.reporting.page import page_of
from gist_train.run_folder import Run

SECONDS = 15
"""After which a browser loads the page again."""


def server_of(runs: Sequence[Run]) -> ThreadingHTTPServer:
    """A server on a free port of the loopback address."""

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path != "/":
                self.send_error(404)
                return
            try:
                content, kind = page_of([figures_of(run) for run in runs], refresh=SECONDS), "text/html"
            except UserError as error:  # a run that has not begun yet
                content, kind = str(error), "text/plain"
            self.send_response(200)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.end_headers()
            self.wfile.write(content.encode())

        def log_message(self, *_: object) -> None:
            """Says nothing of requests."""

    return ThreadingHTTPServer(("127.0.0.1", 0), Page)


def serve(runs: Sequence[Run], console: Console) -> None:
    """Serves the page until Ctrl-C."""
    page_of([figures_of(run) for run in runs])  # refuses what it can't show before anybody looks
    with server_of(runs) as server:
        console.print(f"http://127.0.0.1:{server.server_port}/ until Ctrl-C", highlight=False)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            console.print("Stopped. Nothing was written.")
