"""The command line: `compress`, `test` and `compare` read recipes through LightningCLI.

The recipe's schema is the constructors' signatures: `model` is `ReuseModule`, `data` any
LightningDataModule, `trainer` the Lightning Trainer. The same recipe serves every verb.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from fusionkit import registry
from fusionkit.errors import FusionKitError, listing

Verb = Callable[[list[str]], None]

OVERVIEW = """usage: fusionkit VERB [options]      (fusionkit VERB --help says more)

with a recipe (--config R.yaml; every setting can be overridden on the command line):
  compress   compress fine-tuned checkpoints into a bundle
  test       score every task, from a bundle or compressed on the fly
  compare    score several codecs over the same checkpoints: table, CSV, plot
  fuse       train families of adapters, fuse every set of tasks: table, CSV, plot
  calibrate  compress, with a few scalars per task learned on a few rows
  fit        fine-tune one task: in full, a LoRA, a linearized LoRA, or (IA)³

on a bundle:
  inspect    show what a bundle holds
  export     write one task's whole model to a file, or its delta as a PEFT adapter

without input:
  demo       the whole way on a small family of vision models, made on the spot
  codecs     list the installed codecs and merges
"""


def main(args: list[str] | None = None) -> None:
    """Run `fusionkit VERB …`; bad input ends with one clear message and exit code 1."""
    args = sys.argv[1:] if args is None else args
    if not args or args[0] in ("-h", "--help"):
        print(OVERVIEW, end="")
        return
    verb, rest = args[0], args[1:]
    if verb not in VERBS:
        print(f"fusionkit: no verb '{verb}'\n\n{OVERVIEW}", file=sys.stderr, end="")
        sys.exit(2)
    try:
        VERBS[verb](rest)
    except FusionKitError as error:
        print(f"fusionkit {verb}: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print(f"fusionkit {verb}: interrupted; nothing was left half-written", file=sys.stderr)
        sys.exit(130)


def compress(args: list[str]) -> None:
    """Compress fine-tuned checkpoints into a bundle: the recipe's `model.bundle`."""
    from fusionkit.cli import report
    from fusionkit.cli.compress import CompressCLI

    cli = CompressCLI(args)
    report.show(report.bundle_table(cli.compress()))


def test(args: list[str]) -> None:
    """Score every task of a recipe; writes scores.csv and scores.json to `--out`."""
    from fusionkit.cli import report
    from fusionkit.cli.test import TestCLI

    cli = TestCLI(args)
    scores = cli.test()
    report.show(report.scores_table(scores, cli.title()))
    for path in report.write_rows(scores.rows(), cli.out, "scores"):
        report.show(f"written: {path}")


def compare(args: list[str]) -> None:
    """Score several codecs over the same checkpoints; writes table and plot to `--out`."""
    from fusionkit.cli.compare import CompareCLI

    CompareCLI(args).compare()


def fit(args: list[str]) -> None:
    """Fine-tune one task of a recipe, in full or by an adapter."""
    from fusionkit.cli.fit import FitCLI

    FitCLI(args).fit()


def calibrate(args: list[str]) -> None:
    """Compress the fine-tuned checkpoints of a recipe, a few scalars per task learned."""
    from fusionkit.cli.calibrate import CalibrateCLI

    CalibrateCLI(args).calibrate()


def fuse(args: list[str]) -> None:
    """Train families of adapters, fuse every set of their tasks, and score the fusions."""
    from fusionkit.cli.fuse import FuseCLI

    FuseCLI(args).fuse()


def inspect(bundle: str) -> None:
    """Show what a bundle holds, without reading a payload.

    Args:
        bundle: the bundle's folder.
    """
    from fusionkit.bundles.bundle import Bundle
    from fusionkit.cli import report

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
        + (f"\nadapters themselves: {base.space.summary}" if base.space else ""),
    )


