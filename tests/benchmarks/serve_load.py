"""`fusionkit serve` under load, over HTTP, against the bare model called in batches as large.

A closed loop: 64 connections, each asking again as soon as it has its answer, of tasks at random,
for a minute. The zoo's eight classifiers (`text`) and five language models (`lm`), as in
`serve_engine.py`, and 200 classifiers (`many`): the zoo's LoRA adapters, each 25 times, perturbed.
The bare model is the base, in batches of 32; it runs after the server, alone.

Every answer is checked against the task's own model by itself. The client is a few lines over
asyncio's streams, as httpx takes as much of a core as the server; it shares the machine with the
server, whose own CPU time is told beside.

    python tests/benchmarks/serve_load.py [text|many|lm] [--seconds 60] [--memory 600]
"""

import argparse
import asyncio
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.append(str(Path(__file__).parents[1]))
import serve_engine as engine
import torch
from safetensors.torch import load_file, save_file
from served import Served

import fusionkit
from fusionkit import SVD, Bundle
from fusionkit.serving.requests import Generate, Piece, Predict, Prediction

CONNECTIONS = 64


def many_bundle(folder: Path, copies: int = 25) -> Bundle:
    """The zoo's adapters, each many times, perturbed."""
    whole = engine.text_bundle(folder, 1)
    paths = {}
    for task in whole.tasks:
        adapter = engine.SHARED / "zoo/text" / task / "lora"
        weights = load_file(adapter / "adapter_model.safetensors")
        config = json.loads((folder / task / "config.json").read_text())
        for copy in range(copies):
            torch.manual_seed(copy)
            name = f"{task}_{copy}"
            (folder / name).mkdir()
            noised = {
                key: value + copy * 0.002 * torch.randn_like(value, dtype=torch.float32).to(value)
                for key, value in weights.items()
            }
            save_file(noised, folder / name / "adapter_model.safetensors")
            for file in ("adapter_config.json",):
                (folder / name / file).write_text((adapter / file).read_text())
            (folder / name / "config.json").write_text(json.dumps(config))
            paths[name] = str(folder / name)
    out, heads = folder / "many.bundle", ["classifier.*"]
    return fusionkit.compress(str(folder / "base"), paths, SVD(16), out, private=heads)


def asked(request: Any) -> tuple[str, dict[str, Any]]:
    """A request as it is sent."""
    if isinstance(request, Predict):
        return "/predict", {"task": request.task, "inputs": request.inputs}
    return "/v1/completions", {
        "model": request.task,
        "prompt": [*request.prompt],
        "max_tokens": request.max_tokens,
        "temperature": 0,
    }


def answered(request: Any, body: bytes) -> Any:
    """What the engine had answered."""
    found = json.loads(body)
    if "error" in found:
        return RuntimeError(found["error"]["message"])
    if isinstance(request, Generate):
        return Piece(found["choices"][0]["text"], found["usage"]["completion_tokens"], "stop")
    chances = found["predictions"][0]["probabilities"]
    return Prediction(tuple(chances), tuple(chances.values()))


async def load(
    port: int, requests: Sequence[Any], seconds: float
) -> tuple[list[tuple[Any, bytes]], list[float]]:
    """Ask for so long → requests with their answers' bodies, and seconds of each."""
    found: list[tuple[Any, bytes]] = []
    took: list[float] = []
    order, end = iter(range(10**9)), time.perf_counter() + seconds
    wires = []
    for request in requests:
        path, body = asked(request)
        content = json.dumps(body).encode()
        head = (
            f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(content)}\r\n\r\n"
        )
        wires.append(head.encode() + content)

    async def ask() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while (start := time.perf_counter()) < end:
            place = next(order) % len(requests)
            writer.write(wires[place])
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0])
            body = await reader.readexactly(length)
            took.append(time.perf_counter() - start)
            found.append((requests[place], body))
        writer.close()

    await asyncio.gather(*(ask() for _ in range(CONNECTIONS)))
    return found, took


class Processes:
    """A server's processes: their CPU time, and what memory they hold."""

    def __init__(self, server: Served) -> None:
        self._first = server.process.pid

    def all(self) -> dict[int, str]:
        """Each process's number, and which it is."""
        children = Path(f"/proc/{self._first}/task/{self._first}/children").read_text().split()
        found = {self._first: "main"}
        for place, child in enumerate(map(int, children)):
            command = Path(f"/proc/{child}/cmdline").read_bytes()
            kind = "model" if b"spawn_main" in command else f"forked {place}"
            if b"resource_tracker" not in command:
                found[child] = kind
        return found

    def cpu(self) -> dict[str, float]:
        """Seconds of CPU time of each."""
        ticks = os.sysconf("SC_CLK_TCK")
        found = {}
        for process, kind in self.all().items():
            fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
            found[kind] = (int(fields[11]) + int(fields[12])) / ticks
        return found

    def resident(self) -> int:
        """Bytes of memory that are theirs alone, or shared among them."""
        total = 0
        for process in self.all():
            for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += 1024 * int(line.split()[1])
        return total


