"""A small Hugging Face Hub on loopback: repositories with real commits, both ways of uploading, and faults on demand.

What it answers follows the calls that huggingface_hub makes. Content is kept by its hash and checked against it; an
upload whose bytes are not what its hash says is refused, as the Hub refuses it.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

Files = dict[str, tuple[str, bool]]  # path -> (sha256 of the content, whether it is an LFS object)
LICENSES = {"apache-2.0", "mit", "other", "llama3", "gemma", "cc-by-4.0"}


@dataclass
class Repo:
    """One repository: each commit is the whole list of files at that time."""

    private: bool
    gated: bool = False
    commits: dict[str, Files] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: Files) -> str:
        facts = json.dumps([self.branches.get(branch), len(self.commits), sorted(files.items())])
        oid = hashlib.sha1(facts.encode()).hexdigest()
        self.commits[oid] = files
        self.branches[branch] = oid
        return oid

    def at(self, revision: str) -> tuple[str, Files] | None:
        oid = self.branches.get(revision, revision)
        return (oid, self.commits[oid]) if oid in self.commits else None


@dataclass
class Fault:
    """What goes wrong with requests whose "METHOD path" matches, the first `times` of them.

    status: answered instead of serving. kind: "drop" closes the connection unserved, "lose" serves the request and
    closes before answering, "damage" changes a byte of what arrives.
    """

    request: str
    status: int = 500
    kind: str = "status"
    times: int = 1_000_000
    headers: dict[str, str] = field(default_factory=dict)


class Hub(ThreadingHTTPServer):
    """Start with `running`. `accounts`: token -> user. lfs: whether *.safetensors are sent as LFS objects."""

    daemon_threads = True

    def __init__(self, accounts: dict[str, str], lfs: bool = True) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.accounts, self.lfs = accounts, lfs
        self.repos: dict[str, Repo] = {}
        self.contents: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.bodies: list[bytes] = []
        self.lock = threading.RLock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    @contextmanager
    def running(self) -> Iterator["Hub"]:
        thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self.shutdown()
            self.server_close()

    def store(self, content: bytes) -> str:
        oid = hashlib.sha256(content).hexdigest()
        self.contents[oid] = content
        return oid

    def add_repo(self, name: str, folder: Path, private: bool = False) -> str:
        """A repository with the files of a folder; returns its commit."""
        repo = self.repos[name] = Repo(private)
        files = {
            file.name: (self.store(file.read_bytes()), file.suffix == ".safetensors")
            for file in folder.iterdir()
            if file.is_file()
        }
        return repo.commit("main", files)

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        """What a repository holds."""
        found = self.repos[name].at(revision)
        assert found is not None
        return {path: self.contents[oid] for path, (oid, _) in found[1].items()}

    def count(self, pattern: str) -> int:
        """How many requests matched."""
        return sum(bool(re.search(pattern, request)) for request in self.requests)

    def forget(self) -> None:
        """Empties the lists of faults and requests."""
        self.faults, self.requests = [], []


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def problems_of_card(text: str) -> list[str]:
    """What the Hub would say of a card's metadata."""
    front = re.match(r"---\s*\n(.*?)\n---", text, flags=re.DOTALL)
    metadata = yaml.safe_load(front[1]) if front else {}
    found = []
    base = metadata.get("base_model")
    if base is not None and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(base)):
        found.append(f'"base_model" with value "{base}" is not valid. Use a model id from https://hf.co/models.')
    if "license" in metadata and metadata["license"] not in LICENSES:
        found.append('"license" must be one of the known identifiers')
    for result in [entry for model in metadata.get("model-index", []) for entry in model["results"]]:
        for part, keys in {"task": ["type"], "dataset": ["type", "name"]}.items():
            found += [f"model-index: {part}.{key} is required" for key in keys if key not in result.get(part, {})]
        for metric in result.get("metrics", [{}]):
            if "type" not in metric or not isinstance(metric.get("value"), int | float | str):
                found.append("model-index: a metric needs type and value")
    for key in ("pipeline_tag", "library_name"):
        if not isinstance(metadata.get(key, ""), str):
            found.append(f'"{key}" must be a string')
    return found


