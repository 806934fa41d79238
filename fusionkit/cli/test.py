"""`fusionkit test`: of a bundle or models that the command line names, or of a recipe."""

from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser

from fusionkit.bundles.bundle import Bundle
from fusionkit.cli import report
from fusionkit.cli.named_loggers import logged_as
from fusionkit.cli.recipe import RecipeCLI
from fusionkit.cli.scored_line import recipe_args
from fusionkit.registry import to_config
from fusionkit.reuse.module import ReuseModule
from fusionkit.tasks.score_file import score_file
from fusionkit.tasks.scores import Scores
from fusionkit.tasks.spread import Spread, TasksSpread
from fusionkit.tasks.training import interruptions

Stage = Literal["test", "validate"]
"""Which rows are scored: a datamodule's test rows, or its validation rows."""


def run(args: list[str]) -> None:
    """Score every task; writes scores.csv and scores.json to `--out`."""
    score(TestCLI, args)


def score(verb: "type[TestCLI]", args: list[str]) -> None:
    """Score every task of a line or a recipe, show the scores and write them.

    Args:
        verb: what scores.
        args: the command line after the verb.
    """
    recipe = recipe_args(verb.verb, (verb.__doc__ or "").partition("\n")[0], args)
    if recipe is None:
        return
    cli = verb(recipe)
    scores = cli.test()
    report.show(report.scores_table(scores, cli.title()))
    for path in cli.write(scores):
        report.show(f"written: {path}")


class EvaluationCLI(RecipeCLI):
    """A recipe whose tasks are scored."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """`--spread`."""
        parser.add_argument(
            "--spread",
            type=Spread,
            default="rows",
            help="what each of several processes evaluates: a share of every task's rows, or "
            "whole tasks",
        )


class TestCLI(EvaluationCLI):
    """Score every task, from a bundle, compressed on the fly, or as it is."""

    verb = "test"
    stage: Stage = "test"
    __test__ = False  # not a test case, whatever pytest thinks of the name

    def test(self) -> Scores:
        """Evaluate; the results are for the caller to show."""
        self.save_config()
        spread = self.config["spread"]
        codec = self.model.source.codec if self.model.bundle_path else self.model.codec
        with logged_as(self.trainer, type(codec).__name__ if codec else "fine-tuned"):
            return evaluate(self.model, self.datamodule, self.trainer, spread, self.stage)

    def title(self) -> str:
        """What was evaluated."""
        source = self.model.source
        return repr(source.codec) if isinstance(source, Bundle) else "fine-tuned, uncompressed"

    def write(self, scores: Scores) -> list[Path]:
        """Write the scores; what is in the JSON can be given as `finetuned_scores`."""
        source = self.model.source
        codec = to_config(source.codec) if isinstance(source, Bundle) else None
        paths = [self.out / "scores.csv", self.out / "scores.json"]
        report.replace_file(paths[0], report.csv_text(scores.rows()).encode())
        report.replace_file(paths[1], score_file(scores, self.title(), codec))
        return paths


def evaluate(
    module: ReuseModule,
    datamodule: Any,
    trainer: Trainer,
    spread: Spread = "rows",
    stage: Stage = "test",
) -> Scores:
    """Score every task of a datamodule.

    Args:
        module: what is scored.
        datamodule: the tasks' rows.
        trainer: evaluates.
        spread: what each of several processes evaluates.
        stage: which rows: those for testing, or for validation.
    """
    data = TasksSpread(datamodule) if spread == "tasks" else datamodule
    run = trainer.test if stage == "test" else trainer.validate
    with interruptions(trainer):
        run(module, datamodule=data, verbose=False)
    assert module.scores is not None
    return module.scores


def plain_trainer(**settings: Any) -> Trainer:
    """A Trainer that evaluates, and says and keeps nothing.

    Args:
        settings: what else it is told.
    """
    return Trainer(
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        **settings,
    )
