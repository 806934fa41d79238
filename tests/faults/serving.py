"""Do to a running server what clients, administrators and the system do; nobody else may notice.

While others ask, and have each answer checked against the task's own model, clients go in the
middle of a stream, take nothing of theirs, send what is malformed, ask for what is not there, tasks
are added and removed while they answer, damaged ones are added, the model's process is killed, and
at last the server is told to stop. From the folder `tests`:

    python -m faults.serving [seconds] [seed]
"""

import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
from served import ADMIN, Served

ADMINISTERED = {"Authorization": f"Bearer {ADMIN}"}
LONG = {"model": "dogs", "prompt": "d", "temperature": 0, "max_tokens": 1000, "stream": True}
SHORT = {"temperature": 0, "max_tokens": 8}
PROMPTS = ("b c", "d", "e f g", "h i j k")


class Others:
    """Clients who ask all the time, and whose every answer is checked.

    Args:
        server: whom they ask.
        expected: task and prompt → the answer.
        count: how many there are.

    Attributes:
        answered: right answers.
        wrong: what else came.
    """

    def __init__(self, server: Served, expected: dict[tuple[str, str], str], count: int) -> None:
        self._server, self._expected = server, expected
        self.answered, self.wrong = 0, list[str]()
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(n,)) for n in range(count)]
        for each in self._threads:
            each.start()

    def end(self) -> None:
        """Ask no more."""
        self._over.set()
        for each in self._threads:
            each.join()

    def _ask(self, seed: int) -> None:
        draw = random.Random(seed)
        with httpx2.Client(base_url=self._server.url, timeout=60) as client:
            while not self._over.is_set():
                task, prompt = draw.choice([*self._expected])
                try:
                    found = client.post(
                        "/v1/completions", json={"model": task, "prompt": prompt, **SHORT}
                    )
                except httpx2.HTTPError as error:
                    self.wrong.append(repr(error))
                    continue
                if found.status_code != 200:
                    self.wrong.append(f"{found.status_code}: {found.text}")
                elif found.json()["choices"][0]["text"] != self._expected[task, prompt]:
                    self.wrong.append(f"{task}, {prompt}: {found.text}")
                else:
                    self.answered += 1


def answers(server: Served) -> dict[tuple[str, str], str]:
    """What each task answers when it is asked alone."""
    found = {}
    for task in ("cats", "dogs"):
        for prompt in PROMPTS:
            response = server.client.post(
                "/v1/completions", json={"model": task, "prompt": prompt, **SHORT}
            )
            found[task, prompt] = response.json()["choices"][0]["text"]
    return found


def connection(server: Served, body: dict[str, Any]) -> socket.socket:
    """A connection on which this was asked."""
    content = json.dumps(body).encode()
    made = socket.create_connection(("127.0.0.1", server.port))
    made.sendall(
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n%s" % (len(content), content)
    )
    return made


def leave(server: Served, models: Path, draw: random.Random) -> None:
    """Ask for a long answer, and go in the middle of it."""
    made = connection(server, {**LONG, "stream": draw.random() < 0.5})
    time.sleep(draw.random() * 0.3)
    made.close()


def take_nothing(server: Served, models: Path, draw: random.Random) -> None:
    """Ask for a long answer, and read nothing of it for a while."""
    made = connection(server, LONG)
    time.sleep(0.5)
    read = b""
    made.settimeout(60)
    while b"data: [DONE]" not in read:
        piece = made.recv(1 << 16)
        read += piece
        assert piece, read[-500:]
        assert b" 200 OK" in read, read
    made.close()


