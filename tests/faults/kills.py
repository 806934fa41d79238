"""Kill a run at each thing that it does to the disk: what is there then, what the next run does.

A process is killed (SIGKILL) before its n-th opening to write, renaming, removing or making of a
folder, for each n, over what writes bundles and models; a push, at moments of its time, as what it
changes is on a hub (a stand-in on loopback). After each kill what is written must be as before or
as after, and the same command, given again, must give what it gives undisturbed, and leave nothing
beside it. From the folder `tests`:

    python -m faults.kills [every n-th moment] [ways]
"""

import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hub import Hub
from processes import by_itself
from safetensors.torch import save_file
from tiny_net import TASKS, TinyNet, perturbed

from fusionkit import EMR, Bundle, Dense, add_tasks, compress
from fusionkit.bundles import journal
from fusionkit.bundles.export_model import export_task
from fusionkit.checkpoints import sole_writer
from fusionkit.errors import BundleError

_EVENTS = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree", "ctypes.dlopen")
_WRITES = os.O_WRONLY | os.O_RDWR


class Way(NamedTuple):
    """Something that writes: from what is there before to what is there after."""

    before: Callable[[Path], None]
    run: Callable[[Path], None]


def _compressed(folder: Path, codec: Any, tasks: tuple[str, ...], overwrite: bool) -> None:
    tuned = {task: folder / f"{task}.safetensors" for task in tasks}
    base, out = folder / "base.safetensors", folder / "bundle"
    compress(base, tuned, codec, out, private=["head.*"], overwrite=overwrite)


def _nothing(folder: Path) -> None:
    """No bundle."""


def _first(folder: Path) -> None:
    _compressed(folder, EMR(), TASKS, False)


def _two(folder: Path) -> None:
    _compressed(folder, Dense(), TASKS[:2], False)


def _overwrite(folder: Path) -> None:
    _compressed(folder, EMR(), TASKS, True)


def _overwrite_in_two_steps(folder: Path) -> None:
    sole_writer.exchange = lambda *_: False  # a file system that can't
    _overwrite(folder)


def _save(folder: Path) -> None:
    _compressed(folder / "other", EMR(), TASKS, True)
    Bundle(folder / "other" / "bundle").save(folder / "bundle", overwrite=True)


def _add(folder: Path) -> None:
    bundle = Bundle(folder / "bundle", folder / "base.safetensors")
    if "cat" not in bundle.tasks:
        add_tasks(bundle, {"cat": folder / "cat.safetensors"})


def _export(folder: Path) -> None:
    bundle = Bundle(folder / "bundle", folder / "base.safetensors")
    export_task(bundle, "bee", folder / "bee.out.safetensors", overwrite=True)


def _remove(folder: Path) -> None:
    bundle = Bundle(folder / "bundle")
    if "bee" in bundle.tasks:
        bundle.remove("bee")


_AGAIN = ("save", "export")
"""Ways that replace what is there."""
WAYS = {
    "first": Way(_nothing, _first),
    "overwrite": Way(_two, _overwrite),
    "overwrite in two steps": Way(_two, _overwrite_in_two_steps),
    "save": Way(_two, _save),
    "add": Way(_two, _add),
    "remove": Way(_first, _remove),
    "export": Way(_first, _export),
}


def made(folder: Path) -> Path:
    """A folder with the models of a family."""
    for where in (folder, folder / "other"):
        where.mkdir(parents=True)
        torch.manual_seed(0)
        base = TinyNet()
        _saved(base.state_dict(), where / "base.safetensors")
        for seed, task in enumerate(TASKS):
            _saved(perturbed(base, seed, 3), where / f"{task}.safetensors")
    return folder


def _saved(state: dict[str, torch.Tensor], path: Path) -> None:
    save_file({name: t.clone().contiguous() for name, t in state.items()}, path)


def is_to_disk(event: str, arguments: tuple[Any, ...], inside: str) -> bool:
    """Whether an event that is audited changes the disk, in a folder."""
    if event == "open":
        place = arguments[0]
        there = isinstance(place, str) and (inside in place or not os.path.isabs(place))
        return there and bool(arguments[2] & _WRITES)
    if event not in _EVENTS:
        return False
    return event == "ctypes.dlopen" or inside in os.path.abspath(os.fsdecode(str(arguments[0])))


def work(way: Way, folder: Path, moment: int) -> int:
    """Do it, up to a moment; how many moments there were."""
    count, inside = 0, str(folder)
    journal._DUE = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if is_to_disk(event, arguments, inside):
            count += 1
            if count == moment:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    way.run(folder)
    return count


