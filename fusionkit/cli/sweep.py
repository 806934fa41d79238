"""`fusionkit sweep`, and the function behind it: bytes and weight errors over codecs' settings."""

import time
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import fields
from itertools import product
from pathlib import Path
from types import FunctionType
from typing import Any, Self, TypeVar, cast

import torch
from jsonargparse import ArgumentError, ArgumentParser
from lightning.pytorch.cli import LightningArgumentParser

from fusionkit.bundles.bundle import Bundle
from fusionkit.bundles.compress import check_codec, temporary_bundle
from fusionkit.bundles.format import refuse_alike
from fusionkit.bundles.manifest import BaseRecord
from fusionkit.bundles.weight_error import base_energy, weight_error
from fusionkit.checkpoints.adapters.modules import Adapters
from fusionkit.checkpoints.checkpoint import Checkpoint, Source
from fusionkit.cli import report
from fusionkit.cli.launch import device_of
from fusionkit.cli.progress import progress_bar
from fusionkit.cli.recipe import RecipeCLI
from fusionkit.cli.sweep_report import SweepReport, Swept, TaskCost
from fusionkit.codecs.base import DeltaCodec
from fusionkit.errors import CodecError, FusionKitError
from fusionkit.registry import Plugin
from fusionkit.task_vectors.family import Family
from fusionkit.task_vectors.vectors import TaskVectors
from fusionkit.task_vectors.workers import Progress, Workers

Result = TypeVar("Result")


def run(args: list[str]) -> None:
    """Sizes and weight errors of codecs over their settings; table and plot go to `--out`."""
    cli = SweepCLI(args)
    results, out = cli.sweep(), cli.out
    report.show(results)
    report.show(f"written: {out / 'sweep.csv'}, {out / 'sweep.json'}")
    report.show(f"plot: {out / 'sweep.png'}" if report.plots_are_there() else report.WITHOUT_PLOTS)


class SweepCLI(RecipeCLI):
    """Sizes and weight errors of codecs over their settings, without data: table, CSV, plot.

    In one process, whatever the recipe's trainer has.
    """

    verb = "sweep"
    needs_trainer = False

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """`--codecs` and `--grid`."""
        parser.add_argument(
            "--codecs",
            type=dict[str, Any],
            default={},
            help="a name for the table → a codec; of settings that are lists all combinations",
        )
        parser.add_argument(
            "--grid",
            type=dict[str, Any],
            default={},
            help="settings of the recipe's own codec → lists of values, likewise",
        )

    def before_instantiate_classes(self) -> None:
        """Make the codecs, before anything is read; the recipe's own bundle is none of them."""
        self._recipe = self.config.clone()
        configs = dict(self.config["codecs"])
        if self.config["grid"] or not configs:
            name, config = self._own()
            if name in configs:
                raise FusionKitError(
                    f"codecs: '{name}' is what the grid of the recipe's codec is called; give it "
                    "another name"
                )
            configs[name] = config
        self._codecs = {name: self._made(name, config) for name, config in configs.items()}
        self.config["codecs"] = {}  # or the parser makes of a setting's list one codec, too
        self.config["model"]["codec"] = self.config["model"]["bundle"] = None

    def sweep(self) -> SweepReport:
        """Compress at each setting; write as rows come in."""
        self.config = self._recipe
        self.save_config()
        module = self.model
        return sweep(
            module.base_weights if module.base_source is None else module.base_source,
            module.finetuned,
            self._codecs,
            self.out,
            private=module.private,
            frozen=module.frozen,
            adapters=module.adapters,
            rename=module.rename,
            ignore=module.ignore,
            device=device_of(self.config["trainer"]),
            verbose=True,
        )

    def _own(self) -> tuple[str, dict[str, Any]]:
        """The recipe's own codec, with the grid among its settings."""
        codec, grid = self.config["model"]["codec"], self.config["grid"]
        if codec is None:
            raise FusionKitError(
                "there is no codec to sweep; give --model.codec CODEC and --grid.SETTING "
                "'[VALUE, …]', or `codecs` in the recipe"
            )
        config = codec.as_dict()
        name, settings = config["class_path"].rpartition(".")[2], config.setdefault("init_args", {})
        if unknown := [key for key in grid if key not in settings]:
            raise FusionKitError(
                f"grid: {name} has no setting '{unknown[0]}'; it has {', '.join(settings)}"
            )
        return name, {**config, "init_args": {**settings, **grid}}

    def _made(self, name: str, config: Any) -> list[DeltaCodec]:
        """One codec if it can be made as it is; or one for each combination of what lists hold."""
        config = self.parser.values.value(config, DeltaCodec, f"codecs.{name}")
        parser = ArgumentParser(exit_on_error=False)
        parser.add_argument("--codec", type=DeltaCodec)
        try:
            parsed = [parser.parse_object({"codec": config})]
        except ArgumentError as error:
            parsed = [self._parsed(parser, name, each) for each in _combinations(config)]
            if not parsed:
                raise FusionKitError(
                    f"codecs: {name}: a setting's list is empty; give it a value to try"
                ) from error
        try:
            return [parser.instantiate_classes(each)["codec"] for each in parsed]
        except CodecError as error:
            mend = "\nwhat the recipe's codec has, --model.codec.SETTING null takes out"
            said = f"{error}{mend}" if self.config["grid"] else str(error)
            raise CodecError(f"codecs: {name}: {said}") from error

    def _parsed(self, parser: ArgumentParser, name: str, config: Any) -> Any:
        try:
            return parser.parse_object({"codec": config})
        except ArgumentError as error:
            self.parser.error(f"codecs: {name}: {error}")


