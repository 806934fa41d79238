"""The trellis: what it is, to the bit; the best of all ways; as noisy as it says; its limits."""

import itertools

import numpy as np
import pytest
import torch
from golden.coded import trellis as written_out
from torch import Tensor

from fusionkit.codecs import trellis
from fusionkit.codecs.trellis import Groups


def draw(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("numbers", "steps"),
    [(1, 1), (7, 7), (100, 31), (40, 60), (4096, 1), (700, 9), (30_000, 8193), (9000, 9000)],
)
def test_it_is_what_the_docstring_says(numbers: int, steps: int) -> None:
    stream, _ = trellis.search(draw(numbers), steps)
    assert len(stream) == trellis.size_of(steps)
    found = trellis.look_up(stream, steps, numbers, 0, numbers)
    assert found.tolist() == written_out(bytes(stream.tolist()), steps, numbers)
    for begin, end in itertools.pairwise(range(0, numbers + 1, -(-numbers // 3))):
        part = trellis.look_up(stream, steps, numbers, begin, end)
        assert torch.equal(part, found[begin:end])


def test_no_other_bits_are_better() -> None:
    """Of all 2^13 streams of four steps, the one of least ‖x − a x̂‖², a that of its rate."""
    numbers, steps = draw(12), 4
    stream, product = trellis.search(numbers, steps)
    shrunk = (1 - 4.0 ** -(steps / 12)) ** 0.5

    def error(bits: Tensor) -> float:
        found = trellis.look_up(bits, steps, 12, 0, 12) / trellis.DEVIATION
        return float((numbers - shrunk * found).square().sum())

    all_bits = itertools.product(range(256), range(32))
    errors = [error(torch.tensor(pair, dtype=torch.uint8)) for pair in all_bits]
    assert error(stream) == pytest.approx(min(errors))
    values = trellis.look_up(stream, steps, 12, 0, 12)
    assert product == pytest.approx(float(values @ numbers), rel=1e-5)


def test_groups_count_for_what_they_say() -> None:
    numbers, groups = draw(20_000), Groups(np.array([5, 12_000, 20_000]), np.array([2.0, 0.0, 0.5]))
    stream, product = trellis.search(numbers, 9000, groups)
    values = trellis.look_up(stream, 9000, 20_000, 0, 20_000) * numbers
    wanted = 2 * values[:5].sum() + values[12_000:].sum() / 2
    assert product == pytest.approx(float(wanted), rel=1e-4)


@pytest.mark.parametrize("rate", [0.004, 0.03, 0.07, 0.15, 0.4, 0.75, 1.1, 1.45])
def test_the_noise_is_what_is_said(rate: float) -> None:
    """At the scale at which what comes back has the right size; theory allows 1 / (4^R − 1)."""
    numbers = draw(round(max(20_000, 700 / rate)))
    steps = round(rate * len(numbers))
    stream, product = trellis.search(numbers, steps)
    energy = float(numbers.square().sum())
    values = trellis.look_up(stream, steps, len(numbers), 0, len(numbers)) * energy / product
    noise = float((values - numbers).square().sum()) / energy
    assert noise == pytest.approx(float(trellis.noise(np.array(steps / len(numbers)))), rel=0.06)
    assert noise > 1 / (4**rate - 1)


def test_threads_write_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers, found = draw(600_000), []
    for threads in (1, 2):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        found.append(trellis.search(numbers, 40_000))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]


def test_as_many_steps_as_fit() -> None:
    for bits in (*range(40), *range(8190, 8222), 16_402, 16_403, 50_000):
        steps = trellis.steps_in(bits, 100_000)
        assert steps + 9 * -(-steps // 8192) <= bits or not steps
        more = steps + 1
        assert more + 9 * -(-more // 8192) > bits or more * trellis.WIDEST < 100_000
    assert trellis.steps_in(10_000, 100) == 150
    assert trellis.steps_in(40, 1_000_000) == 0


def test_places_in_the_largest_matrices_are_64_bit_numbers() -> None:
    for numbers in (1 << 32, 5_000_000_000, 1 << 36):
        steps = trellis.steps_in(numbers * 1.5, numbers)
        assert 0 < steps < 1 << 32
        assert numbers * steps < 1 << 63
        one = torch.zeros(1, dtype=torch.uint8)
        stream = one.expand(trellis.size_of(steps))
        trellis.check(stream, steps, numbers)
        more = 1 + max(steps, (1 << 63) // numbers)
        with pytest.raises(ValueError, match=f"no trellis of {numbers} entries has {more} steps"):
            trellis.check(one.expand(trellis.size_of(more)), more, numbers)


@pytest.mark.parametrize(
    ("steps", "numbers", "size", "message"),
    [
        (0, 10, 2, "no trellis of 10 entries has 0 steps"),
        (16, 10, 4, "no trellis of 10 entries has 16 steps"),
        (1, 4097, 2, "no trellis of 4097 entries has 1 steps"),
        (10, 10, 2, "2 bytes are not the 3 of a trellis of 10 steps"),
    ],
)
def test_a_stream_of_another_size_is_refused(
    steps: int, numbers: int, size: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        trellis.check(torch.zeros(size, dtype=torch.uint8), steps, numbers)
