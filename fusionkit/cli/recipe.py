"""Recipes through LightningCLI: one schema for `compress`, `test` and `compare`."""

import logging
import statistics
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from fusionkit import registry
from fusionkit.bundles.bundle import Bundle
from fusionkit.calibration.calibrate import EPOCHS, calibrate
from fusionkit.checkpoints.paths import open_path
from fusionkit.cli import report
from fusionkit.cli.launch import launched
from fusionkit.codecs.base import DeltaCodec
from fusionkit.codecs.dbms import DBMS
from fusionkit.errors import BundleError, DataError, FusionKitError
from fusionkit.reuse.module import ReuseModule
from fusionkit.task_vectors.family import Family
from fusionkit.task_vectors.workers import Progress as ProgressCallback
from fusionkit.tasks.spread import Spread, TasksSpread


class _Parser(LightningArgumentParser):
    """Names the installed codecs where a class of a recipe is not found."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if "codec" in message or "merge" in message:
            failures = registry.load_all()
            found = {
                group: [
                    registry.load(group, name).__name__
                    for name in registry.names(group)
                    if f"{group}:{name}" not in failures
                ]
                for group in registry.GROUPS
            }
            kinds = "; ".join(f"{group}: {', '.join(names)}" for group, names in found.items())
            message = f"{message}\ninstalled ({kinds})"
            for name, failure in failures.items():
                message += f"\nnot usable: {name.rpartition(':')[2]}: {failure}"
        super().error(message, ex)
        raise AssertionError  # super().error never returns


class RecipeCLI(LightningCLI):
    """A recipe, parsed; what its verb needs of it, instantiated.

    Args:
        args: the command line after the verb.
    """

    verb = ""
    needs_trainer = True
    trainer_settings: ClassVar[dict[str, Any]] = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
    }

    def __init__(self, args: list[str]) -> None:
        # Imported so that recipes can use bare class names.
        registry.load_all()
        import fusionkit.tasks.data  # noqa: F401

        _quieten()
        summary = (type(self).__doc__ or "").partition("\n")[0]
        super().__init__(
            model_class=ReuseModule,
            datamodule_class=LightningDataModule,
            subclass_mode_data=True,
            save_config_callback=None,
            trainer_defaults=self.trainer_settings,
            seed_everything_default=0,
            parser_class=_Parser,
            parser_kwargs={
                "prog": f"fusionkit {self.verb}",
                "usage": f"fusionkit {self.verb} --config R.yaml [--model.… --data.… --trainer.…]",
                "description": summary,
            },
            args=args,
            run=False,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse; LightningCLI would warn that the arguments don't come from `sys.argv`."""
        self.config = parser.parse_args(args)

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The Trainer's, the module's and a datamodule's arguments."""
        parser.add_lightning_class_args(self.trainer_class, "trainer")
        settings = self.trainer_settings.items()
        parser.set_defaults({f"trainer.{key}": value for key, value in settings})
        self.add_model_arguments(parser)
        parser.add_lightning_class_args(
            LightningDataModule, "data", subclass_mode=True, required=False
        )
        parser.add_argument("--out", type=str, default="out", help="folder for scores and plots")
        if self.needs_trainer:
            parser.add_argument(
                "--spread",
                type=Spread,
                default="rows",
                help="what each of several processes evaluates: a share of every task's rows, or "
                "whole tasks",
            )

    def add_model_arguments(self, parser: LightningArgumentParser) -> None:
        """ReuseModule's."""
        parser.add_lightning_class_args(ReuseModule, "model")

    def instantiate_classes(self) -> None:
        """Build model and data; a Trainer only for the verbs that evaluate."""
        try:
            self.config_init = self.parser.instantiate_classes(self.config)
        except ValueError as error:
            # The parser reports a constructor's own error as a value of the wrong type.
            raise _cause(error) from error
        self.model: Any = self.config_init["model"]
        self.datamodule: LightningDataModule | None = self.config_init.get("data")
        if self.needs_trainer:
            if self.datamodule is None:
                raise DataError(f"'fusionkit {self.verb}' needs a `data` section in the recipe")
            self.trainer = self.instantiate_trainer()

    @property
    def out(self) -> Path:
        """The folder for results."""
        return Path(self.config["out"])

    def save_config(self) -> None:
        """Keep the resolved recipe beside the results."""
        self.out.mkdir(parents=True, exist_ok=True)
        text = self.parser.dump(self.config, skip_none=False)
        report.replace_file(self.out / "config.yaml", text.encode())

    def evaluate(self) -> report.Scores:
        """Score every task through the Trainer."""
        whole = self.config["spread"] == "tasks"
        datamodule = TasksSpread(self.datamodule) if whole else self.datamodule
        self.trainer.test(self.model, datamodule=datamodule, verbose=False)
        scores: report.Scores = self.model.scores
        return scores


