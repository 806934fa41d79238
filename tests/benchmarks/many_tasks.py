"""Many tasks: opening a bundle, switching, and switching among tasks that are kept decoded.

Bundles of 10 and of many tasks of one small network, by EMR. The rival of the kept weights is the
switch that decodes; of the many tasks the few. All take turns in one process, files in the cache.
Then what is in memory, on the CPU or (`cuda`) on a GPU, once every task was switched to, against
the base's weights.

    python tests/benchmarks/many_tasks.py [tasks] [rounds] [device]
"""

import gc
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import fusionkit
from fusionkit.reuse.module import ReuseModule


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(512, 512) for _ in range(8)))


def main(many: int, rounds: int, device: str) -> None:
    model = network()
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(1)
    kinds = [
        {name: tensor + 0.01 * torch.randn_like(tensor) for name, tensor in base.items()}
        for _ in range(10)
    ]
    with tempfile.TemporaryDirectory() as folder:
        few = fusionkit.compress(
            base,
            {f"task{place}": kind for place, kind in enumerate(kinds)},
            fusionkit.EMR(),
            Path(folder) / "few",
        )
        few.save(Path(folder) / "many")
        all_of = fusionkit.Bundle(Path(folder) / "many", base)
        added = {f"task{place}": kinds[place % 10] for place in range(10, many)}
        fusionkit.add_tasks(all_of, added, keep_shared=True)
        paths = {10: few.path, many: all_of.path}
        report("open", {n: lambda p=p: fusionkit.Bundle(p) for n, p in paths.items()}, rounds)
        sizes = {n: (p / "manifest.json").stat().st_size for n, p in paths.items()}
        print("manifest, kB: " + ", ".join(f"{n} tasks {s / 1e3:.0f}" for n, s in sizes.items()))
        modules = {n: ReuseModule(network(), bundle=p) for n, p in paths.items()}
        report("switch", {n: switcher(m) for n, m in modules.items()}, rounds)
        kept = ReuseModule(network(), bundle=all_of.path, cache_bytes=200_000_000)
        for place in range(10):
            kept.switch(f"task{place}")
        ways = {"decoded anew": switcher(modules[many]), "kept": switcher(kept)}
        report(f"switch among 10 of {many}", ways, rounds)
        for count, path in paths.items():  # each in a process of its own
            call = [sys.executable, __file__, "--memory", str(path), str(count), device]
            subprocess.run(call, check=True)


def memory(path: str, count: int, device: torch.device) -> None:
    """What the module takes, in this process, in multiples of the base's weights."""
    weights = sum(tensor.nbytes for tensor in network().state_dict().values())
    before = anonymous()
    module = ReuseModule(network(), bundle=path).to(device)
    for place in range(count):
        module.switch(f"task{place}")
    line = f"{(anonymous() - before) / weights:.2f} times the base"
    if device.type == "cuda":
        line += f", on the GPU {torch.cuda.max_memory_allocated() / weights:.2f} at the peak"
    payload = sum(file.stat().st_size for file in Path(path).glob("*.safetensors")) / weights
    print(f"memory, {count} tasks, each switched to: {line}; payloads on disk {payload:.2f}")


def anonymous() -> int:
    """Bytes of this process's memory that are not a file's."""
    gc.collect()
    return 1024 * int(Path("/proc/self/status").read_text().partition("RssAnon:")[2].split()[0])


def switcher(module: ReuseModule) -> Callable[[], None]:
    turn = [0]

    def switch() -> None:
        turn[0] = (turn[0] + 1) % 10
        module.switch(f"task{turn[0]}")

    return switch


def report(what: str, ways: dict[object, Callable[[], object]], rounds: int) -> None:
    times: dict[object, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 2):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            if turn > 1:
                times[name].append(time.perf_counter() - started)
    medians = {name: 1e3 * statistics.median(values) for name, values in times.items()}
    first, *_, last = medians.values()
    shown = ", ".join(f"{name}: {value:.2f} ms" for name, value in medians.items())
    print(f"{what}: {shown}; ratio {last / first:.2f}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--memory"]:
        memory(sys.argv[2], int(sys.argv[3]), torch.device(sys.argv[4]))
        sys.exit()
    given = (*sys.argv[1:], *("1000", "40", "cpu")[len(sys.argv) - 1 :])
    main(int(given[0]), int(given[1]), given[2])
