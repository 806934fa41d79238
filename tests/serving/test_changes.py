"""Tasks that are added to a running server, and removed; what may not be, and what can't."""

import io
import json
import os
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from faults import serving
from served import ADMIN, Served, application, asking

from fusionkit import Bundle
from fusionkit.errors import BundleError

ADMINISTERED = {"Authorization": f"Bearer {ADMIN}"}


@pytest.fixture
def client(models: Path) -> Iterator[Any]:
    """Of an application within this process, with models in `models` that may be added."""
    yield from asking(application(models / "talk.bundle", models))


def names(client: Any) -> list[str]:
    found = client.get("/tasks").json()
    assert found["kind"] == "generation"
    assert all(task["bytes"] > 0 for task in found["tasks"])
    return [task["name"] for task in found["tasks"]]


def add(client: Any, name: str, path: object) -> Any:
    return client.post("/tasks", json={"name": name, "path": str(path)}, headers=ADMINISTERED)


def send(client: Any, name: str, body: bytes) -> Any:
    return client.put(f"/tasks/{name}", content=body, headers=ADMINISTERED)


def remove(client: Any, name: str) -> Any:
    return client.delete(f"/tasks/{name}", headers=ADMINISTERED)


def answer(talker: Served, task: str) -> str:
    body = {"model": task, "prompt": "b c", "temperature": 0, "max_tokens": 6}
    found = talker.client.post("/v1/completions", json=body)
    assert found.status_code == 200, found.text
    return str(found.json()["choices"][0]["text"])


def tar(folder: Path, *more: tuple[tarfile.TarInfo, bytes]) -> bytes:
    """A tar of a folder's files, as `tar -C FOLDER -c .` makes it."""
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as archive:
        archive.add(folder, ".")
        for member, content in more:
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return made.getvalue()


@pytest.mark.slow
def test_a_model_is_added_and_removed_while_it_answers(talker: Served) -> None:
    before = names(talker.client)
    response = add(talker.client, "puppies", "dogs")
    assert response.status_code == 201, response.text
    assert response.json()["name"] == "puppies"
    assert names(talker.client) == [*before, "puppies"]
    assert answer(talker, "puppies") == answer(talker, "dogs") != answer(talker, "cats")
    assert add(talker.client, "puppies", "dogs").status_code == 409
    asked = {**serving.LONG, "model": "puppies"}
    with talker.client.stream("POST", "/v1/completions", json=asked) as stream:
        lines = stream.iter_lines()
        assert next(lines).startswith("data: ")
        with httpx2.Client(base_url=talker.url) as other:
            assert remove(other, "puppies").json() == other.get("/tasks").json()
        rest = [line for line in lines if line]
    error = json.loads(rest[-1].removeprefix("data: "))["error"]
    assert "'puppies'" in error["message"]
    assert error["code"] == "model_not_found"
    asked = {"model": "puppies", "prompt": "b"}
    assert talker.client.post("/v1/completions", json=asked).status_code == 404
    assert names(talker.client) == before


@pytest.mark.parametrize("path", ["..", "../x", "/etc", "dogs/../..", "out", "inner", ".", "\0"])
def test_nothing_outside_the_root_is_read(
    client: Any, models: Path, tmp_path: Path, path: str
) -> None:
    shutil.copytree(models / "dogs", tmp_path / "dogs")
    (models / "inner").mkdir(exist_ok=True)
    for link, target in {"out": tmp_path / "dogs", "inner/config.json": "/etc/hostname"}.items():
        (models / link).unlink(missing_ok=True)
        (models / link).symlink_to(target)
    response = add(client, "outside", path)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == "path"
    assert "outside" not in names(client)
    assert str(models) not in response.text


def test_a_damaged_model_changes_nothing(client: Any, models: Path) -> None:
    damaged = models / "damaged"
    shutil.copytree(models / "dogs", damaged, dirs_exist_ok=True)
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    manifest = (models / "talk.bundle" / "manifest.json").read_bytes()
    files = sorted(os.listdir(models / "talk.bundle"))
    for response in (add(client, "damaged", "damaged"), send(client, "damaged", tar(damaged))):
        assert response.status_code == 400, response.text
        error = response.json()["error"]
        assert error["code"] == "not_added"
        assert "model.safetensors" in error["message"]
        assert str(models) not in response.text
    assert (models / "talk.bundle" / "manifest.json").read_bytes() == manifest
    assert sorted(os.listdir(models / "talk.bundle")) == files


def test_what_is_no_tar_of_a_model_is_refused(client: Any, tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "config.json").write_text("{}")
    link = tarfile.TarInfo("model.safetensors")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    code, one = tarfile.TarInfo("../../model.pkl"), tmp_path / "one"
    for body, message in {
        b"": "no tar of a model's folder",
        tar(tmp_path / "none"): "the tar has no files",
        b"no tar" * 200: "no tar of a model's folder",
        tar(one, (link, b"")): "'model.safetensors': a model that is sent has plain files",
        tar(one, (code, b"x")): "'../../model.pkl': a model that is sent has plain files",
        tar(one, (tarfile.TarInfo("a/config.json"), b"{}")): "'config.json' is there twice",
    }.items():
        response = send(client, "sent", body)
        assert response.status_code == 400, response.text
        assert message in response.json()["error"]["message"]


@pytest.mark.parametrize("name", ["-x", ".x", "a b", "a=b", "x" * 101, "*", ""])
def test_a_name_that_is_none_is_refused(client: Any, name: str) -> None:
    response = add(client, name, "dogs")
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "name"


def test_no_change_without_the_token(client: Any) -> None:
    for token in ("", "Bearer other"):
        head = {"Authorization": token}
        assert client.post("/tasks", json={}, headers=head).status_code == 401
        assert client.put("/tasks/x", content=b"x" * 100_000, headers=head).status_code == 401
        assert client.delete("/tasks/cats", headers=head).status_code == 401
    assert "cats" in names(client)


def test_the_last_task_stays(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert remove(client, "none").status_code == 404

    def last(*_: object) -> None:
        raise BundleError(f"{client.app}: 'cats' is the last task; delete the folder instead")

    monkeypatch.setattr(Bundle, "remove", last)
    response = remove(client, "cats")
    assert response.status_code == 409
    assert "the last task" in response.text
    assert "cats" in names(client)
