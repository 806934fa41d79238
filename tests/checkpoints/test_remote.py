"""Files anywhere that fsspec reaches; here in its own memory, over the same calls as s3 or hf."""

import io
import json
import os
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from checks import check_same, contents
from safetensors.torch import load_file, save_file
from tiny_net import TASKS, Files

from fusionkit import EMR, Bundle, Checkpoint, Dense, MagnitudePrune, add_tasks
from fusionkit.bundles.compress import compress
from fusionkit.checkpoints import safetensors_file
from fusionkit.checkpoints.checkpoint import find_checkpoints
from fusionkit.checkpoints.paths import open_path
from fusionkit.errors import BundleError, CheckpointError, FusionKitError
from fusionkit.reuse.module import ReuseModule

PRIVATE = ["head.*"]


@pytest.fixture
def store(files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A file system that holds the family: the base in two shards, tasks in folders."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    system = fsspec.filesystem("memory")
    state = load_file(files.base)
    weight_map = {name: f"shard{place % 2}.safetensors" for place, name in enumerate(state)}
    for shard in set(weight_map.values()):
        save_file({n: t for n, t in state.items() if weight_map[n] == shard}, tmp_path / shard)
        system.put(str(tmp_path / shard), f"/zoo/base/{shard}")
    index = {"metadata": {}, "weight_map": weight_map}
    system.pipe("/zoo/base/model.safetensors.index.json", json.dumps(index).encode())
    for task, path in files.finetuned.items():
        system.put(str(path), f"/zoo/tasks/{task}/model.safetensors")
    yield system
    system.rm("/", recursive=True)


def test_a_checkpoint_is_read_in_place(store: Any, files: Files) -> None:
    check_same(dict(Checkpoint.of("memory://zoo/base")), dict(Checkpoint.of(files.base)))
    there = Checkpoint.of("memory://zoo/tasks/ant/model.safetensors")
    check_same(dict(there), dict(Checkpoint.of(files.finetuned["ant"])))
    store.pipe("/zoo/base.pt", _saved(load_file(files.base)))
    check_same(dict(Checkpoint.of("memory://zoo/base.pt")), dict(Checkpoint.of(files.base)))


def _saved(state: dict[str, torch.Tensor]) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def test_only_what_is_asked_for_is_fetched(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[int] = []
    read = safetensors_file._RemoteFile.read_into

    def count(self: Any, memory: memoryview, start: int) -> None:
        fetched.append(memory.nbytes)
        read(self, memory, start)

    monkeypatch.setattr(safetensors_file._RemoteFile, "read_into", count)
    checkpoint = safetensors_file.SafetensorsFile(
        open_path("memory://zoo/tasks/bee/model.safetensors"), "bee"
    )
    assert sum(fetched) == min(checkpoint._starts.values())  # the header
    fetched.clear()
    tensor = checkpoint["hidden.weight"]
    assert sum(fetched) == tensor.nbytes


def test_a_pattern_finds_the_tasks(store: Any) -> None:
    found = find_checkpoints("memory://zoo/tasks/*/model.safetensors")
    assert list(found) == sorted(TASKS)
    assert Checkpoint.of(found["cat"]).label == "memory://zoo/tasks/cat/model.safetensors"
    with pytest.raises(CheckpointError, match=r"memory://zoo/\*/nothing: nothing matches"):
        find_checkpoints("memory://zoo/*/nothing")


@pytest.mark.parametrize("codec", [EMR(), MagnitudePrune(0.2)], ids=repr)
def test_there_and_back(store: Any, files: Files, tmp_path: Path, codec: Any) -> None:
    """From remote checkpoints into a remote bundle: the bytes are those of the local one."""
    tuned = find_checkpoints("memory://zoo/tasks/*/model.safetensors")
    base = Checkpoint.of("memory://zoo/base")
    compress(base, tuned, codec, "memory://bundles/one", private=PRIVATE)
    local = compress(
        files.base,
        {task: files.finetuned[task] for task in sorted(TASKS)},
        codec,
        tmp_path / "one",
        private=PRIVATE,
    )
    theirs = {Path(path).name: store.cat(path) for path in store.ls("/bundles/one", detail=False)}
    ours = contents(local.path)
    assert theirs.keys() == ours.keys()
    for name in ours.keys() - {"manifest.json"}:  # which names the base's source
        assert theirs[name] == ours[name], name
    opened = Bundle("memory://bundles/one")
    for task in TASKS:
        check_same(opened.state_dict(task), local.state_dict(task))


def test_a_tasks_file_is_fetched_when_it_is_needed(store: Any, tmp_path: Path) -> None:
    tuned = find_checkpoints("memory://zoo/tasks/*/model.safetensors")
    compress("memory://zoo/base", tuned, EMR(), "memory://bundles/one", private=PRIVATE)
    bundle = Bundle("memory://bundles/one")
    cache = tmp_path / "cache" / "fusionkit" / "remote"
    assert not cache.exists()
    bundle.delta("ant", "hidden.weight")
    assert sorted(path.name.partition("-")[2] for path in cache.iterdir()) == [
        "shared.safetensors",
        "task-ant.safetensors",
    ]


def test_a_module_reuses_a_remote_bundle(store: Any, base: Any) -> None:
    tuned = find_checkpoints("memory://zoo/tasks/*/model.safetensors")
    bundle = compress("memory://zoo/base", tuned, EMR(), "memory://bundles/m", private=PRIVATE)
    module = ReuseModule(base, "memory://bundles/m")
    module.switch("ant")
    check_same({"w": module.model.hidden.weight}, {"w": bundle.state_dict("ant")["hidden.weight"]})


def test_what_can_not_be_done_there_is_said(store: Any, tmp_path: Path) -> None:
    tuned = find_checkpoints("memory://zoo/tasks/*/model.safetensors")
    last = {"cat": tuned.pop("cat")}
    bundle = compress("memory://zoo/base", tuned, EMR(), "memory://bundles/one", private=PRIVATE)
    for change in (lambda: bundle.remove("ant"), lambda: add_tasks(bundle, last)):
        with pytest.raises(BundleError, match=r"memory://bundles/one: can only be read where"):
            change()
    with pytest.raises(BundleError, match=r"memory://bundles/one: exists"):
        compress("memory://zoo/base", tuned, EMR(), "memory://bundles/one", private=PRIVATE)
    bundle.save(tmp_path / "local")
    Bundle(tmp_path / "local").remove("ant")
    with pytest.raises(CheckpointError, match=r"memory://zoo/nowhere.safetensors: no such file"):
        Checkpoint.of("memory://zoo/nowhere.safetensors")
    with pytest.raises(BundleError, match=r"memory://zoo: not a bundle"):
        Bundle("memory://zoo")
    with pytest.raises(FusionKitError, match="nonsense"):
        Checkpoint.of("nonsense://zoo/model.safetensors")


def test_a_file_cut_short_is_refused(store: Any) -> None:
    whole = store.cat("/zoo/tasks/ant/model.safetensors")
    for cut in (whole[:-4], whole[:50], whole[:3], b"<html>"):
        store.pipe("/zoo/cut.safetensors", cut)
        with pytest.raises(CheckpointError, match=r"cut\.safetensors: not a whole safetensors"):
            Checkpoint.of("memory://zoo/cut.safetensors")


class Leaving(BaseHTTPRequestHandler):
    """Serves a file for some requests, and then is gone in one way or another."""

    content = b""
    left = 0
    way = ""

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        cls = type(self)
        cls.left -= 1
        if cls.left < 0 and cls.way == "missing":
            self.send_error(404)
        elif cls.left < 0 and cls.way == "cut":
            self.send_response(206)
            self.send_header("Content-Length", "100000")
            self.end_headers()
            self.wfile.write(b"0")
        elif cls.left >= 0:
            start, end = 0, len(cls.content) - 1
            if asked := re.match(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
                start, end = int(asked[1]), min(int(asked[2]), end)
            self.send_response(206)
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Range", f"bytes {start}-{end}/{len(cls.content)}")
            self.send_header("Content-Length", str(end - start + 1))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(cls.content[start : end + 1])

    do_HEAD = do_GET


@pytest.mark.parametrize("way", ["missing", "cut", "silent"])
def test_a_base_that_goes_while_it_is_read(tmp_path: Path, way: str) -> None:
    """One error, whichever request it is; and no bundle."""
    pytest.importorskip("aiohttp")
    save_file({"w": torch.zeros(400, 100)}, tmp_path / "base.safetensors")
    save_file({"w": torch.ones(400, 100)}, tmp_path / "a.safetensors")
    Leaving.content, Leaving.way = (tmp_path / "base.safetensors").read_bytes(), way
    server = ThreadingHTTPServer(("127.0.0.1", 0), Leaving)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/base.safetensors"
    try:
        for requests in range(1, 8):
            Leaving.left = requests
            with pytest.raises(FusionKitError, match=r"base.safetensors"):
                compress(url, {"a": tmp_path / "a.safetensors"}, Dense(), tmp_path / "b")
            assert not (tmp_path / "b").exists()
    finally:
        server.shutdown()
        server.server_close()


def test_a_pipe_is_no_checkpoint(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "base.safetensors")
    with pytest.raises(CheckpointError, match=r"base.safetensors: is no file but a pipe"):
        Checkpoint.of(tmp_path / "base.safetensors")
