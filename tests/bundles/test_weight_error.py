"""Errors of weights: sums over all compressed tensors, whatever their size."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft_adapters import CONFIGS, net, saved
from torch import Tensor

import fusionkit
from fusionkit import Dense, Family, MagnitudePrune
from fusionkit.bundles.weight_error import WeightError, base_energy, weight_error
from fusionkit.errors import BundleError
from fusionkit.task_vectors.vectors import BLOCK


def errors(
    base: dict[str, Tensor], tuned: dict[str, Tensor], codec: fusionkit.DeltaCodec
) -> WeightError:
    bundle = fusionkit.compress(base, {"own": tuned}, codec)
    return weight_error(bundle, Family(base, {"own": tuned}), "own")


def test_of_several_tensors_and_blocks() -> None:
    """Of the one that is kept as fp16 only its rounding; nothing of one that comes back as zero."""
    base = {"large": torch.zeros(3, BLOCK), "small": torch.ones(2, 2), "same": torch.ones(3)}
    tuned = {name: tensor.clone() for name, tensor in base.items()}
    tuned["large"][0, 0], tuned["large"][2, -1] = 3.0, 1.0
    tuned["small"][1] += 0.5
    found = errors(base, tuned, MagnitudePrune(1 / 3 / BLOCK, dtype="fp32"))
    assert found == WeightError(3.0**2 + 1 + 2 * 0.5**2, 1 + 2 * 0.5**2, 3.0**2)
    assert found.relative == 1.5 / 10.5
    assert found.projection == 9 / 10.5


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_whatever_the_scale(scale: float) -> None:
    """Squares that float32 has not are no zeros, and no infinities."""
    base = {"weight": torch.zeros(4, 4)}
    tuned = {"weight": torch.full((4, 4), scale)}
    found = errors(base, tuned, Dense("fp32"))
    assert (found.error, found.relative, found.projection) == (0, 0, 1)
    assert found.energy == pytest.approx(16 * float(torch.tensor(scale)) ** 2, rel=1e-6)


def test_of_no_delta() -> None:
    base = {"weight": torch.ones(4, 4)}
    found = errors(base, base, Dense("fp32"))
    assert (found.error, found.relative, found.projection) == (0, None, None)


def test_what_is_stored_exactly_has_no_error() -> None:
    base = {"weight": torch.ones(4, 4), "count": torch.tensor(3)}
    tuned = {"weight": base["weight"] + 1, "count": torch.tensor(5)}
    assert errors(base, tuned, Dense("fp32")).energy == 16


def test_of_adapters_own_tensors(tmp_path: Path) -> None:
    """Against where they started; to the last bit where all is kept."""
    saved(tmp_path / "in", CONFIGS["rslora"])
    arguments: dict[str, Any] = {"private": ["head.*"], "adapters": "modules"}
    adapters = {"t": str(tmp_path / "in")}
    whole, cut = fusionkit.sweep(
        net(), adapters, {"whole": Dense("fp32"), "cut": MagnitudePrune(0.1)}, **arguments
    ).rows
    assert (whole.weight_error, whole.projection) == (0, 1)
    assert 0 < (cut.weight_error or 0) < 1
    assert cut.weight_error == pytest.approx(1 - (cut.projection or 0), rel=1e-3)


def test_energy_of_the_base() -> None:
    """Of its matrices, as `Sketch` relates noise to it; convolutions are matrices."""
    base = {
        "matrix": torch.full((2, 3), 2.0),
        "convolution": torch.ones(2, 2, 3),
        "row": torch.ones(1, 9),
        "vector": torch.ones(9),
        "none": torch.ones(0, 4),
    }
    assert base_energy(Family(base, {"own": base})) == 6 * 4 + 12


def test_no_such_task() -> None:
    base = {"weight": torch.ones(2, 2)}
    bundle = fusionkit.compress(base, {"own": base}, Dense())
    with pytest.raises(BundleError, match="has no task 'other'"):
        weight_error(bundle, Family(base, {"other": base}), "other")
