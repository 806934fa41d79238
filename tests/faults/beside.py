"""Readers beside writers of one bundle, for a while: what each of them is told, and gets.

Readers open the bundle, read from it what they can, copy it, and open it again; writers replace
it, add to it and remove from it, all at once and in processes of their own. What is read must be
what some writer wrote; an error must tell to open the bundle again, or, of a writer, that another
is at work. From the folder `tests`:

    python -m faults.beside [minutes] [readers] [writers]
"""

import random
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from faults.kills import made
from processes import forking
from tiny_net import TASKS
from torch import Tensor

from fusionkit import EMR, SVD, Bundle, Dense, add_tasks, compress
from fusionkit.errors import FusionKitError

CODECS = {"dense": Dense(), "emr": EMR(), "svd": SVD(rank=2)}
WELL = (
    "another run is writing there",
    "another run has changed it since",
    "has task '",
    "has no task '",
    "is the last task",
    "its tasks share a vector",
)
"""What a run may be told that is not alone."""
States = dict[tuple[str, str], dict[str, Tensor]]


def written(folder: Path) -> States:
    """What each codec makes of each task."""
    found = {}
    for name, codec in CODECS.items():
        bundle = compress(**_family(folder), codec=codec, out=folder / name)
        found |= {(name, task): bundle.state_dict(task) for task in TASKS}
    return found


def read(folder: Path, expected: States, seconds: float, seed: int) -> Counter[str]:
    """Read for a while."""
    draw, seen = random.Random(seed), Counter[str]()

    def all_of(bundle: Bundle) -> None:
        for task in bundle.tasks:
            state = bundle.state_dict(task)
            known = expected[bundle.codec.id, task]
            right = state.keys() == known.keys() and all(
                torch.equal(value, known[name]) for name, value in state.items()
            )
            seen["right" if right else "fault: other values"] += 1

    def turn() -> None:
        bundle = Bundle(folder / "bundle", folder / "base.safetensors")
        for _ in range(draw.randint(1, 4)):
            all_of(bundle)
            if draw.random() < 0.2:
                bundle.save(folder / f"copy{seed}", overwrite=True)
                all_of(Bundle(folder / f"copy{seed}", folder / "base.safetensors"))

    _for_a_while(turn, seconds, seen)
    return seen


def write(folder: Path, seconds: float, seed: int) -> Counter[str]:
    """Write for a while."""
    draw, seen = random.Random(seed), Counter[str]()

    def replace() -> None:
        codec = draw.choice(list(CODECS.values()))
        compress(**_family(folder), codec=codec, out=folder / "bundle", overwrite=True)

    def change() -> None:
        bundle = Bundle(folder / "bundle", folder / "base.safetensors")
        lacking = [task for task in TASKS if task not in bundle]
        if lacking and not bundle.tasks_share:
            task = draw.choice(lacking)
            add_tasks(bundle, {task: folder / f"{task}.safetensors"})
        else:
            bundle.remove(draw.choice(bundle.tasks))

    def copy() -> None:
        Bundle(folder / draw.choice(list(CODECS))).save(folder / "bundle", overwrite=True)

    def turn() -> None:
        draw.choice([replace, change, change, change, copy])()
        seen["right"] += 1

    _for_a_while(turn, seconds, seen)
    return seen


def _for_a_while(turn: Callable[[], None], seconds: float, seen: Counter[str]) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            turn()
        except FusionKitError as error:
            well = any(each in str(error) for each in WELL)
            seen["told" if well else f"fault: {error}"] += 1
        except Exception as error:
            seen[f"fault: {type(error).__name__}: {error}"] += 1


def _family(folder: Path) -> dict[str, Any]:
    tuned = {task: folder / f"{task}.safetensors" for task in TASKS}
    return {"base": folder / "base.safetensors", "finetuned": tuned, "private": ["head.*"]}


def beside(folder: Path, seconds: float, readers: int, writers: int) -> dict[str, Counter[str]]:
    """All at once.

    Returns:
        of readers and writers, what they were told and how often.
    """
    made(folder)
    expected = written(folder)
    compress(**_family(folder), codec=Dense(), out=folder / "bundle")
    context = forking()
    here, there = context.Pipe(duplex=False)
    processes = [
        context.Process(target=_answer, args=(there, "readers", read, folder, expected, seconds, i))
        for i in range(readers)
    ]
    processes += [
        context.Process(target=_answer, args=(there, "writers", write, folder, seconds, i))
        for i in range(writers)
    ]
    for process in processes:
        process.start()
    found = {"readers": Counter[str](), "writers": Counter[str]()}
    for _ in processes:
        who, seen = here.recv()
        found[who] += seen
    for process in processes:
        process.join()
        if process.exitcode:
            found["readers"][f"fault: a process ended with {process.exitcode}"] += 1
    left = {path.name for path in folder.iterdir() if path.name.startswith(".")}
    left |= {p.name for p in (folder / "bundle").iterdir() if p.name.startswith(".")}
    if left:
        found["writers"][f"fault: left behind {sorted(left)}"] += 1
    return found


def _answer(there: Any, who: str, function: Callable[..., Any], *arguments: Any) -> None:
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a moment without a bundle, brought back
        there.send((who, function(*arguments)))


def main(minutes: float, readers: int, writers: int) -> None:
    """All of it, and a table."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        found = beside(Path(folder) / "f", 60 * minutes, readers, writers)
    for who, seen in found.items():
        faults = {what: count for what, count in seen.items() if what.startswith("fault")}
        print(
            f"{who}: {seen.total()} trials, {seen['told']} told well, {seen['right']} right, "
            f"{sum(faults.values())} faults {faults or ''}"
        )
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    given = [float(each) for each in sys.argv[1:]]
    minutes, readers, writers = [*given, *(1.0, 8, 2)[len(given) :]]
    main(minutes, int(readers), int(writers))
