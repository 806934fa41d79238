"""`fusionkit compare`, and the function behind it."""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser

from fusionkit.bundles.bundle import Bundle
from fusionkit.calibration.calibrate import EPOCHS, calibrate
from fusionkit.calibration.settings import Calibration
from fusionkit.cli import report
from fusionkit.cli.progress import progress_bar
from fusionkit.cli.recipe import quiet
from fusionkit.cli.report import Comparison, ComparisonReport
from fusionkit.cli.test import EvaluationCLI, evaluate, plain_trainer
from fusionkit.codecs.base import DeltaCodec
from fusionkit.codecs.dbms import DBMS
from fusionkit.reuse.module import ReuseModule
from fusionkit.task_vectors.family import Family
from fusionkit.tasks.scores import Scores
from fusionkit.tasks.spread import Spread

_CALIBRATION = Calibration()


def run(args: list[str]) -> None:
    """Score several codecs over the same checkpoints; writes table and plot to `--out`."""
    cli = CompareCLI(args)
    results, out = cli.compare(), cli.out
    report.show(results)
    report.show(f"written: {out / 'compare.csv'}, {out / 'compare.json'}")
    report.show(f"plot: {out / 'compare.png'}")


class CompareCLI(EvaluationCLI):
    """Score several codecs over the recipe's checkpoints: one table, CSV, JSON and plot."""

    verb = "compare"

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """`--codecs`, and what else to make of each."""
        super().add_arguments_to_parser(parser)
        parser.add_argument(
            "--codecs",
            type=dict[str, DeltaCodec],
            required=True,
            help="what to compare: a name for the table → a codec",
        )
        parser.add_argument(
            "--dbms", type=bool, default=False, help="each codec within a calibrated DBMS, too"
        )
        parser.add_argument(
            "--calibrated",
            type=bool,
            default=False,
            help="each codec that has parts to learn calibrated, too",
        )
        parser.add_argument(
            "--shift", type=DeltaCodec | None, default=None, help="that DBMS's shift"
        )
        parser.add_argument(
            "--seeds",
            type=list[int],
            default=[],
            help="calibrate with each of these seeds, and report mean and spread",
        )

    def compare(self) -> ComparisonReport:
        """Evaluate the fine-tuned models, then each codec; write as rows come in."""
        self.save_config()
        settings = self.config["trainer"]
        told = settings["max_epochs"] is not None or settings["max_steps"] != -1
        limit = {} if told else {"max_epochs": EPOCHS}
        return compare(
            self.model,
            self.datamodule,
            self.config_init["codecs"],
            self.out,
            calibrated=self.config["calibrated"],
            dbms=self.config["dbms"],
            shift=self.config_init["shift"],
            seeds=self.config["seeds"],
            settings=self.config_init["calibration"],
            trainer=self.trainer,
            make_trainer=lambda: self.another_trainer(**limit),
            spread=self.config["spread"],
            verbose=True,
        )


@quiet()
def compare(
    module: ReuseModule,
    datamodule: Any,
    codecs: Mapping[str, DeltaCodec],
    out: str | Path | None = None,
    *,
    calibrated: bool = False,
    dbms: bool = False,
    shift: DeltaCodec | None = None,
    seeds: Sequence[int] = (),
    settings: Calibration = _CALIBRATION,
    trainer: Trainer | None = None,
    make_trainer: Callable[[], Trainer] | None = None,
    spread: Spread = "rows",
    verbose: bool = False,
) -> ComparisonReport:
    """Score the fine-tuned models as they are, then each codec over them.

    When all is done the module reuses the fine-tuned models, uncompressed.

    Args:
        module: its base and fine-tuned checkpoints are used.
        datamodule: the tasks' test rows; for calibration their training rows, too.
        codecs: a name for the table → a codec; a DBMS is calibrated always.
        out: folder for `compare.csv` and `compare.json`, written as rows come in, and
            `compare.png`; by default nothing is written.
        calibrated: each codec that has parts to learn calibrated, too.
        dbms: each codec within a calibrated DBMS, too.
        shift: that DBMS's shift; by default DBMS's own default.
        seeds: calibrate with each of these, in place of the settings'; such a row has the mean of
            the scores, and how far they scatter.
        settings: how to calibrate.
        trainer: evaluates; by default a plain one.
        make_trainer: makes one for each calibration; by default plain ones, of so many epochs as
            `calibrate` has.
        spread: what each of several processes evaluates.
        verbose: show in the terminal what is being done.

    Returns:
        a row for the fine-tuned models, and one for each codec; a notebook shows its table.

    Raises:
        FusionKitError: `out` is a URL; tasks, data, codecs or checkpoints don't fit together.
    """
    folder = None if out is None else report.local_folder(out)
    make = make_trainer or (lambda: plain_trainer(max_epochs=EPOCHS))
    trainer = trainer or plain_trainer()
    bench = _Bench(module, datamodule, trainer, make, settings, seeds, spread, verbose)
    family, own = module.family(), module.finetuned_scores
    results = ComparisonReport()

    def add(row: Comparison) -> None:
        results.rows.append(row)
        if folder is not None:
            report.write_rows(results.flat(), folder, "compare")

    try:
        add(bench.finetuned(family))
        module.finetuned_scores = results.rows[0].scores.values
        for name, codec, calibrates in _each(codecs, calibrated, dbms, shift):
            measure = bench.calibrated if calibrates else bench.compressed
            add(measure(name, codec))
    finally:
        module.finetuned_scores = own
        module.reuse(family)
    if folder is not None:
        results.plot(folder / "compare.png")
    return results