def sweep(
    base: Source | Checkpoint,
    finetuned: Mapping[str, Source | Checkpoint],
    codecs: Mapping[str, DeltaCodec | list[DeltaCodec]],
    out: str | Path | None = None,
    *,
    private: Sequence[str] = (),
    frozen: Sequence[str] = (),
    adapters: Adapters = "merged",
    rename: Mapping[str, str] | None = None,
    ignore: Sequence[str] = (),
    device: torch.device | str = "cpu",
    verbose: bool = False,
) -> SweepReport:
    """Compress a family by each codec, measure bytes and weight errors, and keep nothing.

    Neither data nor a model is needed. A bundle is written for each, one after the other, to a
    temporary folder, so that its sizes are those of files; memory is a few of the largest tensors.
    What several settings find out alike, as the singular values that `Sketch` places bits by, is
    found once.

    Args:
        base: as for `compress`.
        finetuned: as for `compress`.
        codecs: a name for the table → a codec, or a list of one codec at several settings.
        out: folder for `sweep.csv` and `sweep.json`, written as rows come in, and `sweep.png`; by
            default nothing is written.
        private: as for `compress`.
        frozen: as for `compress`.
        adapters: as for `compress`.
        rename: as for `compress`.
        ignore: as for `compress`.
        device: where to compute.
        verbose: show in the terminal what is being done.

    Returns:
        a row for each codec and setting, with what each task takes; a notebook shows its table.

    Raises:
        FusionKitError: there is no codec; `out` is a URL; checkpoints or codecs don't fit
            together, as for `compress`.
    """
    folder = None if out is None else report.local_folder(out)
    grids = {n: each if isinstance(each, list) else [each] for n, each in codecs.items()}
    if not any(grids.values()):
        raise FusionKitError("there is no codec to sweep; give a name and a codec, or several")
    for codec in (each for grid in grids.values() for each in grid):
        check_codec(codec)
    refuse_alike(finetuned)
    family = _SweptFamily(base, finetuned, private, frozen, adapters, None, device, rename, ignore)
    record, energy = BaseRecord.of(family), base_energy(family)
    results = SweepReport()
    for name, grid in grids.items():
        for codec, (point, curve) in zip(grid, _labels(grid), strict=True):
            with progress_bar(" ".join(filter(None, [name, point, curve])), verbose) as callback:
                own = family.told(callback)
                started = time.perf_counter()
                bundle = temporary_bundle(own, codec, record)
                seconds = time.perf_counter() - started + own.spared
            row = Swept(
                name,
                point,
                curve,
                repr(codec),
                bundle.nbytes,
                report.checkpoint_bytes(bundle) / bundle.nbytes,
                bundle.bits_per_parameter,
                seconds,
                _costs(bundle, family, energy),
            )
            del bundle  # off the disk, before the next is written
            results.rows.append(row)
            if folder is not None:
                report.write_rows(results.flat(), folder, "sweep")
    if folder is not None and report.plots_are_there():
        results.plot(folder / "sweep.png")
    return results


