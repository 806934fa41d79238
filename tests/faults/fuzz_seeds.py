"""The seeds of `faults.fuzz`: tiny bundles of real codecs, and real codes."""

import shutil
import warnings
from pathlib import Path

import torch
from safetensors.torch import save_file

from fusionkit import DBMS, EMR, SVD, Bundle, MagnitudePrune, Sketch, compress
from fusionkit.bundles.small_parts import Names, SmallPart
from fusionkit.codecs import entropy, packing
from fusionkit.codecs.base import DeltaCodec
from fusionkit.codecs.entropy import Bits, Gaps, Gaussian, Laplace

SHAPES = {"w": (8, 6), "b": (6,), "k": (4, 3, 2)}
CODECS: dict[str, DeltaCodec] = {
    "dbms": DBMS(MagnitudePrune(0.3, dtype="int4")),
    "emr": EMR(dtype="int8"),
    "sketch": Sketch(noise=1e-4),
    "svd": SVD(rank=1, dtype="int8"),
}


def write_seeds(folder: Path) -> None:
    """Write them all."""
    shutil.rmtree(folder / "bundles", ignore_errors=True)
    (folder / "bundles").mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    base = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    base["n"] = torch.arange(3)
    tuned = {}
    for task in ("x", "y"):
        moved = {
            name: base[name] + 0.1 * torch.randn(shape, generator=generator)
            for name, shape in SHAPES.items()
        }
        tuned[task] = {**moved, "n": base["n"] + 1, "head": torch.ones(2)}
    save_file(base, folder / "bundles" / "base.safetensors")
    for name, codec in CODECS.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compress(base, tuned, codec, folder / "bundles" / name, private=["head"])
    (folder / "codes").mkdir(exist_ok=True)
    for name, data in _codes(folder / "bundles").items():
        (folder / "codes" / name).write_bytes(data)


def _codes(folder: Path) -> dict[str, bytes]:
    positions = torch.tensor([3, 17, 18, 250, 300])
    packed = packing.pack_integers(torch.arange(20, dtype=torch.uint8) % 8, 3)
    numbers = [
        torch.tensor(each, dtype=torch.int32)
        for each in ([0, 1, -2, 5], [3, -1], [4, 0], [1, 0, 1, 1])
    ]
    models = Gaussian(2), Laplace(2), Gaps(2, 20), Bits()
    stream = entropy.encode(list(zip(numbers, models, strict=True)))
    found = {
        "positions": bytes([0, 1000 % 256, 1000 // 256, 0])
        + _bytes(packing.encode_positions(positions, 1000)),
        "many": bytes([0, 40, 0, 0]) + _bytes(packing.encode_positions(torch.arange(2, 40), 40)),
        "integers": bytes([1, 20, 2, 0]) + _bytes(packed),
        "stream": bytes([2, 4, 2, 2]) + _bytes(stream),
    }
    sketch = Bundle(folder / "sketch", folder / "base.safetensors")
    for name in ("w", "b"):
        rows, columns = SHAPES[name] if name == "w" else (1, 6)
        stored = sketch.task_parts("x", name)["codes"]
        found[f"sketch-{name}"] = bytes([3, rows - 1, columns - 1, 0]) + _bytes(stored)
    rows, columns = 40, 32
    delta = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    base = {"w": torch.ones(rows, columns)}
    noisy = compress(base, {"x": {"w": base["w"] + delta / 10}}, Sketch(noise=0.02))
    stored = noisy.task_parts("x", "w")["codes"]
    found["sketch-trellis"] = bytes([3, rows - 1, columns - 1, 0]) + _bytes(stored)
    name = "layer.0.weight"
    parts = [SmallPart(name, "codes", "U8", [5]), SmallPart("", "gains", "F16", [2, 2])]
    found["pack"] = bytes([4, 2, 0, 0]) + Names([name]).index(parts) + bytes(13)
    return found


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.numpy().tobytes()
