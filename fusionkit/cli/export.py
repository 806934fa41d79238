"""`fusionkit export`."""

import re
from pathlib import Path
from typing import Literal

from fusionkit.bundles.bundle import Bundle
from fusionkit.bundles.export_model import export_task
from fusionkit.bundles.export_peft import Server, export_adapter
from fusionkit.checkpoints.checkpoint import Checkpoint
from fusionkit.checkpoints.paths import open_path
from fusionkit.cli import report
from fusionkit.cli.arguments import call
from fusionkit.errors import listing, size


def run(args: list[str]) -> None:
    """Write one task's whole model, or its delta as a PEFT adapter."""
    named = [re.sub(r"^--for(?=$|=)", "--for_server", each) for each in args]
    call(export, named, positional="bundle")


def export(
    bundle: str,
    task: str,
    out: str,
    base: str | None = None,
    strip_prefix: str = "",
    add_prefix: str = "",
    variant: str | None = None,
    dequantize: bool = False,
    format: Literal["model", "peft"] = "model",  # noqa: A002
    rank: int | None = None,
    lora_only: bool = False,
    leave_out: list[str] | None = None,
    for_server: Server | None = None,
    base_name: str | None = None,
    dtype: str | None = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
) -> None:
    """Write one task's whole model to a file or a folder, or its delta as a PEFT adapter.

    Args:
        bundle: the bundle's folder.
        task: the task.
        out: a file: .safetensors (tied tensors once, as Hugging Face does), .pt or .bin; without
            a suffix, a folder that `from_pretrained` loads; or the adapter's folder.
        base: the base model, if it is not where it was when the bundle was made.
        strip_prefix: taken off the base's tensor names.
        add_prefix: put in front of the base's tensor names.
        variant: which of the base's weights, where its folder has several: `fp16`, say.
        dequantize: the base is quantised, and read as the unquantised model.
        format: `model`, or `peft`: a LoRA that `PeftModel.from_pretrained` loads.
        rank: of an adapter, where the codec has no factors: cut deltas to this rank.
        lora_only: of an adapter, leave out heads, norms and biases.
        leave_out: of an adapter, patterns of tensors to leave out.
        for_server: of an adapter (or --for): leave out what this server refuses: vllm.
        base_name: of an adapter, what it calls its base; by default the base's path.
        dtype: fp32, fp16 or bf16; of all floating-point tensors of a model (by default the
            base's), of the factors of an adapter (by default fp16).
        max_shard_size: of one file of a model's folder: bytes, or 5GB, 500MiB.
        overwrite: replace what is there.
    """
    opened = Bundle.load(
        bundle,
        None
        if base is None
        else Checkpoint.of(base, strip_prefix, add_prefix, variant, dequantize),
    )
    if format == "model":
        written = export_task(opened, task, out, dtype, overwrite, max_shard_size)
        report.show(f"written: {written} ({size(_bytes(written))})")
        return
    left_out = export_adapter(
        opened,
        task,
        out,
        rank=rank,
        lora_only=lora_only,
        leave_out=leave_out or (),
        for_server=for_server,
        base_name=base_name,
        dtype=dtype or "fp16",
        overwrite=overwrite,
    )
    if left_out:
        why = f"for {for_server}" if for_server else "as no LoRA can hold them"
        why = "as asked for" if leave_out else why
        report.show(f"left out, {why}:{listing(left_out)}")
    report.show(f"written: {open_path(out)} ({size(_bytes(open_path(out)))})")


def _bytes(path: Path) -> int:
    return sum(each.stat().st_size for each in (path.iterdir() if path.is_dir() else [path]))
