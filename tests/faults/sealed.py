"""Small bundles of every codec, and how one is spoiled so that its checksums agree again."""

import warnings
from pathlib import Path

import torch
from fusionkit_bitdelta import BitDelta
from fusionkit_compeft import ComPEFT
from fusionkit_dare import DARE
from fusionkit_jd import JointDiagonalization
from fusionkit_lossless import Lossless
from fusionkit_tallmask import TALLMask
from fusionkit_tsv import TSVCompress
from msgspec.structs import replace
from torch import Tensor

from fusionkit import (
    DBMS,
    EMR,
    SVD,
    TIES,
    Bundle,
    Dense,
    MagnitudePrune,
    Mean,
    Merged,
    Sketch,
    compress,
)
from fusionkit.bundles.format import SHARED, task_file
from fusionkit.bundles.part_writer import Part, PartWriter
from fusionkit.bundles.small_parts import Names
from fusionkit.codecs.base import DeltaCodec

Key = tuple[str, str, str]
"""A task, or nothing of what all share; a tensor; a part."""

CODECS: dict[str, DeltaCodec] = {
    "dense": Dense(),
    "dense int3": Dense("int3"),
    "emr": EMR(),
    "emr by tensor": EMR(rescale="l2", scope="tensor", dtype="int8"),
    "emr int3": EMR(dtype="int3"),
    "prune": MagnitudePrune(0.3),
    "prune merged": MagnitudePrune(0.3, merge=TIES(), dtype="int8"),
    "merged": Merged(Mean(), "int4"),
    "svd": SVD(rank=2),
    "svd int3": SVD(rank=2, dtype="int3"),
    "sketch": Sketch(bits=12.0),
    "directions": Sketch(bits=12.0, sketch=False),
    "dbms": DBMS(MagnitudePrune(0.3)),
    "dbms of emr": DBMS(EMR(), SVD(rank=1), (0.0, 1.0)),
    "bitdelta": BitDelta(keep=()),
    "bitdelta by row": BitDelta(keep=(), scales="row"),
    "compeft": ComPEFT(0.3),
    "dare": DARE(0.5),
    "dare spread": DARE(0.5, spread=0.1, shrink=0.5, dtype="int8"),
    "jd": JointDiagonalization(rank=2),
    "lossless": Lossless(),
    "tall mask": TALLMask(),
    "tsv": TSVCompress(),
}
TASKS = ("x", "y")


def weights(seed: int) -> dict[str, Tensor]:
    """The base's; a fine-tuned model's differ in all but the dtypes."""
    generator = torch.Generator().manual_seed(0)
    moved = torch.Generator().manual_seed(seed)
    shapes = {"w": (24, 20), "v": (20, 16), "c": (6, 4, 3), "b": (20,), "s": ()}
    state = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    if seed:
        for name, tensor in state.items():
            state[name] = tensor + 0.3 * torch.randn(tensor.shape, generator=moved)
        state["head"] = torch.randn(3, 20, generator=moved)
    state["n"] = torch.arange(3) + seed
    return state


def made(codec: DeltaCodec, folder: Path) -> Path:
    """A bundle of two tasks in a folder that is not there yet."""
    tuned = {task: weights(place) for place, task in enumerate(TASKS, 1)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what so few bits leave
        compress(weights(0), tuned, codec, folder, private=["head"])
    return folder


def parts_of(bundle: Bundle) -> dict[Key, Tensor]:
    """All parts of a bundle."""
    found: dict[Key, Tensor] = {}
    for task in bundle.tasks:
        for name in bundle.task_names(task):
            for part, tensor in bundle.task_parts(task, name).items():
                found[task, name, part] = tensor
    for name in ("", *bundle.manifest.base.tensors):
        for part, tensor in bundle.shared_parts(name).items():
            found["", name, part] = tensor
    return found


def with_parts(folder: Path, parts: dict[Key, Tensor], task: str) -> None:
    """Write a task's file, or the shared one, anew, and the manifest that vouches for it."""
    bundle = Bundle(folder)
    names = Names(bundle.manifest.base.tensors)
    path = folder / (task_file(task) if task else SHARED)
    if not any(owner == task for owner, _, _ in parts):
        assert not task
        replace(bundle.manifest, shared=None).write(folder)
        return
    writer = PartWriter(path, packed=names if bundle.codec.packs else None)
    for (owner, name, part), tensor in parts.items():
        if owner == task:
            writer.add(Part.of(f"{name}/{part}", tensor))
    record, manifest = writer.finish(), bundle.manifest
    if task:
        tasks = {**manifest.tasks, task: replace(manifest.tasks[task], file=record)}
        replace(manifest, tasks=tasks).write(folder)
    else:
        replace(manifest, shared=record).write(folder)