def trials(name: str, folder: Path, moments: Iterator[int]) -> Iterator[str]:
    """Kill at each moment until there are no more; what was there, after each kill.

    Raises:
        AssertionError: the bundle is neither as before nor as after; or the next run gives another,
            or leaves something.
    """
    way, here, start = WAYS[name], folder / "work", folder / "start"
    way.before(made(here))
    before = found_in(here)
    shutil.copytree(here, start)
    assert by_itself(work, way, here, 0)[0] == 0
    after, whole = found_in(here), beside(here)
    for moment in moments:
        shutil.rmtree(here)
        shutil.copytree(start, here)
        code, _ = by_itself(work, way, here, moment)
        if code == 0:
            return
        assert code == -signal.SIGKILL
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what was left
            found = found_in(here)
            assert found in (before, after), f"{name}, {moment}: neither as before nor as after"
            if name == "first" and found == after:
                left = beside(here) - whole  # by a run that need not be repeated
                assert left <= {".bundle.lock"}, f"{name}, {moment}: {left}"
            elif found == before or "overwrite" in name or name in _AGAIN:
                assert by_itself(work, way, here, 0)[0] == 0, f"{name}, {moment}: can't be repeated"
                assert found_in(here) == after, f"{name}, {moment}: the next run gives another"
                assert beside(here) == whole, f"{name}, {moment}: {beside(here)}"
        yield "before" if found == before else "after"


def found_in(folder: Path) -> dict[str, bytes] | None:
    """The bundle's files, those that it names, and an exported one; None: there is no bundle."""
    try:
        bundle = Bundle(folder / "bundle")
    except BundleError:
        return None
    bundle.check(bundle.tasks)
    named = {"manifest.json", "shared.safetensors"}
    named |= {f"task-{task}.safetensors" for task in bundle.tasks}
    found = [bundle.path / name for name in named]
    found.append(folder / "bee.out.safetensors")
    return {path.name: path.read_bytes() for path in found if path.exists()}


def pushes(folder: Path, shares: Iterator[float]) -> Iterator[str]:
    """Kill a push at shares of its time; what the hub has, after each kill.

    Raises:
        AssertionError: it has neither what it had nor all that was pushed; or can't be pushed to.
    """
    _first(made(folder))
    hub = Hub()
    try:
        for _ in range(2):  # the first imports what it needs
            hub.repositories.clear()
            start = time.monotonic()
            assert by_itself(push, folder, hub.url, "a/undisturbed", None)[0] == 0
            took = time.monotonic() - start
        after = hub.repositories["a/undisturbed"][-1]
        for share in shares:
            hub.repositories.clear()
            code, _ = by_itself(push, folder, hub.url, "a/undisturbed", share * took)
            found = hub.repositories.get("a/undisturbed") or [{}]
            assert found[-1] in ({}, after), f"push, {share}: neither nothing nor all"
            assert code in (0, -signal.SIGKILL)
            assert by_itself(push, folder, hub.url, "a/undisturbed", None)[0] == 0
            assert hub.repositories["a/undisturbed"][-1] == after
            if code:
                yield "after" if found[-1] else "before"
    finally:
        hub.close()


def push(folder: Path, url: str, name: str, delay: float | None) -> None:
    """Push a bundle to a hub, until it is killed."""
    os.environ["HF_TOKEN"] = "hf_none"
    from huggingface_hub import constants

    constants.ENDPOINT, constants.HF_HUB_DISABLE_XET = url, True
    constants.HUGGINGFACE_CO_URL_TEMPLATE = url + "/{repo_id}/resolve/{revision}/{filename}"
    constants.HF_HUB_CACHE = str(folder / "cache")
    if delay is not None:
        timer = threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL))
        timer.daemon = True
        timer.start()
    Bundle(folder / "bundle").push_to_hub(name)


def beside(folder: Path) -> set[str]:
    """All that is in a folder, by name."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def main(every: int, ways: list[str]) -> None:
    """All of it, and a table."""
    for name in ways or [*WAYS, "push"]:
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            if name == "push":
                found = Counter(pushes(Path(folder) / "f", (i / 40 for i in range(0, 40, every))))
            else:
                found = Counter(trials(name, Path(folder), iter(range(1, 10**6, every))))
        spent = time.perf_counter() - start
        print(f"{name:24} {found.total():4} kills: {dict(found)}, {spent:.0f} s", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1, sys.argv[2:])
