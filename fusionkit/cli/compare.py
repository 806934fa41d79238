"""`fusionkit compare`, and the function behind it."""

import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser

from fusionkit.bundles.bundle import Bundle
from fusionkit.calibration.calibrate import EPOCHS, calibrate
from fusionkit.calibration.recalibrate import STALE, has_statistics
from fusionkit.calibration.recalibrate import recalibrate as recalibrated
from fusionkit.calibration.settings import Calibration
from fusionkit.cli import report
from fusionkit.cli.comparison import CALIBRATED, Comparison, ComparisonReport, averaged
from fusionkit.cli.html_report import WITHOUT_PLOTLY, page, plotly_is_there
from fusionkit.cli.kept_rows import (
    KeptRows,
    calibration_inputs,
    codec_inputs,
    inputs_of,
    related,
)
from fusionkit.cli.named_loggers import logged_as, unlogged
from fusionkit.cli.progress import progress_bar
from fusionkit.cli.published import published_in
from fusionkit.cli.recipe import quiet
from fusionkit.cli.scored_line import recipe_args
from fusionkit.cli.scored_options import Compared
from fusionkit.cli.test import EvaluationCLI, evaluate, plain_trainer
from fusionkit.codecs.base import DeltaCodec
from fusionkit.codecs.dbms import DBMS
from fusionkit.codecs.merged import Merged
from fusionkit.reuse.fused import Untuned
from fusionkit.reuse.module import ReuseModule
from fusionkit.task_vectors.family import Family
from fusionkit.tasks.scores import Scores
from fusionkit.tasks.spread import Spread, TasksSpread

_CALIBRATION = Calibration()


def run(args: list[str]) -> None:
    """Score several codecs over the same checkpoints; writes table and plot to `--out`."""
    recipe = recipe_args("compare", (CompareCLI.__doc__ or "").partition("\n")[0], args, Compared)
    if recipe is None:
        return
    cli = CompareCLI(recipe)
    results, out = cli.compare(), cli.out
    report.show(results)
    report.show(f"written: {out / 'compare.csv'}, {out / 'compare.json'}")
    plots = f"plots: {out / 'compare.png'}, {out / 'compare_tasks.png'} (and .svg)"
    report.show(plots if report.plots_are_there() else report.WITHOUT_PLOTS)
    page = out / "compare.html"
    report.show(f"report: {page}" if plotly_is_there() else WITHOUT_PLOTLY)


class CompareCLI(EvaluationCLI):
    """Score several codecs over the same checkpoints: one table, CSV, JSON, plots, a page.

    Whatever `--out` has of the same inputs already is not measured again.
    """

    verb = "compare"
    sections = ("model", "calibration")

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

        parser.add_argument(
            "--published",
            type=list[str],
            default=[],
            help="files of published figures, shown beside ours and marked",
        )
        parser.add_argument(
            "--recalibrate",
            type=bool,
            default=False,
            help="re-estimate BatchNorm's statistics of what each codec gives, on unlabelled rows",
        )

    def compare(self) -> ComparisonReport:
        """Evaluate the fine-tuned models and the base, then each codec; write as rows come in."""
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
            published=self.config["published"],
            recalibrate=self.config["recalibrate"],
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
    published: Sequence[str | Path] = (),
    recalibrate: bool = False,
) -> ComparisonReport:
    """Score the fine-tuned models as they are, then each codec over them.

    When all is done the module reuses the fine-tuned models, uncompressed.

    Args:
        module: its base and fine-tuned checkpoints are used.
        datamodule: the tasks' test rows; for calibration their training rows, too.
        codecs: a name for the table → a codec; a DBMS is calibrated always.
        out: folder for `compare.csv` and `compare.json`, written as rows come in, and
            plots and a page at the end; by default nothing is written. What an earlier run wrote
            of the same inputs there is not measured again.
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
        published: YAML files of published figures (`fusionkit.cli.published`), which are shown
            beside ours, marked, and never mixed into them.
        recalibrate: re-estimate BatchNorm's statistics of what each codec that learns nothing
            gives, on unlabelled rows; see `fusionkit.recalibrate`.

    Returns:
        a row for the fine-tuned models, and one for each codec; a notebook shows its table.

    Raises:
        FusionKitError: `out` is a URL; tasks, data, codecs or checkpoints don't fit together.
    """
    folder = None if out is None else report.local_folder(out)
    results = ComparisonReport(published=published_in(published))
    make = make_trainer or (lambda: plain_trainer(max_epochs=EPOCHS))
    trainer = trainer or plain_trainer()
    family, known = module.family(), (module.finetuned_scores, module.base_scores)
    module.finetuned_scores = module.base_scores = None
    asked = (settings, seeds, spread, verbose, recalibrate)
    bench = _Bench(module, datamodule, trainer, make, *asked, family.base.nbytes)

    def add(row: Comparison) -> None:
        results.rows.append(related(row, finetuned.scores.values, base.scores.values))
        if folder is not None:
            report.write_rows(results.flat(), folder, "compare")

    try:
        kept = bench.kept(folder, family)
        base = bench.once(kept, "base", lambda: bench.base(family))
        finetuned = bench.once(kept, "fine-tuned", lambda: bench.finetuned(family))
        add(finetuned)
        add(base)
        module.finetuned_scores, module.base_scores = finetuned.scores.values, base.scores.values
        for name, codec, calibrates in _each(codecs, calibrated, dbms, shift):
            add(bench.codec(kept, name, codec, calibrates))
    finally:
        module.finetuned_scores, module.base_scores = known
        module.reuse(family)
    if folder is not None:
        write_report(results, folder)
    return results


