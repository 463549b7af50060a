"""The Hugging Face Hub's download protocol on the loopback interface, with holds, cuts and damage on request.

As on the real Hub, *.safetensors are large files: their address redirects to another host, which serves them
by SHA-256 and must never see the token. Tests set HF_ENDPOINT to `HubServer.endpoint`.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

CHUNK = 2**16  # bytes
API = re.compile(r"/api/models/(?P<id>.+?)/(?P<verb>revision|tree|paths-info)/(?P<revision>[^/]+)")
RESOLVE = re.compile(r"/(?P<id>.+?)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
LARGE = re.compile(r"/large/(?P<digest>[0-9a-f]{64})")


@dataclass
class Model:
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)  # by hash: paths and contents
    references: dict[str, str] = field(default_factory=dict)  # branches and tags: hashes
    is_gated: bool = False  # anybody may list it, nobody may read it


@dataclass
class Hold:
    """Stops the transfer of a file after `num_bytes` until `resume` is set."""

    num_bytes: int
    reached: Event = field(default_factory=Event)
    resume: Event = field(default_factory=Event)


@dataclass(frozen=True)
class Request:
    method: str
    target: str  # as in the request line
    path: str | None  # the file within its model
    headers: dict[str, str]  # names in lower case


class HubServer:
    """Use as a context manager. With `token`, whoever does not send it is told that no model exists."""

    def __init__(self, *, token: str | None = None) -> None:
        self.token = token
        self.models: dict[str, Model] = {}
        self.requests: list[Request] = []
        self.bytes_served: Counter[str] = Counter()  # by file; bodies only
        self.holds: dict[str, Hold] = {}  # by file
        self.cuts: dict[str, int] = {}  # by file: close the connection once after so many bytes
        self.damaged: set[str] = set()  # files served with a wrong first byte
        self._servers = [
            ThreadingHTTPServer((host, 0), _handler(self)) for host in ("127.0.0.1", "127.0.0.2")
        ]
        self.endpoint, self.large_files = (
            f"http://{server.server_address[0]!s}:{server.server_port}" for server in self._servers
        )

    def __enter__(self) -> "HubServer":
        for server in self._servers:
            server.daemon_threads = True
            Thread(target=server.serve_forever, args=[0.02], daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        for hold in self.holds.values():
            hold.resume.set()
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def add(self, model_id: str, files: Mapping[str, bytes], *references: str, is_gated: bool = False) -> str:
        """A new commit of a model, at which `references` (by default main) then point. Returns its hash."""
        listing = "".join(f"{path}\0{hashlib.sha1(files[path]).hexdigest()}\0" for path in sorted(files))
        commit = hashlib.sha1(listing.encode()).hexdigest()
        model = self.models.setdefault(model_id, Model())
        model.is_gated = is_gated
        model.commits[commit] = dict(files)
        model.references.update(dict.fromkeys(references or ["main"], commit))
        return commit

    def add_directory(self, model_id: str, directory: Path) -> str:
        """A commit with all files of a directory."""
        paths = [path for path in directory.rglob("*") if path.is_file()]
        return self.add(model_id, {str(path.relative_to(directory)): path.read_bytes() for path in paths})

    def count_anew(self) -> None:
        """What is still being sent, perhaps to a process that was killed, does not count."""
        self.bytes_served = Counter()

    def hold(self, path: str, num_bytes: int) -> Hold:
        """Let `num_bytes` of a file through, and no more until the hold is resumed."""
        self.holds[path] = Hold(num_bytes)
        return self.holds[path]

    def large_requests(self, path: str) -> list[Request]:
        """Those for the content of a large file, on the host where it is."""
        return [r for r in self.requests if r.path == path and r.target.startswith("/large/")]


def _handler(hub: HubServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_GET(self) -> None:
            target = unquote(urlsplit(self.path).path)
            if match := LARGE.fullmatch(target):
                self._large(match["digest"])
            elif match := API.fullmatch(target) or RESOLVE.fullmatch(target):
                self._model(**match.groupdict())
            else:  # the client library has requests of its own, for example for telemetry
                self._error(404, "RepoNotFound")

        do_HEAD = do_POST = do_GET

        def _model(self, id: str, revision: str, path: str | None = None, verb: str | None = None) -> None:
            self._record(path)
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            model = hub.models.get(id)
            if hub.token not in (None, self.headers.get("Authorization", "").removeprefix("Bearer ")):
                return self._error(401, "RepoNotFound")
            if model is None:
                return self._error(404, "RepoNotFound")
            commit = model.references.get(revision, revision)
            files = model.commits.get(commit)
            if files is None:
                return self._error(404, "RevisionNotFound")
            if path is None:
                return self._listing(id, commit, files, verb, body)
            if model.is_gated:
                return self._error(403, "GatedRepo")
            if path not in files:
                return self._error(404, "EntryNotFound")
            return self._file(path, files[path], commit)

        def _listing(
            self, id: str, commit: str, files: dict[str, bytes], verb: str | None, body: bytes
        ) -> None:
            if verb == "revision":
                siblings = [{"rfilename": path} for path in files]
                return self._json({"id": id, "sha": commit, "siblings": siblings, "tags": []})
            wanted = parse_qs(body.decode())["paths"] if verb == "paths-info" else list(files)
            return self._json([_entry(path, files[path]) for path in wanted if path in files])

        def _file(self, path: str, content: bytes, commit: str) -> None:
            headers = {"X-Repo-Commit": commit}
            if _is_large(path):
                digest = hashlib.sha256(content).hexdigest()
                headers |= {"X-Linked-ETag": f'"{digest}"', "X-Linked-Size": str(len(content))}
                headers |= {"Location": f"{hub.large_files}/large/{digest}"}
                return self._send(302, headers, b"")
            headers |= {"ETag": f'"{_git_hash(content)}"'}
            self._send(200, headers, content, path)

        def _large(self, digest: str) -> None:
            for model in hub.models.values():
                for files in model.commits.values():
                    for path, content in files.items():
                        if _is_large(path) and hashlib.sha256(content).hexdigest() == digest:
                            self._record(path)
                            return self._send_range(path, content)
            return self._error(404, "EntryNotFound")

        def _send_range(self, path: str, content: bytes) -> None:
            match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
            if match is None:
                return self._send(200, {}, content, path)
            start = int(match[1])
            if start >= len(content):
                return self._send(416, {"Content-Range": f"bytes */{len(content)}"}, b"")
            content_range = f"bytes {start}-{len(content) - 1}/{len(content)}"
            return self._send(206, {"Content-Range": content_range}, content[start:], path)

        def _send(self, status: int, headers: dict[str, str], body: bytes, path: str | None = None) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                with suppress(ConnectionError):  # the client was killed
                    self._send_body(path, body)

        def _send_body(self, path: str | None, body: bytes) -> None:
            if path is None:
                self.wfile.write(body)
                return
            if path in hub.damaged:
                body = bytes([body[0] ^ 1]) + body[1:]
            hold, cut = hub.holds.get(path), hub.cuts.pop(path, None)
            served = hub.bytes_served
            for start in range(0, len(body), CHUNK):
                if cut is not None and start >= cut:
                    self.close_connection = True
                    return
                if hold is not None and start >= hold.num_bytes:
                    hold.reached.set()
                    hold.resume.wait()
                chunk = body[start : start + CHUNK]
                self.wfile.write(chunk)
                served[path] += len(chunk)

        def _json(self, value: Any) -> None:
            self._send(200, {"Content-Type": "application/json"}, json.dumps(value).encode())

        def _error(self, status: int, code: str) -> None:
            self._send(status, {"X-Error-Code": code, "X-Error-Message": code}, b"")

        def _record(self, path: str | None) -> None:
            headers = {name.lower(): value for name, value in self.headers.items()}
            hub.requests.append(Request(self.command, self.path, path, headers))

        def log_message(self, *arguments: object) -> None:
            pass

    return Handler


def _is_large(path: str) -> bool:
    return path.endswith(".safetensors")


def _entry(path: str, content: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": _git_hash(content)}
    if _is_large(path):
        digest = hashlib.sha256(content).hexdigest()
        entry["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 134}
    return entry


def _git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0%b" % (len(content), content)).hexdigest()
