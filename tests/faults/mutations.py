"""Bundles with something in them changed at random: each is refused by name, or right.

A bit is flipped, a file cut short, a field of the manifest or of a part file's header set to
another value, a part's bytes are replaced; for most of them the checksums are mended, as an
attacker would. Then it is opened, decoded, looked at, switched to, added to, and a task removed.
Each must end, within two seconds, in an error that names something under the bundle's folder, or
in values. Where no checksum was mended, these are the sound bundle's to the bit. Where they were,
the bundle says what its values are: they are held to the names, dtypes and shapes of the base
(deltas to float32), but for tensors that the manifest has been made to leave out, and deltas, which
are read without the base, of tensors to which it gives another shape. From the folder `tests`:

    python -m faults.mutations [--trials N] [--seed S]
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from faults.campaign import Ended, campaign
from faults.lying_parts import same
from faults.sealed import CODECS, made, weights
from manifests import edit, replace_payload
from torch import nn

import fusionkit
from fusionkit import Bundle, add_tasks
from fusionkit.cli.contents import contents
from fusionkit.cli.report import bundle_table
from fusionkit.errors import FusionKitError

SLOW = 2.0
"""Seconds that no trial may take."""
_ODD: list[Any] = [
    *(None, True, -1, 0, 1, 3, 2**31, 2**63, 10**30, 1.5, -0.0, float("nan"), float("inf"), 1e300),
    *("", "x", "w", "/", "../..", "\ud800", "\0", "é", "fp16", "delta", "exact", "a" * 5000),
    *([], {}, [0], [[]], ["w"], {"w": 1}, {"w": "w"}, {"": ""}),
]


class Net(nn.Module):
    """What has the tensors of `faults.sealed`."""

    def __init__(self) -> None:
        super().__init__()
        for name, tensor in weights(0).items():
            if tensor.is_floating_point():
                self.register_parameter(name, nn.Parameter(tensor.clone()))
            else:
                self.register_buffer(name, tensor.clone())
        self.head = nn.Parameter(torch.zeros(3, 20))


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where something is in a JSON value: all of it."""
    found = [path] if path else []
    if isinstance(value, dict | list):
        for key, each in value.items() if isinstance(value, dict) else enumerate(value):
            found += places(each, (*path, key))
    return found


def spoil(value: Any, draw: random.Random) -> None:
    """Change one thing in a JSON value."""
    *path, last = draw.choice(places(value))
    inside = value
    for key in path:
        inside = inside[key]
    way = draw.randrange(5)
    if way == 0:
        del inside[last]
    elif way == 1 and isinstance(inside, dict):
        inside[draw.choice(["x", "", "\ud800", "w/", "__metadata__", "packed"])] = inside.pop(last)
    elif way == 2 and isinstance(inside[last], int):
        inside[last] += draw.choice([-1, 1, 8, 2**32])
    elif way == 3:
        for _ in range(draw.choice([1, 5, 100])):
            inside[last] = [inside[last]] if draw.random() < 0.5 else {"codec": inside[last]}
    else:
        inside[last] = draw.choice(_ODD)


def of_manifest(folder: Path, draw: random.Random) -> None:
    """A field of the manifest; the checksum agrees."""
    edit(folder, lambda manifest: spoil(manifest, draw))


def of_text(folder: Path, draw: random.Random) -> None:
    """Bytes of the manifest; the checksum does not agree, if it can be read at all."""
    path = folder / "manifest.json"
    raw = bytearray(path.read_bytes())
    raw[draw.randrange(len(raw))] ^= 1 << draw.randrange(8)
    path.write_bytes(raw[: draw.randrange(len(raw))] if draw.random() < 0.3 else raw)


def _file(folder: Path, draw: random.Random) -> Path:
    return draw.choice(sorted(folder.glob("*.safetensors")))


def _split(raw: bytes) -> tuple[bytes, bytes]:
    length = int.from_bytes(raw[:8], "little")
    return raw[8 : 8 + length], raw[8 + length :]


def of_bits(folder: Path, draw: random.Random) -> None:
    """Bits of a part file, or its end; nothing is mended."""
    path = _file(folder, draw)
    raw = bytearray(path.read_bytes())
    if draw.random() < 0.3:
        raw = raw[: draw.randrange(len(raw))]
    else:
        raw[draw.randrange(len(raw))] ^= 1 << draw.randrange(8)
    path.write_bytes(raw)


def of_header(folder: Path, draw: random.Random) -> None:
    """A field of a part file's header; all checksums agree."""
    path = _file(folder, draw)
    text, data = _split(path.read_bytes())
    header = json.loads(text)
    spoil(header, draw)
    replace_payload(folder, path.name, json.dumps(header).encode(), data)


def of_header_bytes(folder: Path, draw: random.Random) -> None:
    """Bytes of a part file's header; the manifest vouches for them."""
    path = _file(folder, draw)
    text, data = _split(path.read_bytes())
    raw = bytearray(text)
    raw[draw.randrange(len(raw))] = draw.randrange(256)
    replace_payload(folder, path.name, bytes(raw), data)