def _each(
    codecs: Mapping[str, DeltaCodec], calibrated: bool, dbms: bool, shift: DeltaCodec | None
) -> Iterator[tuple[str, DeltaCodec, bool]]:
    """Each codec, and whether to calibrate it; after it what more was asked for of it."""
    for name, codec in codecs.items():
        yield name, codec, isinstance(codec, DBMS)
        if calibrated and codec.learned:
            yield f"{name}, calibrated", codec, True
        if dbms and not isinstance(codec, DBMS) and not codec.unscalable:
            yield f"DBMS {name}", DBMS(codec, shift), True


@dataclass(frozen=True)
class _Bench:
    """Measures one row after the other; its fields are the arguments of `compare`."""

    module: ReuseModule
    datamodule: Any
    trainer: Trainer
    make_trainer: Callable[[], Trainer]
    settings: Calibration
    seeds: Sequence[int]
    spread: Spread
    verbose: bool

    def finetuned(self, family: Family) -> Comparison:
        """The fine-tuned models, uncompressed."""
        self._say("fine-tuned models, uncompressed")
        self.module.reuse(family)
        self.module.finetuned_scores = None
        scores = self._evaluate()
        return Comparison(
            "fine-tuned",
            "",
            replace(scores, finetuned=scores.values),
            sum(checkpoint.nbytes for checkpoint in family.finetuned.values()),
            1.0,
            family.bits_per_parameter,
            switch_seconds=self._switch_seconds(),
        )

    def compressed(self, name: str, codec: DeltaCodec) -> Comparison:
        """A codec without data."""
        started = time.perf_counter()
        with progress_bar(name, self.verbose) as callback:
            bundle = self.module.compress(codec=codec, progress=callback)
        seconds = time.perf_counter() - started
        self.module.reuse(bundle)
        return self._row(name, bundle, seconds)

    def calibrated(self, name: str, codec: DeltaCodec) -> Comparison:
        """Calibrated with each seed: the mean of the scores, and how far the means scatter."""
        found = []
        for seed in self.seeds or [self.settings.seed]:
            self._say(f"{name}, seed {seed}")
            started = time.perf_counter()
            bundle = calibrate(
                self.module,
                self.datamodule,
                settings=replace(self.settings, seed=seed),
                codec=codec,
                trainer=self.make_trainer(),
            )
            seconds = time.perf_counter() - started
            self._say(report.calibration_table(bundle))
            found.append(self._row(name, bundle, seconds))
        return report.averaged(found)

    def _row(self, name: str, bundle: Bundle, seconds: float) -> Comparison:
        return Comparison(
            name,
            repr(bundle.codec),
            self._evaluate(),
            bundle.nbytes,
            report.checkpoint_bytes(bundle) / bundle.nbytes,
            bundle.bits_per_parameter,
            seconds,
            self._switch_seconds(),
        )

    def _evaluate(self) -> Scores:
        return evaluate(self.module, self.datamodule, self.trainer, self.spread)

    def _switch_seconds(self) -> float:
        """Median over the tasks, files in cache."""
        times = []
        for task in self.module.tasks:
            started = time.perf_counter()
            self.module.switch(task)
            if self.module.device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - started)
        return statistics.median(times)

    def _say(self, item: object) -> None:
        if self.verbose:
            report.show(item)