class _SweptFamily(Family):
    """A family that is compressed again and again: what is asked of it again is answered at once.

    Only of functions that stand in a module by themselves, and so know of nothing but a tensor's
    vectors.

    Attributes:
        spared: seconds that the passes took that were not made again.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._answers: dict[Callable[[TaskVectors], Any], tuple[dict[str, Any], float]] = {}
        self.spared = 0.0

    def told(self, progress: Progress | None) -> Self:
        """The same family, its answers shared, with a callback of its own.

        Args:
            progress: called after each tensor of each pass.
        """
        other = copy(self)
        workers = Workers(progress=progress)
        other.workers = workers.one_by_one() if self.base.serial else workers
        return other

    def changed(self, changes: Callable[[TaskVectors], Any]) -> Self:
        """As of any family; of changed vectors nothing is known yet."""
        other = super().changed(changes)
        other._answers = {}
        return other

    def each(self, function: Callable[[TaskVectors], Result]) -> dict[str, Result]:
        """As of any family."""
        if not isinstance(function, FunctionType) or "<" in function.__qualname__:
            return super().each(function)
        if function in self._answers:
            found, seconds = self._answers[function]
            self.spared += seconds
            return cast(dict[str, Result], found)
        started = time.perf_counter()
        answers = super().each(function)
        self._answers[function] = answers, time.perf_counter() - started
        return answers


def _costs(bundle: Bundle, family: Family, base: float) -> dict[str, TaskCost]:
    """What each task takes, and how far off its weights are."""
    costs = {}
    for task, record in bundle.manifest.tasks.items():
        found = weight_error(bundle, family, task)
        nbytes = record.file.bytes
        costs[task] = TaskCost(
            nbytes,
            8 * (nbytes - record.private_bytes) / max(family.parameters, 1),
            found.relative,
            found.projection,
            found.error / base if base else None,
        )
    return costs


def _combinations(config: Any) -> list[Any]:
    """A codec's config, or one for each combination of the values that lists in it hold."""
    if not isinstance(config, Mapping):
        return [config]
    choices = {
        key: [each for value in _values(own) for each in _combinations(value)]
        for key, own in config.items()
    }
    return [dict(zip(choices, each, strict=True)) for each in product(*choices.values())]


def _values(own: Any) -> list[Any]:
    return own if isinstance(own, list) else [own]


def _labels(codecs: Sequence[DeltaCodec]) -> list[tuple[str, str]]:
    """What tells one codec's settings apart: that with the most values, and all others."""
    settings = [_settings(codec) for codec in codecs]
    names = dict.fromkeys(name for own in settings for name in own)
    counts = {name: len({own.get(name) for own in settings}) for name in names}
    varied = [name for name, count in counts.items() if count > 1]
    point = max(varied, key=counts.__getitem__, default="")
    others = [name for name in varied if name != point]
    return [(_told([point], own), _told(others, own)) for own in settings]


def _settings(codec: Plugin, prefix: str = "") -> dict[str, str]:
    """A codec's settings as text, those of codecs and merges within it among them."""
    found = {prefix or "class": type(codec).__name__}
    for each in fields(cast(Any, codec)):
        value, name = getattr(codec, each.name), f"{prefix}.{each.name}".lstrip(".")
        found |= _settings(value, name) if isinstance(value, Plugin) else {name: str(value)}
    return found


def _told(names: Sequence[str], settings: Mapping[str, str]) -> str:
    return " ".join(f"{name}={settings[name]}" for name in names if name in settings)