def of_data(folder: Path, draw: random.Random) -> None:
    """Bytes of the parts; their digests, and the header's, agree."""
    path = _file(folder, draw)
    text, data = _split(path.read_bytes())
    raw, header = bytearray(data), json.loads(text)
    for _ in range(draw.choice([1, 1, 4, 40])):
        if raw:
            raw[draw.randrange(len(raw))] = draw.choice([0, 255, draw.randrange(256)])
    metadata = header.pop("__metadata__")
    spans = [entry["data_offsets"] for entry in header.values()]
    digests = [hashlib.sha256(raw[start:end]).hexdigest()[:16] for start, end in spans]
    metadata["digests"] = "".join(digests)
    text = json.dumps({"__metadata__": metadata, **header}).encode()
    replace_payload(folder, path.name, text + b" " * (-len(text) % 8), bytes(raw))


MUTATIONS: dict[str, Callable[[Path, random.Random], None]] = {
    "manifest": of_manifest,
    "manifest's bytes": of_text,
    "part file's bits": of_bits,
    "header": of_header,
    "header's bytes": of_header_bytes,
    "data": of_data,
}


_UNMENDED = {"manifest's bytes", "part file's bits"}
"""Of these the checksums tell: a value that comes back is the sound bundle's."""


def uses(folder: Path) -> dict[str, Callable[[], Any]]:
    """What is done with a bundle, in turn: each gives what came of it."""

    def opened() -> Bundle:
        return Bundle(folder, weights(0))

    def inspected() -> Any:
        bundle = opened()
        bundle_table(bundle)
        return [contents(bundle, task) for task in bundle.tasks]

    def switched() -> dict[str, torch.Tensor]:
        net = Net()
        fusionkit.switch(net, opened(), "x")
        return {name: tensor.detach().clone() for name, tensor in net.state_dict().items()}

    def added() -> dict[str, torch.Tensor]:
        bundle = opened()
        add_tasks(bundle, {"z": weights(3)}, keep_shared=True)
        return bundle.state_dict("z")

    def removed() -> dict[str, torch.Tensor]:
        bundle = opened()
        bundle.remove("y")
        return bundle.state_dict("x")

    return {
        "weights": lambda: opened().state_dict("x"),
        "deltas": lambda: {n: opened().delta("y", n) for n in ("w", "c", "b")},
        "inspect": inspected,
        "switch": switched,
        "add": added,
        "remove": removed,
    }


def unlike(mutation: str, use: str, found: Any) -> str:
    """What of values that a changed bundle vouches for can't be the model's; empty: nothing."""
    if use == "inspect":
        return ""
    base = weights(0)
    if use == "deltas":
        base = {name: base[name].float() for name, each in found.items() if each is not None}
    for name, like in base.items():
        if name not in found:
            if mutation == "manifest":
                continue  # which does not speak of it any more
            return f"{name} is missing"
        # A delta is read without the base: of a manifest that was made anew, it has that's shape.
        told = use == "deltas" and mutation == "manifest"
        if found[name].dtype != like.dtype or (found[name].shape != like.shape and not told):
            return f"{name} is {found[name].dtype} {tuple(found[name].shape)}"
    return ""


def trial(
    start: Path, here: Path, mutation: str, draw: random.Random, wanted: dict[str, Any]
) -> tuple[str, str]:
    """One of them: how it ended, and of a fault, what.

    Args:
        start: the sound bundle.
        here: the folder of its copy that is changed.
        mutation: which of `MUTATIONS`.
        draw: of what is drawn.
        wanted: what each of `uses` gives with the sound bundle.
    """
    shutil.rmtree(here, ignore_errors=True)
    shutil.copytree(start, here)
    MUTATIONS[mutation](here, draw)
    ends, begun = set(), time.process_time()
    try:
        Bundle(here, weights(0))
    except FusionKitError as error:
        named, spent = str(here) in str(error), time.process_time() - begun
        if named and spent < SLOW:
            return "refused", ""  # and so is every use
    for use, run in uses(here).items():
        begun = time.process_time()
        try:
            found = run()
        except FusionKitError as error:
            if str(here) not in str(error):
                return "fault", f"{use}: no file is named: {type(error).__name__}: {error}"
            ends.add("refused")
        except Exception as error:
            return "fault", f"{use}: {type(error).__name__}: {error}"
        else:
            if mutation in _UNMENDED and not same(found, wanted[use]):
                return "fault", f"{use}: other values than the sound bundle's"
            if wrong := unlike(mutation, use, found):
                return "fault", f"{use}: {wrong}"
            ends.add("right")
        if time.process_time() - begun > SLOW:
            return "fault", f"{use}: took {time.process_time() - begun:.1f} s"
    return ("refused" if "refused" in ends else "right"), ""


def results(start: Path, here: Path) -> dict[str, Any]:
    """What each of `uses` gives with a sound bundle, of which a copy is made."""
    shutil.rmtree(here, ignore_errors=True)
    return {use: run() for use, run in uses(shutil.copytree(start, here)).items()}


def main(trials: int, seed: int) -> int:
    """All of them, and a table; how many faults there were."""
    with tempfile.TemporaryDirectory() as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = Path(temporary)
        sound = {
            name: made(codec, folder / name.replace(" ", "-")) for name, codec in CODECS.items()
        }
        # Whose first call imports and compiles, too.
        wanted = {name: results(start, folder / "copy") for name, start in sound.items()}

        def one(draw: random.Random, own: random.Random) -> Ended:
            name, mutation = draw.choice(list(CODECS)), draw.choice(list(MUTATIONS))
            end, what = trial(sound[name], folder / "spoiled", mutation, own, wanted[name])
            return Ended(mutation, end, f"{name}, {mutation}", what)

        return campaign(trials, seed, MUTATIONS, ("refused", "right", "fault"), one)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(min(main(given.trials, given.seed), 1))
