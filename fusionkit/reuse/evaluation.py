"""A Trainer's evaluation of a model that becomes one task's after the other."""

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

from lightning.pytorch import LightningModule
from torch import nn

from fusionkit.tasks.limits import limit_of
from fusionkit.tasks.metrics import MetricChoice, value_of
from fusionkit.tasks.score_file import KnownScores
from fusionkit.tasks.scorer import Scorer
from fusionkit.tasks.scores import Scores
from fusionkit.tasks.spread import (
    TasksSpread,
    over_processes,
    real_rows,
    row_places,
    value_of_owner,
)
from fusionkit.tasks.task import Task


def loader_of(trainer: Any, place: int) -> Any:
    """A dataloader of what a Trainer runs over, of several by its place."""
    stage = "test" if trainer.testing else "predict" if trainer.predicting else "val"
    loaders: Any = getattr(trainer, f"{stage}_dataloaders")
    return loaders[place] if isinstance(loaders, list | tuple) else loaders


class Evaluation(nn.Module):
    """Scores tasks, batch by batch.

    Args:
        kinds: task → of what kind it is, in the order of the dataloaders.
        metric: what scores them.
        known: scores that theirs are related to.

    Raises:
        FusionKitError: a metric can't be made, or is not for its task.
    """

    def __init__(self, kinds: dict[str, Task], metric: MetricChoice, known: KnownScores) -> None:
        super().__init__()
        self.tasks = list(kinds)
        self.known = known
        self.scorers = nn.ModuleList(Scorer(metric, *each) for each in kinds.items())
        self._rows = 0

    def check(self, trainer: Any, datamodule: Any, stage: str) -> None:
        """Check that the scores that are known are of these tasks, metrics and rows.

        Raises:
            DataError: they are not.
        """
        metrics = {each.task: each.facts.name for each in self._all}
        self.known.check(metrics, limit_of(trainer, datamodule, stage))

    @property
    def _all(self) -> Sequence[Scorer]:
        return [cast(Scorer, each) for each in self.scorers]

    def step(self, model: Any, batch: Any, batch_idx: int, place: int, loader: Any) -> None:
        """Score a batch; rows that fill up a process's share do not count.

        Args:
            model: the task's, itself.
            batch: its rows.
            batch_idx: how many batches of the task were before.
            place: of the task's dataloader.
            loader: that, as the Trainer prepared it.
        """
        self._rows = 0 if batch_idx == 0 else self._rows
        scorer = self._all[place]
        kind = scorer.kind
        outputs, count = kind.answers(model, batch), kind.count(batch)
        real = real_rows(loader, self._rows, count)
        if real:
            places = row_places(loader, self._rows, real)
            scorer.update(outputs[:real], kind.first(batch, real), places)
        self._rows += count

    def finish(self, module: LightningModule, datamodule: Any, stage: str) -> Scores:
        """The tasks' scores, over all processes.

        Args:
            module: whose processes these are.
            datamodule: the rows.
            stage: `test` or `val`.
        """
        trainer = module.trainer
        value = partial(value_of_owner, module) if isinstance(datamodule, TasksSpread) else value_of
        found = over_processes([each.found() for each in self._all], trainer.world_size)
        values, measured = {}, {}
        for place, scorer in enumerate(self._all):
            own = [process[place] for process in found]
            values[scorer.task], measured[scorer.task] = scorer.compute(value, own)
            scorer.reset()
        limit = limit_of(trainer, datamodule, stage)
        return Scores(values, self.known.finetuned, self.known.base, measured, limit)
