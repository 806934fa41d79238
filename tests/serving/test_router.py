"""Requests that name no task: the router's pick, and how the answer says so."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from program import run
from routed import routed, routed_sorting, texts_of
from served import ADMIN, application, asking

from fusionkit import Bundle
from fusionkit.reuse.routing import ROUTER
from fusionkit.serving.picker import sharing


@pytest.fixture(scope="module")
def sorts(sorting: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return routed_sorting(sorting.path, tmp_path_factory.mktemp("sorts"))


@pytest.fixture
def client(sorts: Path) -> Iterator[Any]:
    yield from asking(application(sorts, router=True))


def test_a_row_without_a_task(client: Any) -> None:
    assert client.get("/tasks").json()["router"] is True
    for task in ("moods", "topics"):
        text = texts_of(task)[3]
        named = client.post("/predict", json={"task": task, "inputs": text}).json()
        for asked in ({}, {"task": "auto"}, {"task": None}):
            found = client.post("/predict", json={**asked, "inputs": text}).json()
            router = found.pop("router")
            assert router["task"] == task
            assert router["probability"] > 0.9
            assert found == named
        several = {"inputs": texts_of(task)[:3]}
        assert client.post("/predict", json=several).json()["task"] == task
    named = client.post("/predict", json={"task": "moods", "inputs": "a"}).json()
    assert "router" not in named
    wrong = client.post("/predict", json={"inputs": {"values": [1.0]}})
    assert wrong.status_code == 400
    assert "takes a text" in wrong.json()["error"]["message"]


def test_tasks_that_are_gone_are_not_picked(sorts: Path, tmp_path: Path) -> None:
    shutil.copytree(sorts, tmp_path / "b")
    for client in asking(application(tmp_path / "b", router=True)):
        admin = {"Authorization": f"Bearer {ADMIN}"}
        assert client.delete("/tasks/topics", headers=admin).status_code == 200
        found = client.post("/predict", json={"inputs": texts_of("topics")[0]}).json()
        assert found["router"] == {"task": "moods", "probability": 1.0}


def test_without_a_router(sorts: Path) -> None:
    for client in asking(application(sorts)):
        assert client.get("/tasks").json()["router"] is False
        response = client.post("/predict", json={"inputs": "a"})
        assert response.status_code == 400
        error = response.json()["error"]
        assert error["message"] == "`task` is missing: name the task that answers"
        assert error["param"] == "task"
        assert client.post("/predict", json={"task": "auto", "inputs": "a"}).status_code == 404


def test_prompts_without_a_model(models: Path, tmp_path: Path) -> None:
    names = ("cats", "dogs")
    bundle = routed(models / "talk.bundle", tmp_path, names, "prompt,completion", models / "base")
    for client in asking(application(bundle, router=True)):
        text = texts_of("dogs")[2]
        body = {"prompt": text, "max_tokens": 8, "temperature": 0}
        named = client.post("/v1/completions", json={**body, "model": "dogs"}).json()
        found = client.post("/v1/completions", json={**body, "model": "auto"}).json()
        assert found["model"] == found["router"]["task"] == "dogs"
        assert found["choices"] == named["choices"]
        with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as stream:
            lines = [line for line in stream.iter_lines() if line.startswith("data: {")]
        events = [json.loads(line.removeprefix("data: ")) for line in lines]
        assert {(each["model"], each["router"]["task"]) for each in events} == {("dogs", "dogs")}
        said = "".join(each["choices"][0]["text"] for each in events)
        assert said == named["choices"][0]["text"]
        messages = [{"role": "user", "content": texts_of("cats")[0]}]
        chat = {"messages": messages, "model": "auto", "max_tokens": 4}
        assert client.post("/v1/chat/completions", json=chat).json()["router"]["task"] in names


def test_a_bundle_without_one_is_told_at_once(sorting: Bundle, sorts: Path, tmp_path: Path) -> None:
    said = run("serve", sorting.path, "--router", code=1)
    assert f"has no router ({ROUTER}); make it: fusionkit route" in said


def test_weights_are_shared() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    twin = sharing(model)
    pairs = zip(model.state_dict().values(), twin.state_dict().values(), strict=True)
    assert all(one.data_ptr() == other.data_ptr() for one, other in pairs)
    model[0].forward = None  # type: ignore[assignment]
    assert callable(twin[0].forward)  # type: ignore[index]
