"""A server of one model and of data sets that speaks the Hub's protocol, and can fail in the ways that the Hub fails."""

import contextlib
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

from minitune.registry import hub
from support.hub_repositories import Repositories

REPO, COMMIT = "somebody/tiny-model", "c0ffee" + 34 * "0"
INDEX = "model.safetensors.index.json"
SHARDS = ("weights-a.safetensors", "weights-b.safetensors")
NEEDED = {
    "config.json": b"{}",
    "tokenizer.json": b'{"version": "1.0"}',
    "chat_template.jinja": b"{{ messages }}",
    "additional_chat_templates/tool_use.jinja": b"{{ tools }}",
    INDEX: json.dumps({"weight_map": {"a": SHARDS[0], "b": SHARDS[1], "c": SHARDS[0]}}).encode(),
    SHARDS[0]: bytes(range(256)) * 40,
    SHARDS[1]: bytes(3),
}
NOT_NEEDED = dict.fromkeys(
    [
        "README.md",
        "pytorch_model.bin",
        "model.gguf",
        "consolidated.safetensors",
        "original/params.json",
        "onnx/model.onnx",
        "checkpoint-9/config.json",
        "other/tool_use.jinja",
        ".gitattributes",
    ],
    b"not needed",
)


class Hub:
    """A server with one repository; `log` holds the requests, `refusal` (status, error code) is what files are answered with."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files, self.log, self.tokens = files, [], []
        self.refusal: tuple[int, str] | None = None
        self.delay_s = 0.0
        self.cut_after: int | None = None  # bytes of a weight file, behind which the connection breaks, once
        self.damaged: set[str] = set()  # files whose content is not what the repository lists
        self.hold: tuple[str, threading.Event] | None = None  # a file whose answer waits for the event
        self.asked = threading.Event()  # set when that file is asked for
        self.resumed: list[int] = []  # where answers began that were no beginning
        self.data_sets: dict[str, dict[str, bytes]] = {}  # files of each data set
        self.commit = COMMIT  # of the data sets
        self.api_status = 0  # of every answer of the API, where it is an error
        self.repositories = Repositories()  # those that take uploads
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                server.log.append(f"{self.command} {self.path}")
                server.tokens.append(self.headers.get("Authorization"))
                server.answer(self)

            def do_HEAD(self) -> None:
                self.do_GET()

            def do_POST(self) -> None:
                self.do_GET()

            def do_PUT(self) -> None:
                self.do_GET()

            def do_DELETE(self) -> None:
                self.do_GET()

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def close(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        body = body_of(request)
        path, _, query = request.path.partition("?")
        if path.startswith(("/api/datasets", "/datasets")):
            return self.answer_data(request, path, query)
        if path == "/api/models":  # a search
            asked = re.search(r"(?:search|author)=([^&]*)", query)
            found = [{"id": REPO}] if asked and asked[1] in REPO else []
            return send(request, json.dumps(found).encode())
        if self.api_status and path.startswith("/api/"):
            return refuse(request, self.api_status, "")
        answer = self.repositories.answer(request.command, unquote(path), body, request.headers)
        if answer is not None:
            return send(request, *answer)
        for pattern, handler in (
            (r"/api/models/(?P<repo>[^/]+/[^/]+)/revision/(?P<rev>[^/]+)", self.info),
            (rf"/api/models/(?P<repo>[^/]+/[^/]+)/tree/(?P<rev>{COMMIT})", self.tree),
            (rf"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<rev>{COMMIT})/(?P<name>.+)", self.file),
        ):
            if match := re.fullmatch(pattern, path):
                if match["repo"] != REPO:
                    return refuse(request, 401, "RepoNotFound")
                return handler(request, **{key: value for key, value in match.groupdict().items() if key != "repo"})
        return refuse(request, 404, "EntryNotFound")

    def answer_data(self, request: BaseHTTPRequestHandler, path: str, query: str) -> None:
        """Answer about a data set: a search, what it holds, or a file of it."""
        if path == "/api/datasets":
            asked = re.search(r"(?:search|author)=([^&]*)", query)
            return send(request, json.dumps([{"id": n} for n in self.data_sets if asked and asked[1] in n]).encode())
        if self.api_status and path.startswith("/api/"):
            return refuse(request, self.api_status, "")
        match = re.fullmatch(r"/api/datasets/([^/]+/[^/]+)/(?:revision|tree)/([^/]+)", path)
        match = match or re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if match is None:
            return refuse(request, 404, "EntryNotFound")
        if match[1] not in self.data_sets:
            return refuse(request, 401, "RepoNotFound")
        if unquote(match[2]) not in ("main", self.commit, "refs/convert/parquet"):
            return refuse(request, 404, "RevisionNotFound")
        files = self.data_sets[match[1]]
        if "/tree/" in path:
            entries = [{"type": "file", "oid": str(i), "size": len(files[n]), "path": n} for i, n in enumerate(files)]
            return send(request, json.dumps(entries).encode())
        if "/resolve/" in path:
            return self.file(request, match[2], unquote(match[3]), files)
        siblings = [{"rfilename": name, "size": len(data), "blobId": str(i)} for i, (name, data) in enumerate(files.items())]
        for sibling in siblings:
            if sibling["rfilename"].endswith(".parquet"):
                digest = hashlib.sha256(files[sibling["rfilename"]]).hexdigest()
                sibling["lfs"] = {"sha256": digest, "size": sibling["size"], "pointerSize": 130}
        return send(request, json.dumps({"id": match[1], "sha": self.commit, "siblings": siblings, "private": False}).encode())

    def info(self, request: BaseHTTPRequestHandler, rev: str) -> None:
        if rev not in ("main", COMMIT, "v1"):
            return refuse(request, 404, "RevisionNotFound")
        siblings = [{"rfilename": name, "size": len(data), "blobId": str(i)} for i, (name, data) in enumerate(self.files.items())]
        for sibling in siblings:
            if sibling["rfilename"].endswith(".safetensors"):  # which the Hub keeps in LFS
                digest = hashlib.sha256(self.files[sibling["rfilename"]]).hexdigest()
                sibling["lfs"] = {"sha256": digest, "size": sibling["size"], "pointerSize": 130}
        return send(request, json.dumps({"id": REPO, "sha": COMMIT, "siblings": siblings, "private": False}).encode())

    def tree(self, request: BaseHTTPRequestHandler, rev: str) -> None:
        entries = [{"type": "file", "oid": str(i), "size": len(self.files[n]), "path": n} for i, n in enumerate(self.files)]
        send(request, json.dumps(entries).encode())

    def file(self, request: BaseHTTPRequestHandler, rev: str, name: str, files: dict[str, bytes] | None = None) -> None:
        files = self.files if files is None else files
        if self.refusal is not None:
            return refuse(request, *self.refusal)
        if request.command == "GET":
            time.sleep(self.delay_s)
            if self.hold is not None and self.hold[0] == name:
                self.asked.set()
                self.hold[1].wait()
        headers = {
            "ETag": f'"{len(files[name])}-{name.replace("/", "-")}"',
            "X-Repo-Commit": rev,
            "Accept-Ranges": "bytes",
        }
        data, status = files[name], 200
        if name in self.damaged:
            data = bytes(byte ^ 1 for byte in data)
        if wanted := re.fullmatch(r"bytes=(\d+)-", request.headers.get("Range") or ""):
            first = int(wanted[1])
            self.resumed += [first] if request.command == "GET" else []
            headers["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
            data, status = data[first:], 206
        if self.cut_after is not None and request.command == "GET" and len(data) > self.cut_after:
            n, self.cut_after = self.cut_after, None
            send(request, data, headers, status, n)
            request.close_connection = True
            return None
        return send(request, data, headers, status)

    def fetched(self) -> list[str]:
        """The files that were asked for, each as often as it was."""
        return sorted(re.split("/resolve/[^/]+/", line)[1] for line in self.log if line.startswith("GET") and "/resolve/" in line)


def body_of(request: BaseHTTPRequestHandler) -> bytes:
    """Body of a request, in one piece or in chunks."""
    if request.headers.get("Transfer-Encoding") != "chunked":
        return request.rfile.read(int(request.headers.get("Content-Length") or 0))
    body = b""
    while size := int(request.rfile.readline(), 16):
        body += request.rfile.read(size)
        request.rfile.readline()
    request.rfile.readline()
    return body


def send(
    request: BaseHTTPRequestHandler,
    body: bytes,
    headers: dict[str, str] | None = None,
    status: int = 200,
    n: int | None = None,
) -> None:
    """Answer with a body; n: so many bytes of it, where the connection is to break."""
    request.send_response(status)
    for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
        request.send_header(key, value)
    # a client that was killed or broke off takes no answer
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(body[:n])


def refuse(request: BaseHTTPRequestHandler, status: int, code: str) -> None:
    send(request, b"", {"X-Error-Code": code, "X-Error-Message": code}, status)


def fetch(folder: Path, repo: str = REPO, revision: str = "main") -> tuple[dict[str, int], str]:
    return hub.fetch(repo, revision, folder, lambda text: None)


def contents(folder: Path) -> dict[str, bytes]:
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if not name.startswith(".cache/")}


def command(server: Hub, *words: str, **env: str) -> subprocess.Popen[str]:
    """The command line in a process of its own, since huggingface_hub reads HF_ENDPOINT when it is imported."""
    environ = {
        **os.environ,
        "HF_ENDPOINT": server.url,
        "HF_HUB_OFFLINE": "0",
        "PYTHONPATH": str(Path(hub.__file__).parents[2]),
        **env,
    }
    words = (sys.executable, "-m", "minitune", "download", *words)
    return subprocess.Popen(words, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