def measured(kind: str, rank: int, seconds: float, memory: float) -> Iterator[str]:
    """Lines of what came out."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if kind == "lm":
            bundle = engine.lm_bundle(folder, rank)
            requests = engine.lm_requests(bundle, fusionkit.tokenizer(bundle))
        elif kind == "many":
            bundle = many_bundle(folder)
            requests = _of_copies(bundle)
        else:
            bundle = engine.text_bundle(folder, rank)
            requests = engine.text_requests(bundle)
        with Served(bundle.path, "--device", "cpu", "--dtype", "fp32") as server:
            asyncio.run(load(server.port, requests, 3))  # tasks are read
            loaded = _under_load(kind, bundle, server, requests, seconds)
            yield from loaded.lines
            if memory:
                yield from _over_time(kind, server, requests, memory)
        long = min(seconds, 20)
        if kind == "lm":
            bare = engine.bare_lm(bundle, requests, long, loaded.length, plain=True)
        else:
            bare = engine.bare_text(bundle, requests, long)
        rate, what = loaded.rate, "tokens/s" if kind == "lm" else "rows/s"
        yield f"{kind}: {rate:.0f} {what}; the bare model {bare:.0f}: {rate / bare:.0%}"
        engine.check(bundle, loaded.answers)
        yield f"{kind}: all {len(loaded.answers)} answers are their tasks' own"


def _of_copies(bundle: Bundle) -> list[Any]:
    found = []
    draw = random.Random(0)
    rows = {}
    for task in bundle.tasks:
        zoo = task.rpartition("_")[0]
        if zoo not in rows:
            rows[zoo] = list(engine.text_requests(_Only(zoo)))  # type: ignore[arg-type]
        found += [Predict(task, each.inputs) for each in draw.sample(rows[zoo], 6)]
    draw.shuffle(found)
    return found


class _Only:
    """Something with one task."""

    def __init__(self, task: str) -> None:
        self.tasks = (task,)


class _Loaded(NamedTuple):
    """What came of a load: rows or tokens a second, tokens of an answer, and all answers."""

    rate: float
    length: int
    lines: list[str]
    answers: list[tuple[Any, Any]]


def _under_load(
    kind: str, bundle: Bundle, server: Served, requests: Sequence[Any], seconds: float
) -> _Loaded:
    processes = Processes(server)
    before, start, own = processes.cpu(), time.perf_counter(), time.process_time()
    found, took = asyncio.run(load(server.port, requests, seconds))
    spent, own = time.perf_counter() - start, time.process_time() - own
    after = processes.cpu()
    answers = [(request, answered(request, body)) for request, body in found]
    tokens = sum(answer.tokens for _, answer in answers if isinstance(answer, Piece))
    took.sort()
    share = ", ".join(f"{k} {(after[k] - before[k]) / spent:.0%}" for k in after)
    lines = [
        f"{kind}: {len(bundle.tasks)} tasks, {len(found) / spent:.1f} requests/s, p50 "
        f"{1000 * statistics.median(took):.0f} ms, p99 {1000 * took[int(0.99 * len(took))]:.0f} ms",
        f"{kind}: of a core: {share}; the client {own / spent:.0%}",
    ]
    rate = (tokens if kind == "lm" else len(found)) / spent
    return _Loaded(rate, round(tokens / len(found)), lines, answers)


def _over_time(kind: str, server: Served, requests: Sequence[Any], seconds: float) -> Iterator[str]:
    processes, held = Processes(server), []
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        asyncio.run(load(server.port, requests, 10))
        held.append(processes.resident())
    minute = 6
    first, last = statistics.mean(held[:minute]), statistics.mean(held[-minute:])
    yield (
        f"{kind}: memory in the first minute {first / 1e6:.0f} MB, in the last, after "
        f"{seconds / 60:.0f} minutes, {last / 1e6:.0f} MB"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("kind", nargs="*", default=["text", "many", "lm"])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--memory", type=float, default=0)
    given = parser.parse_args()
    for each in given.kind:
        for line in measured(each, given.rank, given.seconds, given.memory):
            print(line, flush=True)
