"""Sketch on random families: budgets, bytes, predictions, mends; and no bias, by statistics.

`python -m families` searches further; see `families/__main__.py`.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from families.check import check
from families.draw import _SPECTRA
from scipy import stats
from torch import Tensor

from fusionkit import Sketch, compress

SEEDS = 64
SHAPE = (96, 64)


@pytest.mark.parametrize("seed", range(12))
def test_a_family_is_held_to_all_of_it(seed: int, tmp_path: Path) -> None:
    check(seed, tmp_path, thorough=seed % 3 == 0)


def decoded(delta: Tensor, bits: float) -> Tensor:
    """What comes back with each of many seeds: float64 `(seeds, entries)`."""
    found = []
    for seed in range(SEEDS):
        bundle = compress({"w": torch.zeros(SHAPE)}, {"t": {"w": delta}}, Sketch(bits, seed=seed))
        tensor = bundle.delta("t", "w")
        assert tensor is not None
        found.append(tensor.flatten())
    return torch.stack(found).to(torch.float64)


@pytest.mark.parametrize("bits", [0.6, 2.0])
@pytest.mark.parametrize("kind", ["flat", "strong and flat", "heavy tails"])
def test_there_is_no_bias(kind: str, bits: float) -> None:
    """The mean's projections on δ, and on directions at random, miss by chance alone.

    Student's t of each, at a chance of one in 10,000 that any of all these tests fails. The
    strongest of the directions that are sketched do come back a little too large: of a mean over
    seeds that leaves an error of at most a twentieth of δ's energy.
    """
    delta = _SPECTRA[kind](np.random.default_rng(5), SHAPE).contiguous()
    found, wanted = decoded(delta, bits), delta.flatten().to(torch.float64)
    draw = torch.Generator().manual_seed(1)
    directions = torch.randn(40, len(wanted), generator=draw, dtype=torch.float64)
    missed = (found - wanted) @ directions.mT
    t = missed.mean(0) / missed.std(0) * SEEDS**0.5
    assert float(t.abs().max()) < stats.t.ppf(1 - 1e-4 / 2 / 6 / 40, SEEDS - 1)
    on_itself = found @ wanted / wanted.square().sum() - 1
    assert float(on_itself.mean().abs()) < 2e-3 + 5 * float(on_itself.std()) / SEEDS**0.5
    noise = float((found - wanted).square().sum(1).mean() / wanted.square().sum())
    bias = float((found.mean(0) - wanted).square().sum() / wanted.square().sum())
    assert abs(bias - noise / SEEDS) < 0.05 + 0.2 * noise / SEEDS


def test_more_bits_are_less_error() -> None:
    for kind in ("flat", "decaying", "strong and flat", "rank 1"):
        delta = _SPECTRA[kind](np.random.default_rng(7), SHAPE).contiguous()
        last = float("inf")
        for bits in (0.6, 1.2, 2.5, 5.0):
            bundle = compress({"w": torch.zeros(SHAPE)}, {"t": {"w": delta}}, Sketch(bits))
            tensor = bundle.delta("t", "w")
            assert tensor is not None
            error = float((tensor - delta).square().sum())
            assert error < 0.9 * last, (kind, bits)
            last = error
