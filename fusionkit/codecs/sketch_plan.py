"""What `Sketch` may spend where: a family's measures, and a budget, made into each task's plan."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fusionkit.codecs.allocation import Plan, Share, Spectra, within
from fusionkit.codecs.overhead import entry_bytes, overhead
from fusionkit.codecs.quantized_factors import Doubles
from fusionkit.codecs.sign_sketch import MOST
from fusionkit.codecs.sketch_codes import FIXED_BYTES
from fusionkit.codecs.sketch_encoder import How, Measured, sides
from fusionkit.registry import Config
from fusionkit.task_vectors.family import Family

_NOISY = 0.04
"""Error energy over base energy that is felt: there a divergence of 0.01 on text classifiers."""
_LEAST_FELT = 0.01
"""How little of the mean a tensor is felt at least: a few rows may not reach all experts, say."""
_OF_MANIFEST = 10
"""The part of a budget in bits that is left for the manifest, at most."""


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
    parameters = max(family.parameters, 1) * len(family.tasks)
    budget = target.nbytes or int((target.bits or MOST) * parameters / 8)
    beside = overhead(family, codec, budget)
    spectra = _spectra(family, layout, measured, how, budget, beside.packs)
    base = sum(each.base for each in measured.values())
    first = family.workers.processes.rank == 0
    if target.noise is not None:
        errors = target.noise * base
        plans = [own.plan(own.bits_for(errors)) for own in spectra]
    else:
        gains = entry_bytes("", "gains", budget) + 4 * len(layout.matrices)
        fixed = beside.headers + gains * len(family.tasks)
        if target.nbytes:
            fixed += beside.manifest + beside.whole
        else:
            fixed += min(beside.manifest, budget // _OF_MANIFEST)
        plans = within(spectra, budget, fixed, target.share)
        nothing = not any(plan.nbytes.any() for plan in plans)
        if first and nothing and any(own.energy for own in spectra):
            least = fixed + sum(int(own.entries.sum()) for own in spectra)
            _warn_of_headers(target, budget, fixed, least, parameters)
    if first and how.sketch and base:
        _warn_of_noise(family, plans, spectra, base)
    return plans


def _spectra(
    family: Family,
    layout: Layout,
    measured: Mapping[str, Measured],
    how: How,
    nbytes: int,
    packed: bool,
) -> list[Spectra]:
    rows, columns = np.array(layout.shapes, np.float64).reshape(-1, 2).T
    entries = np.array([entry_bytes(name, "codes", nbytes) for name in layout.names], np.float64)
    base = sum(each.base for each in measured.values())
    return [
        Spectra(
            base,
            np.array([each.energies[task] for each in measured.values()]),
            [each.squares[task] for each in measured.values()],
            rows,
            columns,
            entries,
            packed,
            FIXED_BYTES,
            how.exponent,
            how.sketch,
            _felt(family.sensitivities.get(name, {}), layout),
        )
        for task, name in enumerate(family.tasks)
    ]


def _felt(sensitivities: Mapping[str, float], layout: Layout) -> Doubles:
    """How much a task's outputs feel an error in each tensor, over what they do on average."""
    known = [sensitivities[name] for name in layout.matrices if name in sensitivities]
    mean = sum(known) / max(len(known), 1)
    if not mean:
        return np.ones(len(layout.names))
    felt = [sensitivities.get(name, mean) / mean for name in layout.names]
    return np.maximum(np.array(felt, np.float64), _LEAST_FELT)


def _warn_of_headers(target: Target, budget: int, fixed: int, least: int, parameters: int) -> None:
    asked, enough = f"bits={target.bits}", f"bits={8 * least / parameters:.2g}"
    if target.nbytes:
        asked, enough = f"bytes={target.nbytes}", f"bytes={least}"
    warnings.warn(
        f"Sketch({asked}) leaves {budget} bytes, of which all that is not deltas takes {fixed}: "
        f"the deltas come back as zero; ask for more than {enough}",
        stacklevel=2,
    )


def _warn_of_noise(
    family: Family, plans: Sequence[Plan], spectra: Sequence[Spectra], base: float
) -> None:
    for task, plan, own in zip(family.tasks, plans, spectra, strict=True):
        ratio = plan.error / base
        if not plan.nbytes.any() or ratio <= _NOISY * 1.001:
            continue
        wanted = own.plan(own.bits_for(_NOISY * base))
        bits, enough = (8 * each.total / max(family.parameters, 1) for each in (plan, wanted))
        mend = f"below {_NOISY} it is hardly felt: that takes {enough:.3g} bits"
        if wanted.error > _NOISY * base * 1.001:
            mend = "it is too large to be sketched: store it by another codec"
        warnings.warn(
            f"task '{task}': at {bits:.3g} bits per parameter its delta comes back with an error "
            f"of {ratio:.2g} times the base's energy; {mend}",
            stacklevel=2,
        )