def write_report(results: ComparisonReport, folder: Path) -> None:
    """Write what a comparison's rows look like, as far as what draws it is installed.

    Args:
        results: the rows.
        folder: for `compare.png`, `compare_tasks.png`, their SVGs and `compare.html`.
    """
    if report.plots_are_there():
        pictures = {"compare": results.figure(), "compare_tasks": results.heat_map()}
        for name, figure in pictures.items():
            report.write_figure(figure, folder / f"{name}.png", folder / f"{name}.svg")
    if plotly_is_there():
        report.replace_file(folder / "compare.html", page(results).encode())


def _each(
    codecs: Mapping[str, DeltaCodec], calibrated: bool, dbms: bool, shift: DeltaCodec | None
) -> Iterator[tuple[str, DeltaCodec, bool]]:
    """Each codec, and whether to calibrate it; after it what more was asked for of it."""
    for name, codec in codecs.items():
        yield name, codec, isinstance(codec, DBMS)
        if calibrated and codec.learned:
            yield name + CALIBRATED, codec, True
        if dbms and not isinstance(codec, DBMS) and not codec.unscalable:
            yield f"DBMS {name}", DBMS(codec, shift), True


@dataclass(frozen=True)
class _Bench:
    """Measures one row after the other; its fields are the arguments of `compare`, and bytes."""

    module: ReuseModule
    datamodule: Any
    trainer: Trainer
    make_trainer: Callable[[], Trainer]
    settings: Calibration
    seeds: Sequence[int]
    spread: Spread
    verbose: bool
    recalibrate: bool
    base_nbytes: int

    def kept(self, folder: Path | None, family: Family) -> KeptRows:
        """What an earlier run measured of the same inputs."""
        if folder is None:
            return KeptRows(None, None, self.trainer)
        data = TasksSpread(self.datamodule) if self.spread == "tasks" else self.datamodule
        with unlogged(self.trainer):
            inputs = inputs_of(self.module, family, data, self.trainer)
        return KeptRows(folder, inputs, self.trainer)

    def once(self, kept: KeptRows, what: Any, measure: Callable[[], Comparison]) -> Comparison:
        """A row that was kept, or is measured now."""
        key = kept.key(what)
        row = kept.get(key)
        if row is None:
            row = measure()
            kept.keep(key, row)
        return row

    def codec(self, kept: KeptRows, name: str, codec: DeltaCodec, calibrates: bool) -> Comparison:
        """A codec's row."""
        what, measure = [codec_inputs(codec)], self.compressed
        if self.recalibrate and kept.keeps:
            maker = self.make_trainer()
            what += calibration_inputs(self.settings, (), self.datamodule, maker)
        if calibrates:
            measure = self.calibrated
            if kept.keeps:
                maker = self.make_trainer()
                what += calibration_inputs(self.settings, self.seeds, self.datamodule, maker)
        row = kept.get(kept.key(what))
        if row is not None:
            self._say(f"{name}: as an earlier run measured it")
        return replace(self.once(kept, what, lambda: measure(name, codec)), name=name)

    def finetuned(self, family: Family) -> Comparison:
        """The fine-tuned models, uncompressed."""
        self._say("fine-tuned models, uncompressed")
        self.module.reuse(family)
        return Comparison(
            "fine-tuned",
            "",
            self._evaluate("fine-tuned"),
            sum(checkpoint.nbytes for checkpoint in family.finetuned.values()),
            1.0,
            family.bits_per_parameter,
            switch_seconds=self._switch_seconds(),
            kind="fine-tuned",
        )

    def base(self, family: Family) -> Comparison:
        """The base, with each task's own head: what is there without any delta."""
        self._say("base, with the tasks' own heads")
        self.module.reuse(Untuned(family))
        scores, nbytes = self._evaluate("base"), family.base.nbytes
        return Comparison("base", "", scores, 0, 0.0, 0.0, kind="base", base_nbytes=nbytes)

    def compressed(self, name: str, codec: DeltaCodec) -> Comparison:
        """A codec without data; or with such as BatchNorm's statistics need."""
        started = time.perf_counter()
        if self.recalibrate:
            bundle = recalibrated(
                self.module,
                self.datamodule,
                codec=codec,
                rows=self.settings.rows,
                seed=self.settings.seed,
            )
        else:
            if isinstance(codec, Merged) and has_statistics(self.module.model):
                warnings.warn(f"{name}: {STALE}", stacklevel=2)
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
        return averaged(found)

    def _row(self, name: str, bundle: Bundle, seconds: float) -> Comparison:
        return Comparison(
            name,
            repr(bundle.codec),
            self._evaluate(name),
            bundle.nbytes,
            report.checkpoint_bytes(bundle) / bundle.nbytes,
            bundle.bits_per_parameter,
            seconds,
            self._switch_seconds(),
            base_nbytes=self.base_nbytes,
        )

    def _evaluate(self, name: str) -> Scores:
        with logged_as(self.trainer, name):
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
