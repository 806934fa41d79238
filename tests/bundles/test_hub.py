"""A bundle on the Hugging Face Hub, which a server on loopback stands in for."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import minisign
import pytest
from hub import Hub
from talking import bundle
from tiny_net import TESTS

from fusionkit import Bundle, add_tasks
from fusionkit.bundles.hub import MARK
from fusionkit.bundles.sign_bundle import sign_bundle
from fusionkit.bundles.signature import SIGNATURE

pytestmark = pytest.mark.slow
Run = Callable[..., "subprocess.CompletedProcess[str]"]
NAME = "someone/talk"


VERBS = """
import io, json, os, sys
from contextlib import redirect_stderr, redirect_stdout
from fusionkit.cli.main import main
for line in sys.stdin:
    folder, args = json.loads(line)
    os.chdir(folder)
    before = dict(os.environ)  # as `--key` says there what it is
    out, errors, code = io.StringIO(), io.StringIO(), 0
    with redirect_stdout(out), redirect_stderr(errors):
        try:
            main(args)
        except SystemExit as ended:
            code = ended.code or 0
    os.environ.clear()
    os.environ.update(before)
    print(json.dumps([code, out.getvalue(), errors.getvalue()]), flush=True)
"""
"""Runs verbs one after another: most of what one takes is its imports."""


@pytest.fixture(scope="module")
def server() -> Iterator[Hub]:
    made = Hub()
    yield made
    made.close()


@pytest.fixture
def hub(server: Hub, environment: dict[str, str]) -> Hub:
    """Empty, as the cache is."""
    shutil.rmtree(Path(environment["HF_HOME"]) / "hub", ignore_errors=True)
    server.repositories.clear()
    server.served.clear()
    server.refuse = set()
    return server


@pytest.fixture(scope="module")
def environment(server: Hub, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Where the stand-in is the Hub, which is looked at when its library is imported."""
    return {
        **os.environ,
        "PYTHONPATH": f"{TESTS.parent}:{TESTS}",
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(tmp_path_factory.mktemp("cache")),
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": "hf_none",
    }


@pytest.fixture(scope="module")
def verbs(environment: dict[str, str]) -> Iterator["subprocess.Popen[str]"]:
    line = [sys.executable, "-c", VERBS]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(line, env=environment, text=True, **pipes) as process:  # type: ignore[call-overload]
        yield process
        process.stdin.close()


@pytest.fixture
def run(environment: dict[str, str], verbs: "subprocess.Popen[str]", tmp_path: Path) -> Run:
    """Runs `fusionkit VERB …`, or Python code, where the stand-in is the Hub."""

    def run(*args: str, **settings: str) -> "subprocess.CompletedProcess[str]":
        if args[0] != "-c" and not settings:
            assert verbs.stdin
            assert verbs.stdout
            print(json.dumps([str(tmp_path), args]), file=verbs.stdin, flush=True)
            return subprocess.CompletedProcess(args, *json.loads(verbs.stdout.readline()))
        line = [sys.executable, *(args if args[0] == "-c" else ("-m", "fusionkit", *args))]
        own = {**environment, **settings}
        return subprocess.run(
            line, env=own, cwd=tmp_path, capture_output=True, text=True, check=False
        )

    return run


