"""`fusionkit compress BASE FINETUNED…`: the models that the line names, streamed."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from fusionkit.bundles.compress import compress
from fusionkit.bundles.format import MANIFEST
from fusionkit.checkpoints.output_folder import check_replaceable
from fusionkit.cli import report
from fusionkit.cli.line import line_help, models_in, parse_line
from fusionkit.cli.named_codec import as_config
from fusionkit.cli.named_models import task_of
from fusionkit.cli.progress import progress_bar
from fusionkit.codecs.base import DeltaCodec
from fusionkit.errors import in_line
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
    assert line.codec is not None
    base, finetuned, left_out = models_in("compress", line.words)
    out = str(line.own["out"] or f"{task_of(base)}.bundle")
    if not line.own["print_config"]:
        check_replaceable(out, line.own["overwrite"], known_by=MANIFEST, mend=MEND)
    told = line.how.told
    models = {task: line.how.opened(path) for task, path in finetuned.items()}
    start = line.how.opened(base)
    found = find_roles(start, models, **told, rounded=not line.codec.restores)
    told["private"] += found.private
    told["frozen"] += found.frozen
    if line.own["print_config"]:
        read = line.how.as_config
        named = {"base": read(base), "finetuned": {t: read(p) for t, p in finetuned.items()}}
        print(_recipe({**named, **told}, line.codec, out), end="")
        return
    tell(finetuned, left_out, found)
    with progress_bar("compressing") as callback:
        bundle = compress(
            start,
            models,
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


def tell(finetuned: Collection[str], left_out: Sequence[str], found: FoundRoles) -> None:
    """Say what was found, a line each.

    Args:
        finetuned: the tasks.
        left_out: what globs found, and is no model.
        found: which tensors are private, and which frozen.
    """
    count = len(finetuned)
    report.show(f"{count} task{'s' * (count > 1)}: {', '.join(finetuned)}")
    said = (
        ("left out, no model, or the base itself", left_out),
        ("private, as the base lacks them, stored whole", found.lacked),
        ("private, as their shapes are not the base's, stored whole", found.reshaped),
        ("frozen, as they equal the base's in every task, not stored", found.equal),
        ("frozen, as no task has any of its own, not stored", found.absent),
    )
    for words, patterns in said:
        if patterns:
            report.show(f"{words}: {in_line(patterns)}")


def as_model(told: Mapping[str, Any], codec: DeltaCodec | None) -> dict[str, Any]:
    """What a line says of models as a recipe's section `model`; what says nothing is left out."""
    model = {name: value for name, value in told.items() if value and value != "merged"}
    return model if codec is None else {**model, "codec": as_config(codec)}


def _recipe(told: Mapping[str, Any], codec: DeltaCodec, out: str) -> str:
    """The recipe that makes the same bundle."""
    import yaml

    model = {**as_model(told, codec), "bundle": out}
    head = (
        "# fusionkit compress --config THIS.yaml\n"
        "# For 'fusionkit test', add model.model (the network), data and trainer.\n"
    )
    return head + str(yaml.safe_dump({"model": model}, sort_keys=False, allow_unicode=True))
