"""Big checkpoints: compress against reading the inputs and writing the outputs, and peak memory.

A synthetic family in bf16, shards of safetensors with an index, layers of the shapes of a model of
7 billion parameters, as many as make the size asked for. The rival reads every input tensor with
safetensors (a copy of each, as any use needs) and writes as many bytes as the bundle has. Each way
runs in a process of its own, in turns, three times: with the inputs on disk, as a family larger
than memory is, and once more with as much of them in the system's cache as there is room for. What
is printed are medians. Then the seconds that each stage takes, added up over the threads.

    python tests/benchmarks/big.py [GB per checkpoint] [tasks] [folder] [codec …]
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from operator import itemgetter
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

import fusionkit
from fusionkit.bundles import manifest, part_writer
from fusionkit.checkpoints import safetensors_file
from fusionkit.codecs import payload

HIDDEN, INNER, WORDS = 4096, 11008, 32000
LAYER = {
    **{f"attention.{name}.weight": (HIDDEN, HIDDEN) for name in "qkvo"},
    "mlp.gate.weight": (INNER, HIDDEN),
    "mlp.up.weight": (INNER, HIDDEN),
    "mlp.down.weight": (HIDDEN, INNER),
    "norm.weight": (HIDDEN,),
}
CODECS = {
    "EMR": fusionkit.EMR(),
    "prune 10%, per tensor": fusionkit.MagnitudePrune(0.1, scope="tensor"),
    "prune 10%, whole model": fusionkit.MagnitudePrune(0.1),
    "dense fp16": fusionkit.Dense(),
}


def make(folder: Path, gigabytes: float, tasks: int) -> None:
    """A base and its fine-tuned models; a shard is a layer."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1 << 24, generator=generator)
    per_layer = 2 * sum(torch.Size(shape).numel() for shape in LAYER.values())
    layers = max(round((1e9 * gigabytes - 2 * WORDS * HIDDEN) / per_layer), 1)
    for place in range(tasks + 1):
        path = folder / ("base" if not place else f"task{place}")
        path.mkdir()
        weight_map = {}
        for layer in range(-1, layers):
            shapes = LAYER if layer >= 0 else {"embed.weight": (WORDS, HIDDEN)}
            shard = {}
            for each, (name, shape) in enumerate(shapes.items()):
                count = torch.Size(shape).numel()
                start = (layer * 7919 + each * 104729) % (1 << 22)
                copies = -(-count // (1 << 23))
                values = noise[start : start + (1 << 23)].repeat(copies)[:count].mul_(0.02)
                if place:
                    moved = noise[start + place * 65537 :][: 1 << 23].repeat(copies)[:count]
                    values.add_(moved, alpha=1e-3)
                shard[f"layer{layer}.{name}"] = values.bfloat16().view(shape)
            file = f"model-{layer + 1:05}.safetensors"
            save_file(shard, path / file)
            weight_map.update(dict.fromkeys(shard, file))
        index = {"metadata": {}, "weight_map": weight_map}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))


def evict(folder: Path) -> None:
    """Have the system forget what it has read."""
    for path in folder.rglob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def cache(folder: Path) -> None:
    """Have the system read all inputs, as far as it has room for them."""
    for path in folder.glob("*/model-*.safetensors"):
        with path.open("rb", buffering=0) as file:
            while file.read(1 << 26):
                pass


