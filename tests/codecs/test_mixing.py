"""Matrices as sequences: what they are, to the bit; undone; levelled; the same on other ways."""

import math

import numpy as np
import pytest
import torch
from golden.coded import mixed as written_out
from torch import Tensor

from fusionkit.checkpoints.adapters.lowrank import LowRank
from fusionkit.codecs import mixing, trellis
from fusionkit.codecs.mixing import Coded, rebuild

SHAPES = [(1, 1), (2, 3), (16, 256), (33, 400), (50, 70), (300, 7), (40, 16), (5, 1030), (64, 272)]


def draw(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def coded(matrix: Tensor, rate: float, seed: int = 0, place: int = 0) -> tuple[Coded, float]:
    """What is stored of a matrix, and its scale."""
    found = mixing.levelled(matrix, seed, place)
    assert found is not None
    steps = trellis.steps_in(rate * len(found.numbers), len(found.numbers))
    stream, product = trellis.search(found.numbers, steps, found.groups)
    scale = found.energy / product * found.size
    return mixing.read(found.levels, steps, stream, *matrix.shape), scale


@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_what_the_docstring_says(shape: tuple[int, int]) -> None:
    matrix = draw(shape) * torch.linspace(0.1, 3, shape[0])[:, None]
    if shape[0] > 40:
        matrix[: shape[0] // 2] = 0
    stored, _ = coded(matrix, 0.2, seed=2**64 - 1, place=5)
    stream = bytes(stored.stream.tolist())
    wanted = written_out(stored.levels.tolist(), stream, stored.steps, shape, 2**64 - 1, 5)
    found = rebuild(stored, shape, 2**64 - 1, 1.0, place=5)
    assert (found - wanted).norm() < 1e-6 * wanted.norm()


@pytest.mark.parametrize("shape", SHAPES)
def test_both_ways_are_the_same_as_by_torch(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What other devices do, on this one."""
    matrix = draw(shape)
    sequence = mixing._mixed(matrix, 7, 3)
    assert torch.allclose(sequence, mixing._mixed_by_torch(matrix, 7, 3), atol=1e-5)
    assert float(sequence.norm()) == pytest.approx(float(matrix.norm()))
    if not mixing.is_turned(*shape):
        matrix[16:32] = 0
        stored, _ = coded(matrix, 0.4, 7, 3)
        wanted = rebuild(stored, shape, 7, 1.0, place=3)
        for at_once in (1 << 20, 5000):
            monkeypatch.setattr(mixing, "_AT_ONCE", at_once)
            found = mixing._looked_up(stored, *shape, 7, 3)
            assert torch.allclose(found, wanted, atol=0.01)


@pytest.mark.parametrize("shape", [(33, 400), (300, 7), (18, 1030)])
def test_a_matrix_comes_back_with_noise_alone(shape: tuple[int, int]) -> None:
    matrix = draw(shape)
    stored, scale = coded(matrix, 1.4)
    found = rebuild(stored, shape, 0, scale)
    assert float((found * matrix).sum() / matrix.square().sum()) == pytest.approx(1, abs=0.02)
    noise = float((found - matrix).square().sum() / matrix.square().sum())
    predicted = float(trellis.noise(np.array(stored.steps / stored.numbers)))
    filled = mixing.length(*shape) / matrix.numel()
    assert noise < 1.15 * max(predicted, predicted * filled)


def test_what_is_added() -> None:
    shape = (37, 270)
    stored, scale = coded(draw(shape), 0.3)
    product, base = LowRank(draw((37, 3), 1), draw((270, 3), 2)), draw(shape, 3)
    alone, out = rebuild(stored, shape, 0, scale), torch.full(shape, math.nan)
    found = rebuild(stored, shape, 0, scale, product=product, base=base, out=out)
    assert found is out
    assert torch.allclose(found, alone + product.left @ product.right.mT + base, atol=1e-4)
    assert torch.allclose(rebuild(stored, shape, 0, 2 * scale), 2 * alone, rtol=1e-5, atol=1e-6)


def test_threads_rebuild_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    shape, found = (1100, 512), []
    stored, scale = coded(draw(shape), 0.05)
    for threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        found.append((rebuild(stored, shape, 0, scale), mixing._mixed(draw(shape), 0, 0)))
    assert all(map(torch.equal, *found))


def test_rows_that_nothing_was_tuned_in_stay_zero_and_cost_nothing() -> None:
    """As an embedding's of words that no row of the data has."""
    matrix = torch.zeros(4000, 256)
    matrix[512:1024] = draw((512, 256))
    stored, scale = coded(matrix, 0.5)
    assert stored.numbers == 512 * 256
    found = rebuild(stored, matrix.shape, 0, scale)
    assert not found[:512].any()
    assert not found[1024:].any()
    assert float((found * matrix).sum() / matrix.square().sum()) == pytest.approx(1, abs=0.02)


def test_each_group_has_its_size() -> None:
    """A quiet one comes back as faithfully as a loud one: noise is relative to each."""
    matrix = draw((128, 512)) * torch.tensor([0.01, 1.0]).repeat_interleave(64)[:, None]
    stored, scale = coded(matrix, 1.0)
    assert stored.levels.unique().numel() > 1
    found = rebuild(stored, matrix.shape, 0, scale)
    for part in (slice(0, 64), slice(64, 128)):
        error = (found[part] - matrix[part]).square().sum() / matrix[part].square().sum()
        assert float(error) == pytest.approx(0.4, rel=0.1)


@pytest.mark.parametrize("small", [1e-11, 1e-45])
def test_groups_of_any_sizes_keep_them(small: float) -> None:
    """Levels end at 2^32: the largest is at the last one, and less than 2^-40 of it is zero."""
    matrix = draw((128, 512))
    matrix[16:] *= small
    assert matrix[16:].any()
    stored, scale = coded(matrix, 1.0)
    assert int(stored.levels.max()) == 256
    found = rebuild(stored, matrix.shape, 0, scale)
    for part in (slice(0, 16), slice(16, 128)):
        given, rebuilt = matrix[part].double(), found[part].double()
        share = float((rebuilt * given).sum() / given.square().sum())
        assert share == pytest.approx(0 if small < 1e-12 and part.start else 1, abs=0.05)


def test_columns_that_stand_out_are_spread() -> None:
    """A single one of them is in all numbers alike."""
    matrix = torch.zeros(64, 384)
    matrix[:, 301] = draw((64,))
    sequence = mixing._mixed(matrix, 0, 0).view(4, 24, 16, 16)
    own = sequence.square().sum((0, 2, 3))
    assert float(own.max() / own.sum()) < 3 / 24


def test_zero_is_nothing() -> None:
    assert mixing.levelled(torch.zeros(20, 300), 0, 0) is None


def test_what_can_not_be_of_the_matrix_is_refused() -> None:
    stored, _ = coded(draw((40, 300)), 0.3)
    rows = stored.levels, stored.steps, stored.stream
    assert mixing.read(*rows, 40, 300).numbers == stored.numbers
    with pytest.raises(ValueError, match=r"no trellis|bytes are not"):
        mixing.read(stored.levels, stored.steps + 8, stored.stream, 40, 300)
    with pytest.raises(ValueError, match="no trellis of 0 entries"):
        mixing.read(torch.full_like(stored.levels, -64), *rows[1:], 40, 300)
    for level in (-65, 257):
        with pytest.raises(ValueError, match="level of a matrix's rows is out of range"):
            mixing.read(torch.full_like(stored.levels, level), *rows[1:], 40, 300)
