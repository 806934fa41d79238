"""How much room on a disk a bundle, or a model, takes: told before the work that goes into it."""

from fusionkit.bundles.weights import TaskWeights
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
