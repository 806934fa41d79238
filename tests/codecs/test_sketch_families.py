"""Sketch on random families: budgets, bytes, predictions, mends; and no bias, by statistics.

`python -m families` searches further; see `families/__main__.py`.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from families.check import check
from families.draw import SPECTRA
from scipy import stats
from torch import Tensor

from fusionkit import Sketch, compress

SEEDS = 64
SHAPE = (96, 64)


@pytest.mark.parametrize("seed", range(10))
def test_a_family_is_held_to_all_of_it(seed: int, tmp_path: Path) -> None:
    check(seed, tmp_path, thorough=seed % 3 == 0)


@pytest.mark.parametrize(("bits", "most"), [(0.6, 0.12), (2.0, 0.01)])
def test_there_is_no_bias(bits: float, most: float) -> None:
    """The mean's projections on δ, and on directions at random, miss by chance alone.

    Student's t of each, at a chance of one in 10,000 that any of all these tests fails. Of the
    directions that are sketched, the strongest do come back a little too large, and the others too
    small, the more so the fewer the bits: along δ that is less than a fiftieth, and in a mean over
    seeds an error of at most `most` of δ's energy.
    """
    deltas = {
        kind: SPECTRA[kind](np.random.default_rng(5), SHAPE).contiguous()
        for kind in ("flat", "strong and flat", "heavy tails")
    }
    deltas = {kind: delta / delta.norm() for kind, delta in deltas.items()}
    base = {kind: torch.zeros(SHAPE) for kind in deltas}
    draws: dict[str, list[Tensor]] = {kind: [] for kind in deltas}
    for seed in range(SEEDS):
        bundle = compress(base, {"t": deltas}, Sketch(bits, seed=seed))
        for kind, found in draws.items():
            delta = bundle.delta("t", kind)
            assert delta is not None
            found.append(delta.flatten())
    directions = torch.randn(
        40, base["flat"].numel(), generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    for kind, delta in deltas.items():
        wanted = delta.flatten().to(torch.float64)
        missed = torch.stack(draws[kind]).to(torch.float64) - wanted
        along = missed @ directions.mT
        t = along.mean(0) / along.std(0) * SEEDS**0.5
        assert float(t.abs().max()) < stats.t.ppf(1 - 1e-4 / 2 / 6 / 40, SEEDS - 1), kind
        energy = float(wanted.square().sum())
        on_itself = missed @ wanted / energy
        chance = 5 * float(on_itself.std()) / SEEDS**0.5
        assert float(on_itself.mean().abs()) < 0.02 + chance, kind
        noise = float(missed.square().sum(1).mean()) / energy
        bias = float(missed.mean(0).square().sum()) / energy
        assert abs(bias - noise / SEEDS) < most + 0.2 * noise / SEEDS, kind


def test_more_bits_are_less_error() -> None:
    for kind in ("flat", "decaying", "strong and flat", "rank 1"):
        delta = SPECTRA[kind](np.random.default_rng(7), SHAPE).contiguous()
        last = float("inf")
        for bits in (0.6, 1.2, 2.5, 5.0):
            bundle = compress({"w": torch.zeros(SHAPE)}, {"t": {"w": delta}}, Sketch(bits))
            tensor = bundle.delta("t", "w")
            assert tensor is not None
            error = float((tensor - delta).square().sum())
            assert error < 0.9 * last, (kind, bits)
            last = error
