"""`fusionkit compress BASE FINETUNED…`: the models that the line names, streamed."""

from typing import Any

from fusionkit.bundles.compress import compress
from fusionkit.bundles.format import MANIFEST
from fusionkit.checkpoints.output_folder import check_replaceable
from fusionkit.cli import report
from fusionkit.cli.line import Line, as_list, line_help, parse_line
from fusionkit.cli.named_codec import as_config
from fusionkit.cli.named_models import task_of
from fusionkit.cli.progress import progress_bar
from fusionkit.task_vectors.found_roles import FoundRoles, find_roles

MEND = "replace it with --overwrite"
_HELP = ("--help", "-h", "--help-all")


def options(out: str | None = None, overwrite: bool = False, print_config: bool = False) -> None:
    """What `fusionkit compress BASE FINETUNED…` takes beside models and codec.

    Args:
        out: the bundle's folder; by default the base's name with `.bundle`, here.
        overwrite: replace the bundle if it is there.
        print_config: print the line as a recipe, and do nothing.
    """


def run(args: list[str]) -> None:
    """Compress fine-tuned models into a bundle."""
    if {*_HELP} & {*args}:
        print(line_help("compress", "Compress fine-tuned models into a bundle.", args, options))
    else:
        compress_line(args)


def compress_line(args: list[str]) -> None:
    """Compress the models that a command line names; nothing is imported but what that takes.

    Raises:
        FusionKitError: the line can't be understood, the models don't fit together, or the bundle
            is there already.
    """
    line = parse_line("compress", args, options)
    out = str(line.own["out"] or f"{task_of(line.base)}.bundle")
    if not line.own["print_config"]:
        check_replaceable(out, line.own["overwrite"], known_by=MANIFEST, mend=MEND)
    how = line.how
    told: dict[str, Any] = {
        "private": as_list(how.private),
        "frozen": as_list(how.frozen),
        "adapters": how.adapters,
        "rename": how.rename or {},
        "ignore": as_list(how.ignore),
    }
    found = find_roles(line.base, line.finetuned, **told, rounded=not line.codec.restores)
    told["private"] += found.private
    told["frozen"] += found.frozen
    if line.own["print_config"]:
        print(_recipe(line, out, told), end="")
        return
    _tell(line, found)
    with progress_bar("compressing") as callback:
        bundle = compress(
            line.base,
            line.finetuned,
            line.codec,
            out,
            overwrite=line.own["overwrite"],
            progress=callback,
            **told,
        )
    report.show(report.bundle_table(bundle))
    report.show(
        f"written: {out}\nnext: fusionkit inspect {out}\n"
        f"      fusionkit export {out} --task {bundle.tasks[0]} --out {bundle.tasks[0]}"
    )


def _tell(line: Line, found: FoundRoles) -> None:
    """Say what was found, a line each."""
    count = len(line.finetuned)
    report.show(f"{count} task{'s' * (count > 1)}: {', '.join(line.finetuned)}")
    said = (
        (("left out, no model, or the base itself",), line.left_out),
        (("private, as the base lacks them", "stored whole"), found.lacked),
        (("private, as their shapes are not the base's", "stored whole"), found.reshaped),
        (("frozen, as they equal the base's in every task", "not stored"), found.equal),
        (("frozen, as no task has any of its own", "not stored"), found.absent),
    )
    for words, patterns in said:
        if patterns:
            report.show(f"{', '.join(words)}: {_few(patterns)}")


def _few(items: tuple[str, ...], limit: int = 6) -> str:
    more = len(items) - limit
    return ", ".join(items[:limit]) + (f" and {more} more" if more > 0 else "")


def _recipe(line: Line, out: str, told: dict[str, Any]) -> str:
    """The recipe that makes the same bundle."""
    import yaml

    model = {
        "base": line.base,
        "finetuned": line.finetuned,
        **{name: value for name, value in told.items() if value and value != "merged"},
        "codec": as_config(line.codec),
        "bundle": out,
    }
    head = (
        "# fusionkit compress --config THIS.yaml\n"
        "# For 'fusionkit test', add model.model (the network), data and trainer.\n"
    )
    return head + str(yaml.safe_dump({"model": model}, sort_keys=False, allow_unicode=True))
