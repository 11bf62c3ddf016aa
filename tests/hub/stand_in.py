"""A local stand-in for the Hugging Face Hub: the part of its HTTP API that is used here.

It keeps repositories in memory, one commit after the other, and answers what `huggingface_hub`
asks: create, validate, preupload, LFS batch and upload, commit, model info, tree, resolve. What it
does not know it refuses and remembers in `unknown`, so that a test can see it.
"""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKEN = "hf_standin"


@dataclass
class Repo:
    private: bool = False
    commits: list[tuple[str, dict[str, bytes]]] = field(default_factory=list)

    def commit(self, files: dict[str, bytes]) -> str:
        text = repr((len(self.commits), sorted(files.items())))
        self.commits.append((hashlib.sha1(text.encode()).hexdigest(), files))
        return self.commits[-1][0]

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        if revision == "main":
            return self.commits[-1]
        return next((commit for commit in self.commits if commit[0] == revision), None)


@dataclass
class Hub:
    """What the server holds; `url` is its HF_ENDPOINT."""

    url: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)

    def put(self, name: str, files: dict[str, bytes]) -> str:
        """Makes a repository as if it had been pushed; its commit."""
        return self.repos.setdefault(name, Repo()).commit(files)

    def files(self, name: str) -> dict[str, bytes]:
        return self.repos[name].commits[-1][1]


def oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


def entry(path: str, content: bytes) -> dict:
    record = {"type": "file", "path": path, "size": len(content), "oid": oid(content)}
    if path.endswith(".safetensors"):
        digest = hashlib.sha256(content).hexdigest()
        record["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 130}
    return record


@contextmanager
def running_hub():
    hub = Hub()
    handler = type("Bound", (Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_GET(self):
        self.route(
            (r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", self.info),
            (r"/api/models/([^/]+/[^/]+)/tree/([^/]+)(?:/(.+))?", self.tree),
            (r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.resolve),
        )

    do_HEAD = do_GET

    def do_POST(self):
        self.route(
            (r"/api/repos/create", self.create),
            (r"/api/validate-yaml", self.validate),
            (r"/api/models/([^/]+/[^/]+)/preupload/([^/]+)", self.preupload),
            (r"/api/models/([^/]+/[^/]+)/commit/([^/]+)", self.commit),
            (r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", self.batch),
            (r"/lfs/verify", self.verify),
        )

    def do_PUT(self):
        self.route((r"/lfs/([0-9a-f]{64})", self.upload))

    def route(self, *routes):
        # A body that is not read would be taken for the next request on this connection.
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        self.query = parse_qs(urlsplit(self.path).query)
        for pattern, answer in routes:
            if match := re.fullmatch(pattern, path):
                return answer(*match.groups())
        self.hub.unknown.append(f"{self.command} {self.path}")
        return self.error(404, "NoSuchRoute")

    # Reading

    def found(self, name, revision="main"):
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and not self.may_write()):
            return self.error(401, "RepoNotFound")
        commit = repo.at(revision) if repo.commits else ("0" * 40, {})
        return commit or self.error(404, "RevisionNotFound")

    def info(self, name, revision):
        if commit := self.found(name, revision or "main"):
            sha, files = commit
            record = {"id": name, "sha": sha, "private": self.hub.repos[name].private}
            record["siblings"] = [{"rfilename": path} for path in files]
            card = files.get("README.md", b"---\n{}\n---\n").decode()
            self.json(record | {"cardData": yaml.safe_load(card.split("---\n")[1])})

    def tree(self, name, revision, folder):
        if commit := self.found(name, revision):
            inside = {p: c for p, c in commit[1].items() if not folder or p.startswith(folder)}
            if folder and not inside:
                return self.error(404, "EntryNotFound")
            self.json([entry(path, content) for path, content in inside.items()])
        return None

    def resolve(self, name, revision, path):
        if commit := self.found(name, revision):
            sha, files = commit
            if path not in files:
                return self.error(404, "EntryNotFound", {"X-Repo-Commit": sha})
            headers = {"X-Repo-Commit": sha, "ETag": f'"{oid(files[path])}"'}
            self.reply(200, files[path], "application/octet-stream", headers)
        return None

    # Writing

    def may_write(self):
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def create(self):
        if not self.may_write():
            return self.error(401, "Unauthorized")
        asked = json.loads(self.body)
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.hub.repos:
            return self.json({"url": f"{self.hub.url}/{name}"}, 409)
        self.hub.repos[name] = Repo(asked.get("visibility") == "private" or asked.get("private"))
        return self.json({"url": f"{self.hub.url}/{name}"})

    def validate(self):
        asked = json.loads(self.body)
        head = yaml.safe_load(asked["content"].split("---\n")[1])
        missing = [key for key in ("license", "base_model") if key not in head]
        errors = [{"message": f"{key} is missing"} for key in missing]
        self.json({"errors": errors, "warnings": []}, 400 if errors else 200)

    def preupload(self, name, revision):
        def mode(path):
            return "lfs" if path.endswith(".safetensors") else "regular"

        paths = [file["path"] for file in json.loads(self.body)["files"]]
        told = [{"path": p, "uploadMode": mode(p), "shouldIgnore": False} for p in paths]
        self.json({"files": told})

    def batch(self, name):
        objects = []
        for asked in json.loads(self.body)["objects"]:
            actions = {
                "upload": {"href": f"{self.hub.url}/lfs/{asked['oid']}", "header": {}},
                "verify": {"href": f"{self.hub.url}/lfs/verify", "header": {}},
            }
            objects.append({**asked, "actions": actions})
        self.json({"transfer": "basic", "objects": objects})

    def upload(self, digest):
        if hashlib.sha256(self.body).hexdigest() != digest:
            return self.error(400, "WrongHash")
        self.hub.objects[digest] = self.body
        return self.reply(200)

    def verify(self):
        asked = json.loads(self.body)
        known = self.hub.objects.get(asked["oid"], b"")
        self.reply(200 if len(known) == asked["size"] else 400)

    def commit(self, name, revision):
        if not self.may_write():
            return self.error(403, "Forbidden")
        repo = self.hub.repos[name]
        files = dict(repo.commits[-1][1]) if repo.commits else {}
        for line in self.body.decode().splitlines():
            record = json.loads(line)
            value = record["value"]
            if record["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif record["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif record["key"] == "deletedFile":
                del files[value["path"]]
            elif record["key"] != "header":
                return self.error(400, f"UnknownKey {record['key']}")
        sha = repo.commit(files)
        return self.json({"commitUrl": f"{self.hub.url}/{name}", "commitOid": sha})

    # Replies

    def json(self, value, status=200):
        self.reply(status, json.dumps(value).encode(), "application/json")

    def error(self, status, code, headers=None):
        told = {"X-Error-Code": code, "X-Error-Message": code} | (headers or {})
        self.reply(status, json.dumps({"error": code}).encode(), "application/json", told)

    def reply(self, status, body=b"", kind="text/plain", headers=None):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *arguments):
        """Nothing on standard error."""