def test_a_bundle_goes_there_and_comes_back(hub: Hub, run: Run, tmp_path: Path) -> None:
    source = bundle("llama, tied", tmp_path)
    scores = {
        "format": 1,
        "fusionkit": "0.1.0",
        "model": "b",
        "codec": None,
        "limit": "",
        "tasks": {
            "cats": {"metric": "Accuracy", "score": 0.915, "finetuned": 0.92, "share": 0.9946}
        },
    }
    (tmp_path / "scores.json").write_text(json.dumps(scores))
    base = {each.name: each.read_bytes() for each in (tmp_path / "base").iterdir()}
    hub.repositories["someone/base"] = [base]
    done = run("push", "talk.bundle", NAME, "--base", "someone/base", "--scores", "scores.json")
    assert done.returncode == 0, done.stderr
    assert f"pushed: {hub.url}/{NAME}/commit/" in done.stdout
    (files,) = hub.repositories[NAME]
    assert {*files} == {
        *("README.md", "manifest.json", "task-cats.safetensors", "task-dogs.safetensors")
    }
    card = files["README.md"].decode()
    assert card.startswith("---\nbase_model: someone/base\nlibrary_name: fusionkit\n")
    size = source.manifest.tasks["cats"].file.bytes
    assert f"| `cats` | {size:,} | " in card
    assert " | Accuracy | 0.915 | 0.92 | 0.9946 |" in card
    assert f'model = fusionkit.load("{NAME}", "dogs")' in card

    (tmp_path / "base").rename(tmp_path / "gone")  # whoever pulls has none
    code = f"""
import fusionkit, torch
bundle = fusionkit.Bundle.from_pretrained("{NAME}")
model = fusionkit.load("{NAME}", "dogs")
torch.save(model.state_dict(), "dogs.pt")
fusionkit.tokenizer(bundle, "dogs")
try:
    bundle.remove("cats")
except fusionkit.errors.BundleError as error:
    print(error)
"""
    hub.served.clear()
    done = run("-c", code)
    assert done.returncode == 0, done.stderr
    assert "can only be read where it is" in done.stdout
    assert "task-dogs.safetensors" in hub.served
    assert "task-cats.safetensors" not in hub.served
    import torch

    wanted = Bundle(tmp_path / "talk.bundle", str(tmp_path / "gone")).state_dict("dogs")
    found = torch.load(tmp_path / "dogs.pt")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    hub.served.clear()
    done = run("-c", code, HF_HUB_OFFLINE="1")  # all that is needed is in the cache
    assert done.returncode == 0, done.stderr
    assert not hub.served

    done = run("pull", NAME, "--task", "cats", "--out", "pulled")
    assert done.returncode == 0, done.stderr
    assert Bundle(tmp_path / "pulled").tasks == ("cats",)
    same = (tmp_path / "pulled" / "task-cats.safetensors").read_bytes()
    assert same == files["task-cats.safetensors"]


def test_a_push_is_whole_or_not_at_all(hub: Hub, run: Run, tmp_path: Path) -> None:
    source = bundle("llama, tied", tmp_path)
    done = run("push", "talk.bundle", NAME)
    assert done.returncode == 0
    assert "note: the base" in done.stdout
    first = hub.repositories[NAME][-1]
    add_tasks(source, {"birds": str(tmp_path / "dogs")})
    Bundle(source.path).remove("dogs")
    for broken in ("/large/", "/commit/"):
        hub.refuse = {broken}
        done = run("push", "talk.bundle", NAME)
        assert done.returncode == 1
        assert "could not be pushed to, and is as it was before" in done.stderr
        assert hub.repositories[NAME] == [first]
    hub.refuse = set()
    hub.repositories[NAME].append({**first, "README.md": b"my own", "notes.txt": b"kept"})
    assert run("push", "talk.bundle", NAME).returncode == 0
    last = hub.repositories[NAME][-1]
    assert {*last} == {
        *("README.md", "manifest.json", "notes.txt"),
        *("task-cats.safetensors", "task-birds.safetensors"),
    }
    assert last["README.md"] == b"my own"
    assert MARK in first["README.md"].decode()


def test_what_is_not_there_is_told(run: Run) -> None:
    done = run("pull", "someone/nothing")
    assert done.returncode == 1
    assert "fusionkit pull: someone/nothing: 'manifest.json' can't be downloaded" in done.stderr
    assert "check the name and the network" in done.stderr
    done = run("pull", "someone/nothing", HF_HUB_OFFLINE="1")
    assert "can't be downloaded" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_signed_bundle_goes_there_and_comes_back(hub: Hub, run: Run, tmp_path: Path) -> None:
    """Its signature is carried, and verified by what is pulled, unless it is another bundle."""
    source, pair = bundle("llama, tied", tmp_path), minisign.KeyPair.generate()
    (tmp_path / "team.key").write_bytes(bytes(pair.secret_key))
    key = pair.public_key.to_base64().decode()
    sign_bundle(source, tmp_path / "team.key")
    assert run("push", str(source.path), NAME).returncode == 0
    pushed = hub.repositories[NAME][-1]
    assert pushed[SIGNATURE] == (source.path / SIGNATURE).read_bytes()
    assert "signed" in pushed["README.md"].decode()
    done = run("pull", NAME, "--out", "whole", "--key", key)
    assert done.returncode == 0, done.stderr
    assert Bundle(tmp_path / "whole", key=key).tasks == source.tasks
    other = minisign.KeyPair.generate().public_key.to_base64().decode()
    done = run("pull", NAME, "--out", "other", "--key", other)
    assert done.returncode == 1
    assert "is no signature of this manifest.json by the key" in done.stderr
    done = run("push", str(source.path), NAME, "--base", "someone/base")
    assert "and so what is pushed is not" in done.stderr
    assert SIGNATURE not in hub.repositories[NAME][-1]
