"""Parts of another length, rank or dtype than they should have, checksums mended: all refused.

For every codec and plugin, every part is cut, emptied, made a scalar, one entry, longer, of another
dtype, of another rank; or is missing. What comes of it, decoded, as factors, added to the base, in
the whole model, and where a task is added against what all share, must be an error that names the
bundle, or what the sound bundle gives; and no compiled loop may read beyond an array's end, which
NUMBA_BOUNDSCHECK=1 tells. From the folder `tests`:

    NUMBA_BOUNDSCHECK=1 python -m faults.lying_parts [every n-th lie] [codecs]
"""

import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from faults.sealed import CODECS, Key, made, parts_of, weights, with_parts
from torch import Tensor

from fusionkit import Bundle, add_tasks
from fusionkit.checkpoints.safetensors_file import tensor_bytes
from fusionkit.codecs.base import DeltaCodec
from fusionkit.errors import FusionKitError

LIES: dict[str, Callable[[Tensor], Tensor | None]] = {
    "shorter": lambda t: t[:-1] if t.ndim else None,
    "much shorter": lambda t: t[: len(t) // 3] if t.ndim else None,
    "empty": lambda t: t.new_empty((0, *t.shape[1:])),
    "empty of one axis": lambda t: t.new_empty(0),
    "one": lambda t: t[:1] if t.ndim and len(t) > 1 else None,
    "scalar": lambda t: t.reshape(-1)[0].clone() if t.ndim and t.numel() else None,
    "longer": lambda t: torch.cat([t, t]) if t.ndim else None,
    "more columns": lambda t: torch.cat([t, t], 1) if t.ndim > 1 else None,
    "fewer columns": lambda t: t[:, :-1].contiguous() if t.ndim > 1 else None,
    "another axis": lambda t: t[None],
    "flat": lambda t: t.reshape(-1) if t.ndim > 1 else None,
    "bytes": lambda t: t.to(torch.uint8) if t.dtype != torch.uint8 else None,
    "floats": lambda t: t.to(torch.float64),
    "long integers": lambda t: t.to(torch.int64) if t.dtype != torch.int64 else None,
    "missing": lambda _: None,
}


def results(bundle: Bundle, name: str) -> dict[str, Any]:
    """What is made of a tensor of the first task, in each way; the error, where it is one."""
    base = weights(0)
    ways: dict[str, Callable[[], Any]] = {
        "whole model": lambda: bundle.state_dict("x"),
        "names": lambda: [list(bundle.task_names(task)) for task in bundle.tasks],
    }
    if name in base and bundle.roles.get(name) == "delta":
        ways |= {
            "decoded": lambda: bundle.delta("x", name),
            "factors": lambda: bundle.factors("x", name),
            "added": lambda: bundle.tensor("x", name, base[name]),
            "into memory": lambda: bundle.tensor(
                "x", name, base[name], torch.empty_like(base[name])
            ),
        }
    found: dict[str, Any] = {}
    for way, make in ways.items():
        try:
            found[way] = make()
        except Exception as error:
            found[way] = error
    return found


def with_another(folder: Path) -> Any:
    """A bundle's new task, encoded against what all share."""
    try:
        bundle = Bundle(folder, weights(0))
        add_tasks(bundle, {"z": weights(3)}, keep_shared=True)
        return bundle.state_dict("z")
    except Exception as error:
        return error


def judged(found: Any, sound: Any, folder: Path) -> str:
    """`refused`, `right`, or what is wrong."""
    if isinstance(found, FusionKitError):
        if "IndexError: index is out of bounds" in str(found):
            return f"beyond an array's end: {found}"
        return "refused" if str(folder) in str(found) else f"no file is named: {found}"
    if isinstance(found, BaseException):
        return f"{type(found).__name__}: {found}"
    return "right" if same(found, sound) else "other values"


def same(one: Any, other: Any) -> bool:
    """Whether two results are equal to the bit."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        alike = one.dtype == other.dtype and one.shape == other.shape
        return alike and bool(tensor_bytes(one) == tensor_bytes(other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
    if isinstance(one, tuple | list) and isinstance(other, tuple | list):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def trials(codec: DeltaCodec, folder: Path, every: int = 1) -> Iterator[tuple[str, str]]:
    """Each n-th lie about each part: what it was, and how each way of reading it ended."""
    start = made(codec, folder / "sound")
    parts = parts_of(Bundle(start))
    new, count = with_another(shutil.copytree(start, folder / "copy")), -1
    for key, tensor in parts.items():
        if key[0] == "y" or key[1] == "head":
            continue  # as of the first task; what a private tensor must be, no one knows
        sound = results(Bundle(start, weights(0)), key[1])
        for lie, change in LIES.items():
            changed = change(tensor)
            if changed is None and lie != "missing":
                continue
            count += 1
            if count % every == 0:
                yield from _lied(key, lie, changed, parts, folder, sound, new)


def _lied(
    key: Key,
    lie: str,
    changed: Tensor | None,
    parts: dict[Key, Tensor],
    folder: Path,
    sound: dict[str, Any],
    new: Any,
) -> Iterator[tuple[str, str]]:
    here = folder / "spoiled"
    shutil.rmtree(here, ignore_errors=True)
    shutil.copytree(folder / "sound", here)
    left = {**parts, key: changed} if changed is not None else {**parts}
    if changed is None:
        del left[key]
    with_parts(here, {each: t for each, t in left.items() if t is not None}, key[0])
    begun = time.perf_counter()
    ends = {
        way: (each, sound[way]) for way, each in results(Bundle(here, weights(0)), key[1]).items()
    }
    if key[0] == "":
        ends["adding"] = with_another(here), new
    for way, (found, wanted) in ends.items():
        end = judged(found, wanted, here)
        # What is not stored is the base's; and factors of other ranks are a basis, too.
        another = lie == "missing" or (way == "adding" and "columns" in lie)
        yield f"{key} {lie}, {way}", "right" if another and end == "other values" else end
    if time.perf_counter() - begun > 2:
        yield f"{key} {lie}", "slow"


def main(every: int, names: list[str]) -> int:
    """All of it, and a table; how many faults there were."""
    if os.environ.get("NUMBA_BOUNDSCHECK") != "1":
        print("without NUMBA_BOUNDSCHECK=1: what is read beyond an array's end goes unseen")
    whole = 0
    for name in names or CODECS:
        start, found = time.perf_counter(), Counter[str]()
        with tempfile.TemporaryDirectory() as folder:
            for what, end in trials(CODECS[name], Path(folder), every):
                well = end in ("refused", "right")
                found[end if well else "fault"] += 1
                if not well:
                    print(f"  {what}: {end[:300]}", flush=True)
        whole += found["fault"]
        print(f"{name:16} {dict(found)}, {time.perf_counter() - start:.0f} s", flush=True)
    return whole


if __name__ == "__main__":
    sys.exit(min(main(int(sys.argv[1]) if len(sys.argv) > 1 else 1, sys.argv[2:]), 1))