def dawdle(server: Served, models: Path, draw: random.Random) -> None:
    """Begin a request, and never end it."""
    made = socket.create_connection(("127.0.0.1", server.port))
    made.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{")
    time.sleep(0.3)
    made.close()


def babble(server: Served, models: Path, draw: random.Random) -> None:
    """Send what is malformed."""
    body = draw.choice([b"", b"{", b"[]", b'{"model": "cats"}', draw.randbytes(100), b"[" * 9999])
    head = {"Content-Type": draw.choice(["application/json", "text/plain", "multipart/form-data"])}
    found = server.client.post("/v1/completions", content=body, headers=head)
    assert found.status_code == 400, (body, found.status_code, found.text)
    raw = socket.create_connection(("127.0.0.1", server.port))
    raw.sendall(draw.randbytes(50) + b"\r\n\r\n")
    raw.close()


def ask_for_nothing(server: Served, models: Path, draw: random.Random) -> None:
    """Ask for a task that is not there."""
    found = server.client.post("/v1/completions", json={"model": "nobody", "prompt": "b"})
    assert found.status_code == 404
    assert "there are cats, dogs" in found.text


def change(server: Served, models: Path, draw: random.Random) -> None:
    """Add a task, and remove it in the middle of its answer."""
    name = f"new{draw.randrange(10**9)}"
    added = server.client.post("/tasks", json={"name": name, "path": "dogs"}, headers=ADMINISTERED)
    assert added.status_code == 201, added.text
    with server.client.stream("POST", "/v1/completions", json={**LONG, "model": name}) as stream:
        lines = stream.iter_lines()
        assert next(lines).startswith("data: ")
        with httpx2.Client(base_url=server.url, timeout=60) as other:
            assert other.delete(f"/tasks/{name}", headers=ADMINISTERED).status_code == 200
        rest = [line for line in lines if line]
    assert "was removed" in rest[-1] or rest[-1] == "data: [DONE]", rest[-1]


def add_damaged(server: Served, models: Path, draw: random.Random) -> None:
    """Add a model whose file is cut short."""
    shutil.copytree(models / "dogs", models / "damaged", dirs_exist_ok=True)
    weights = models / "damaged" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: -draw.randrange(1, 5000)])
    found = server.client.post(
        "/tasks", json={"name": "damaged", "path": "damaged"}, headers=ADMINISTERED
    )
    assert found.status_code == 400, found.text


Fault = Callable[[Served, Path, random.Random], None]
FAULTS: tuple[Fault, ...] = (leave, take_nothing, dawdle, babble, ask_for_nothing)
CHANGES: tuple[Fault, ...] = (change, add_damaged)


def during(server: Served, models: Path, faults: list[Fault], seed: int) -> Others:
    """Faults, one after another, while others ask; their answers."""
    draw = random.Random(seed)
    others = Others(server, answers(server), 4)
    try:
        for fault in faults:
            fault(server, models, draw)
    finally:
        others.end()
    server.until("fusionkit_running", 0)  # those that nobody waits for, too
    return others


def stop_under_load(server: Served) -> Counter[str]:
    """Tell it to stop while many ask: how those ended who were being answered, and others."""
    ends: Counter[str] = Counter()
    started = threading.Barrier(9)

    def ask(seed: int) -> None:
        url = f"{server.url}/v1/completions"
        with httpx2.stream("POST", url, json=LONG, timeout=60) as stream:
            lines = stream.iter_lines()
            next(lines)
            started.wait(30)
            ends[[line for line in lines if line][-1]] += 1

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(8)]
    for each in threads:
        each.start()
    started.wait(30)
    code = server.stop(signal.SIGTERM)
    for each in threads:
        each.join()
    ends[f"exit {code}"] += 1
    return ends


def main(seconds: float = 60, seed: int = 0) -> None:
    """The campaign."""
    from talking import TEMPLATE, bundle

    draw, counts = random.Random(seed), Counter[str]()
    with tempfile.TemporaryDirectory() as folder:
        models = Path(folder)
        bundle("llama, tied", models, TEMPLATE, context=4096)
        options = ("--device", "cpu", "--tasks-root", models)
        with Served(models / "talk.bundle", *options) as server:
            expected = answers(server)
            others = Others(server, expected, 8)
            end = time.monotonic() + seconds
            try:
                while time.monotonic() < end:
                    fault = draw.choice(FAULTS if draw.random() < 0.9 else CHANGES)
                    fault(server, models, draw)
                    counts[fault.__name__] += 1
            finally:
                others.end()
                print(*server.told, sep="\n")
            print(f"{dict(counts)}; others: {others.answered} right, {len(others.wrong)} wrong")
            print(*others.wrong[:5], sep="\n")
            _kill_the_model(server, expected)
            print("told to stop:", dict(stop_under_load(server)))
        sys.exit(bool(others.wrong))


def _kill_the_model(server: Served, expected: dict[tuple[str, str], str]) -> None:
    """Kill the model's process: it comes again, and answers as before."""
    children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children")
    for each in children.read_text().split():
        if b"spawn_main" in Path(f"/proc/{each}/cmdline").read_bytes():
            os.kill(int(each), signal.SIGKILL)
    began, states = time.monotonic(), Counter[int]()
    while server.client.get("/ready").status_code == 200:
        time.sleep(0.1)
    while server.client.get("/ready").status_code != 200:
        found = server.client.post("/v1/completions", json={"model": "cats", "prompt": "b"})
        states[found.status_code] += 1
        time.sleep(0.1)
    assert answers(server) == expected
    print(f"model's process killed: ready again in {time.monotonic() - began:.1f} s; {states}")


if __name__ == "__main__":
    main(*(float(each) for each in sys.argv[1:2]), *(int(each) for each in sys.argv[2:3]))