def export(
    bundle: str,
    task: str,
    out: str,
    base: str | None = None,
    strip_prefix: str = "",
    add_prefix: str = "",
    format: Literal["model", "peft"] = "model",  # noqa: A002
    rank: int | None = None,
    lora_only: bool = False,
    dtype: str | None = None,
    overwrite: bool = False,
) -> None:
    """Write one task's whole model to a file, or its delta as a PEFT adapter.

    Args:
        bundle: the bundle's folder.
        task: the task.
        out: the file: .safetensors (tied tensors once, as Hugging Face does), .pt or .bin; or
            the adapter's folder.
        base: the base model, if it is not where it was when the bundle was made.
        strip_prefix: taken off the base's tensor names.
        add_prefix: put in front of the base's tensor names.
        format: `model`, or `peft`: a LoRA that `PeftModel.from_pretrained` loads.
        rank: of an adapter, where the codec has no factors: cut deltas to this rank.
        lora_only: of an adapter, leave out heads, norms and biases.
        dtype: fp32, fp16 or bf16; of all floating-point tensors of a model (by default the
            base's), of the factors of an adapter (by default fp16).
        overwrite: replace what is there.
    """
    from fusionkit.bundles.bundle import Bundle
    from fusionkit.bundles.export_model import export_task
    from fusionkit.bundles.export_peft import export_adapter
    from fusionkit.checkpoints.checkpoint import Checkpoint
    from fusionkit.cli import report

    source = None if base is None else Checkpoint.of(base, strip_prefix, add_prefix)
    if format == "peft":
        folder = Path(out)
        left_out = export_adapter(
            Bundle.load(bundle, source),
            task,
            folder,
            rank=rank,
            lora_only=lora_only,
            dtype=dtype or "fp16",
            overwrite=overwrite,
        )
        if left_out:
            report.show(f"left out, as no LoRA can hold them:{listing(left_out)}")
        nbytes = sum(file.stat().st_size for file in folder.iterdir())
        report.show(f"written: {folder} ({report.size(nbytes)})")
        return
    path = export_task(Bundle.load(bundle, source), task, Path(out), dtype, overwrite)
    report.show(f"written: {path} ({report.size(path.stat().st_size)})")


def codecs() -> None:
    """List the installed codecs and merges, where they come from and what they do."""
    from rich.table import Table

    from fusionkit.cli import report

    failures = registry.load_all()
    for group in registry.GROUPS:
        table = Table("id", "class", "from", "what it does", title=group)
        for name in registry.names(group):
            if failure := failures.get(f"{group}:{name}"):
                table.add_row(name, "", "", f"can't be used: {failure}")
                continue
            plugin = registry.load(group, name)
            what = (plugin.__doc__ or "").strip().splitlines()
            table.add_row(
                name, plugin.__name__, " ".join(registry.origin(plugin)), what[0] if what else ""
            )
        report.show(table)


def demo(out: str = "out/demo", cache: str | None = None) -> None:
    """The whole way on a small family of vision models: train, compress, compare, plot.

    Args:
        out: folder for the table, the scores and the plot.
        cache: folder that keeps the trained models; by default the user's cache folder.
    """
    from fusionkit.cli.demo import run_demo

    run_demo(Path(out), Path(cache) if cache else None)


def _function(function: Callable[..., None], positional: str | None = None) -> Verb:
    """A verb whose options are a function's parameters."""

    def run(args: list[str]) -> None:
        from jsonargparse import ArgumentParser

        summary, _, _ = (function.__doc__ or "").partition("\n")
        parser = ArgumentParser(prog=f"fusionkit {function.__name__}", description=summary)
        if positional:
            parser.add_argument(positional, type=str, help=f"the {positional}'s folder")
        skip: set[str | int] = {positional} if positional else set()
        parser.add_function_arguments(function, skip=skip, as_group=False)
        function(**parser.parse_args(args).as_dict())

    return run


VERBS: dict[str, Verb] = {
    "compress": compress,
    "test": test,
    "compare": compare,
    "calibrate": calibrate,
    "fit": fit,
    "fuse": fuse,
    "inspect": _function(inspect, "bundle"),
    "export": _function(export, "bundle"),
    "codecs": _function(codecs),
    "demo": _function(demo),
}
"""What `fusionkit` can do."""
