"""The application: who is let in, what is refused and how it is told; its engine is in here."""

import asyncio
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from served import ADMIN, application, asking, figure

from fusionkit import Bundle

PROMPT = {"model": "cats", "prompt": "b c"}


@contextmanager
def client_of(bundle: Path, **limits: Any) -> Iterator[Any]:
    yield from asking(application(bundle, **limits))


def told(response: Any, status: int) -> str:
    """The message of a refusal, whose form is checked."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert "Traceback" not in response.text
    return str(error["message"])


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("", "expected a JSON object, with Content-Type: application/json"),
        ("[]", "expected a JSON object"),
        ("null", "expected a JSON object"),
        ('{"model": "cats"', "the body is not JSON (Expecting ',' delimiter)"),
        ("[" * 50_000, "the body"),
        ('{"model": "cats"}', "`prompt` is missing"),
        ('{"model": "cats", "prompt": 3}', "`prompt` is of another kind"),
        ('{"model": "cats", "prompt": []}', "`prompt` is of another kind, or empty"),
        ('{"model": "cats", "prompt": ""}', "the prompt is empty"),
        ('{"model": "cats", "prompt": "b", "stop": ""}', "`stop`"),
        ('{"model": "cats", "prompt": "b", "seed": "1"}', "`seed`: input should be a valid int"),
        ('{"model": "cats", "prompt": "b", "seed": 1e999}', "`seed`"),
        ('{"model": "cats", "prompt": "b", "temperature": NaN}', "`temperature`"),
        ('{"model": "cats", "prompt": "\\ud800"}', "`prompt`"),
        ('{"model": "\\ud800", "prompt": "b"}', "`model`: value error, holds half a character"),
        ('{"model": "cats", "prompt": [1000000]}', "token"),
        ('{"model": 7, "prompt": "b"}', "`model`: input should be a valid string"),
    ],
)
def test_a_malformed_body_is_told(here: Any, body: str, message: str) -> None:
    response = here.post(
        "/v1/completions", content=body, headers={"Content-Type": "application/json"}
    )
    assert message in told(response, 400)


def test_what_is_nowhere_and_what_a_place_does_not_take(here: Any) -> None:
    assert told(here.get("/nothing"), 404) == (
        "nothing is at /nothing; GET /openapi.json says what there is"
    )
    assert told(here.put("/v1/models"), 405) == "/v1/models does not take PUT"
    assert told(here.post("/predict", json={}), 404)  # these models generate text


def test_it_lives_and_is_ready(here: Any) -> None:
    assert here.get("/health").json() == {"status": "ok"}
    assert here.get("/ready").json() == {"status": "ready"}


def test_what_has_no_key_is_refused(models: Path) -> None:
    with client_of(models / "talk.bundle", keys=("one", "two")) as client:
        for given in ("", "Bearer three", "Bearer ", "one", "Basic one", "Bearer onetwo"):
            response = client.get("/v1/models", headers={"Authorization": given})
            assert "with a key of this server" in told(response, 401)
            assert response.headers["www-authenticate"] == "Bearer"
        assert told(client.get("/metrics"), 401)
        for key in ("one", "two", ADMIN):
            head = {"Authorization": f"Bearer {key}"}
            assert client.get("/v1/models", headers=head).status_code == 200
        assert client.get("/health").status_code == 200
        for path in ("/tasks/cats", "/tasks/none"):
            response = client.delete(path, headers={"Authorization": "Bearer one"})
            assert "the server's admin token" in told(response, 401)


def test_too_much_is_refused(models: Path) -> None:
    with client_of(models / "talk.bundle", body=200, tokens=20, rows=2) as client:
        long = client.post("/v1/completions", json={**PROMPT, "user": "u" * 200})
        assert "more than 200 bytes" in told(long, 413)
        many = client.post("/v1/completions", json={**PROMPT, "max_tokens": 21})
        assert told(many, 400) == "`max_tokens`: this server's answers have at most 20, got 21"
        rows = client.post("/v1/completions", json={**PROMPT, "prompt": ["b", "c", "d"]})
        assert "at most 2 prompts here, got 3" in told(rows, 400)
        assert client.post("/v1/completions", json=PROMPT).status_code == 200


def test_a_full_queue_is_told_and_what_took_too_long(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = application(models / "talk.bundle", max_queue=2, seconds=0.5)
    for client in asking(app):
        # What is given to the engine waits, as it does behind other rows.
        waiting: list[Any] = []
        monkeypatch.setattr(app.state.engine, "submit", _held(app.state.engine, waiting, 2))
        late = client.post("/v1/completions", json={**PROMPT, "prompt": ["b", "c"]})
        assert "there was no answer within 0.5 s" in told(late, 408)
        end = time.monotonic() + 5
        while not all(ticket.cancelled for ticket in waiting):
            assert time.monotonic() < end
        full = client.post("/v1/completions", json=PROMPT)
        assert "wait already, as many as may; ask again later" in told(full, 429)
        assert full.headers["retry-after"] == "1"


def _held(engine: Any, waiting: list[Any], room: int) -> Any:
    from fusionkit.errors import QueueFullError
    from fusionkit.serving.requests import Ticket

    def submit(request: Any, to: Any) -> Ticket:
        if len(waiting) >= room:
            raise QueueFullError(f"{room} requests wait already, as many as may; ask again later")
        waiting.append(Ticket(request, to))
        return waiting[-1]

    return submit


def test_a_fault_of_ours_tells_nothing_but_where_to_look(
    models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    app = application(models / "talk.bundle")
    for client in asking(app):

        def fails(*_: object) -> None:
            raise ZeroDivisionError("secret of the model")

        monkeypatch.setattr(app.state.engine, "submit", fails)
        response = client.post("/v1/completions", json=PROMPT)
        assert told(response, 500) == (
            "the server failed; its log says more, of request " + response.headers["x-request-id"]
        )
    assert "secret of the model" in capsys.readouterr().err


def test_the_body_of_a_slow_client_is_waited_for_only_so_long(models: Path) -> None:
    app = application(models / "talk.bundle", seconds=0.2)
    sent: list[Any] = []

    async def never() -> Any:
        await asyncio.sleep(60)

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/completions",
        "headers": [(b"content-length", b"10")],
    }
    asyncio.run(app(scope, never, send))  # type: ignore[arg-type]
    assert sent[0]["status"] == 408
    assert "did not come within 0.2 s" in json.loads(sent[1]["body"])["error"]["message"]


def test_figures_count_what_was_asked(here: Any) -> None:
    for task in ("cats", "dogs", "none", "no" * 1000):
        here.post("/v1/completions", json={**PROMPT, "model": task, "max_tokens": 2})
    text = here.get("/metrics").text
    where = {"endpoint": "/v1/completions"}
    assert figure(text, "fusionkit_requests_total", status="200", **where) == 2
    assert figure(text, "fusionkit_requests_total", task="cats", status="200", **where) == 1
    assert figure(text, "fusionkit_requests_total", task="", status="404", **where) == 2
    assert figure(text, "fusionkit_request_seconds_count", **where) == 4
    assert figure(text, "fusionkit_tokens_total", kind="prompt") == 4
    assert figure(text, "fusionkit_tasks_per_step_count") > 0
    assert figure(text, "fusionkit_operand_bytes") > 0
    assert "nono" not in text


def test_classes_are_told_by_name(sorter: Any, sorting: Bundle) -> None:
    texts = ["b c", "d e f", "g"]
    for task, names in {"moods": ["glad", "sad", "so-so"], "topics": ["art", "war"]}.items():
        response = sorter.post("/predict", json={"task": task, "inputs": texts})
        found = response.json()
        assert response.status_code == 200, found
        assert found["task"] == task
        for text, each in zip(texts, found["predictions"], strict=True):
            expected = probabilities(sorting, task, text)
            assert list(each["probabilities"]) == names
            assert each["probabilities"] == pytest.approx(dict(zip(names, expected, strict=True)))
            assert each["label"] == max(each["probabilities"], key=each["probabilities"].get)
            assert each["value"] is None
        assert found["usage"]["prompt_tokens"] == 6
        one = sorter.post("/predict", json={"task": task, "inputs": texts[0]}).json()
        assert one["predictions"][0]["label"] == found["predictions"][0]["label"]


def probabilities(bundle: Bundle, task: str, text: str) -> list[float]:
    """What the task's own model says, by itself."""
    import fusionkit

    model = fusionkit.load(bundle, task)
    inputs = fusionkit.tokenizer(bundle, task)([text], return_tensors="pt")
    found: list[float] = model(**inputs).logits.softmax(-1)[0].tolist()
    return found


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"task": "moods"}, "`inputs` is missing"),
        ({"task": "moods", "inputs": []}, "`inputs` is of another kind, or empty"),
        ({"task": "moods", "inputs": 3}, "`inputs` is of another kind"),
        ({"task": "moods", "inputs": [{"image": "?"}]}, "`inputs`"),
        ({"task": "moods", "inputs": "b", "top_k": 1}, "`top_k` is not supported"),
        ({"task": "moods", "inputs": {"values": [1, [2]]}}, ""),
    ],
)
def test_what_is_nothing_to_classify_is_refused(sorter: Any, body: Any, message: str) -> None:
    assert message in told(sorter.post("/predict", json=body), 400)


def test_a_task_that_is_not_there(sorter: Any) -> None:
    response = sorter.post("/predict", json={"task": "mood", "inputs": "b"})
    assert told(response, 404) == (
        "no task 'mood' is served; there are moods, topics; did you mean 'moods'?"
    )
