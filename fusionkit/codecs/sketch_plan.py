"""What `Sketch` may spend where: a family's measures, and a budget, made into each task's plan."""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch

from fusionkit.codecs.allocation import Division, Plan, Share, Spectra
from fusionkit.codecs.overhead import entry_bytes, overhead
from fusionkit.codecs.quantized_factors import Doubles
from fusionkit.codecs.rounded_sketch import MOST
from fusionkit.codecs.sketch_codes import FIXED_BYTES
from fusionkit.codecs.sketch_encoder import How, Measured, sides
from fusionkit.codecs.whitening import Metric, Metrics
from fusionkit.registry import Config
from fusionkit.task_vectors.family import Family
from fusionkit.task_vectors.moments import UNKNOWN, Moments

_NOISY = 0.04
"""Error energy over base energy that is felt: there a divergence of 0.01 on text classifiers."""
_LEAST_FELT = 0.01
"""How little of the mean a tensor is felt at least: a few rows may not reach all experts, say."""
_OF_MANIFEST = 10
"""The part of a budget in bits that is left for the manifest, at most."""
_TRIES = 50


@dataclass(frozen=True)
class Layout:
    """Where tensors are, in a task's plan and among its gains.

    Attributes:
        names: of all tensors.
        matrices: of those that are matrices, and so have gains.
        shapes: rows and columns of each.
    """

    names: Mapping[str, int]
    matrices: Mapping[str, int]
    shapes: Sequence[tuple[int, int]]


@dataclass(frozen=True)
class Target:
    """What is asked for: one of bits, bytes and noise, as `Sketch` has them."""

    bits: float | None
    nbytes: int | None
    noise: float | None
    share: Share


def layout_of(family: Family) -> Layout:
    """Where a family's tensors are."""
    shapes = [sides(torch.Size(family.base.specs[name].shape)) for name in family.sizes]
    names = {name: place for place, name in enumerate(family.sizes)}
    matrices = [name for name, (rows, _) in zip(names, shapes, strict=True) if rows > 1]
    return Layout(names, {name: place for place, name in enumerate(matrices)}, shapes)


def plans_of(
    family: Family,
    layout: Layout,
    measured: Mapping[str, Measured],
    target: Target,
    how: How,
    codec: Config,
    felt: Mapping[str, Measured] | None = None,
) -> list[Plan]:
    """Each task's plan; warns of what is asked for and can't be good.

    What data tell moves a task's bytes among its own tensors, and none to another task.

    Args:
        family: what is compressed.
        layout: where its tensors are.
        measured: what a pass saw of each.
        target: what is asked for.
        how: what is made of a matrix.
        codec: as the manifest records it.
        felt: what a pass saw of each as data have told that it is felt; for bits or bytes only.
    """
    budgets = _Budgets(family, layout, measured, target, how, codec)
    warned = family.workers.processes.rank == 0
    if target.noise is not None:
        spectra = budgets.spectra(int(MOST * budgets.parameters / 8))
        error = target.noise * budgets.base
        plans = [own.plan(own.bits_for(error)) for own in spectra]
    else:
        budget = budgets.asked
        spectra, plans = budgets.spectra(budget), budgets.plans(budget)
        if warned and not any(map(_stores, plans)) and any(own.energy for own in spectra):
            _warn_of_headers(budgets)
        if felt is not None:
            spectra = replace(budgets, measured=felt).spectra(budget)
            plans = [
                Division([own], target.share).within(plan.total)[0]
                for own, plan in zip(spectra, plans, strict=True)
            ]
    if warned and how.sketch and budgets.base:
        _warn_of_noise(budgets, plans, spectra)
    return plans