class CompressCLI(RecipeCLI):
    """Compress the recipe's fine-tuned checkpoints into the bundle `--model.bundle`."""

    verb = "compress"
    needs_trainer = False

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """`--overwrite`."""
        parser.add_argument("--overwrite", type=bool, default=False, help="replace the bundle")

    def before_instantiate_classes(self) -> None:
        """Take the bundle's folder as the place to write, not to read."""
        self._bundle = self.config["model"]["bundle"]
        self.config["model"]["bundle"] = None
        if self._bundle is None:
            raise FusionKitError("where to? give the bundle's folder: --model.bundle FOLDER")
        if open_path(self._bundle).exists() and not self.config["overwrite"]:
            raise BundleError(f"{self._bundle}: exists; replace it with --overwrite true")

    def compress(self) -> Bundle:
        """Compress, with a progress bar; among the processes that the recipe's trainer has."""
        with (
            launched(self.config["trainer"]) as (processes, device),
            progress_bar("compressing") as callback,
        ):
            bundle: Bundle = self.model.compress(
                self._bundle,
                self.config["overwrite"],
                callback,
                processes=processes,
                device=device,
            )
        return bundle


class TestCLI(RecipeCLI):
    """Score every task of the recipe, from its bundle or compressed on the fly."""

    verb = "test"
    __test__ = False  # not a test case, whatever pytest thinks of the name

    def test(self) -> report.Scores:
        """Evaluate; the results are for the caller to show."""
        self.save_config()
        return self.evaluate()

    def title(self) -> str:
        """What was evaluated."""
        source = self.model.source
        return repr(source.codec) if isinstance(source, Bundle) else "fine-tuned, uncompressed"


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
        scores = report.Scores(scores.values, scores.values)
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
        settings, own = module.calibration, module.codec
        found = []
        for seed in self.config["seeds"] or [settings.seed]:
            report.show(f"{name}, seed {seed}")
            module.calibration, module.codec = replace(settings, seed=seed), codec
            trainer = self.config["trainer"]
            told = trainer["max_epochs"] is not None or trainer["max_steps"] != -1
            limit = {} if told else {"max_epochs": EPOCHS}
            started = time.perf_counter()
            bundle = calibrate(module, self.datamodule, trainer=self.instantiate_trainer(**limit))
            seconds = time.perf_counter() - started
            report.show(report.calibration_table(bundle))
            found.append(self._row(name, bundle, seconds))
        module.calibration, module.codec = settings, own
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


def _cause(error: BaseException) -> BaseException:
    """FusionKit's own error among the causes of another, or else that error."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, FusionKitError):
        cause = cause.__cause__ or cause.__context__
    return cause or error


def _quieten() -> None:
    """Leave out what Lightning tells every user of every Trainer."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*no `val_dataloader`.*")  # calibration needs none
    warnings.filterwarnings("ignore", ".*this fit will run with no optimizer.*")  # but a search
    warnings.filterwarnings("ignore", ".*in eval mode at the start of training.*")
    warnings.filterwarnings("ignore", ".*treespec, LeafSpec.*")
    warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*")  # PEFT asks transformers


@contextmanager
def progress_bar(what: str) -> Iterator[ProgressCallback]:
    """A bar that follows the passes over a family."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("tensors"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, disable=not report.main_process()) as progress:
        bar = progress.add_task(what, total=None)

        def update(this_pass: int, done: int, total: int) -> None:
            text = what if this_pass == 1 else f"{what} (pass {this_pass})"
            progress.update(bar, description=text, completed=done, total=total)

        yield update


def recipes_folder() -> Path:
    """The folder of the recipes: inside an installed FusionKit, or beside its source."""
    installed = Path(__file__).parents[1] / "recipes"
    return installed if installed.is_dir() else Path(__file__).parents[2] / "recipes"


def run_demo(out: Path, cache: Path | None) -> list[report.ComparisonReport]:
    """Train the demo's families (or take them from the cache), and compare codecs on each."""
    from fusionkit.cli import demo

    _quieten()
    torch.set_num_threads(
        1
    )  # such small matrices gain nothing from more, and a busy machine stalls
    folder = cache or Path.home() / ".cache" / "fusionkit" / "demo"
    family = demo.prepare(folder)
    reports = []
    for name, finetuned, place in (
        ("demo", family.full, out),
        ("demo_lora", family.lora, out / "lora"),
    ):
        arguments = [
            f"--config={recipes_folder() / name}.yaml",
            f"--model.base={family.base}",
            *(f"--model.finetuned.{task}={path}" for task, path in finetuned.items()),
            f"--out={place}",
        ]
        reports.append(CompareCLI(arguments).compare())
    return reports
