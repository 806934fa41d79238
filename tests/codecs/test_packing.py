"""Bits and sparse positions as bytes: round trips, sizes, layout, malformed codes."""

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fusionkit.codecs import packing
from fusionkit.codecs.packing import (
    decode_positions,
    encode_positions,
    pack_bits,
    pack_integers,
    unpack_bits,
    unpack_integers,
)

LENGTHS = [0, 1, 7, 8, 9, 31, 32, 33, 64, 1000, 1_000_003]
quick = settings(deadline=None, max_examples=200)


def entropy(density: float) -> float:
    return -density * math.log2(density) - (1 - density) * math.log2(1 - density)


def kept(total: int, density: float) -> Tensor:
    return (torch.rand(total) < density).nonzero().reshape(-1)


@pytest.mark.parametrize("count", LENGTHS)
def test_bits_round_trip_at_one_bit_each(count: int) -> None:
    mask = torch.rand(count) < 0.4
    packed = pack_bits(mask)
    assert packed.dtype == torch.uint8
    assert packed.shape == (math.ceil(count / 8),)
    assert torch.equal(unpack_bits(packed, count), mask.to(torch.uint8))


@pytest.mark.parametrize("shape", [(), (3, 5), (2, 0, 4), (2, 3, 7)])
def test_bits_are_read_in_row_major_order(shape: tuple[int, ...]) -> None:
    mask = torch.rand(shape) < 0.5
    flat = mask.reshape(-1)
    assert torch.equal(pack_bits(mask), pack_bits(flat))
    strided = mask.mT.contiguous().mT if mask.ndim > 1 else mask
    assert torch.equal(pack_bits(strided), pack_bits(flat))


