"""Top-k by magnitude: the exact count, ties, and a full sort as the reference."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fusionkit.task_vectors.family import Family
from fusionkit.task_vectors.topk import Thresholds, TopK, top_k, top_k_of

Vector = list[Tensor]
"""One vector's values, tensor by tensor."""


def by_sorting(vector: Vector, count: int) -> list[list[int]]:
    """The reference: sort all magnitudes, the first of equal ones first, and drop the zeros."""
    flat = torch.cat([values.reshape(-1) for values in vector])
    order = torch.sort(flat.abs(), descending=True, stable=True).indices[: max(count, 0)].tolist()
    chosen = {place for place in order if flat[place] != 0}
    found, start = [], 0
    for values in vector:
        found.append([i for i in range(values.numel()) if start + i in chosen])
        start += values.numel()
    return found


def family_of(vectors: list[Vector]) -> Family:
    """Tasks with these vectors, tensor by tensor."""
    names = [f"w{place}" for place in range(len(vectors[0]))]
    base = {name: torch.zeros_like(values) for name, values in zip(names, vectors[0], strict=True)}
    tuned = {f"task{t}": dict(zip(names, vector, strict=True)) for t, vector in enumerate(vectors)}
    return Family(base, tuned)


def select(vectors: list[Vector], counts: list[int]) -> list[list[list[int]]]:
    """Per vector, per tensor: the kept positions, asked for from the last tensor to the first."""
    family = family_of(vectors)
    thresholds = Thresholds.over(family, counts)
    kept: list[list[list[int]]] = [[] for _ in vectors]
    for name in reversed(family.names("delta")):
        for t, own in enumerate(family.vectors(name)):
            kept[t].insert(0, thresholds.positions(own, t, name).tolist())
    return kept


# Few distinct magnitudes, so that ties are common; denormals, which share their upper 16 bits
# with zero; and neighbours that differ in the lower 16 bits only.
entries = st.sampled_from(
    [0.0, -0.0, 1.0, -1.0, 1.0 + 2**-23, -1.0 - 2**-20, 2.0, 1e-40, -1e-40, 1e-45, 1e33]
) | st.floats(-4, 4, width=32)


@st.composite
def families(draw: st.DrawFn) -> tuple[list[Vector], list[int]]:
    sizes = draw(st.lists(st.integers(0, 12), min_size=1, max_size=4))
    tasks = draw(st.integers(1, 3))
    vectors = [
        [
            torch.tensor(draw(st.lists(entries, min_size=n, max_size=n)), dtype=torch.float32)
            for n in sizes
        ]
        for _ in range(tasks)
    ]
    total = sum(sizes)
    return vectors, [draw(st.integers(-1, total + 2)) for _ in range(tasks)]


@settings(deadline=None, max_examples=300)
@given(families())
def test_equals_a_full_sort_over_the_stream(drawn: tuple[list[Vector], list[int]]) -> None:
    vectors, counts = drawn
    expected = [by_sorting(v, count) for v, count in zip(vectors, counts, strict=True)]
    assert select(vectors, counts) == expected


@pytest.mark.parametrize("count", [1, 17, 500, 9_999])
def test_the_count_is_exact_over_tensors_of_any_shape(count: int) -> None:
    vector = [torch.randn(50, 40), torch.randn(7, 10, 100) * 3, torch.randn(1000)]
    kept = select([vector], [count])[0]
    assert sum(map(len, kept)) == count
    assert kept == by_sorting(vector, count)


@pytest.mark.parametrize("count", [0, 1, 5, 36, 37, 100])
def test_one_tensor_equals_a_full_sort(count: int) -> None:
    values = torch.randn(6, 6)
    values[0, :3] = 0
    assert top_k(values, count).tolist() == by_sorting([values], count)[0]


def test_of_equal_magnitudes_the_first_win_whatever_their_sign() -> None:
    values = torch.tensor([0.5, -1.0, 1.0, -1.0, 2.0, 1.0])
    assert top_k(values, 3).tolist() == [1, 2, 4]


