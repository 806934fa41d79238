"""A stand-in for the Hugging Face Hub on loopback: repositories, commits, large files."""

import hashlib
import json
import threading
from base64 import b64decode
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Hub:
    """Serves the routes that huggingface_hub uses to push and to download.

    Attributes:
        repositories: name → its commits, each a mapping of files; the last is `main`.
        served: files that were downloaded, in turn.
        refuse: paths whose requests fail, as of a network that goes.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, list[dict[str, bytes]]] = {}
        self.large: dict[str, bytes] = {}
        self.served: list[str] = []
        self.refuse: set[str] = set()
        hub = self

        class Handler(_Handler):
            own = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def commit_of(place: int) -> str:
    """The name of a repository's so-manieth commit."""
    return f"{place:040x}"


def _sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    own: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def _send(self, content: Any, status: int = 200, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _missing(self, code: str) -> None:
        self._send({"error": code}, 404, X_Error_Code=code)

    def do_GET(self) -> None:
        parts = self.path.partition("?")[0].strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            name = "/".join(parts[2:4])
            if name not in self.own.repositories:
                return self._missing("RepoNotFound")
            commits = self.own.repositories[name]
            if parts[4:5] == ["tree"]:
                tree = [
                    {"type": "file", "path": file, "size": len(content), "oid": _sha(content)}
                    for file, content in commits[-1].items()
                ]
                return self._send(tree)
            files = [{"rfilename": file} for file in commits[-1]] if commits else []
            said = {"_id": name, "id": name, "sha": commit_of(len(commits)), "siblings": files}
            return self._send(said)
        if parts[2:3] != ["resolve"]:
            return self._missing("EntryNotFound")
        name, revision, file = "/".join(parts[:2]), parts[3], "/".join(parts[4:])
        if name not in self.own.repositories:
            return self._missing("RepoNotFound")
        commits = self.own.repositories[name]
        place = len(commits) if revision == "main" else int(revision, 16)
        content = commits[place - 1].get(file)
        if content is None:
            return self._missing("EntryNotFound")
        if self.command == "GET":
            self.own.served.append(file)
        return self._send(content, ETag=f'"{_sha(content)}"', X_Repo_Commit=commit_of(place))

    do_HEAD = do_GET

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        path = self.path.partition("?")[0]
        if any(each in path for each in self.own.refuse):
            return self._send({"error": "gone"}, 400)
        if path == "/api/repos/create":
            said = json.loads(body)
            name = f"{said['organization']}/{said['name']}"
            known = name in self.own.repositories
            self.own.repositories.setdefault(name, [])
            return self._send({"url": f"{self.own.url}/{name}"}, 409 if known else 200)
        if "/preupload/" in path:
            files = [
                {
                    "path": each["path"],
                    "uploadMode": "lfs" if each["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for each in json.loads(body)["files"]
            ]
            return self._send({"files": files})
        if path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**each, "actions": {"upload": {"href": f"{self.own.url}/large/{each['oid']}"}}}
                for each in json.loads(body)["objects"]
            ]
            return self._send({"transfer": "basic", "objects": objects})
        if "/commit/" in path:
            return self._commit("/".join(path.split("/")[3:5]), body)
        return self._send({"errors": [], "warnings": []})

    def do_PUT(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        if any(each in self.path for each in self.own.refuse):
            return self._send({"error": "gone"}, 400)
        self.own.large[self.path.rpartition("/")[2]] = content
        return self._send(b"")

    def _commit(self, name: str, body: bytes) -> None:
        commits = self.own.repositories[name]
        files = dict(commits[-1]) if commits else {}
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header" and value.get("parentCommit") != commit_of(len(commits)):
                return self._send({"error": "changed meanwhile"}, 412)
            if line["key"] == "file":
                files[value["path"]] = b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.own.large[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        commits.append(files)
        sha = commit_of(len(commits))
        url = f"{self.own.url}/{name}/commit/{sha}"
        return self._send({"success": True, "commitOid": sha, "commitUrl": url})
