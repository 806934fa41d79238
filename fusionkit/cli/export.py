"""`fusionkit export`."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from fusionkit.bundles.bundle import Bundle
from fusionkit.bundles.export_model import export_task
from fusionkit.bundles.export_peft import Server, export_adapter
from fusionkit.bundles.served_folder import alike, export_adapters
from fusionkit.checkpoints.checkpoint import Checkpoint
from fusionkit.checkpoints.disk import bytes_of
from fusionkit.checkpoints.paths import open_path
from fusionkit.cli import report
from fusionkit.cli.arguments import call
from fusionkit.errors import UsageError, in_line, listing, size


def run(args: list[str]) -> None:
    """Write one task's whole model, or its delta as a PEFT adapter; or all as a server's."""
    named = [re.sub(r"^--for(?=$|=)", "--for_server", each) for each in args]
    call(export, named, positional="bundle")


def export(
    bundle: str,
    out: str,
    task: str | None = None,
    tasks: list[str] | None = None,
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

    With --for and no task: the adapters of all tasks in one folder, and the server's line.

    Args:
        bundle: the bundle's folder.
        out: a file: .safetensors (tied tensors once, as Hugging Face does), .pt or .bin; without
            a suffix, a folder that `from_pretrained` loads; or the adapter's folder; or that of
            all adapters.
        task: the task.
        tasks: of --for, these, where not all can be adapters.
        base: the base model, if it is not where it was when the bundle was made.
        strip_prefix: taken off the base's tensor names.
        add_prefix: put in front of the base's tensor names.
        variant: which of the base's weights, where its folder has several: `fp16`, say.
        dequantize: the base is quantised, and read as the unquantised model.
        format: `model`, or `peft`: a LoRA that `PeftModel.from_pretrained` loads (so --for).
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
    given = (
        base if base is None else Checkpoint.of(base, strip_prefix, add_prefix, variant, dequantize)
    )
    opened = Bundle.load(bundle, given)
    if task is None:
        if for_server is None:
            raise UsageError(
                "give the task (--task); all tasks at once are written for a server (--for vllm)"
            )
    elif format == "model" and for_server is None:
        written = export_task(opened, task, out, dtype, overwrite, max_shard_size)
        report.show(f"written: {written} ({size(_bytes(written))})")
        return
    settings: dict[str, Any] = {
        "rank": rank,
        "leave_out": leave_out or (),
        "base_name": base_name,
        "dtype": dtype or "fp16",
        "overwrite": overwrite,
    }
    if task is None:
        _for_vllm(opened, out, tasks or (), settings)
        return
    left_out = export_adapter(
        opened, task, out, lora_only=lora_only, for_server=for_server, **settings
    )
    if left_out:
        why = f"for {for_server}" if for_server else "as no LoRA can hold them"
        why = "as asked for" if leave_out else why
        report.show(f"left out, {why}:{listing(left_out)}")
    report.show(f"written: {open_path(out)} ({size(_bytes(open_path(out)))})")


def _for_vllm(bundle: Bundle, out: str, tasks: Sequence[str], settings: dict[str, Any]) -> None:
    """All tasks' adapters; says what each lacks, and the line that serves them."""
    served = export_adapters(bundle, out, tasks=tasks, **settings)
    alike_tasks: dict[str, list[str]] = {}
    for task, adapter in served.adapters.items():
        if adapter.left_out:
            alike_tasks.setdefault(listing(alike(adapter.left_out)), []).append(f"'{task}'")
    for left_out, names in alike_tasks.items():
        report.show(f"left out of {in_line(names)}, for vllm:{left_out}")
    path = open_path(out)
    report.show(f"written: {path} ({size(_bytes(path))})")
    report.show(served.line(path))


def _bytes(path: Path) -> int:
    return bytes_of(path) if path.is_dir() else path.stat().st_size
