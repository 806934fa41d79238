"""Write one task's whole model as other tools read it: one file, or a folder."""

import re
from pathlib import Path

import torch

from fusionkit.bundles.bundle import Bundle
from fusionkit.bundles.export_folder import export_folder
from fusionkit.bundles.model_file import write_model_file
from fusionkit.bundles.space import model_needs
from fusionkit.bundles.weights import TaskWeights
from fusionkit.checkpoints.disk import check_writable
from fusionkit.checkpoints.output_folder import new_file
from fusionkit.checkpoints.paths import open_path, refuse_existing
from fusionkit.errors import BundleError

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_PICKLES = {".pt", ".pth", ".bin"}
_SUFFIX = re.compile(r"\.[A-Za-z]\w*")
"""What says that a file is meant; `Llama-3.2-1B` has no suffix."""


def export_task(
    bundle: Bundle,
    task: str,
    out: str | Path,
    dtype: str | None = None,
    overwrite: bool = False,
    max_shard_size: int | str = "5GB",
) -> Path:
    """Write a task's model; the file, or folder, appears whole or not at all.

    Args:
        bundle: the bundle, its base at hand.
        task: one of its tasks.
        out: `.safetensors` (tied tensors are written once, under the first name, as Hugging Face
            does; a tensor at a time is in memory) or `.pt`, `.pth`, `.bin` (a state dict with every
            name); or, without a suffix, a folder that `from_pretrained` loads, see `export_folder`;
            a URL, too.
        dtype: `fp32`, `fp16` or `bf16` for all floating-point tensors; by default the base's.
        overwrite: replace the file or folder if it is there.
        max_shard_size: of a folder's files, in bytes or as `5GB`, `500MiB`.

    Returns:
        the file's, or folder's, path.

    Raises:
        BundleError: it exists, its kind or the dtype is unknown, the bundle has no such task, the
            base can't be found, or nobody knows the configuration that a folder needs.
        WrongBaseError: the base at hand is another model.
    """
    out = open_path(out)
    if dtype is not None and dtype not in DTYPES:
        raise BundleError(f"unknown dtype '{dtype}'; expected {', '.join(DTYPES)}")
    if not _SUFFIX.fullmatch(out.suffix):
        target = DTYPES[dtype] if dtype else None
        return export_folder(bundle, task, out, target, overwrite, max_shard_size)
    if out.suffix not in {".safetensors", *_PICKLES}:
        raise BundleError(
            f"{out}: expected a name that ends in .safetensors, .pt, .pth or .bin, for a file, or "
            "one without a suffix, for a folder"
        )
    refuse_existing(out, overwrite, "choose another name, or set overwrite (--overwrite)")
    check_writable(out)
    if out.is_dir():
        raise BundleError(f"{out}: is a folder, where a file is to be written; choose another name")
    target = DTYPES[dtype] if dtype else None
    weights = TaskWeights(bundle, task, target)
    streamed = out.suffix == ".safetensors"
    needed = model_needs(weights, bundle.codec.restores and target is None, streamed)
    with new_file(out, needed) as new:
        if streamed:
            write_model_file(weights.items(), new, {"format": "pt", "task": task})
        else:
            with new.open("wb") as file:
                torch.save(bundle.state_dict(task, target), file)
    return out