class Handler(BaseHTTPRequestHandler):
    """One request: read whole, matched with the faults, then served."""

    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *args: Any) -> None:
        """The server keeps its own list."""

    def do_GET(self) -> None:
        self.path, self.query = urlsplit(self.path).path, parse_qs(urlsplit(self.path).query)
        self.body = self._read_body()
        call = f"{self.command} {self.path}"
        with self.server.lock:
            self.server.requests.append(call)
            self.server.bodies.append(self.body)
            fault = next((f for f in self.server.faults if f.times > 0 and re.search(f.request, call)), None)
            if fault is not None:
                fault.times -= 1
        kind = fault.kind if fault else ""
        if kind == "status":
            self._answer({"error": "injected"}, fault.status, fault.headers)
        elif kind == "drop":
            self.close_connection = True
        else:
            if kind == "damage":
                self.body = bytes([self.body[0] ^ 1]) + self.body[1:]
            self.silent = kind == "lose"
            with self.server.lock:
                self._serve()
            self.close_connection = self.close_connection or self.silent

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET
    silent = False

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "") == "chunked":
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _answer(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        if self.silent:
            return
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        given = {"Content-Type": "application/json", "Content-Length": str(len(body))} | (headers or {})
        for name, value in given.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _refuse(self, status: int, code: str = "", message: str = "", commit: str = "") -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": message or code, "X-Repo-Commit": commit}
        self._answer({"error": message or code}, status, {name: value for name, value in headers.items() if value})

    @property
    def user(self) -> str | None:
        return self.server.accounts.get(self.headers.get("Authorization", "").removeprefix("Bearer "))

    def _serve(self) -> None:
        name = r"(?P<name>[\w.-]+/[\w.-]+)"
        routes = {
            r"POST /api/repos/create": self._create,
            r"POST /api/validate-yaml": self._validate,
            rf"POST /api/models/{name}/preupload/(?P<branch>[^/]+)": self._preupload,
            rf"POST /api/models/{name}/commit/(?P<branch>[^/]+)": self._commit,
            rf"POST /api/models/{name}/branch/(?P<branch>[^/]+)": self._branch,
            rf"POST /{name}\.git/info/lfs/objects/batch": self._batch,
            r"PUT /lfs/(?P<oid>[0-9a-f]{64})": self._put,
            r"POST /lfs/verify": self._verify,
            rf"GET /api/models/{name}/tree/(?P<revision>[^/]+)(/(?P<under>.+))?": self._tree,
            rf"GET /api/models/{name}(/revision/(?P<revision>[^/]+))?": self._info,
            rf"(GET|HEAD) /{name}/resolve/(?P<revision>[^/]+)/(?P<file>.+)": self._resolve,
        }
        for pattern, serve in routes.items():
            if match := re.fullmatch(pattern, f"{self.command} {self.path}"):
                found = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
                serve(**found)
                return
        self._refuse(404, "", f"no such endpoint: {self.path}")

    # --- writing ----------------------------------------------------------------------------------------------------

    def _may_write(self, name: str) -> bool:
        if self.user is None:
            self._refuse(401, "", "Invalid username or password.")
        elif name.split("/")[0] != self.user:
            self._refuse(403, "", "You don't have the rights to write here")
        elif name not in self.server.repos:
            self._refuse(404, "RepoNotFound", "Repository not found")
        else:
            return True
        return False

    def _create(self) -> None:
        asked = json.loads(self.body)
        name = f"{asked['organization'] or self.user}/{asked['name']}"
        if self.user is None or not name.startswith(f"{self.user}/"):
            self._refuse(401 if self.user is None else 403, "", "not yours")
        elif name in self.server.repos:
            self._answer({"error": "exists", "url": f"{self.server.url}/{name}"}, 409)
        else:
            repo = self.server.repos[name] = Repo(
                asked.get("visibility", "public") == "private" or bool(asked.get("private"))
            )
            repo.commit("main", {})
            self._answer({"url": f"{self.server.url}/{name}", "id": name})

    def _validate(self) -> None:
        found = problems_of_card(json.loads(self.body)["content"])
        errors = [{"message": problem} for problem in found]
        self._answer({"errors": errors, "warnings": []}, 400 if errors else 200)

    def _preupload(self, name: str, branch: str) -> None:
        if not self._may_write(name):
            return
        found = self.server.repos[name].at(branch)
        if found is None:
            self._refuse(404, "RevisionNotFound", "no such branch")
            return
        answers = []
        for file in json.loads(self.body)["files"]:
            lfs = self.server.lfs and file["path"].endswith(".safetensors")
            oid, was_lfs = found[1].get(file["path"], ("", False))
            known = (oid if was_lfs else git_oid(self.server.contents[oid])) if oid else None
            mode = "lfs" if lfs else "regular"
            answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": known})
        self._answer({"files": answers})

    def _batch(self, name: str) -> None:
        if not self._may_write(name):
            return
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            entry = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.server.contents:
                links = {"upload": f"/lfs/{wanted['oid']}", "verify": "/lfs/verify"}
                entry["actions"] = {key: {"href": self.server.url + link} for key, link in links.items()}
            objects.append(entry)
        self._answer({"transfer": "basic", "objects": objects})

    def _put(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() == oid:
            self.server.store(self.body)
        self._answer({})  # as an object store does; the Hub looks when it is asked to verify

    def _verify(self) -> None:
        asked = json.loads(self.body)
        content = self.server.contents.get(asked["oid"])
        if content is None or len(content) != asked["size"]:
            self._refuse(422, "", "the object's content does not have its sha256")
        else:
            self._answer({})

    def _commit(self, name: str, branch: str) -> None:
        if not self._may_write(name):
            return
        repo = self.server.repos[name]
        found = repo.at(branch)
        assert found is not None
        files = dict(found[1])
        for line in self.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = self.server.store(base64.b64decode(value["content"])), False
            elif entry["key"] == "lfsFile":
                if value["oid"] not in self.server.contents:
                    self._refuse(400, "", f"LFS object of {value['path']} was never uploaded")
                    return
                files[value["path"]] = value["oid"], True
        oid = repo.commit(branch, files)
        self._answer({"commitUrl": f"{self.server.url}/{name}/commit/{oid}", "commitOid": oid})

    def _branch(self, name: str, branch: str) -> None:
        if not self._may_write(name):
            return
        repo = self.server.repos[name]
        if branch in repo.branches:
            self._refuse(409, "", "branch exists")
            return
        repo.branches[branch] = repo.branches["main"]
        self._answer({})

    # --- reading ----------------------------------------------------------------------------------------------------

    def _found(self, name: str, revision: str) -> tuple[str, Files] | None:
        repo = self.server.repos.get(name)
        if repo is None or (repo.private and self.user != name.split("/")[0]):
            self._refuse(404 if self.user else 401, "RepoNotFound", "Repository not found")
        elif repo.gated:
            self._refuse(403, "GatedRepo", "Access to this model is restricted")
        elif (found := repo.at(revision)) is None:
            self._refuse(404, "RevisionNotFound", "no such revision")
        else:
            return found
        return None

    def _info(self, name: str, revision: str = "main") -> None:
        if found := self._found(name, revision):
            siblings = [
                {"rfilename": path, "blobId": oid, "size": (size := len(self.server.contents[oid]))}
                | ({"lfs": {"sha256": oid, "size": size, "pointerSize": 130}} if lfs else {})
                for path, (oid, lfs) in sorted(found[1].items())
            ]
            facts = {"id": name, "modelId": name, "sha": found[0], "siblings": siblings}
            self._answer(facts | {"private": self.server.repos[name].private, "tags": []})

    def _tree(self, name: str, revision: str, under: str = "") -> None:
        if found := self._found(name, revision):
            inside = {path: oid for path, (oid, _) in found[1].items() if path.startswith(under)}
            if under and not inside:
                self._refuse(404, "EntryNotFound", "no such folder")
                return
            sizes = {path: len(self.server.contents[oid]) for path, oid in inside.items()}
            self._answer([{"type": "file", "path": p, "oid": oid, "size": sizes[p]} for p, oid in inside.items()])

    def _resolve(self, name: str, revision: str, file: str) -> None:
        if found := self._found(name, revision):
            oid, _ = found[1].get(file, ("", False))
            if not oid:
                self._refuse(404, "EntryNotFound", "no such file", found[0])
                return
            self._answer(self.server.contents[oid], 200, {"ETag": f'"{oid}"', "X-Repo-Commit": found[0]})
