"""Products of low rank, each task's for its own rows."""

import pytest
import torch

from fusionkit.reuse import thin_products
from fusionkit.reuse.row_tasks import RowTasks
from fusionkit.reuse.thin_products import JoinedFactors, ThinProducts

ORDERS = [
    ("a", "b", "a", None, "b", "c"),
    ("c", "c", "b", None, None, "a"),
    ("a", "a", "a", "a", "a", "a"),
    (None, "c", None, "c", None, "c"),
]


@pytest.mark.parametrize("few", [0, 1 << 40])
@pytest.mark.parametrize("wider", [0, 2])
def test_each_row_has_its_own(monkeypatch: pytest.MonkeyPatch, few: int, wider: int) -> None:
    """Whether all are done at once or each by itself, for any order of rows."""
    monkeypatch.setattr(thin_products, "_FEW", few)
    torch.manual_seed(0)
    factors = {
        task: (torch.randn(5, rank), torch.randn(rank, 4))
        for task, rank in zip("abc", (2, 3, 1), strict=True)
    }
    kept = JoinedFactors()
    for order in ORDERS:
        x, before = torch.randn(6, 3, 5 + wider), torch.randn(6, 3, 4 + wider)
        out = before.clone()
        rows = RowTasks(order)
        own = {task: factors[task] for task in rows.groups if task is not None}
        given = out.view(1, 18, -1) if rows.alone else out
        ThinProducts(rows, own, kept).add(x.view(1, 18, -1) if rows.alone else x, given)
        expected = before.clone()
        for row, task in enumerate(order):
            if task is not None:
                right, left = factors[task]
                expected[row, :, :4] += x[row, :, :5] @ right @ left
        torch.testing.assert_close(out, expected)


def test_what_other_rows_have_does_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even where it is not finite."""
    monkeypatch.setattr(thin_products, "_FEW", 1 << 40)
    rows, out = RowTasks(("a", "b")), torch.zeros(2, 1, 4)
    factors = {task: (torch.ones(5, 1), torch.ones(1, 4)) for task in "ab"}
    factors["b"][0][0] = torch.inf
    ThinProducts(rows, factors, JoinedFactors()).add(torch.ones(2, 1, 5), out)
    assert out[0].eq(5).all()
