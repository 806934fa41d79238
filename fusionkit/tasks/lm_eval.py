"""Tasks of lm-eval: language models are scored as its harness scores them."""

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NoReturn, Self

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader
from torchmetrics import Metric

from fusionkit.checkpoints.hub_names import Use, reads_hub
from fusionkit.errors import DataError, in_line, meant
from fusionkit.tasks.facts import Facts
from fusionkit.tasks.harness import Harness, HarnessSettings
from fusionkit.tasks.harness_tasks import HarnessTasks
from fusionkit.tasks.task import Task


@reads_hub(tokenizer=Use.BESIDE)
class LMEval(LightningDataModule):
    """Each task is scored by tasks of lm-eval (EleutherAI's evaluation harness).

    What counts is the first metric of the first of lm-eval's tasks, or what `metric` of the model
    names (`acc_norm`; of other tasks than the first `hellaswag/acc`); all others, and standard
    errors, are beside it, under lm-eval's own names. The figures are those of lm-eval's own
    command, with the same settings, on the exported models.

    lm-eval runs each of its tasks as a whole: of several processes, each runs all of them, unless
    whole tasks are spread (`--spread tasks`).

    Args:
        tasks: task name → lm-eval's name of a task or group, or a YAML file's path; or a list of
            these, of which the first counts.
        tokenizer: folder or hub name of the tokenizer; by default the base's own, from where its
            weights are.
        batch_size: requests at once; `auto`: as many as fit.
        limit: at most so many documents of each of lm-eval's tasks, the first ones.
        num_fewshot: examples before a question, of tasks that don't say it themselves.
        include_path: folder with YAML files of tasks beside lm-eval's own, or a list.
        apply_chat_template: write prompts as the tokenizer's chat template has it.
        system_instruction: what a conversation begins with.
        gen_kwargs: of tasks that generate, settings that go before their own.
        bootstrap_iters: samples for standard errors that have no formula; 0: no standard errors.
        confirm_run_unsafe_code: let tasks run the code that a model writes.
        metadata: what some tasks (RULER) want to know.
        model_args: further arguments of lm-eval's `HFLM`: `max_length`, `add_bos_token`, …

    Attributes:
        tasks: the tasks' names.
        limit: see above.

    Raises:
        DataError: a setting is out of range.
    """

    def __init__(
        self,
        tasks: dict[str, str | list[str]],
        tokenizer: str | None = None,
        batch_size: int | str = 1,
        limit: int | None = None,
        num_fewshot: int | None = None,
        include_path: str | list[str] | None = None,
        apply_chat_template: bool = False,
        system_instruction: str | None = None,
        gen_kwargs: dict[str, Any] | None = None,
        bootstrap_iters: int = 100_000,
        confirm_run_unsafe_code: bool = False,
        metadata: dict[str, Any] | None = None,
        model_args: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if limit is not None and limit < 1:
            raise DataError(f"expected limit to be at least 1 document, got {limit}")
        self.tasks = list(tasks)
        self.limit = limit
        self._names = {task: _listed(names) for task, names in tasks.items()}
        for task, names in self._names.items():
            if not names:
                raise DataError(f"task '{task}' has none of lm-eval's tasks; give it at least one")
        self._harness = Harness(
            HarnessSettings(
                tokenizer,
                batch_size,
                limit,
                num_fewshot,
                tuple(_listed(include_path or ())),
                apply_chat_template,
                system_instruction,
                gen_kwargs or {},
                bootstrap_iters,
                confirm_run_unsafe_code,
                metadata or {},
                model_args or {},
            )
        )

    def only(self, tasks: Sequence[str]) -> Self:
        """The same of some tasks, in the order asked for; no other task's data are loaded."""
        other = copy(self)
        other.tasks = list(tasks)
        return other

    @property
    def kinds(self) -> dict[str, Task]:
        """Task name → of what kind it is; lm-eval's tasks are loaded on first use.

        Raises:
            MissingExtraError: lm-eval is not installed.
            DataError: lm-eval has no such task, or its data set can't be had.
        """
        found = self._harness.load([self._names[task] for task in self.tasks])
        return {
            task: HarnessTask(tasks, self._harness.settings, self._harness)
            for task, tasks in zip(self.tasks, found, strict=True)
        }

    def test_dataloader(self) -> list[DataLoader[Any]]:
        """Numbers of documents, all of a task's in one batch: one dataloader per task."""
        found = self._harness.load([self._names[task] for task in self.tasks])
        counts = [tasks.documents for tasks in found]
        return [DataLoader(range(count), batch_size=count) for count in counts]  # type: ignore[arg-type]

    def train_dataloader(self) -> NoReturn:
        """There are none.

        Raises:
            DataError: always.
        """
        raise DataError(
            "lm-eval's tasks are for scoring alone; fine-tune, or calibrate, on rows of your own: "
            "`data` of fusionkit.tasks.language_data.LanguageData, say"
        )

    def val_dataloader(self) -> NoReturn:
        """There are none, either.

        Raises:
            DataError: always.
        """
        raise DataError(
            "lm-eval's tasks say themselves which rows they are scored on; score them by "
            "`Trainer.test`, or 'fusionkit test'"
        )


@dataclass(frozen=True)
class Answers:
    """What lm-eval made of a model.

    Attributes:
        tasks: which of its tasks.
        results: as its `evaluate` returns them.
    """

    tasks: HarnessTasks
    results: Mapping[str, Any]

    def __getitem__(self, rows: slice) -> Self:
        """Those of some rows: the whole, as lm-eval's tasks are never run in part."""
        return self


@dataclass(frozen=True)
class HarnessTask(Task):
    """What lm-eval asks of a model, scored as it scores it.

    Args:
        tasks: lm-eval's tasks.
        settings: how they are run.
        harness: runs them.
    """

    tasks: HarnessTasks
    settings: HarnessSettings
    harness: Harness = field(repr=False, compare=False)

    def answers(self, model: Any, batch: Any, outputs: Any = None) -> Any:
        """What lm-eval makes of a model: `Answers`.

        Raises:
            FusionKitError: it is no language model that generates.
            DataError: as of `Harness.run`.
        """
        return Answers(self.tasks, self.harness.run(model, self.tasks))

    def metric(self) -> "HarnessMetric":
        """The first one of lm-eval's first task."""
        name, facts = next(iter(self.tasks.metrics.items()))
        return HarnessMetric(name, facts)

    @property
    def metrics(self) -> Mapping[str, Any]:
        """All of them, under lm-eval's names."""
        return {
            name: partial(HarnessMetric, name, facts) for name, facts in self.tasks.metrics.items()
        }

    def update(self, metric: Metric, outputs: Any, batch: Any) -> None:
        """Let a metric of lm-eval's know what was found.

        Raises:
            TypeError: it is another one.
        """
        if not isinstance(metric, HarnessMetric):
            raise TypeError(f"lm-eval scores by its own metrics: {in_line(list(self.metrics))}")
        metric.update(self.tasks.values(outputs.results))

    def row_scores(self, metric: Metric, outputs: Any, batch: Any) -> Tensor | None:
        """Each document's own, where lm-eval's metric is a mean over them."""
        assert isinstance(metric, HarnessMetric)
        rows = self.tasks.rows(outputs.results, metric.name)
        if rows is None or len(rows) != self.tasks.documents:
            return None
        return torch.tensor(rows)[batch.cpu()]

    def beside(self, metric: Metric) -> Mapping[str, float]:
        """lm-eval's other metrics, and its standard errors."""
        assert isinstance(metric, HarnessMetric)
        return {name: value for name, value in metric.values.items() if name != metric.name}

    def count(self, batch: Any) -> int:
        """How many documents there are."""
        return len(batch)

    def first(self, batch: Any, rows: int) -> Any:
        """The first documents."""
        return batch[:rows]

    def predict(self, model: Callable[..., Any], batch: Any) -> Tensor:
        """Not what lm-eval's tasks are for.

        Raises:
            DataError: always.
        """
        raise DataError("lm-eval's tasks are for scoring alone, and have no batches of tokens")

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        """As `predict`."""
        return self.predict(_nothing, batch)

    def divergence(self, student: Tensor, teacher: Tensor) -> Tensor:
        """As `predict`."""
        return self.predict(_nothing, None)


class HarnessMetric(Metric):
    """A number that lm-eval found, to its last digit.

    Args:
        name: lm-eval's.
        facts: what is known of it.

    Attributes:
        values: all numbers that lm-eval found with it.
    """

    full_state_update = False

    def __init__(self, name: str, facts: Facts) -> None:
        super().__init__()
        self.name, self.facts = name, facts
        self.values: dict[str, float] = {}

    def update(self, values: dict[str, float]) -> None:
        """Take in what lm-eval found.

        Raises:
            ValueError: that has not this metric.
        """
        if self.name not in values:
            raise ValueError(
                f"lm-eval found no '{self.name}'{meant(self.name, values)}, but "
                f"{in_line(list(values))}"
            )
        self.values = values

    def compute(self) -> Tensor:
        """The number, float64; of no rows, not a number."""
        return torch.tensor(self.values.get(self.name, torch.nan), dtype=torch.float64)

    def reset(self) -> None:
        """Forget it."""
        super().reset()
        self.values = {}


def _listed(names: str | Sequence[str]) -> list[str]:
    return [names] if isinstance(names, str) else list(names)


def _nothing(*_: Any) -> None:
    pass
