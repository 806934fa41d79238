"""What is felt of a matrix: the closed form, there and back, and that its cut is the best."""

import pytest
import torch
from torch import Tensor

from fusionkit.checkpoints.adapters.lowrank import LowRank
from fusionkit.codecs.decomposition import svd_exact
from fusionkit.codecs.quantized_factors import quantize
from fusionkit.codecs.whitening import ALIKE, Metric
from fusionkit.task_vectors.moments import Moments

ROWS, COLUMNS, SIZE = 24, 40, 1.5


def drawn(side: int) -> Tensor:
    """A factor of a moment some of whose directions are a hundred times as strong as others."""
    tokens = torch.randn(side, side) * torch.linspace(0.1, 3, side)[:, None]
    moment = tokens @ tokens.mT / side
    return torch.linalg.cholesky(moment + 0.1 * moment.diagonal().mean() * torch.eye(side))


def metrics() -> list[Metric]:
    left, right = drawn(ROWS), drawn(COLUMNS)
    return [Metric(SIZE, Moments(*each)) for each in ((left, right), (None, right), (left, None))]


def dense(metric: Metric) -> list[Tensor]:
    """Both moments, float64."""
    return [
        torch.eye(side, dtype=torch.float64) if root is None else (root.double() @ root.double().mT)
        for side, root in zip((ROWS, COLUMNS), metric.moments, strict=True)
    ]


def error(of: Tensor, metric: Metric) -> float:
    """w ⟨M E N, E⟩."""
    left, right = dense(metric)
    of = of.to(torch.float64)
    return float(metric.size**2 * (left @ of @ right * of).sum())


@pytest.mark.parametrize("place", range(3), ids=["both sides", "columns", "rows"])
def test_what_is_seen(place: int) -> None:
    """Its energy is the error that is felt, of a product as well; and there is a way back."""
    metric = metrics()[place]
    factors = LowRank(torch.randn(ROWS, 3), torch.randn(COLUMNS, 3))
    matrix = factors.left @ factors.right.mT
    seen = metric.seen(matrix)
    assert float(seen.square().sum()) == pytest.approx(error(matrix, metric), rel=1e-4)
    left, right = metric.product(factors)
    assert torch.allclose(left @ right.mT, seen, rtol=1e-4, atol=1e-4)
    left, right = metric.back(left, right)
    assert torch.allclose(left @ right.mT, matrix, rtol=1e-3, atol=1e-3)


def test_nothing_known_changes_nothing() -> None:
    matrix = torch.randn(ROWS, COLUMNS)
    assert ALIKE.seen(matrix) is matrix
    assert all(map(torch.equal, ALIKE.back(matrix, matrix), (matrix, matrix)))


@pytest.mark.parametrize("place", range(3), ids=["both sides", "columns", "rows"])
def test_the_cut_is_the_best_of_its_rank(place: int) -> None:
    """As near as alternating least squares in the metric comes, from anywhere; nearer than SVD."""
    metric, matrix, rank = metrics()[place], torch.randn(ROWS, COLUMNS), 4
    spectral = svd_exact(metric.seen(matrix), rank)
    left, right = metric.back(spectral.u[:, :rank] * spectral.s[:rank], spectral.v[:, :rank])
    found = error(matrix - left @ right.mT, metric)
    assert found == pytest.approx(float(spectral.s[rank:].square().sum()), rel=1e-3)
    u, s, v = svd_exact(matrix, rank).first(rank)
    assert found < 0.9 * error(matrix - u * s @ v.mT, metric)
    of_rows, of_columns = dense(metric)
    double = matrix.to(torch.float64)
    b = torch.randn(COLUMNS, rank, dtype=torch.float64)
    for _ in range(300):
        a = double @ of_columns @ b @ torch.linalg.inv(b.mT @ of_columns @ b)
        b = double.mT @ of_rows @ a @ torch.linalg.inv(a.mT @ of_rows @ a)
    assert found == pytest.approx(error(double - a @ b.mT, metric), rel=1e-3)


def test_rounding_is_fitted_in_the_metric() -> None:
    """No factor of any direction makes what is felt less."""
    metric = metrics()[0]
    matrix = torch.randn(ROWS, 3) @ torch.randn(3, COLUMNS) + 0.1 * torch.randn(ROWS, COLUMNS)
    leading = svd_exact(metric.seen(matrix), 3).first(3)
    left, right = quantize(matrix, leading, 1e-2, 0.5, 0.0, metric).product()
    found = error(matrix - left @ right.mT, metric)
    for direction in range(3):
        for change in (0.97, 1.03):
            other = left.clone()
            other[:, direction] *= change
            assert found < error(matrix - other @ right.mT, metric)


def test_a_direction_that_is_hardly_felt_keeps_to_the_integers() -> None:
    """As it comes back it is longer; its steps are as wide as that asks for."""
    hardly = torch.ones(ROWS)
    hardly[: ROWS // 2] = 0.48
    matrix = torch.zeros(ROWS, COLUMNS)
    matrix[: ROWS // 2] = torch.randn(ROWS // 2, 1) * torch.randn(COLUMNS)
    metric = Metric(1.0, Moments(torch.diag(hardly), None))
    leading = svd_exact(metric.seen(matrix), 1).first(1)
    factors = quantize(matrix, leading, 1e-12, 0.5, 0.0, metric)
    assert float(factors.left.double().square().mean().sqrt()) == pytest.approx(32, rel=0.1)
    left, right = factors.product()
    assert torch.allclose(left @ right.mT, matrix, atol=0.05 * float(matrix.abs().max()))
