"""How much a task's outputs feel each tensor, and which directions of it, on a few rows."""

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusionkit.calibration.objective import drawn, head_of
from fusionkit.calibration.settings import Calibration
from fusionkit.calibration.token_moments import TokenMoments
from fusionkit.errors import DataError
from fusionkit.reuse.module import ReuseModule
from fusionkit.task_vectors.family import Family
from fusionkit.task_vectors.moments import Moments
from fusionkit.tasks.reweighted import Reweighted
from fusionkit.tasks.task import Task

_DRAWS = 4
"""Backward passes over each batch."""


class Felt(NamedTuple):
    """What was found.

    Attributes:
        sensitivities: task → tensor's name → its sensitivity; 0 where nothing depends on it.
        moments: task → matrix's name → its moments; empty where they weren't asked for.
    """

    sensitivities: dict[str, dict[str, float]]
    moments: dict[str, dict[str, Moments]]


def felt(
    reuse: ReuseModule,
    family: Family,
    kinds: Sequence[Task],
    batches: Callable[[str], Iterable[Any]],
    settings: Calibration,
    moments: bool = False,
) -> Felt:
    """How much each tensor W that is compressed is felt, at each task's own weights.

    f is what the fine-tuned model says of a row: noise of variance v in the entries of W, each by
    itself, changes it by v E ‖∂f/∂W‖², summed over the outputs; W's sensitivity is E ‖∂f/∂W‖² over
    its entries. The squares of all rows and outputs are had from one gradient:
    E ‖Σ ε ∂f/∂W‖² = Σ ‖∂f/∂W‖², where the ε are independent, of mean 0 and variance 1. Memory
    beside the model is a batch's activations and one tensor's gradient; of stacks of experts, a
    copy, too. The moments are had in the same passes: see `TokenMoments`.

    Args:
        reuse: its model is given each task's weights.
        family: has them.
        kinds: of what kind each task is; says how the model is called.
        batches: a task's name → batches of its rows, on the model's device.
        settings: how many rows, what draws, and whether the outputs or the features are meant.
        moments: whether they are wanted, too.

    Raises:
        DataError: a gradient is not finite.
    """
    found = Felt({}, {})
    try:
        for task, kind in zip(family.tasks, kinds, strict=True):
            reuse.place(task, family, deltas=True)
            own = _of_task(reuse, family, task, kind, batches(task), settings, moments)
            found.sensitivities[task], found.moments[task] = own
    finally:
        reuse.switch(None)
    return found


def _of_task(
    reuse: ReuseModule,
    family: Family,
    task: str,
    kind: Task,
    batches: Iterable[Any],
    settings: Calibration,
    moments: bool,
) -> tuple[dict[str, float], dict[str, Moments]]:
    """One task's, whose weights the model has."""
    seen, specs = reuse.seen(family), family.base.specs
    tensors, sums = seen.tensors, dict.fromkeys(family.sizes, 0.0)

    def take(name: str, leaf: Tensor) -> None:
        """Note a gradient, and let go of it before the next one is there."""
        gradient, leaf.grad = leaf.grad, None
        if gradient is not None:
            common = gradient[: specs[name].shape[0]] if gradient.ndim else gradient
            sums[name] += float(common.to(torch.float32).square().sum(dtype=torch.float64))

    leaves = {}
    for name in family.sizes:
        if name in tensors and tensors[name].is_floating_point():
            leaves[name] = tensors[name].detach().requires_grad_()
            hook = partial(take, name)
            leaves[name].register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
    tokens = TokenMoments(leaves, len(family.tasks), frozenset(family.tied.values()))
    features = settings.objective == "features"
    head = head_of(reuse.model, family.private[task]) if features else None
    generator, rows = torch.Generator().manual_seed(settings.seed), 0
    for batch in batches:
        if rows >= settings.rows:
            break
        rows += kind.count(batch)
        watched = tokens.watching(reuse.model) if moments else nullcontext()
        with watched, torch.enable_grad():
            said = drawn(Reweighted(reuse.model, seen.live(leaves)), batch, kind, head)
            for draw in range(_DRAWS):
                total = said(generator)
                if total.requires_grad:
                    again = draw + 1 < _DRAWS
                    torch.autograd.backward(total, retain_graph=again, inputs=[*leaves.values()])
        tokens.flush()
    for name, value in sums.items():
        if not math.isfinite(value):
            raise DataError(
                f"the gradient of what the model says of task '{task}' is not finite in '{name}'; "
                "look at its rows, and at the fine-tuned model's outputs on them"
            )
    draws = max(rows * _DRAWS, 1)
    told = {name: value / draws / max(family.sizes[name], 1) for name, value in sums.items()}
    return told, tokens.found()
