"""The part of the Hugging Face hub's interface that reading asks for, on loopback: commits, trees and files. It can fail, too."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from typing import Any

from support.serving import serving

Commits = dict[str, dict[str, bytes]]
"""Commit (40 hex digits) -> path -> content. The last one is main."""


@contextmanager
def hub(name: str, commits: Commits, kind: str = "datasets", fault: str | int | None = None) -> Iterator[tuple[str, list[str]]]:
    """Serves a repository; yields the endpoint and the requests, which grow as they come.

    Args:
        kind: datasets or models.
        fault: a status that all answers have, "silent" for none, "half" for half of each.
    """
    requests: list[str] = []
    over = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(body=True)

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def log_message(self, *_: Any) -> None:
            pass

        def _answer(self, *, body: bool) -> None:
            path = self.path.partition("?")[0]
            requests.append(path)
            if fault == "silent":
                over.wait()
                return
            status, content, headers = (fault, b"{}", {}) if isinstance(fault, int) else _found(name, commits, path, kind)
            if fault == "half":
                content = content[: len(content) // 2]
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(key, value)
            self.end_headers()
            if body:
                self.wfile.write(content)

    with serving(Handler) as endpoint:
        try:
            yield endpoint, requests
        finally:
            over.set()


def _found(name: str, commits: Commits, path: str, kind: str) -> tuple[int, bytes, dict[str, str]]:
    newest = list(commits)[-1]
    api, files = f"/api/{kind}/{name}", f"/{name}/resolve/" if kind == "models" else f"/{kind}/{name}/resolve/"
    if path.startswith(files):
        revision, _, file = path.removeprefix(files).partition("/")
        commit = newest if revision == "main" else revision
        if file in commits.get(commit, {}):
            content = commits[commit][file]
            return 200, content, {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": commit}
        return 404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}
    if path == api or path.startswith(f"{api}/revision/"):
        revision = path.removeprefix(api).removeprefix("/revision/") or "main"
        commit = newest if revision == "main" else revision
        if commit in commits:
            siblings = [{"rfilename": file} for file in commits[commit]]
            return _json({"id": name, "sha": commit, "siblings": siblings, "tags": [], "private": False})
        return 404, b"{}", {"X-Error-Code": "RevisionNotFound"}
    if path.startswith(f"{api}/tree/"):
        commit, _, folder = path.removeprefix(f"{api}/tree/").partition("/")
        return _json(_tree(commits.get(commit, {}), folder))
    return 404, b"{}", {"X-Error-Code": "RepoNotFound"}


def _tree(files: dict[str, bytes], folder: str) -> list[dict[str, Any]]:
    """What stands in the folder itself: files, and folders below it."""
    prefix = f"{folder}/" if folder else ""
    entries: dict[str, dict[str, Any]] = {}
    for path, content in files.items():
        if path.startswith(prefix):
            first, _, rest = path.removeprefix(prefix).partition("/")
            kind = "directory" if rest else "file"
            entries[first] = {"type": kind, "path": prefix + first, "oid": hashlib.sha1(content).hexdigest()}
            entries[first]["size"] = 0 if rest else len(content)
    return list(entries.values())


def _json(value: Any) -> tuple[int, bytes, dict[str, str]]:
    return 200, json.dumps(value).encode(), {"Content-Type": "application/json"}
