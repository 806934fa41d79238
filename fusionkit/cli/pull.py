"""`fusionkit pull`."""

from fusionkit.bundles.bundle import Bundle
from fusionkit.bundles.format import MANIFEST
from fusionkit.checkpoints.output_folder import check_replaceable
from fusionkit.cli import report
from fusionkit.cli.arguments import call
from fusionkit.errors import size


def run(args: list[str]) -> None:
    """Get a bundle from the Hugging Face Hub."""
    call(pull, args, positional="bundle")


def pull(
    bundle: str,
    task: str | None = None,
    out: str | None = None,
    revision: str | None = None,
    overwrite: bool = False,
) -> None:
    """Get a bundle from the Hugging Face Hub; all of it, or what some tasks need.

    Args:
        bundle: its name there, OWNER/NAME.
        task: of this task alone; several with commas between.
        out: the folder; by default NAME, here.
        revision: a branch, tag or commit.
        overwrite: replace the bundle if it is there.
    """
    out = out or bundle.rpartition("/")[2]
    check_replaceable(out, overwrite, known_by=MANIFEST, mend="replace it with --overwrite")
    opened = Bundle.from_pretrained(bundle, revision=revision)
    chosen = [each.strip() for each in task.split(",")] if task else list(opened.tasks)
    opened.save(out, overwrite, chosen)
    report.show(f"written: {out} ({', '.join(chosen)}; {size(Bundle(out, key='').nbytes)})")
