"""A stand-in for the Hugging Face Hub on loopback: repositories, commits, large files."""

import hashlib
import json
import threading
from base64 import b64decode
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import unquote


class Hub:
    """Serves the routes that huggingface_hub uses to push and to download.

    Attributes:
        repositories: name → its commits, each a mapping of files; the last is `main`. A data set's
            name is `datasets/OWNER/NAME`.
        served: files that were downloaded, in turn.
        refuse: paths whose requests fail, as of a network that goes.
        gated: names of repositories that may not be read.
        gone: commits that a rewritten history lacks.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, list[dict[str, bytes]]] = {}
        self.large: dict[str, bytes] = {}
        self.served: list[str] = []
        self.refuse: set[str] = set()
        self.gated: set[str] = set()
        self.gone: set[str] = set()
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


def is_large(file: str) -> bool:
    """Whether a file is one of Git LFS."""
    return file.endswith((".safetensors", ".bin", ".parquet"))


def id_of(file: str, content: bytes) -> str:
    """What the Hub calls a file's content: its SHA-256, or its id in Git."""
    if is_large(file):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _sibling(file: str, content: bytes) -> dict[str, Any]:
    """A file in what is said of a repository."""
    own = {"rfilename": file, "size": len(content), "blobId": id_of("", content)}
    large = {"sha256": id_of(file, content), "size": len(content), "pointerSize": 130}
    return {**own, "lfs": large} if is_large(file) else own


def _tree(files: dict[str, bytes]) -> list[dict[str, Any]]:
    """A repository's files and folders."""
    folders = {str(above) for file in files for above in PurePosixPath(file).parents} - {"."}
    made = [{"type": "directory", "path": each, "oid": "0" * 40, "size": 0} for each in folders]
    return sorted([*made, *(_entry(*each) for each in files.items())], key=lambda e: e["path"])


def _entry(file: str, content: bytes) -> dict[str, Any]:
    own = {"type": "file", "path": file, "size": len(content), "oid": id_of("", content)}
    large = {"oid": id_of(file, content), "size": len(content), "pointerSize": 130}
    return {**own, "lfs": large} if is_large(file) else own


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

    def _missing(self, code: str, status: int = 404) -> None:
        self._send({"error": code}, status, X_Error_Code=code)

    def _named(self, parts: list[str]) -> tuple[str, list[str]]:
        """The repository that a path begins with, of one part or, with its owner, two; the rest."""
        count = (
            3 if parts[:1] == ["datasets"] else 2 - ("".join(parts[:1]) in self.own.repositories)
        )
        return "/".join(parts[:count]), parts[count:]

    def _commit_at(self, name: str, revision: str) -> int | None:
        """Which of a repository's commits is meant, from 1; None, and the answer is sent."""
        if name not in self.own.repositories:
            return self._missing("RepoNotFound")
        commits = [commit_of(place) for place in range(len(self.own.repositories[name]) + 1)]
        commit = commits[-1] if revision == "main" else revision
        if commit not in commits or commit in self.own.gone:
            return self._missing("RevisionNotFound")
        return commits.index(commit)

    def _api(self, name: str, what: str, revision: str, inside: str) -> None:
        place = self._commit_at(name, revision)
        if place is None:
            return None
        gated = name in self.own.gated
        if what == "auth-check":
            return self._missing("GatedRepo", 403) if gated else self._send({})
        commits = self.own.repositories[name]
        files = commits[place - 1] if place else {}
        if what == "paths-info":
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["paths"]
            return self._send([each for each in _tree(files) if each["path"] in asked])
        if what == "tree":
            every = "recursive=true" in self.path.lower()
            found = [
                e for e in _tree(files) if e["path"].startswith(f"{inside}/" if inside else "")
            ]
            left = len(inside) + 1 if inside else 0
            return self._send([e for e in found if every or "/" not in e["path"][left:]])
        siblings = [_sibling(file, content) for file, content in files.items()]
        said = {"_id": name, "id": name.removeprefix("datasets/"), "sha": commit_of(place)}
        return self._send({**said, "siblings": siblings, "gated": "manual" if gated else False})

    def do_GET(self) -> None:
        parts = self.path.partition("?")[0].strip("/").split("/")
        if parts[0] == "api":
            name, asked = self._named(parts[1:] if parts[1] == "datasets" else parts[2:])
            what, revision = (*asked[:2], *("", "main")[len(asked[:2]) :])
            return self._api(name, what, revision, unquote("/".join(asked[2:])))
        name, asked = self._named(parts)
        if asked[:1] != ["resolve"]:
            return self._missing("EntryNotFound")
        place = self._commit_at(name, asked[1])
        if place is None:
            return None
        if name in self.own.gated:
            return self._missing("GatedRepo", 403)
        file = unquote("/".join(asked[2:]))
        content = self.own.repositories[name][place - 1].get(file)
        if content is None:
            return self._missing("EntryNotFound")
        if self.command == "GET":
            self.own.served.append(file)
        etag = f'"{id_of(file, content)}"'
        return self._send(content, ETag=etag, X_Repo_Commit=commit_of(place))

    do_HEAD = do_GET

    def do_POST(self) -> None:
        if "/paths-info/" in self.path:
            return self.do_GET()
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