def read_and_write(folder: Path, tasks: int, nbytes: int) -> None:
    """The rival: copy every tensor into memory, and write a bundle's worth of bytes."""
    for path in [folder / "base", *(folder / f"task{place + 1}" for place in range(tasks))]:
        for shard in sorted(path.glob("*.safetensors")):
            with safe_open(shard, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    file.get_tensor(name).clone()
    chunk = torch.zeros(1 << 26, dtype=torch.uint8)
    for place in range(-(-nbytes // chunk.numel())):
        size = min(chunk.numel(), nbytes - place * chunk.numel())
        save_file({"x": chunk[:size].contiguous()}, folder / f"written-{place}.safetensors")


RIVAL, ROUNDS = "read and write", 3
STAGES = {
    "read": (safetensors_file._Pieces, "__call__"),
    "fingerprint": (manifest, "_sha256"),
    "checksum": (part_writer, "digest"),
    "write": (part_writer.PartWriter, "_write"),
    "finish": (part_writer.PartWriter, "finish"),
    "encode, all of it": (payload, "_one"),
}


def timed(seconds: dict[str, float]) -> None:
    """Have the stages add up their seconds, over all threads."""
    lock = threading.Lock()

    def wrap(stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            started = time.perf_counter()
            result = function(*given, **named)
            with lock:
                seconds[stage] += time.perf_counter() - started
            return result

        return call

    for stage, (owner, name) in STAGES.items():
        setattr(owner, name, wrap(stage, getattr(owner, name)))


def run(folder: Path, tasks: int, way: str, nbytes: int) -> None:
    """One way, in this process; prints seconds, peak memory, bytes written, and the stages."""
    stages: dict[str, float] = defaultdict(float)
    timed(stages)
    started = time.perf_counter()
    if way == RIVAL:
        read_and_write(folder, tasks, nbytes)
    else:
        finetuned = {f"task{place + 1}": folder / f"task{place + 1}" for place in range(tasks)}
        bundle = fusionkit.compress(
            folder / "base", finetuned, CODECS[way], folder / "bundle", overwrite=True
        )
        nbytes = bundle.nbytes
    seconds = time.perf_counter() - started
    # Not getrusage's, which a process takes over from the one that started it.
    status = Path("/proc/self/status").read_text()
    peak = 1024 * int(status.partition("VmHWM:")[2].split()[0])
    print(json.dumps([seconds, peak, nbytes, stages]))


def main(gigabytes: float, tasks: int, parent: str | None, codecs: list[str]) -> None:
    with tempfile.TemporaryDirectory(dir=parent) as temporary:
        folder = Path(temporary)
        make(folder, gigabytes, tasks)
        size = sum(path.stat().st_size for path in folder.rglob("*.safetensors")) / 1e9
        print(
            f"{tasks} tasks, {size:.1f} GB of inputs, {torch.get_num_threads()} threads", flush=True
        )
        for codec in codecs or CODECS:
            for kept in ("disk", "cache"):
                measure(folder, tasks, codec, kept)


def measure(folder: Path, tasks: int, codec: str, kept: str) -> None:
    """A codec against its rival, with the inputs on disk or in the cache."""
    runs: dict[str, list[Any]] = {codec: [], RIVAL: []}
    nbytes = 0
    for way in (codec, RIVAL) * ROUNDS:
        os.sync()  # what another has written is not written during this one's time
        (evict if kept == "disk" else cache)(folder)
        program = [sys.executable, __file__, "--run", str(folder), str(tasks), way, str(nbytes)]
        done = subprocess.run(program, capture_output=True, text=True, check=True)
        runs[way].append(json.loads(done.stdout.splitlines()[-1]))
        nbytes = runs[codec][0][2]
    seconds, peak, _, stages = sorted(runs[codec], key=itemgetter(0))[ROUNDS // 2]
    rival = median(run[0] for run in runs[RIVAL])
    print(
        f"{codec:22} from {kept}: {seconds:5.1f} s, peak {peak / 1e9:.2f} GB, bundle "
        f"{nbytes / 1e9:.2f} GB; read and write {rival:5.1f} s: {rival / seconds:.0%} of its speed"
    )
    told = ("encode, all of it", "read", "checksum", "fingerprint", "write", "finish")
    print("   " + ", ".join(f"{stage} {stages.get(stage, 0):.1f} s" for stage in told), flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--run"]:
        run(Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4], int(sys.argv[5]))
    else:
        given = sys.argv[1:]
        main(
            float(given[0]) if given else 4.0,
            int(given[1]) if len(given) > 1 else 3,
            given[2] if len(given) > 2 else None,
            given[3:],
        )
