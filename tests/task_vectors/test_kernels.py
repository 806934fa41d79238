"""What is compiled for the CPU does what PyTorch does on other devices, and what it says."""

import os
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fusionkit.codecs import emr, packing
from fusionkit.codecs.kernels import elect
from fusionkit.task_vectors import kernels
from fusionkit.task_vectors.kept import Collected, places_above
from fusionkit.task_vectors.topk import _histogram

CPU = torch.device("cpu")
LENGTHS = st.sampled_from([0, 1, 7, 8, 9, 1023, 1024, 1025, 2049, 5000])
quick = settings(deadline=None, max_examples=60)


@st.composite
def values(draw: st.DrawFn, rows: int | None = None) -> Tensor:
    """Few distinct values, so that there are ties, zeros of both signs, and cancelling sums."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    count, step = draw(LENGTHS), draw(st.sampled_from([0.5, 1e-4]))
    shape = (count,) if rows is None else (rows, count)
    drawn = torch.randn(shape, generator=generator)
    return (drawn / step).round() * step if draw(st.booleans()) else drawn


@quick
@given(values(rows=3), st.booleans(), st.booleans(), st.integers(0, 2))
def test_election_is_the_same_in_both(block: Tensor, given_: bool, squared: bool, at: int) -> None:
    count, first = block.shape[1], 1024 * at
    elected = block.sum(0).roll(1) if given_ else torch.full((count,), torch.nan)
    masks = torch.zeros(3, first // 8 + -(-count // 8) + 2, dtype=torch.uint8)
    sums = torch.ones(2, 3, dtype=torch.float64)
    found = [each.clone() for each in (block, elected, masks, sums)]
    elect(*(each.numpy() for each in found), first, given_, squared)
    assert torch.equal(found[0], block)
    wanted = [each.clone() for each in (block, elected, masks, sums)]
    emr._elect_in_torch(*wanted, first, given_, squared)
    assert torch.equal(found[1], wanted[1])
    assert torch.equal(found[2], wanted[2])
    assert not found[2][:, : first // 8].any()
    assert not found[2][:, -2:].any()
    torch.testing.assert_close(found[3], wanted[3], rtol=1e-5, atol=1e-5)


def test_sums_of_many_entries_are_precise() -> None:
    block = torch.rand(1, 4_000_000) + 1
    sums = torch.zeros(2, 1, dtype=torch.float64)
    masks = torch.empty(1, block.shape[1] // 8, dtype=torch.uint8)
    arrays = (each.numpy() for each in (block, torch.empty(block.shape[1]), masks, sums))
    elect(*arrays, 0, False, False)
    torch.testing.assert_close(sums[:, 0], block.double().sum().expand(2), rtol=1e-7, atol=0)


@quick
@given(values(), st.integers(0, 5), st.sampled_from([0.0, 0.5, 1.0, 2.5, 100.0]))
def test_what_is_collected_is_the_same_in_both(block: Tensor, ties: int, limit: float) -> None:
    collected = Collected("test", 10**9, CPU)
    half = len(block) // 2
    left = collected.add(block[:half], 0, limit, ties)
    left = collected.add(block[half:], half, limit, left)
    wanted, wanted_left = places_above(block, limit, ties)
    assert collected.all.positions.tolist() == wanted.tolist()
    assert torch.equal(collected.all.values, block[wanted])
    assert left == wanted_left


@quick
@given(values(), st.integers(0, 5), st.sampled_from([0.0, 0.5, 1.0, 2.5]))
def test_what_is_dropped_is_the_same_in_both(block: Tensor, ties: int, limit: float) -> None:
    collected = Collected("test", 2**40, CPU)
    collected.add(block, 2**35, -1.0)
    assert len(collected.all.values) == len(block)
    magnitudes = block.abs()
    assert torch.equal(collected.up_to(limit), magnitudes[magnitudes <= limit])
    collected.drop(limit, ties)
    wanted, _ = places_above(block, limit, ties)
    assert collected.all.positions.tolist() == (wanted + 2**35).tolist()
    assert torch.equal(collected.all.values, block[wanted])


@quick
@given(values())
def test_histograms_count_the_halves_of_magnitudes(block: Tensor) -> None:
    bits = [int(each) for each in block.abs().numpy().view(np.uint32)]
    (upper,) = _histogram([[block[:5], block[5:]]], [1])
    counts = Counter(each >> 16 for each in bits)
    assert {i: int(upper[i]) for i in upper.nonzero()[:, 0].tolist()} == counts
    bin_ = bits[0] >> 16 if bits else 0
    counts = Counter(each & 0xFFFF for each in bits if each >> 16 == bin_)
    (lower,) = _histogram([[block]], [1], [(bin_, 1)])
    assert {i: int(lower[i]) for i in lower.nonzero()[:, 0].tolist()} == counts


@quick
@given(st.sets(st.integers(0, 2**33), max_size=300), st.integers(0, 40), st.booleans())
def test_positions_are_coded_the_same_in_both(drawn: set[int], shift: int, small: bool) -> None:
    dtype = torch.int32 if small else torch.int64
    kept = sorted({each >> (shift + 5 * small) for each in drawn if not small or shift + 5 >= 3})
    positions = torch.tensor(kept, dtype=torch.int64).to(dtype)
    mean = (kept[-1] + 1) // len(kept) if kept else 0
    least = max(mean.bit_length() - 2, 0)
    k, unary, remainders = packing._rice(positions, least)
    wanted = packing._rice_on_device(positions, least)
    assert k == wanted[0]
    assert torch.equal(unary, wanted[1])
    assert torch.equal(remainders, wanted[2])


@pytest.mark.parametrize("bad", [None, torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("count", [1, 1023, 1024, 3000])
def test_differences_are_exact_and_tell_what_is_not_finite(count: int, bad: float | None) -> None:
    base, tuned = torch.randn(count), torch.randn(count).bfloat16()
    if bad is not None:
        tuned[-1] = bad
    out = torch.empty(count)
    bits = tuned.view(torch.uint16).numpy()
    finite = kernels.difference_of_bfloat16(bits, base.numpy(), out.numpy())
    assert finite == (bad is None)
    torch.testing.assert_close(out, tuned.float() - base, rtol=0, atol=0, equal_nan=True)
    same = tuned.float()
    assert kernels.difference(same.numpy(), base.numpy(), same.numpy()) == finite
    torch.testing.assert_close(same, out, rtol=0, atol=0, equal_nan=True)


def test_comparing_and_finding_as_on_other_devices() -> None:
    values = torch.randn(17, 59).mT
    mask = kernels.above(values, 0.3)
    assert torch.equal(mask, values > 0.3)
    assert torch.equal(kernels.places(mask), mask.reshape(-1).nonzero().reshape(-1))
    assert kernels.count_set(mask) == int(mask.sum())


def test_without_a_folder_to_keep_what_is_compiled() -> None:
    """As in a container that can't be written to, by a user without a home."""
    program = (
        "import numpy as np\n"
        "from fusionkit.task_vectors import kernels\n"
        "values = np.arange(5, dtype=np.float32)\n"
        "print(kernels.up_to(values, 2.0, np.empty(5, np.float32)))\n"
    )
    nowhere = {"NUMBA_CACHE_LOCATOR_CLASSES": "UserProvidedCacheLocator", "NUMBA_CACHE_DIR": ""}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, **nowhere},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "3", done.stderr
