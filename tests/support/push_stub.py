"""The part of the Hugging Face hub's interface that a push asks for, on loopback: account, repository, LFS and commits."""

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any

from support.serving import serving

TOKEN = "hf_ThisIsASecretThatNobodyMayRead"


@dataclass
class PushHub:
    """What the hub holds of one repository, and what it was asked."""

    endpoint: str = ""
    repo_id: str = "me/model"
    exists: bool = False
    private: bool = False
    role: str = "write"
    files: dict[str, bytes] = field(default_factory=dict)
    lfs: dict[str, bytes] = field(default_factory=dict)
    """SHA-256 -> content that was uploaded by LFS."""
    by_lfs: set[str] = field(default_factory=set)
    """Paths that were committed as LFS files."""
    verified: set[str] = field(default_factory=set)
    commits: list[str] = field(default_factory=list)
    """Summary of each commit."""
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    """(method, path, Authorization header) as they come."""
    failing: dict[str, int] = field(default_factory=dict)
    """Part of a path -> status that it answers. The answer repeats the Authorization header, as a careless server would."""

    def answer(self, method: str, path: str, authorization: str | None, body: bytes) -> tuple[int, Any]:
        """Status and JSON."""
        self.requests.append((method, path, authorization))
        for part, status in self.failing.items():
            if part in path:
                return status, {"error": f"no: {authorization}"}
        if path.startswith("/lfs/"):
            self.lfs[path.removeprefix("/lfs/")] = body
            return 200, {}
        if authorization != f"Bearer {TOKEN}":
            return 401, {"error": f"unknown: {authorization}"}
        models = f"/api/models/{self.repo_id}"
        match method, path:
            case "GET", "/api/whoami-v2":
                return 200, {"name": "me", "auth": {"accessToken": {"role": self.role}}}
            case "POST", "/api/repos/create":
                return self._create(json.loads(body))
            case "POST", "/api/validate-yaml":
                return 200, {"errors": [], "warnings": []}
            case "GET", _ if path == models and self.exists:
                siblings = [{"rfilename": name} for name in self.files]
                return 200, {"id": self.repo_id, "sha": "0" * 40, "private": self.private, "siblings": siblings}
            case "GET", _ if path == f"{models}/tree/main" and self.exists:
                return 200, [{"type": "file", "path": name, "size": len(c), "oid": "0" * 40} for name, c in self.files.items()]
            case "POST", _ if path == f"{models}/preupload/main" and self.exists:
                files = [self._mode(file["path"]) for file in json.loads(body)["files"]]
                return 200, {"files": files}
            case "POST", _ if path == f"/{self.repo_id}.git/info/lfs/objects/batch":
                return 200, {"objects": [self._upload(**entry) for entry in json.loads(body)["objects"]]}
            case "POST", "/verify":
                self.verified.add(json.loads(body)["oid"])
                return 200, {}
            case "POST", _ if path == f"{models}/commit/main":
                self._commit([json.loads(line) for line in body.splitlines()])
                return 200, {"commitUrl": f"{self.endpoint}/{self.repo_id}/commit/{'1' * 40}", "commitOid": "1" * 40}
        return 404, {"error": "not found"}

    def _create(self, asked: dict[str, Any]) -> tuple[int, Any]:
        assert f"{asked['organization']}/{asked['name']}" == self.repo_id
        if self.exists:
            return 409, {"error": "You already created this model repo", "url": f"{self.endpoint}/{self.repo_id}"}
        self.exists, self.private = True, asked.get("visibility") == "private"
        return 200, {"url": f"{self.endpoint}/{self.repo_id}"}

    def _mode(self, path: str) -> dict[str, Any]:
        mode = "lfs" if path.endswith(".safetensors") else "regular"
        return {"path": path, "uploadMode": mode, "shouldIgnore": False}

    def _upload(self, oid: str, size: int) -> dict[str, Any]:
        actions = {"upload": {"href": f"{self.endpoint}/lfs/{oid}"}, "verify": {"href": f"{self.endpoint}/verify"}}
        return {"oid": oid, "size": size, "actions": actions}

    def _commit(self, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            key, value = line["key"], line["value"]
            if key == "header":
                self.commits.append(value["summary"])
            elif key == "file":
                self.files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                content = self.lfs[value["oid"]]
                assert hashlib.sha256(content).hexdigest() == value["oid"]
                self.files[value["path"]] = content
                self.by_lfs.add(value["path"])
            elif key == "deletedFile":
                del self.files[value["path"]]


@contextmanager
def push_hub(**state: Any) -> Iterator[PushHub]:
    """Serves a hub on loopback."""
    hub = PushHub(**state)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, value = hub.answer(self.command, self.path.partition("?")[0], self.headers.get("Authorization"), body)
            content = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_POST = do_PUT = do_GET  # noqa: N815

        def log_message(self, *_: Any) -> None:
            pass

    with serving(Handler) as hub.endpoint:
        yield hub