@dataclass(frozen=True)
class _Budgets:
    """What any number of bytes would be spent on; fields as `plans_of` has them."""

    family: Family
    layout: Layout
    measured: Mapping[str, Measured]
    target: Target
    how: How
    codec: Config

    @cached_property
    def base(self) -> float:
        """The base's energy."""
        return sum(each.base for each in self.measured.values())

    @property
    def parameters(self) -> int:
        """Of all tasks."""
        return max(self.family.parameters, 1) * len(self.family.tasks)

    @property
    def asked(self) -> int:
        """Bytes that are asked for."""
        return self.target.nbytes or int((self.target.bits or MOST) * self.parameters / 8)

    def fixed(self, budget: int) -> int:
        """Bytes of a budget that no delta gets."""
        beside = overhead(self.family, self.codec, budget)
        gains = entry_bytes("", "gains", budget) + 4 * len(self.layout.matrices)
        least = beside.headers + gains * len(self.family.tasks)
        if self.target.nbytes:
            return least + beside.manifest + beside.whole
        return least + min(beside.manifest, budget // _OF_MANIFEST)

    def spectra(self, budget: int) -> list[Spectra]:
        """Of each task, with the entries that its header would have."""
        layout, each = self.layout, self.measured.values()
        rows, columns = np.array(layout.shapes, np.float64).reshape(-1, 2).T
        entries = np.array([entry_bytes(n, "codes", budget) for n in layout.names], np.float64)
        packed = overhead(self.family, self.codec, budget).packs
        return [
            Spectra(
                self.base,
                np.array([own.energies[task] for own in each]),
                [own.squares[task] for own in each],
                rows,
                columns,
                entries,
                packed,
                FIXED_BYTES,
                self.how.exponent,
                self.how.sketch,
                _felt(self.family.sensitivities.get(name, {}), layout),
            )
            for task, name in enumerate(self.family.tasks)
        ]

    def plans(self, budget: int) -> list[Plan]:
        """Each task's, at most at so many bytes."""
        return self._division(budget).within(budget - self.fixed(budget))

    def enough(
        self, good: Callable[[list[Plan]], bool], error: float | None = None
    ) -> tuple[str, list[Plan]]:
        """What to ask for instead, so that the plans are good; and these.

        Args:
            good: whether plans are.
            error: the most energy that any task's error is to have; None: that something is
                stored is all.
        """
        budget = self.asked
        if error is None:
            left = max(own.least for own in self.spectra(budget))
        else:
            left = self._division(budget).quiet(error)
        for _ in range(3):  # what no delta gets hardly grows with the budget
            budget = left + self.fixed(budget)
        for _ in range(_TRIES):
            name, value, budget = self._rounded_up(budget)
            if good(plans := self.plans(budget)):
                break
            budget += 1 + budget // 50
        return f"{name}={value}", plans

    def _division(self, budget: int) -> Division:
        return Division(self.spectra(budget), self.target.share)

    def _rounded_up(self, budget: int) -> tuple[str, float, int]:
        """A budget as a setting, of three digits, and how many bytes it is then."""
        parts = 1.0 if self.target.nbytes else self.parameters / 8
        unit = 10.0 ** (math.floor(math.log10(budget / parts)) - 2)
        value = float(f"{math.ceil(budget / parts / unit) * unit:.3g}")
        name = "bytes" if self.target.nbytes else "bits"
        return name, int(value) if self.target.nbytes else value, int(value * parts)


def metrics_of(family: Family, layout: Layout) -> Metrics | None:
    """How errors in each task's tensors are felt; None where no data have told."""
    if not family.moments:
        return None
    felt = [_felt(family.sensitivities.get(task, {}), layout) for task in family.tasks]

    def metric(task: int, name: str) -> Metric:
        known = family.moments.get(family.tasks[task], {}).get(name, UNKNOWN)
        sides = (side if side is None else side.to(family.device) for side in known)
        return Metric(float(felt[task][layout.names[name]]) ** 0.5, Moments(*sides))

    return metric


def _felt(sensitivities: Mapping[str, float], layout: Layout) -> Doubles:
    """How much a task's outputs feel an error in each tensor, over what they do on average."""
    known = [sensitivities[name] for name in layout.matrices if name in sensitivities]
    mean = sum(known) / max(len(known), 1)
    if not mean:
        return np.ones(len(layout.names))
    felt = [sensitivities.get(name, mean) / mean for name in layout.names]
    return np.maximum(np.array(felt, np.float64), _LEAST_FELT)


def _warn_of_headers(budgets: _Budgets) -> None:
    target, budget = budgets.target, budgets.asked
    asked = f"bytes={target.nbytes}" if target.nbytes else f"bits={target.bits}"
    enough, _ = budgets.enough(lambda plans: any(map(_stores, plans)))
    warnings.warn(
        f"Sketch({asked}) leaves {budget} bytes, of which all that is not deltas takes "
        f"{budgets.fixed(budget)}: the deltas come back as zero; ask for {enough} or more",
        stacklevel=2,
    )


def _warn_of_noise(budgets: _Budgets, plans: Sequence[Plan], spectra: Sequence[Spectra]) -> None:
    base, parameters = budgets.base, max(budgets.family.parameters, 1)
    noisy = [_stores(plan) and _is_noisy(plan, base) for plan in plans]
    if not any(noisy):
        return
    error = _NOISY * base
    wanted = quieter = [own.plan(own.bits_for(error)) for own in spectra]
    mend = f"noise={_NOISY}"
    if budgets.target.noise is None and not any(_is_noisy(plan, base) for plan in wanted):
        stored = [_stores(plan) for plan in wanted]

        def good(plans: list[Plan]) -> bool:
            return not any(_is_noisy(plan, base) for plan in plans) and all(
                _stores(plan) for plan, needed in zip(plans, stored, strict=True) if needed
            )

        mend, quieter = budgets.enough(good, error)
    for task, plan, quiet, felt in zip(budgets.family.tasks, plans, quieter, noisy, strict=True):
        if not felt:
            continue
        bits, enough = (8 * each.total / parameters for each in (plan, quiet))
        way = f"below {_NOISY} it is hardly felt: that takes {enough:.3g} bits, as by {mend}"
        if _is_noisy(quiet, base):
            way = "it is too large to be sketched: store it by another codec"
        warnings.warn(
            f"task '{task}': at {bits:.3g} bits per parameter its delta comes back with an error "
            f"of {plan.error / base:.2g} times the base's energy; {way}",
            stacklevel=2,
        )


def _stores(plan: Plan) -> bool:
    return bool(plan.nbytes.any())


def _is_noisy(plan: Plan, base: float) -> bool:
    return plan.error > _NOISY * base * 1.001
