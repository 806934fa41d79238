"""What `Sketch` may spend where: a family's measures, and a budget, made into each task's plan."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fusionkit.codecs.allocation import Plan, Share, Spectra, within
from fusionkit.codecs.overhead import entry_bytes, overhead
from fusionkit.codecs.sketch_codes import FIXED_BYTES
from fusionkit.codecs.sketch_encoder import How, Measured, sides
from fusionkit.registry import Config
from fusionkit.task_vectors.family import Family

_NOISY = 0.04
"""Error energy over base energy that is felt: there a divergence of 0.01 on text classifiers."""


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
) -> list[Plan]:
    """Each task's plan; warns of what is asked for and can't be good.

    Args:
        family: what is compressed.
        layout: where its tensors are.
        measured: what a pass saw of each.
        target: what is asked for.
        how: what is made of a matrix.
        codec: as the manifest records it.
    """
    spectra = _spectra(layout, measured, len(family.tasks), how)
    base = sum(each.base for each in measured.values())
    first = family.workers.processes.rank == 0
    if target.noise is not None:
        errors = target.noise * base
        plans = [own.plan(own.bits_for(errors)) for own in spectra]
    else:
        parameters = max(family.parameters, 1) * len(family.tasks)
        budget = target.nbytes or int((target.bits or 0) * parameters / 8)
        beside = overhead(family, codec, budget)
        fixed = beside.total if target.nbytes else beside.beside_parameters
        fixed += len(family.tasks) * _gains_bytes(layout)
        plans = within(spectra, budget, fixed, target.share)
        if (
            first
            and not any(plan.nbytes.any() for plan in plans)
            and any(own.energy for own in spectra)
        ):
            _warn_of_headers(budget, fixed, spectra, parameters, target)
    if first and how.sketch and base:
        _warn_of_noise(family, plans, spectra, base)
    return plans


def _spectra(
    layout: Layout, measured: Mapping[str, Measured], tasks: int, how: How
) -> list[Spectra]:
    rows, columns = np.array(layout.shapes, np.float64).reshape(-1, 2).T
    entries = np.array([entry_bytes(name, "codes", 1 << 40) for name in layout.names], np.float64)
    return [
        Spectra(
            np.array([each.energies[task] for each in measured.values()]),
            [each.squares[task] for each in measured.values()],
            rows,
            columns,
            entries,
            FIXED_BYTES,
            how.exponent,
            how.sketch,
        )
        for task in range(tasks)
    ]


def _gains_bytes(layout: Layout) -> int:
    return entry_bytes("", "gains", 1 << 40) + 4 * len(layout.matrices)


def _warn_of_headers(
    budget: int, fixed: int, spectra: Sequence[Spectra], parameters: int, target: Target
) -> None:
    least = fixed + sum(sum(own.entries) for own in spectra)
    asked = f"bytes={target.nbytes}" if target.nbytes else f"bits={target.bits}"
    enough = f"bytes={least}" if target.nbytes else f"bits={8 * least / parameters:.2g}"
    warnings.warn(
        f"Sketch({asked}): the bundle may take {budget} bytes, of which headers, manifest and "
        f"private tensors take up to {fixed}: no delta is stored; ask for more than {enough}",
        stacklevel=2,
    )


def _warn_of_noise(
    family: Family, plans: Sequence[Plan], spectra: Sequence[Spectra], base: float
) -> None:
    for task, plan, own in zip(family.tasks, plans, spectra, strict=True):
        ratio = plan.error / base
        if not plan.nbytes.any() or ratio <= _NOISY * 1.001:
            continue
        wanted = own.plan(own.bits_for(_NOISY * base)).total
        bits, enough = (8 * size / max(family.parameters, 1) for size in (plan.total, wanted))
        warnings.warn(
            f"task '{task}': {bits:.3f} bits per parameter are "
            f"few for its delta: the error's energy is {ratio:.0%} of the base's, and above "
            f"{_NOISY:.0%} it is felt; that takes {enough:.3f} bits",
            stacklevel=2,
        )
