"""Scales and weights of a merge, searched on a few labelled batches (LoraHub, 2307.13269)."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fusionkit.errors import FusionKitError, of_extra
from fusionkit.merges.base import Merge
from fusionkit.merges.weighted import Weighted
from fusionkit.reuse.fused import Fused
from fusionkit.reuse.module import ReuseModule
from fusionkit.task_vectors.family import Family
from fusionkit.tasks.metrics import is_lower_better, metric_of, update, value_of
from fusionkit.tasks.task import Task

Batches = Mapping[str, Sequence[Any]]
"""Task → a few labelled batches of it."""


def evaluate(
    module: ReuseModule, fused: Fused, batches: Batches, kinds: Mapping[str, Task]
) -> tuple[float, float]:
    """The tasks' own losses and scores, each a mean over the tasks; of scores, more is better.

    Args:
        module: evaluates, by its metric.
        fused: what is evaluated.
        batches: of each task.
        kinds: of what kind each task is.
    """
    losses, scores = [], []
    module.reuse(fused)
    training = module.training
    module.eval()
    with torch.no_grad():
        for task, its_batches in batches.items():
            module.switch(task)
            kind = kinds[task]
            metric = metric_of(module.metric, task, kind).to(module.device)
            sign = -1 if is_lower_better(module.metric, task, kind) else 1
            total = rows = 0.0
            for batch in its_batches:
                outputs, count = kind.predict(module, batch), kind.count(batch)
                total += float(kind.loss(outputs, batch)) * count
                rows += count
                update(metric, task, kind, kind.answers(module.model, batch, outputs), batch)
            losses.append(total / rows)
            scores.append(sign * value_of(metric, task))
    module.train(training)
    return sum(losses) / len(losses), sum(scores) / len(scores)


def search_scale(
    module: ReuseModule,
    family: Family,
    merge: Merge,
    scales: Sequence[float],
    batches: Batches,
    kinds: Mapping[str, Task],
) -> Merge:
    """The merge with the scale that scores best on a few labelled batches.

    Args:
        module: evaluates.
        family: the tasks.
        merge: one with a `scale`; others come back as they are.
        scales: those to try; of equals the one with the lower loss.
        batches: of each task.
        kinds: of what kind each task is.
    """
    settings: Any = merge
    if not scales or "scale" not in {field.name for field in dataclasses.fields(settings)}:
        return merge
    fused = Fused(family, dataclasses.replace(settings, scale=1.0))
    found = []
    for scale in scales:
        fused.scale = scale
        loss, score = evaluate(module, fused, batches, kinds)
        found.append((math.isnan(score), -score, loss, scale))
    chosen: Merge = dataclasses.replace(settings, scale=min(found)[-1])
    return chosen


@dataclass(frozen=True)
class LoraHub:
    """Gradient-free search of one weight per task on a few labelled batches (2307.13269).

    Minimises the tasks' own loss + penalty · mean |w| by CMA-ES, from the mean merge, w = 1/T. The
    authors use another evolutionary optimiser, from w = 0.

    Args:
        evaluations: how often the fused model is evaluated.
        bound: weights stay within ± this.
        penalty: of the weights' mean magnitude.
        seed: of the search.
    """

    evaluations: int = 40
    bound: float = 1.5
    penalty: float = 0.05
    seed: int = 0

    def search(
        self, module: ReuseModule, family: Family, batches: Batches, kinds: Mapping[str, Task]
    ) -> Weighted:
        """Search the weights.

        Args:
            module: evaluates.
            family: the tasks.
            batches: of each task.
            kinds: of what kind each task is.

        Raises:
            FusionKitError: there are fewer than two tasks, or evaluations, or the mean merge is
                out of bounds.
        """
        import numpy as np

        cma = of_extra("cma", "search", "LoraHub")
        count = len(family.tasks)
        if count < 2 or self.evaluations < 2:
            raise FusionKitError(
                f"LoraHub needs two tasks and evaluations at least, got {count} tasks and "
                f"{self.evaluations} evaluations"
            )
        if self.bound < 1 / count:
            raise FusionKitError(
                f"LoraHub starts from the mean merge, so that its bound, {self.bound:g}, must be "
                f"{1 / count:g} at least"
            )

        def loss(weights: Sequence[float]) -> float:
            merge = Weighted({t: float(w) for t, w in zip(family.tasks, weights, strict=True)})
            magnitude = sum(abs(weight) for weight in weights) / count
            found, _ = evaluate(module, Fused(family, merge), batches, kinds)
            return found + self.penalty * magnitude

        start = [1 / count] * count
        options = {
            "bounds": [-self.bound, self.bound],
            "maxfevals": self.evaluations - 1,
            "seed": np.nan,  # would be set for all of NumPy
            "randn": np.random.RandomState(self.seed + 1).randn,
            "verbose": -9,
        }
        strategy = cma.CMAEvolutionStrategy(start, self.bound / 3, options)
        best, lowest = start, loss(start)
        left = self.evaluations - 1
        while left > 0:
            candidates = strategy.ask(min(strategy.popsize, left) if left >= 2 else None)[:left]
            values = [loss(candidate) for candidate in candidates]
            left -= len(candidates)
            for candidate, value in zip(candidates, values, strict=True):
                if value < lowest:
                    best, lowest = list(candidate), value
            if len(candidates) >= strategy.sp.weights.mu:
                strategy.tell(candidates, values)
        return Weighted({t: float(w) for t, w in zip(family.tasks, best, strict=True)})
