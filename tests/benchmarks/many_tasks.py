"""Many tasks: opening a bundle, switching, and switching among tasks that are kept decoded.

Bundles of 10 and of many tasks of one small network, by EMR. The rival of the kept weights is the
switch that decodes; of the many tasks the few. All take turns in one process, files in the cache.
Then what is in memory, on the CPU or (`cuda`) on a GPU, once every task was switched to: the bytes
of all live tensors, against the base's weights; and of the process, against those before.

    python tests/benchmarks/many_tasks.py [tasks] [rounds] [device]
"""

import gc
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import fusionkit
from fusionkit.module import ReuseModule


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
        del modules, kept, ways, few, all_of, added, kinds, model
        weights = sum(tensor.nbytes for tensor in base.values())
        base.clear()
        memory(paths, weights, torch.device(device))


def memory(paths: dict[int, Path], weights: int, device: torch.device) -> None:
    """What is there beside the base's weights, in multiples of them."""
    for count, path in paths.items():
        before = live(device)
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        module = ReuseModule(network(), bundle=path).to(device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        for place in range(count):
            module.switch(f"task{place}")
        kept = (live(device) - before) / weights
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - resident) * 1024 / weights
        line = f"{count} tasks, each switched to: {kept:.2f} times the base in live tensors"
        if device.type == "cuda":
            line += f", peak {torch.cuda.max_memory_allocated() / weights:.2f}"
        print(f"{line}; the process grew by {grown:.2f}, its files' pages included")
        del module


def live(device: torch.device) -> int:
    """Bytes of all tensors that are alive on a device, but for those that are files."""
    gc.collect()
    storages = {}
    for each in gc.get_objects():
        if isinstance(each, torch.Tensor) and each.device.type == device.type:
            storage = each.untyped_storage()
            if storage.filename is None:
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


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
    given = (*sys.argv[1:], *("1000", "40", "cpu")[len(sys.argv) - 1 :])
    main(int(given[0]), int(given[1]), given[2])
