"""Switch a model ten thousand times over a cache that holds a few of its tasks: what it costs.

More tasks than files that stay open, and than the cache holds. Every so often the model must be,
bit by bit, the task's; memory and open files must stay as they are once all tasks were seen. From
the folder `tests`:

    python -m faults.switches [switches] [tasks]
"""

import gc
import os
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch
from tiny_net import TinyNet, perturbed

import fusionkit
from fusionkit import EMR, Bundle, ReuseModule, compress

_LOOK = 97
"""Switches after which the model's weights are looked at."""


class Found(NamedTuple):
    """What came of it.

    Attributes:
        switches: how many.
        compared: after how many the weights were looked at.
        wrong: how many of these were another task's.
        memory: by how many bytes the process grew, once all was seen.
        files: by how many open files.
    """

    switches: int
    compared: int
    wrong: int
    memory: int
    files: int


def memory() -> int:
    """Bytes of this process that are resident."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def files() -> int:
    """Files that this process has open."""
    return len(os.listdir("/proc/self/fd"))


def switched(folder: Path, switches: int, tasks: int) -> Found:
    """Switch between tasks, drawn by lot; half by a module with a cache, half in place."""
    torch.manual_seed(0)
    base = TinyNet()
    tuned = {f"t{i}": perturbed(base, i, 3) for i in range(tasks)}
    bundle = compress(base, tuned, EMR(), folder / "b", private=["head.*"])
    known = {task: bundle.state_dict(task) for task in bundle.tasks}
    room = 5 * sum(tensor.nbytes for tensor in known["t0"].values())
    live = Bundle(folder / "b", fusionkit.Checkpoint.of(base).in_memory())
    module = ReuseModule(TinyNet(), bundle, base=base, cache_bytes=room)
    plain = TinyNet()
    draw, wrong, compared = random.Random(0), 0, 0
    before = (0, 0)
    for count in range(switches):
        if count == max(switches // 4, 4 * tasks):
            before = memory(), files()
        first = count < 2 * tasks  # each by either way
        task = f"t{count // 2}" if first else draw.choice(list(known))
        model = module.model if count % 2 else plain
        if count % 2:
            module.switch(task)
        else:
            fusionkit.switch(plain, live, task)
        if count % _LOOK == 0:
            state = model.state_dict()
            compared += 1
            wrong += any(not torch.equal(state[n], value) for n, value in known[task].items())
    return Found(switches, compared, wrong, memory() - before[0], files() - before[1])


def main(switches: int, tasks: int) -> None:
    """All of it, and a line."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        found = switched(Path(folder), switches, tasks)
    print(
        f"{found.switches} switches among {tasks} tasks, {found.compared} compared, {found.wrong} "
        f"wrong; memory {found.memory / 1e6:+.1f} MB, open files {found.files:+d}; "
        f"{time.perf_counter() - start:.0f} s"
    )


if __name__ == "__main__":
    given = [int(each) for each in sys.argv[1:]]
    main(*[*given, *(10_000, 40)[len(given) :]])
