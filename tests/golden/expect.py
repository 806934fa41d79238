"""What the golden bundles hold, read by the description of the format and by none of FusionKit.

Each bundle's tensors are read as plain safetensors and decoded here, plainly, bit by bit where
bits are coded. `python -m golden.expect`, from the folder `tests`, writes what comes out to
`expected/<bundle>.safetensors`; the test holds both the bundles and this script to these files.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from golden import coded
from safetensors.torch import load_file, save_file
from torch import Tensor

FOLDER = Path(__file__).parent
BUNDLES = ("emr", "lora", "dbms", "sketch", "directions", "trellis")
Parts = dict[str, Tensor]


def expected(bundle: str) -> dict[str, Tensor]:
    """Every task's whole model, by `<task>:<tensor>`."""
    folder = FOLDER / f"{bundle}.bundle"
    manifest = json.loads((folder / "manifest.json").read_text())
    base = load_file(FOLDER / "base.safetensors")
    shared = folder / "shared.safetensors"
    of_all = load_file(shared) if shared.exists() else {}
    found = {}
    for task in manifest["tasks"]:
        own = load_file(folder / f"task-{quote(task, safe='')}.safetensors")
        own = coded.unpacked(own, list(manifest["base"]["tensors"]))
        for name, tensor in _model(manifest, base, of_all, own).items():
            found[f"{task}:{name}"] = tensor.clone()  # safetensors stores no tensor twice
    return found


def _model(manifest: dict[str, Any], base: Parts, shared: Parts, own: Parts) -> dict[str, Tensor]:
    """One task's tensors: as stored, as the base's, or base plus delta, rounded once."""
    space = manifest["base"].get("space")
    state: dict[str, Tensor] = {}
    adapter: dict[str, Tensor] = {}
    for name, record in manifest["base"]["tensors"].items():
        start = base[name] if name in base else shared[f"start:{name}/tensor"]
        delta = None
        if record["role"] == "delta":
            parts = {**_parts(shared, ""), **_parts(own, "")}
            parts |= {**_parts(shared, name), **_parts(own, name)}
            delta = _DECODE[manifest["codec"]["id"]](manifest["codec"], parts, start.shape)
        whole = own.get(f"{name}/tensor", start)
        if delta is not None:
            whole = start.to(delta) + delta.view(start.shape)
        (adapter if name not in base else state)[name] = whole.to(start.dtype)
    state |= {key[: -len("/tensor")]: own[key] for key in own if key.endswith("/tensor")}
    for module in space["layout"]["modules"] if space else []:
        name = module["name"]
        a, b = (adapter[f"{name}.lora_{factor}.weight"].double() for factor in "AB")
        weight = state[f"{name}.weight"]
        state[f"{name}.weight"] = (weight + module["scale"] * b @ a).to(weight.dtype)
    return state | {alias: state[name] for alias, name in manifest["base"]["tied"].items()}


def _parts(file: Parts, name: str) -> Parts:
    """A tensor's parts; the whole model's have no name before the slash."""
    return {
        key.rpartition("/")[2]: part for key, part in file.items() if key.rpartition("/")[0] == name
    }


def _emr(codec: dict[str, Any], parts: Parts, shape: torch.Size) -> Tensor | None:
    """λ M ⊙ τ, in float32: each step is one rounding, and so the same everywhere."""
    if "elected" not in parts:
        return None
    mask = torch.tensor(list(_bits(parts["mask"]))[: shape.numel()])
    return parts["elected"].to(torch.float32) * mask * parts["rescaler"]


def _svd(codec: dict[str, Any], parts: Parts, shape: torch.Size) -> Tensor | None:
    """U Vᵀ of columns in int8, each with its scale."""
    if "left" not in parts:
        return None
    left, right = (parts[f].double() * parts[f"{f}.scale"].double() for f in ("left", "right"))
    return left @ right.T


def _dbms(codec: dict[str, Any], parts: Parts, shape: torch.Size) -> Tensor | None:
    """α u + β D: u in int4, a scale to each 128; D at its positions, and 0 elsewhere."""
    shift, scale = parts["scalars"].double()
    count = shape.numel()
    delta = torch.zeros(count, dtype=torch.float64)
    if "shift.merged" in parts:
        codes = [
            half - 8 for byte in parts["shift.merged"].tolist() for half in (byte & 15, byte >> 4)
        ]
        scales = parts["shift.merged.scale"].double()
        for place in range(count):
            delta[place] = shift * codes[place] * scales[place // 128]
    if "delta.positions" in parts:
        places = _positions(bytes(parts["delta.positions"].tolist()), count)
        for place, value in zip(places, parts["delta.values"].double(), strict=True):
            delta[place] += scale * value
    return delta


def _sketch(codec: dict[str, Any], parts: Parts, shape: torch.Size) -> Tensor | None:
    """Directions, and signs or integers, rotated back."""
    return coded.sketch(codec["settings"], parts, shape)


def _positions(coded: bytes, total: int) -> list[int]:
    """Golomb-Rice: a byte `k`, its top bit for the complement; a count in 8; quotients in unary,
    each ended by a one; then a stream for each of the remainders' k bits, all as one."""
    k, count = coded[0] & 0x7F, int.from_bytes(coded[1:9], "little")
    tail = -(-count * k // 8)
    unary = _bits(torch.tensor(list(coded[9 : len(coded) - tail]), dtype=torch.uint8))
    low = list(_bits(torch.tensor(list(coded[len(coded) - tail :]), dtype=torch.uint8)))
    places, last = [], -1
    for number in range(count):
        quotient = 0
        while not next(unary):
            quotient += 1
        remainder = sum(low[bit * count + number] << bit for bit in range(k))
        last += (quotient << k) + remainder + 1
        places.append(last)
    if coded[0] & 0x80:
        return sorted(set(range(total)) - set(places))
    return places


def _bits(packed: Tensor) -> Iterator[int]:
    """Bit after bit, the lowest of each byte first."""
    return (byte >> bit & 1 for byte in packed.tolist() for bit in range(8))


_DECODE = {"emr": _emr, "svd": _svd, "dbms": _dbms, "sketch": _sketch}

if __name__ == "__main__":
    (FOLDER / "expected").mkdir(exist_ok=True)
    for bundle in BUNDLES:
        save_file(expected(bundle), FOLDER / "expected" / f"{bundle}.safetensors")
