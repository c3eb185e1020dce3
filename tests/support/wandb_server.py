"""A server on loopback that wandb takes for its own: what it is sent of a run's history is kept, and it can fall silent."""

import gzip
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from typing import Any

from support.serving import serving

KEY = "0123456789abcdef" * 2 + "01234567"
HISTORY = "wandb-history.jsonl"


class WandbServer:
    """What the requests left behind, and how the next ones are answered."""

    def __init__(self) -> None:
        self.history: list[dict[str, Any]] = []
        """Rows of the run, in the order of their lines; a line that was sent again replaces what was there."""
        self.runs: set[str] = set()
        """Ids of the runs that were begun."""
        self.received = b""
        """All that was sent, as it came."""
        self.silent = threading.Event()
        """Set: connections are taken, and nothing is answered."""
        self.status = 200
        """Of all answers."""
        self.over = threading.Event()
        self.address = ""

    def answer(self, operation: str, variables: dict[str, Any]) -> dict[str, Any]:
        """The data of a GraphQL operation."""
        project = {"id": "1", "name": "project", "entity": {"id": "1", "name": "entity"}}
        bucket = {"id": "1", "name": variables.get("name"), "displayName": "run", "project": project}
        counts = {"historyLineCount": len(self.history), "eventsLineCount": 0, "logLineCount": 0}
        match operation:
            case "Viewer":
                return {"viewer": {"id": "1", "entity": "entity", "username": "us", "flags": "{}", "teams": {"edges": []}}}
            case "RunResumeStatus":
                tails = {"historyTail": json.dumps([json.dumps(row) for row in self.history[-1:]]), "eventsTail": "[]"}
                there = {
                    **bucket,
                    **counts,
                    **tails,
                    "summaryMetrics": "{}",
                    "config": "{}",
                    "tags": [],
                    "wandbConfig": '{"t": 1}',  # without it a run counts as one that nobody has begun
                }
                return {"model": {**project, "bucket": there if variables["name"] in self.runs else None}}
            case "UpsertBucket":
                self.runs.add(variables["name"])
                return {"upsertBucket": {"bucket": {**bucket, **counts, "config": "{}"}, "inserted": True}}
            case "CreateRunFiles":
                files = [{"name": name, "uploadUrl": f"{self.address}/upload/{name}"} for name in variables["files"]]
                return {"createRunFiles": {"runID": "1", "uploadHeaders": [], "files": files}}
        return {}

    def take_stream(self, files: dict[str, Any]) -> None:
        """Rows of the history that were sent."""
        if HISTORY in files:
            rows = [json.loads(line) for line in files[HISTORY]["content"]]
            self.history[files[HISTORY]["offset"] :] = rows


@contextmanager
def wandb_server() -> Iterator[WandbServer]:
    """A server that answers while the block runs; its `address` is for WANDB_BASE_URL, and `KEY` for WANDB_API_KEY."""
    server = WandbServer()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def _handle(self) -> None:
            content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.headers.get("Content-Encoding") == "gzip":
                content = gzip.decompress(content)
            server.received += content
            if server.silent.is_set():
                server.over.wait()
                return
            told: dict[str, Any] = {}
            if server.status == 200 and self.path.endswith("/graphql"):
                asked = json.loads(content)
                told = {"data": server.answer(asked["operationName"], asked.get("variables") or {})}
            elif server.status == 200 and self.path.endswith("/file_stream"):
                server.take_stream(json.loads(content).get("files") or {})
            body = json.dumps(told).encode()
            self.send_response(server.status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = do_PUT = _handle  # noqa: N815  (as the base class asks for them)

    with serving(Handler) as server.address:
        try:
            yield server
        finally:
            server.over.set()
