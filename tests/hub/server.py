"""A hub on 127.0.0.1: it serves directories as repositories, and fails where a test tells it to.

It speaks what `huggingface_hub` and `datasets` ask: the records of models and data sets, revisions,
trees, files with ETag and Range, large files from a second host as the hub's CDN does, tokens, and
the hub's refusals. Commits are hashes of what they hold, so two servers of one directory agree.

    with Hub() as hub:
        repository = hub.model("an/model", directory)
        hub.cut("model.safetensors", after=1000)
        subprocess.run(…, env=os.environ | hub.environment(tmp_path))
        hub.sent("model.safetensors")  # bytes

What a client that writes asks is answered by uploads.py.
"""

import hashlib
import http.server
import json
import re
import socket
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote, urlsplit

from hub import uploads

DATE = "2026-01-01T00:00:00.000Z"
PIECE = 1 << 16  # bytes
LARGE = (".safetensors", ".parquet", ".bin", ".gz", ".zst", ".arrow")


class Blob:
    """A file of a commit: its bytes, its git blob hash, and its SHA-256 where it is in LFS."""

    def __init__(self, name: str, content: bytes, large: bool) -> None:
        self.name, self.content, self.size = name, content, len(content)
        self.sha256 = hashlib.sha256(content).hexdigest() if large else None
        in_git = content
        if large:
            in_git = b"version https://git-lfs.github.com/spec/v1\n"
            in_git += f"oid sha256:{self.sha256}\nsize {self.size}\n".encode()
        self.pointer_size = len(in_git)
        self.oid = hashlib.sha1(b"blob %d\0" % len(in_git) + in_git).hexdigest()

    @property
    def etag(self) -> str:
        """The hash that the hub gives as the file's ETag."""
        return self.sha256 or self.oid

    def lfs(self, key: str) -> dict:
        """Return the LFS part of a record, whose hash is called ``key``; nothing for a small file."""
        if self.sha256 is None:
            return {}
        return {"lfs": {key: self.sha256, "size": self.size, "pointerSize": self.pointer_size}}


@dataclass
class Repository:
    """A model or a data set: commits, the branches and tags that name them, and who may read."""

    kind: str  # models or datasets
    name: str
    private: bool = False
    gated: bool = False
    readers: tuple[str, ...] = ()  # tokens with access
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    @property
    def commit(self) -> str:
        """The commit of the branch main."""
        return self.refs["main"]

    def push(self, directory: Path, branch: str = "main") -> str:
        """Make a commit of all files below a directory, let ``branch`` name it, and return it."""
        files = {}
        for path in sorted(directory.rglob("*")):
            if path.is_file():
                name = path.relative_to(directory).as_posix()
                files[name] = Blob(name, path.read_bytes(), path.suffix in LARGE)
        return self.add(files, branch)

    def add(self, files: dict[str, Blob], branch: str = "main") -> str:
        """Make a commit of these files, let ``branch`` name it, and return it."""
        listing = "".join(f"{blob.oid} {name}\n" for name, blob in sorted(files.items()))
        commit = hashlib.sha1(f"{self.name}\n{listing}".encode()).hexdigest()
        self.commits[commit], self.refs[branch] = files, commit
        return commit


@dataclass
class Fault:
    """What goes wrong with a file: how often still, and what is done to it."""

    times: int
    after: int | None = None  # cut the connection after so many bytes of an answer
    byte: int | None = None  # the position of a byte that is turned over
    grow: int = 0  # so many bytes more than the record says, or fewer
    delay: float = 0.0  # seconds before each piece of 64 KiB, so that a test can step in


@dataclass
class Request:
    """A request as it was answered."""

    method: str
    path: str
    range: str | None
    token: str | None
    status: int
    file: str | None = None  # the repository's file, of an answer with its content
    sent: int = 0  # bytes of content


