"""How much room a bundle, a model or an adapter takes: told before the work that goes into it."""

from collections.abc import Sequence

import torch

from fusionkit.bundles.bundle import Bundle
from fusionkit.bundles.weights import TaskWeights
from fusionkit.checkpoints.checkpoint import matches
from fusionkit.checkpoints.disk import Needed
from fusionkit.codecs.base import DeltaCodec
from fusionkit.task_vectors.family import Family


def bundle_needs(family: Family, codec: DeltaCodec) -> Needed:
    """What a family's bundle takes.

    Certainly what is stored whole, as it is: tensors that are private. Likely what the codec says
    beside it, where it can; a delta that is zero takes nothing, and so that is not certain.
    """
    whole = sum(
        family.finetuned[task].specs[name].nbytes
        for task, names in family.private.items()
        for name in names
    )
    shapes = {name: family.base.specs[name].shape for name in family.names("delta")}
    payload = codec.likely_bytes(shapes, len(family.tasks)) or 0
    return Needed(whole, whole + payload)


def model_needs(weights: TaskWeights, restored: bool, streamed: bool = False) -> Needed:
    """What a task's whole model takes while it is written.

    Args:
        weights: the model's.
        restored: it has dtypes of its own, which are not known yet.
        streamed: as `write_model_file` does, which has the widest tensors twice.
    """
    sizes = weights.sizes
    total = sum(sizes.values())
    if streamed and sizes:
        total += sizes[max(sizes, key=lambda dtype: dtype.itemsize)]
    return Needed(0 if restored else total, total)


def adapter_needs(
    bundle: Bundle,
    tasks: Sequence[str],
    rank: int | None,
    dtype: torch.dtype,
    leave_out: Sequence[str] = (),
) -> Needed:
    """What tasks take as PEFT adapters, where one rank holds for all matrices.

    Nothing is certain: a delta may be zero, a tensor without a place. Likely is a product for each
    matrix, and what is stored whole.

    Args:
        bundle: the bundle.
        tasks: some of its tasks.
        rank: that deltas are cut to; by default the codec's.
        dtype: of the factors.
        leave_out: patterns of tensors that are left out.
    """
    rank = rank or getattr(bundle.codec, "rank", None)
    if not isinstance(rank, int):
        return Needed(0, 0)
    entries = sum(
        min(rank, *tensor.shape) * sum(tensor.shape)
        for name, tensor in bundle.manifest.base.tensors.items()
        if tensor.role == "delta" and len(tensor.shape) == 2 and not matches(name, leave_out)
    )
    whole = sum(bundle.manifest.tasks[task].private_bytes for task in tasks)
    return Needed(0, len(tasks) * entries * dtype.itemsize + whole)