def test_bit_order_is_little_endian_with_zero_padding() -> None:
    # Entry i is bit i % 8 of byte i // 8.
    assert pack_bits(torch.tensor([1, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1])).tolist() == [0b1, 0b110]
    assert pack_bits(torch.ones(9, dtype=torch.bool)).tolist() == [0xFF, 0x01]
    assert unpack_bits(torch.tensor([0b110], dtype=torch.uint8), 4).tolist() == [0, 1, 1, 0]


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("shape", [(0,), (1,), (3,), (8,), (17,), (1001,), (5, 3), (0, 2), (7, 0)])
def test_integers_round_trip_at_their_bits(shape: tuple[int, ...], bits: int) -> None:
    integers = torch.randint(0, 1 << bits, shape, dtype=torch.uint8)
    packed = pack_integers(integers, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (math.ceil(shape[0] * bits / 8), *shape[1:])
    assert torch.equal(unpack_integers(packed, shape[0], bits), integers)
    surplus = torch.cat([packed, packed.new_full((1, *shape[1:]), 0xFF)])
    assert torch.equal(unpack_integers(surplus, shape[0], bits), integers)
    if shape[0] and math.prod(shape):
        with pytest.raises(ValueError, match=f"bytes of {bits}-bit integers, got"):
            unpack_integers(packed[:-1], shape[0], bits)


@pytest.mark.parametrize("bits", range(1, 9))
def test_integers_are_a_stream_of_bits_from_the_lowest_on(bits: int) -> None:
    integers = torch.randint(0, 1 << bits, (29,), dtype=torch.uint8)
    places = torch.arange(bits, dtype=torch.uint8)
    stream = (integers[:, None] >> places & 1).reshape(-1)
    assert torch.equal(pack_integers(integers, bits), pack_bits(stream))


def test_what_fills_up_the_last_byte() -> None:
    assert pack_integers(torch.tensor([3], dtype=torch.uint8), 4, fill=8).tolist() == [0x83]
    assert pack_integers(torch.tensor([3], dtype=torch.uint8), 2, fill=2).tolist() == [0b10101011]


@pytest.mark.parametrize("count", LENGTHS)
def test_the_path_of_other_devices_gives_the_same_bytes(count: int) -> None:
    mask = torch.rand(count) < 0.4
    packed = packing._pack_on_device(mask)
    assert torch.equal(packed, pack_bits(mask))
    assert torch.equal(packing._unpack_on_device(packed, count), unpack_bits(packed, count))


def test_surplus_bytes_are_ignored_and_missing_ones_refused() -> None:
    packed = pack_bits(torch.ones(12, dtype=torch.bool))
    assert unpack_bits(torch.cat([packed, packed]), 12).tolist() == [1] * 12
    with pytest.raises(ValueError, match="at least 17 bits, got 16"):
        unpack_bits(packed, 17)


@st.composite
def subsets(draw: st.DrawFn) -> tuple[Tensor, int]:
    """Sorted positions inside a range, sparse or dense, at random or in runs."""
    total = draw(st.integers(0, 3000))
    density = draw(st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0, 1)))
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    run = draw(st.integers(1, 300))
    drawn = np.repeat(generator.random(total // run + 1), run)[:total] < density
    return torch.from_numpy(np.flatnonzero(drawn)), total


@quick
@given(subsets())
def test_positions_round_trip(drawn: tuple[Tensor, int]) -> None:
    positions, total = drawn
    coded = encode_positions(positions, total)
    assert coded.dtype == torch.uint8
    decoded = decode_positions(coded, total)
    assert decoded.dtype == torch.int64
    assert torch.equal(decoded, positions)


@quick
@given(st.sets(st.integers(0, 2**40 - 1), max_size=30))
@example({0, 2**40 - 1})
@example({2**40 - 1})
def test_positions_far_apart_round_trip(drawn: set[int]) -> None:
    positions = torch.tensor(sorted(drawn), dtype=torch.int64)
    coded = encode_positions(positions, 2**40)
    assert torch.equal(decode_positions(coded, 2**40), positions)
    assert coded.numel() <= 9 + 2 + len(drawn) * 6


@pytest.mark.parametrize("density", [0.5, 0.1, 0.05, 0.01, 0.001])
def test_positions_cost_at_most_a_tenth_above_the_entropy(density: float) -> None:
    total = 1_000_000
    positions = kept(total, density)
    coded = encode_positions(positions, total)
    assert torch.equal(decode_positions(coded, total), positions)
    assert coded.numel() * 8 / total <= 1.10 * entropy(density)


@pytest.mark.parametrize("density", [0.9, 0.99, 0.999])
def test_dense_positions_cost_what_their_complement_does(density: float) -> None:
    total = 200_001
    positions = kept(total, density)
    coded = encode_positions(positions, total)
    assert int(coded[0]) & 0x80
    assert torch.equal(decode_positions(coded, total), positions)
    left_out = torch.from_numpy(np.setdiff1d(np.arange(total), positions.numpy()))
    assert coded.numel() == encode_positions(left_out, total).numel()


@pytest.mark.parametrize("total", [0, 1, 1000])
def test_none_and_all_cost_the_header_alone(total: int) -> None:
    for positions in (torch.arange(0), torch.arange(total)):
        coded = encode_positions(positions, total)
        assert coded.numel() == 9
        assert torch.equal(decode_positions(coded, total), positions)


def test_the_layout_is_the_documented_one() -> None:
    # Gaps (one fewer than the distance) 6, 1, 9; k = 2: quotients 1, 0, 2, remainders 2, 1, 1.
    coded = encode_positions(torch.tensor([6, 8, 18]), 20)
    assert coded[:9].tolist() == [2, 3, 0, 0, 0, 0, 0, 0, 0]
    assert coded[9].item() == 0b100_1_10  # from the lowest bit on: 01, 1, 001
    assert coded[10:].tolist() == [0b001_110]  # low bits 0, 1, 1, then high bits 1, 0, 0


def check_malformed(coded: bytes, total: int) -> None:
    """Either refused, or positions that a tensor of `total` entries has."""
    code = torch.frombuffer(bytearray(coded), dtype=torch.uint8) if coded else torch.empty(0)
    try:
        positions = decode_positions(code.to(torch.uint8), total)
    except ValueError:
        return
    assert positions.numel() <= total
    if positions.numel():
        assert int(positions[0]) >= 0
        assert int(positions[-1]) < total
        assert bool((positions[1:] > positions[:-1]).all())


def header(k: int, count: int) -> bytes:
    return bytes([k]) + count.to_bytes(8, "little")


@settings(deadline=None, max_examples=500)
@given(
    head=st.one_of(
        st.binary(max_size=12),
        st.builds(header, st.integers(0, 255), st.integers(0, 20)),
        st.builds(header, st.integers(0, 255), st.integers(0, 2**64 - 1)),
    ),
    body=st.binary(max_size=80),
    total=st.sampled_from([0, 1, 5, 64, 1000, 2**20]),
)
@example(head=header(62, 2), body=b"\x0a" + bytes(16), total=1000)
@example(head=header(0x80 | 62, 2), body=b"\x0a" + bytes(16), total=1000)
@example(head=header(63, 4), body=b"\xaa" + bytes(32), total=1000)
def test_random_bytes_are_refused_or_valid(head: bytes, body: bytes, total: int) -> None:
    check_malformed(head + body, total)


@quick
@given(subsets(), st.data())
def test_a_damaged_code_is_refused_or_valid(drawn: tuple[Tensor, int], data: st.DataObject) -> None:
    positions, total = drawn
    coded = bytearray(encode_positions(positions, total).numpy().tobytes())
    place = data.draw(st.integers(0, len(coded) - 1))
    coded[place] ^= data.draw(st.integers(1, 255))
    check_malformed(bytes(coded), total)
    check_malformed(bytes(coded[:place]), total)


@pytest.mark.parametrize(
    ("coded", "message"),
    [
        (b"", "at least 9 bytes"),
        (header(3, 0)[:-1], "at least 9 bytes"),
        (header(0, 2**63), "malformed"),
        (header(0, 101) + bytes(20), "malformed"),  # more positions than entries
        (header(7, 10) + b"\xff", "malformed"),  # the remainders are cut off
        (header(60, 1) + b"\x01" + bytes(8), "malformed"),  # no gap among 100 is so long
        (header(0, 3) + b"\x03", "expected 3 coded positions, found 2"),
        (header(0, 1) + bytes(12) + b"\x80", "outside the 100 entries"),
        (header(7, 1) + b"\x02\x00", "outside the 100 entries"),
    ],
)
def test_malformed_codes_are_refused(coded: bytes, message: str) -> None:
    code = torch.from_numpy(np.frombuffer(coded, dtype=np.uint8).copy())
    with pytest.raises(ValueError, match=message):
        decode_positions(code, 100)


def test_a_gap_too_long_for_an_int64_is_refused() -> None:
    # Quotient 4 and k = 62: 2^64, which wraps to 0.
    coded = torch.frombuffer(bytearray(header(62, 1) + b"\x10" + bytes(8)), dtype=torch.uint8)
    with pytest.raises(ValueError, match="outside"):
        decode_positions(coded, 2**62)


@quick
@given(st.sets(st.integers(0, 999), min_size=1))
def test_positions_outside_a_smaller_tensor_are_refused(drawn: set[int]) -> None:
    coded = encode_positions(torch.tensor(sorted(drawn)), 2000)
    with pytest.raises(ValueError, match=r"outside|malformed"):
        decode_positions(coded, max(drawn))
