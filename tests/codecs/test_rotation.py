"""The seeded rotation: what it is, to the bit; orthogonal; undone; Gaussian; alike everywhere."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from golden.coded import rotation as written_out
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fusionkit.checkpoints.adapters.lowrank import LowRank
from fusionkit.codecs import rotation
from fusionkit.codecs.rotation import rotate, rotate_sparse
from fusionkit.codecs.rotation_sides import draw, flips, side_of

quick = settings(deadline=None, max_examples=60)
shapes = st.tuples(st.integers(0, 70), st.integers(0, 70)) | st.sampled_from(
    [(1, 4095), (1000, 1), (33, 257), (128, 384), (0, 5), (5, 0)]
)
seeds = st.integers(0, 2**64 - 1)


def close(a: Tensor, b: Tensor, norm: float | Tensor) -> bool:
    return bool((a - b).norm() <= 1e-6 * norm)


def kurtosis(values: Tensor) -> float:
    values = values.double()
    return float(values.pow(4).mean() / values.pow(2).mean() ** 2)


@pytest.mark.parametrize(
    "shape", [(1, 1), (2, 3), (5, 7), (16, 31), (32, 48), (97, 128), (130, 33)]
)
@pytest.mark.parametrize("seed", [0, 7, 2**64 - 1])
def test_it_is_what_the_docstring_says(shape: tuple[int, int], seed: int) -> None:
    matrix = torch.randn(shape, dtype=torch.float64)
    for place in (0, 5, 2**32 - 1):
        left, right = (written_out(seed, side, n, place) for side, n in enumerate(shape))
        rotated = rotate(matrix.float(), seed, place=place)
        assert close(rotated, left @ matrix @ right.T, matrix.norm())
        back = rotate(matrix.float(), seed, inverse=True, place=place)
        assert close(back, left.T @ matrix @ right, matrix.norm())


def test_golden() -> None:
    """Bundles are decoded by these numbers for ever."""
    order, signs = draw(1, 0, 8)
    assert order.tolist() == [0, 5, 4, 7, 6, 1, 3, 2]
    assert [sum(1 << i for i in range(8) if row[i] < 0) for row in signs.tolist()] == [
        210,
        92,
        119,
        68,
    ]
    assert flips(1, 0, 8, 0).tolist() == [-1, 1, 1, -1, 1, 1, -1, -1]
    assert flips(1, 1, 70, 7).tolist()[60:] == [1, -1, -1, -1, 1, -1, 1, 1, 1, 1]
    order, signs = draw(2**63 + 5, 1, 14336)
    assert order[:6].tolist() == [2557, 10956, 7063, 1291, 5397, 10840]
    assert int((order * np.arange(14336)).sum()) == 734696443916
    ramp = torch.arange(15, dtype=torch.float32).view(3, 5)
    assert torch.allclose(
        rotate(ramp, 3)[1],
        torch.tensor([0.0, -5.685029, 1.992639, -2.871320, 5.977921]),
        atol=1e-5,
    )


@quick
@given(shapes, seeds)
@example((17, 1537), 1)
@example((1025, 3), 1)
def test_it_is_orthogonal_and_undone(shape: tuple[int, int], seed: int) -> None:
    matrix = torch.randn(shape)
    rotated = rotate(matrix, seed)
    assert rotated.shape == matrix.shape
    assert rotated.is_contiguous()
    other = torch.randn(shape)
    product = (rotated.double() * rotate(other, seed).double()).sum()
    scale = matrix.norm() * other.norm()
    assert abs(product - (matrix.double() * other.double()).sum()) <= 1e-6 * scale
    assert close(rotate(rotated, seed, inverse=True), matrix, matrix.norm())
    assert close(rotate(rotate(matrix, seed, inverse=True), seed), matrix, matrix.norm())


@quick
@given(shapes, seeds, st.booleans())
def test_other_devices_way_is_the_same(shape: tuple[int, int], seed: int, inverse: bool) -> None:
    matrix = torch.randn(shape)
    if not matrix.numel():
        return
    other = rotation._on_device(matrix, *rotation._sides(matrix.shape, seed, inverse))
    assert close(rotate(matrix, seed, inverse), other, matrix.norm())


@quick
@given(shapes, seeds, st.sampled_from([0, 0.003, 0.05, 1]), st.booleans())
@example((64, 300), 1, 0.0005, False)
@example((3, 4099), 1, 0.01, True)
def test_a_sparse_matrix_is_rotated_back(
    shape: tuple[int, int], seed: int, density: float, signs: bool
) -> None:
    total = shape[0] * shape[1]
    positions = (torch.rand(total) < density).nonzero().view(-1)
    values = torch.randn(len(positions))
    if signs:
        values, positions = torch.where(values > 0, 1, -1).to(torch.int8), positions.int()
    dense = torch.zeros(total)
    dense[positions.long()] = values * 0.25
    rotated = rotate_sparse(positions, values, shape, seed, 0.25, place=3)
    assert close(rotated, rotate(dense.view(shape), seed, inverse=True, place=3), dense.norm())


@quick
@given(shapes, seeds, st.integers(0, 5), st.booleans())
@example((384, 48), 1, 3, True)
@example((48, 390), 1, 3, True)
@example((1100, 33), 1, 2, True)
@example((1100, 33), 1, 2, False)
def test_what_is_added(shape: tuple[int, int], seed: int, rank: int, sparse: bool) -> None:
    total = shape[0] * shape[1]
    matrix = torch.randn(shape) * (torch.rand(shape) < (0.02 if sparse else 1))
    product = LowRank(torch.randn(shape[0], rank), torch.randn(rank, shape[1]).mT)
    base, out = torch.randn(shape), torch.empty(shape)

    def both(**more: Any) -> Tensor:
        if not sparse:
            return rotate(matrix, seed, inverse=True, **more)
        positions = matrix.view(total).nonzero().view(-1)
        return rotate_sparse(positions, matrix.view(total)[positions], shape, seed, 1, **more)

    found = both(product=product)
    assert close(found, both() + product.left @ product.right.mT, 10 * base.norm() + 1)
    kept = base.clone()
    assert both(product=product, base=base, out=out) is out
    assert torch.equal(out, base + found)
    assert torch.equal(base, kept)
    left, right = rotation._sides(matrix.shape, seed, inverse=True)
    added = rotation.Added.of(out, product, base)
    if total:
        elsewhere = added.write(out, rotation._on_device(matrix, left, right))
        assert close(elsewhere, base + found, 10 * base.norm())


def test_what_does_not_fit_is_not_added() -> None:
    matrix = torch.zeros(3, 4)
    factors = LowRank(torch.zeros(3, 2), torch.zeros(4, 2))
    with pytest.raises(ValueError, match=r"float32 \(3, 4\) to be added, got torch.float32 \(4, 3"):
        rotate(matrix, 0, base=torch.zeros(4, 3))
    with pytest.raises(ValueError, match=r"float32 \(4, 2\) to be added, got torch.float32 \(3, 2"):
        rotate(matrix, 0, product=factors._replace(right=torch.zeros(3, 2)))
    with pytest.raises(ValueError, match=r"float32 \(3, 2\) to be added, got torch.float64 \(3, 2"):
        rotate(matrix, 0, product=factors._replace(left=torch.zeros(3, 2).double()))


@pytest.mark.parametrize("shape", [(1000, 1100), (16, 40_000), (40_000, 5), (1500, 700)])
def test_threads_change_nothing(shape: tuple[int, int]) -> None:
    matrix, before = torch.randn(shape), torch.get_num_threads()
    positions = (torch.rand(matrix.numel()) < 0.01).nonzero().view(-1)
    values = torch.ones(len(positions))
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            sparse = rotate_sparse(positions, values, shape, 4, 0.5)
            results.append((rotate(matrix, 4), rotate(matrix, 4, inverse=True), sparse))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_it_writes_where_it_is_told() -> None:
    matrix = torch.randn(50, 70)
    expected, out = rotate(matrix, 9), torch.full((50, 70), math.nan)
    kept = matrix.clone()
    assert rotate(matrix, 9, out=out) is out
    assert torch.equal(out, expected)
    assert torch.equal(matrix, kept)
    assert rotate(matrix, 9, out=matrix) is matrix
    assert torch.equal(matrix, expected)
    positions, values = torch.tensor([3, 2000]), torch.tensor([1.0, -2.0])
    rotate_sparse(positions, values, (50, 70), 9, 1, out=out)
    assert torch.equal(out, rotate_sparse(positions, values, (50, 70), 9, 1))


def test_a_transposed_or_sliced_matrix_is_read_as_it_is() -> None:
    matrix = torch.randn(40, 60)
    assert torch.equal(rotate(matrix.mT, 2), rotate(matrix.mT.contiguous(), 2))
    assert torch.equal(rotate(matrix[:, 1:18], 2), rotate(matrix[:, 1:18].contiguous(), 2))
    assert not rotate(matrix.requires_grad_(), 2).requires_grad


def test_seeds_and_sides_differ() -> None:
    same = torch.eye(384)
    assert kurtosis(rotate(same, 0)) < 4  # one rotation on both sides would leave it as it is
    assert not torch.equal(rotate(same, 0), rotate(same, 1))
    direction = torch.randn(1, 384)
    one, other = rotate(direction, 0), rotate(direction, 0, place=1)
    assert abs(float(one @ other.mT)) < 0.25 * float(direction @ direction.mT)  # 5 deviations
    assert draw(0, 0, 384)[0].tolist() != draw(0, 1, 384)[0].tolist()


SIZES = [31, 97, 128, 129, 384, 1000, 1536, 4095, 4096, 4097, 14336, 65521]


@pytest.mark.parametrize("n", SIZES)
def test_what_is_peaked_becomes_gaussian(n: int) -> None:
    """Rows of which each is as far from Gaussian as can be; a random rotation has 3n / (n + 2)."""
    one, count = torch.zeros(n), torch.arange(n)
    one[n // 3] = 1
    edge = torch.zeros(n)
    edge[-1] = 1
    rows = [one, edge, torch.ones(n), 1 - 2.0 * (count % 2), count + 1.0, (count < n / 2).float()]
    found = [
        kurtosis(rotated)
        for seed in range(5)
        for rotated in rotation._turned(torch.stack(rows)[:, :, None], side_of(seed, 1, n, False))
    ]
    assert abs(sum(found) / len(found) - 3 * n / (n + 2)) < 8 / math.sqrt(n)
    assert max(found) < 3 + 40 / math.sqrt(n)


def test_a_diagonal_matrix_becomes_gaussian() -> None:
    """Of full rank, and all its energy in few entries: every size of the table at once."""
    for n in (97, 384, 1000, 1536):
        peaked = torch.zeros(n, n)
        peaked.diagonal().copy_(torch.arange(n) % 3)
        assert abs(kurtosis(rotate(peaked, 8)) - 3) < 0.1


def test_what_is_not_a_matrix_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected a float32 matrix, got torch.float16 \(3, 4\)"):
        rotate(torch.zeros(3, 4).half(), 0)
    with pytest.raises(ValueError, match=r"float32 matrix, got torch.float32 \(3,\)"):
        rotate(torch.zeros(3), 0)
    with pytest.raises(ValueError, match="a seed from 0 to"):
        rotate(torch.zeros(3, 4), -1)
    with pytest.raises(ValueError, match=r"out to be contiguous float32 \(3, 4\) on cpu"):
        rotate(torch.zeros(3, 4), 0, out=torch.zeros(4, 3).mT)


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        ([-1, 3], "outside the 12 entries"),
        ([3, 12], "outside the 12 entries"),
        ([3, 3], "increase strictly"),
        ([0, 50, 1], "increase strictly"),
        ([[0, 1]], "in one dimension"),
        ([0.0, 1.0], "int32 or int64 positions"),
        ([0, 1, 2, 3], None),
    ],
)
def test_positions_that_would_be_written_elsewhere_are_refused(
    positions: list[int], message: str | None
) -> None:
    given = torch.tensor(positions)
    with pytest.raises(ValueError, match=message or "expected 4 values, got shape"):
        rotate_sparse(given, torch.ones(given.shape if message else 3), (3, 4), 0, 1)
