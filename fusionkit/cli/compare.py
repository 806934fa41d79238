"""`fusionkit compare`."""

import statistics
import time
from collections.abc import Iterator
from dataclasses import replace

import torch
from lightning.pytorch.cli import LightningArgumentParser

from fusionkit.bundles.bundle import Bundle
from fusionkit.calibration.calibrate import EPOCHS, calibrate
from fusionkit.cli import report
from fusionkit.cli.compress import progress_bar
from fusionkit.cli.recipe import RecipeCLI
from fusionkit.codecs.base import DeltaCodec
from fusionkit.codecs.dbms import DBMS
from fusionkit.task_vectors.family import Family
from fusionkit.tasks.scores import Scores


class CompareCLI(RecipeCLI):
    """Score several codecs over the recipe's checkpoints: one table, CSV, JSON and plot."""

    verb = "compare"

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """`--codecs`."""
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

    def compare(self) -> report.ComparisonReport:
        """Evaluate the fine-tuned models, then each codec; show and write as rows come in."""
        self.save_config()
        module = self.model
        family = module.family()
        results = report.ComparisonReport([self._finetuned(family)])
        module.finetuned_scores = results.rows[0].scores.values
        for name, codec, calibrates in self._codecs():
            measure = self._measure_calibrated if calibrates else self._measure
            results.rows.append(measure(name, codec))
            report.write_rows(results.flat(), self.out, "compare")
        report.show(results.table())
        plot = self.out / "compare.png"
        results.plot(plot)
        report.show(f"written: {self.out / 'compare.csv'}, {self.out / 'compare.json'}")
        report.show(f"plot: {plot}")
        return results

    def _finetuned(self, family: Family) -> report.Comparison:
        report.show("fine-tuned models, uncompressed")
        self.model.reuse(family)
        self.model.finetuned_scores = None
        scores = self.evaluate()
        scores = Scores(scores.values, scores.values)
        nbytes = sum(checkpoint.nbytes for checkpoint in family.finetuned.values())
        return report.Comparison(
            "fine-tuned",
            "",
            scores,
            nbytes,
            1.0,
            family.bits_per_parameter,
            switch_seconds=self._switch_seconds(),
        )

    def _measure(self, name: str, codec: DeltaCodec) -> report.Comparison:
        started = time.perf_counter()
        with progress_bar(name) as callback:
            bundle = self.model.compress(codec=codec, progress=callback)
        seconds = time.perf_counter() - started
        self.model.reuse(bundle)
        return self._row(name, bundle, seconds)

    def _row(self, name: str, bundle: Bundle, seconds: float) -> report.Comparison:
        return report.Comparison(
            name,
            repr(bundle.codec),
            self.evaluate(),
            bundle.nbytes,
            report.checkpoint_bytes(bundle) / bundle.nbytes,
            bundle.bits_per_parameter,
            seconds,
            self._switch_seconds(),
        )

    def _codecs(self) -> Iterator[tuple[str, DeltaCodec, bool]]:
        """The recipe's, and whether to calibrate them; after each what more was asked for of it."""
        for name, codec in self.config_init["codecs"].items():
            yield name, codec, isinstance(codec, DBMS)
            if self.config["calibrated"] and codec.learned:
                yield f"{name}, calibrated", codec, True
            if self.config["dbms"] and not isinstance(codec, DBMS) and not codec.unscalable:
                yield f"DBMS {name}", DBMS(codec, self.config_init["shift"]), True

    def _measure_calibrated(self, name: str, codec: DeltaCodec) -> report.Comparison:
        """Calibrated with each seed: the mean of the scores, and how far the means scatter."""
        module = self.model
        settings = self.config_init["calibration"]
        found = []
        for seed in self.config["seeds"] or [settings.seed]:
            report.show(f"{name}, seed {seed}")
            trainer = self.config["trainer"]
            told = trainer["max_epochs"] is not None or trainer["max_steps"] != -1
            limit = {} if told else {"max_epochs": EPOCHS}
            started = time.perf_counter()
            bundle = calibrate(
                module,
                self.datamodule,
                settings=replace(settings, seed=seed),
                codec=codec,
                trainer=self.instantiate_trainer(**limit),
            )
            seconds = time.perf_counter() - started
            report.show(report.calibration_table(bundle))
            found.append(self._row(name, bundle, seconds))
        return report.averaged(found)

    def _switch_seconds(self) -> float:
        """Median over the tasks, files in cache."""
        times = []
        for task in self.model.tasks:
            started = time.perf_counter()
            self.model.switch(task)
            if self.model.device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - started)
        return statistics.median(times)
