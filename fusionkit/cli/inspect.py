"""`fusionkit inspect`."""

from fusionkit.bundles.bundle import Bundle
from fusionkit.cli import report
from fusionkit.cli.arguments import call


def run(args: list[str]) -> None:
    """Show what a bundle holds."""
    call(inspect, args, positional="bundle")


def inspect(bundle: str) -> None:
    """Show what a bundle holds, without reading a payload.

    Args:
        bundle: the bundle's folder.
    """
    opened = Bundle.load(bundle)
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
