"""Recipes through LightningCLI: the schema that all verbs share.

It is the constructors' signatures: `model` is `ReuseModule` (of `fit` and `fuse` any
LightningModule that trains), `data` any LightningDataModule, `trainer` the Lightning Trainer,
`calibration` how a codec's numbers are learned.
"""

import logging
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

from jsonargparse import Namespace
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from fusionkit import registry
from fusionkit.calibration.settings import Calibration
from fusionkit.checkpoints.hub_lock import LOCK, lock_beside
from fusionkit.cli import report
from fusionkit.cli.class_names import subclass_names
from fusionkit.cli.recipe_help import ASK, AllHelp, recipe_help
from fusionkit.cli.recipe_parser import RecipeParser, recipes_in
from fusionkit.errors import DataError, FusionKitError
from fusionkit.reuse.module import ReuseModule

_DATA = tuple(
    f"fusionkit.tasks.{name}"
    for name in (
        *("digits", "image_files", "image_questions", "image_text_pairs", "images"),
        *("joined", "language_data", "lm_eval", "texts"),
    )
)
"""The modules that have datamodules."""


class RecipeCLI(LightningCLI):
    """A recipe, parsed; what its verb needs of it, instantiated.

    Args:
        args: the command line after the verb.

    Attributes:
        verb: its name.
        sections: of the recipe, what the help lists.
        settings_of: whose settings the help lists of `model`, where a recipe names the class.
        needs_trainer: it evaluates or trains.
        writes_out: it writes into the folder `--out`.
        trainer_settings: Trainer defaults.
    """

    verb = ""
    sections: ClassVar[tuple[str, ...]] = ("model",)
    settings_of: ClassVar[type | None] = None
    parser: RecipeParser
    needs_trainer = True
    writes_out = True
    trainer_settings: ClassVar[dict[str, Any]] = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
    }

    def __init__(self, args: list[str]) -> None:
        # Imported so that recipes can use bare class names.
        registry.load_all()
        for module in ("fusionkit.calibration.lorahub", *_DATA):
            import_module(module)

        quieten()
        summary = (type(self).__doc__ or "").partition("\n")[0]
        super().__init__(
            model_class=ReuseModule,
            datamodule_class=LightningDataModule,
            subclass_mode_data=True,
            save_config_callback=None,
            trainer_defaults=self.trainer_settings,
            seed_everything_default=0,
            parser_class=RecipeParser,
            parser_kwargs={
                "prog": f"fusionkit {self.verb}",
                "usage": f"fusionkit {self.verb} --config R.yaml [--model.… --data.… --trainer.…]",
                "description": summary,
                "formatter_class": AllHelp,
            },
            args=args,
            run=False,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse; LightningCLI would warn that the arguments don't come from `sys.argv`.

        Raises:
            FusionKitError: `--out` is a URL, or may not be written.
            SystemExit: help was asked for, and is printed.
        """
        if asked := {*ASK} & {*args}:
            print(parser.format_help() if "--help-all" in asked else self._help(), end="")
            sys.exit(0)
        self.config = parser.parse_args(args)
        use_lock(recipes_in(args))
        self.config["out"] = str(report.local_folder(self.config["out"], self.writes_out))

    def _help(self) -> str:
        """What the verb reads itself."""
        own = subclass_names(LightningDataModule, _DATA)
        return recipe_help(self.parser, self.sections, self.settings_of, own)

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The Trainer's, the module's and a datamodule's arguments."""
        parser.add_lightning_class_args(self.trainer_class, "trainer")
        settings = self.trainer_settings.items()
        parser.set_defaults({f"trainer.{key}": value for key, value in settings})
        self.add_model_arguments(parser)
        parser.add_class_arguments(Calibration, "calibration")
        parser.add_lightning_class_args(
            LightningDataModule, "data", subclass_mode=True, required=False
        )
        parser.add_argument("--out", type=str, default="out", help="folder for scores and plots")

    def add_model_arguments(self, parser: LightningArgumentParser) -> None:
        """ReuseModule's."""
        parser.add_lightning_class_args(ReuseModule, "model")

    def parts_of(self, config: Any, whole: bool = False) -> Any:
        """What a recipe's settings are, built; themselves, but for the classes that they name.

        Args:
            config: the recipe, parsed.
            whole: build model and data, too.
        """
        try:
            return self.parser.instantiate_classes(config, instantiate_groups=whole)
        except ValueError as error:
            # The parser reports a constructor's own error as a value of the wrong type.
            raise _cause(error) from error

    def instantiate_classes(self) -> None:
        """Build model and data; a Trainer only for the verbs that evaluate."""
        self.config_init = self.parts_of(self.config, whole=True)
        self.model: Any = self.config_init["model"]
        self.datamodule: LightningDataModule | None = self.config_init.get("data")
        if self.needs_trainer:
            if self.datamodule is None:
                raise DataError(f"'fusionkit {self.verb}' needs a `data` section in the recipe")
            self.trainer = self.instantiate_trainer()

    def another_trainer(self, **settings: Any) -> Trainer:
        """A Trainer of the recipe's settings that shares no strategy, callback or logger.

        Args:
            settings: what it is told in place of the recipe's.
        """
        told = Namespace(trainer=self.config["trainer"])  # type: ignore[no-untyped-call]
        made = self.parser.instantiate_classes(told, instantiate_groups=False)
        self.config_init["trainer"] = made["trainer"]
        return self.instantiate_trainer(**settings)

    @property
    def out(self) -> Path:
        """The folder for results."""
        return Path(self.config["out"])

    def save_config(self) -> None:
        """Keep the resolved recipe beside the results."""
        self.out.mkdir(parents=True, exist_ok=True)
        text = self.parser.dump(self.config, skip_none=False)
        report.replace_file(self.out / "config.yaml", text.encode())


def use_lock(recipes: Sequence[str]) -> None:
    """Have the commits opened that the lock file beside the first recipe names, if there is one.

    Args:
        recipes: files, or recipes themselves.
    """
    lock = next((lock_beside(each) for each in recipes if each[:1] != "{"), None)
    if lock is not None and lock.is_file():
        os.environ[LOCK] = str(lock.resolve())


def _cause(error: BaseException) -> BaseException:
    """FusionKit's own error among the causes of another, or else that error."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, FusionKitError):
        # Of the types that a value may have, the parser passes on what the first one said; why a
        # Checkpoint can't be opened is among what the others did.
        for frame, _ in traceback.walk_tb(cause.__traceback__):
            for each in frame.f_locals.get("exceptions", ()):
                if isinstance(found := _cause(each), FusionKitError):
                    return found
        cause = cause.__cause__ or cause.__context__
    return cause or error


def quieten() -> None:
    """Leave out what Lightning tells every user of every Trainer."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*no `val_dataloader`.*")  # calibration needs none
    warnings.filterwarnings("ignore", ".*this fit will run with no optimizer.*")  # but a search
    warnings.filterwarnings("ignore", ".*in eval mode at the start of training.*")
    warnings.filterwarnings("ignore", ".*treespec, LeafSpec.*")
    warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*")  # PEFT asks transformers


@contextmanager
def quiet() -> Iterator[None]:
    """A context, or a function's decorator, that is `quieten` for a while."""
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    level = logger.level
    with warnings.catch_warnings():
        quieten()
        try:
            yield
        finally:
            logger.setLevel(level)


def recipes_folder() -> Path:
    """The folder of the recipes: inside an installed FusionKit, or beside its source."""
    installed = Path(__file__).parents[1] / "recipes"
    return installed if installed.is_dir() else Path(__file__).parents[2] / "recipes"