def test_ties_are_kept_in_the_order_of_the_stream() -> None:
    vector = [torch.tensor([1.0, 3.0, -1.0]), torch.tensor([1.0, 1.0]), torch.tensor([1.0, 5.0])]
    assert select([vector], [5]) == [[[0, 1, 2], [0], [1]]]
    assert select([vector], [2]) == [[[1], [], [1]]]


def test_zeros_are_never_kept() -> None:
    values = torch.tensor([0.0, 3.0, -0.0, 0.0, 1.0])
    assert top_k(values, 4).tolist() == [1, 4]
    assert top_k(torch.zeros(5), 3).tolist() == []
    assert top_k(torch.zeros(0), 3).tolist() == []


def test_none_for_none_and_all_for_more_than_there_are() -> None:
    values = torch.randn(9)
    assert top_k(values, 0).tolist() == []
    assert top_k(values, -1).tolist() == []
    assert top_k(values, 10).tolist() == list(range(9))


def test_denormals_are_told_apart() -> None:
    tiny = 2.0**-149
    values = torch.tensor([3 * tiny, 0.0, -5 * tiny, tiny, 4 * tiny, 2 * tiny])
    assert top_k(values, 3).tolist() == [0, 2, 4]
    assert top_k(values, 6).tolist() == [0, 2, 3, 4, 5]


def test_each_vector_has_its_own_count() -> None:
    vectors = [[torch.tensor([1.0, 2.0]), torch.tensor([3.0])] for _ in range(3)]
    assert select(vectors, [0, 1, 2]) == [[[], []], [[], [0]], [[1], [0]]]


def test_a_second_pass_over_the_same_stream_chooses_the_same() -> None:
    vector = [torch.ones(4), torch.ones(4)]
    assert select([vector], [5]) == select([vector], [5]) == [[[0, 1, 2, 3], [0]]]


# --- by a sample --------------------------------------------------------------------------------


def heavy(count: int) -> Tensor:
    """A heavy tail, rounded so that many magnitudes are equal."""
    return (torch.randn(count) ** 3).to(torch.bfloat16).to(torch.float32)


@pytest.mark.parametrize("density", [1e-5, 0.01, 0.1, 0.5, 0.999])
@pytest.mark.parametrize("draw", [torch.randn, heavy], ids=["distinct", "ties"])
def test_a_large_tensor_equals_a_full_sort(draw: Any, density: float) -> None:
    values = draw(400_000)
    count = round(density * values.numel())
    assert top_k(values, count).tolist() == by_sorting([values], count)[0]


@pytest.mark.parametrize("density", [0.001, 0.1])
def test_blocks_of_all_tasks_equal_a_full_sort(density: float) -> None:
    vectors = [[heavy(300_000)], [torch.randn(300_000)], [torch.zeros(300_000)]]
    count = round(density * 300_000)
    (each,) = family_of(vectors)
    for kept, (values,) in zip(top_k_of(each, count), vectors, strict=True):
        assert kept.positions.tolist() == by_sorting([values], count)[0]
        assert torch.equal(kept.values, values[kept.positions])


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_a_sample_that_misleads_is_found_out(scale: float) -> None:
    """All of the sample is much smaller, or larger, than the rest."""
    values = torch.randn(100_000)
    search = TopK(1000, values.numel(), torch.randn(5000) * scale)
    search.add(values, 0)
    kept = search.result()
    if scale > 1:  # too few were looked at
        assert kept is None
        search.add(values, 0)
        kept = search.result()
    assert kept is not None
    assert kept.positions.tolist() == by_sorting([values], 1000)[0]


def test_few_entries_are_looked_at_closely() -> None:
    values = torch.randn(1_000_000)
    search = TopK(100_000, values.numel(), values[:: 1_000_000 // 65_536])
    search.add(values, 0)
    assert 100_000 <= len(search._near.all.values) < 110_000