class Hub:
    """The server, with a second host for large files; use it as a context."""

    def __init__(self, page: int = 1000) -> None:
        self.page = page  # entries of a tree in one answer
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.tokens: set[str] = set()
        self.owners: dict[str, tuple[str, ...]] = {}  # by token, below whom it writes
        self.uploaded: dict[str, bytes] = {}  # objects of LFS by their hash
        self.faults: dict[str, Fault] = {}
        self.requests: list[Request] = []
        self.lock = threading.Lock()
        self.servers = [self._serve(Answer), self._serve(Answer)]
        self.address, self.cdn = (f"http://127.0.0.1:{s.server_port}" for s in self.servers)

    def _serve(self, handler: type) -> http.server.ThreadingHTTPServer:
        bound = type("Bound", (handler,), {"hub": self})
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), bound)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return server

    def __enter__(self) -> "Hub":
        return self

    def __exit__(self, *error) -> None:
        for server in self.servers:
            server.shutdown()
            server.server_close()

    # What it serves.

    def model(self, name: str, directory: Path, **access) -> Repository:
        """Serve a directory as a model; ``private``, ``gated`` and ``readers`` say who may have it."""
        return self._add("models", name, directory, access)

    def dataset(self, name: str, directory: Path, **access) -> Repository:
        """Serve a directory as a data set, with the same options as a model."""
        return self._add("datasets", name, directory, access)

    def _add(self, kind: str, name: str, directory: Path, access: dict) -> Repository:
        repository = self.new(kind, name, **access)
        repository.push(directory)
        return repository

    def new(self, kind: str, name: str, **access) -> Repository:
        """Serve a repository with nothing in it yet; ``kind`` is models or datasets."""
        repository = Repository(kind, name, **access)
        repository.add({})
        self.repositories[kind, name] = repository
        self.tokens |= set(repository.readers)
        return repository

    def allow(self, token: str, *owners: str) -> None:
        """Let a token write below these owners, and make repositories there."""
        self.owners[token] = owners
        self.tokens.add(token)

    def environment(self, home: Path, token: str | None = None) -> dict[str, str]:
        """Return the variables with which the clients, in a process of their own, ask this hub."""
        variables = {
            "HF_ENDPOINT": self.address,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "no_proxy": "127.0.0.1",
        }
        return variables | ({"HF_TOKEN": token} if token else {})

    # What goes wrong, by the file's path in its repository.

    def cut(self, file: str, after: int, times: int = 1) -> None:
        """Cut the connection after so many bytes of the file's content, so many times."""
        self.faults[file] = Fault(times, after=after)

    def corrupt(self, file: str, byte: int = -1) -> None:
        """Turn over one byte of the file, of which the record keeps the right hash."""
        self.faults[file] = Fault(10**9, byte=byte)

    def resize(self, file: str, grow: int) -> None:
        """Send so many bytes more, or fewer, than the record says."""
        self.faults[file] = Fault(10**9, grow=grow)

    def slow(self, file: str, delay: float) -> None:
        """Wait so many seconds before each piece of 64 KiB of the file."""
        self.faults[file] = Fault(10**9, delay=delay)

    def heal(self) -> None:
        """End all faults."""
        self.faults.clear()

    # What was asked.

    def sent(self, file: str) -> int:
        """Return how many bytes of a file's content were sent, over all answers."""
        return sum(request.sent for request in self.requests if request.file == file)

    def asked(self, file: str) -> list[Request]:
        """Return the requests that were answered with content of a file."""
        return [request for request in self.requests if request.file == file]


class Refused(Exception):
    """An answer that is an error: its status, and the hub's own code and message."""

    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        self.status, self.headers = status, {}
        if code:
            self.headers["X-Error-Code"] = code
        self.headers["X-Error-Message"] = message or code


