"""`fusionkit inspect`."""

import json as json_text
from typing import Any

from fusionkit.bundles.bundle import Bundle
from fusionkit.cli import report
from fusionkit.cli.arguments import call
from fusionkit.cli.contents import By, contents, contents_table
from fusionkit.errors import BundleError


def run(args: list[str]) -> None:
    """Show what a bundle holds."""
    after = [*args[1:], ""]  # `--json` alone is `--json true`
    given = [
        "--json=true" if each == "--json" and said not in ("true", "false") else each
        for each, said in zip(args, after, strict=True)
    ]
    call(inspect, given, positional="bundle")


def inspect(
    bundle: str,
    task: str | None = None,
    by: By = "tensor",
    finetuned: str | None = None,
    json: bool = False,
) -> None:
    """Show what a bundle holds; of one task, what its tensors take.

    Without a task no payload is read.

    Args:
        bundle: the bundle's folder.
        task: show what this task takes, by tensor.
        by: add that up by layer or kind.
        finetuned: the task's fine-tuned checkpoint, which its weights are held against.
        json: as JSON.
    """
    opened = Bundle.load(bundle)
    if task is None:
        if finetuned is not None or by != "tensor":
            raise BundleError(
                f"{opened.path}: of which task? give --task, one of {', '.join(opened.tasks)}"
            )
        if json:
            print(json_text.dumps(_whole(opened), indent=1))
        else:
            _show(opened)
        return
    found = contents(opened, task, by, finetuned)
    if json:
        parts = [each.as_json() for each in found]
        own = {"bundle": str(opened.path), "task": task, "by": by, "parts": parts}
        print(json_text.dumps(own, indent=1))
    else:
        report.show(contents_table(opened, task, by, found))


def _whole(opened: Bundle) -> dict[str, Any]:
    """A bundle's tasks and sizes."""
    manifest = opened.manifest
    return {
        "bundle": str(opened.path),
        "codec": manifest.codec,
        "base": manifest.base.source,
        "fingerprint": manifest.base.fingerprint,
        "parameters": manifest.base.parameters,
        "bytes": opened.nbytes,
        "bits_per_parameter": opened.bits_per_parameter,
        "shared_bytes": manifest.shared.bytes if manifest.shared else 0,
        "tasks": {
            task: {
                "bytes": record.file.bytes,
                "private_bytes": record.private_bytes,
                "checkpoint_bytes": record.checkpoint_bytes,
            }
            for task, record in manifest.tasks.items()
        },
    }


def _show(opened: Bundle) -> None:
    """A bundle's tasks and sizes, as a table, and what its base is."""
    base = opened.manifest.base
    if any(record.calibration for record in opened.manifest.tasks.values()):
        report.show(report.calibration_table(opened))
    report.show(
        report.bundle_table(opened),
        f"base: {base.source}\nfingerprint: {base.fingerprint}\n"
        f"compressed parameters per task: {base.parameters:,} "
        f"in {len(base.names('delta'))} tensors; "
        f"exact: {len(base.names('exact'))}; frozen: {len(base.names('frozen'))}\n"
        f"private: {', '.join(opened.manifest.private) or 'none'}"
        + "".join(
            f"\nrows that '{task}' adds to the vocabulary, stored whole: "
            + ", ".join(f"{name} {rows:+,}" for name, rows in record.added.items())
            for task, record in opened.manifest.tasks.items()
            if record.added
        )
        + (f"\nadapters themselves: {base.space.summary}" if base.space else ""),
    )