class Answer(http.server.BaseHTTPRequestHandler):
    """One connection to the hub or to its second host."""

    hub: Hub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_HEAD(self) -> None:
        self.respond()

    def do_GET(self) -> None:
        self.respond()

    def do_POST(self) -> None:
        self.respond()

    def do_PUT(self) -> None:
        self.respond()

    def log_message(self, *arguments) -> None:
        pass

    def respond(self) -> None:
        """Answer a request, and note it."""
        self.body = self.read_body()
        authorization = self.headers.get("Authorization", "")
        token = authorization.removeprefix("Bearer ") or None
        self.record = Request(self.command, self.path, self.headers.get("Range"), token, 0)
        self.hub.requests.append(self.record)
        address = urlsplit(self.path)
        self.query = parse_qs(address.query)
        parts = [unquote(part) for part in address.path.strip("/").split("/")]
        try:
            self.route(parts)
        except Refused as refused:
            text = {"error": refused.headers["X-Error-Message"]}
            self.send(refused.status, json.dumps(text).encode(), refused.headers)
        except (BrokenPipeError, ConnectionResetError):  # the client went away
            self.close_connection = True

    refused, blob = Refused, Blob  # for uploads

    def read_body(self) -> bytes:
        """Read what a client sends, of a stated length or in chunks."""
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        pieces = []
        while size := int(self.rfile.readline(), 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(pieces)

    def route(self, parts: list[str]) -> None:
        """Find what a path asks for: /api/models/…, /api/datasets/…, …/resolve/…, or the CDN's own."""
        if uploads.route(self, parts):
            return None
        if parts[0] == "cdn":
            if self.record.token:
                raise Refused(400, message="the CDN takes no Authorization header")
            return self.send_file(
                self.repository(*parts[1:4]).commits[parts[4]]["/".join(parts[5:])]
            )
        if parts[0] == "api" and len(parts) > 3 and parts[1] in ("models", "datasets"):
            repository = self.readable(*parts[1:4])
            action = parts[4] if len(parts) > 4 else "revision"
            commit = self.commit(repository, parts[5] if len(parts) > 5 else "main")
            if action == "revision":
                return self.send_json(self.info(repository, commit))
            if action == "tree":
                return self.send_tree(repository, commit, "/".join(parts[6:]))
            if action == "paths-info":
                return self.send_json(self.paths_info(repository, commit))
        if "resolve" in parts:
            kind = "datasets" if parts[0] == "datasets" else "models"
            owner, name, _, revision, *path = parts[kind == "datasets" :]
            return self.resolve(self.readable(kind, owner, name), revision, "/".join(path))
        raise Refused(404, message="Not Found")

    # Who may read what.

    def repository(self, kind: str, owner: str, name: str) -> Repository:
        try:
            return self.hub.repositories[kind, f"{owner}/{name}"]
        except KeyError:
            # As on the hub: who is not logged in is not told whether it exists.
            raise Refused(404 if self.record.token else 401, "RepoNotFound") from None

    def readable(self, kind: str, owner: str, name: str) -> Repository:
        """Return a repository whose record this client may read; files of a gated one are another matter."""
        token = self.record.token
        if token and token not in self.hub.tokens:
            raise Refused(401, message="Invalid credentials in Authorization header")
        repository = self.repository(kind, owner, name)
        if repository.private and token not in repository.readers:
            raise Refused(404 if token else 401, "RepoNotFound")
        return repository

    def commit(self, repository: Repository, revision: str) -> str:
        commit = repository.refs.get(revision, revision)
        if commit not in repository.commits:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    # Records.

    def info(self, repository: Repository, commit: str) -> dict:
        siblings = [
            {"rfilename": name}
            | ({"size": b.size, "blobId": b.oid} | b.lfs("sha256") if "blobs" in self.query else {})
            for name, b in repository.commits[commit].items()
        ]
        return {
            "_id": hashlib.sha1(repository.name.encode()).hexdigest()[:24],
            "id": repository.name,
            "author": repository.name.partition("/")[0],
            "sha": commit,
            "private": repository.private,
            "gated": "manual" if repository.gated else False,
            "disabled": False,
            "lastModified": DATE,
            "createdAt": DATE,
            "tags": [],
            "downloads": 0,
            "likes": 0,
            "siblings": siblings,
        } | ({"modelId": repository.name} if repository.kind == "models" else {})

    def entries(self, repository: Repository, commit: str) -> dict[str, dict]:
        """Return the record of each file and each directory of a commit, by path."""
        found = {}
        for path, blob in repository.commits[commit].items():
            for parent in reversed(Path(path).parents[:-1]):
                oid = hashlib.sha1(str(parent).encode()).hexdigest()
                folder = {"type": "directory", "oid": oid, "size": 0, "path": str(parent)}
                found.setdefault(str(parent), folder)
            found[path] = {"type": "file", "oid": blob.oid, "size": blob.size, "path": path}
            found[path] |= blob.lfs("oid")
        if self.query.get("expand") == ["true"] or b"expand=true" in self.body.lower():
            last = {"lastCommit": {"id": commit, "title": "a commit", "date": DATE}}
            return {path: entry | last for path, entry in found.items()}
        return found

    def paths_info(self, repository: Repository, commit: str) -> list[dict]:
        if "json" in self.headers.get("Content-Type", ""):
            paths = json.loads(self.body)["paths"]
        else:
            paths = parse_qs(self.body.decode()).get("paths", [])
        entries = self.entries(repository, commit)
        return [entries[path] for path in paths if path in entries]

    def send_tree(self, repository: Repository, commit: str, folder: str) -> None:
        """Send what lies in a folder, a page of it, with the address of the next in the header Link."""
        entries = self.entries(repository, commit)
        if folder and entries.get(folder, {}).get("type") != "directory":
            raise Refused(404, "EntryNotFound", f"{folder} does not exist on {commit}")
        prefix = f"{folder}/" if folder else ""
        listed = [entry for path, entry in entries.items() if path.startswith(prefix)]
        if self.query.get("recursive", ["false"])[0].lower() not in ("true", "1"):
            listed = [entry for entry in listed if "/" not in entry["path"][len(prefix) :]]
        size = int(self.query.get("limit", [self.hub.page])[0])
        start = int(self.query.get("cursor", [0])[0])
        headers = {}
        if start + size < len(listed):
            rest = re.sub(r"[?&]cursor=\d+", "", self.path)
            mark = "&" if "?" in rest else "?"
            next_page = f"{self.hub.address}{rest}{mark}cursor={start + size}"
            headers["Link"] = f'<{next_page}>; rel="next"'
        self.send_json(listed[start : start + size], headers)

    # Files.

    def resolve(self, repository: Repository, revision: str, path: str) -> None:
        """Send a file, or for a large one the address of the other host that has it."""
        token = self.record.token
        if repository.gated and token not in repository.readers:
            words = f"Access to {repository.kind[:-1]} {repository.name} is restricted"
            raise Refused(403 if token else 401, "GatedRepo", words)
        commit = self.commit(repository, revision)
        blob = repository.commits[commit].get(path)
        if blob is None:
            refused = Refused(404, "EntryNotFound", "Entry not found")
            refused.headers["X-Repo-Commit"] = commit
            raise refused
        if blob.sha256 is None:
            return self.send_file(blob, {"X-Repo-Commit": commit})
        parts = (repository.kind, repository.name, commit, path)
        headers = {
            "Location": f"{self.hub.cdn}/cdn/{quote('/'.join(parts))}",
            "X-Repo-Commit": commit,
            "X-Linked-Etag": f'"{blob.sha256}"',
            "X-Linked-Size": str(blob.size),
        }
        self.send(302, b"", headers)

    def send_file(self, blob: Blob, headers: dict | None = None) -> None:
        """Send a file or the range of it that is asked for, with whatever fault is set for it."""
        content, fault = self.spoilt(blob)
        headers = {"ETag": f'"{blob.etag}"', "Accept-Ranges": "bytes"} | (headers or {})
        status, start, stop = 200, 0, len(content)
        if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.record.range or ""):
            start = int(asked[1])
            stop = min(stop, int(asked[2]) + 1) if asked[2] else stop
            if start >= len(content):
                self.send(416, b"", headers | {"Content-Range": f"bytes */{len(content)}"})
                return
            status = 206
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
        if self.command != "HEAD":
            self.record.file = blob.name
        self.send(status, content[start:stop], headers, fault)

    def spoilt(self, blob: Blob) -> tuple[bytes, Fault | None]:
        """Return the content to send, and the fault that is set for the file."""
        with self.hub.lock:
            fault = self.hub.faults.get(blob.name)
            if fault is None or fault.times < 1 or self.command == "HEAD":
                return blob.content, None
            fault.times -= 1
        content = bytearray(blob.content)
        if fault.byte is not None:
            content[fault.byte] ^= 0xFF
        content = content[: fault.grow] if fault.grow < 0 else content + bytes(fault.grow)
        return bytes(content), fault

    # The wire.

    def send_json(self, value: object, headers: dict | None = None) -> None:
        headers = {"Content-Type": "application/json"} | (headers or {})
        self.send(200, json.dumps(value).encode(), headers)

    def send(self, status: int, content: bytes, headers: dict, fault: Fault | None = None) -> None:
        """Send an answer; a fault may cut it after a part, or send it slowly."""
        self.record.status = status
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        fault = fault or Fault(0)
        sent = content[: fault.after]
        for start in range(0, len(sent), PIECE):
            time.sleep(fault.delay)
            self.wfile.write(sent[start : start + PIECE])
            self.record.sent += len(sent[start : start + PIECE])
        if len(sent) < len(content):
            self.close_connection = True
            with suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)
