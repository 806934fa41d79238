"""The entropy coder: round trips, lengths, its format, goldens, hostile bytes."""

import hashlib
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from golden import coded
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fusionkit.codecs import entropy
from fusionkit.codecs import entropy_tables as tables
from fusionkit.codecs.entropy import (
    Bits,
    Gaps,
    Gaussian,
    Laplace,
    Model,
    best,
    code_length,
    decode,
    encode,
)

Runs = list[tuple[Tensor, Model]]
quick = settings(deadline=None, max_examples=200)
LEAST, MOST = -(2**31), 2**31 - 1
SCALED = [kind(scale) for kind in (Gaussian, Laplace) for scale in range(64)]
GAPS = [
    Gaps(count, total)
    for count, total in [(0, 0), (0, 9), (5, 5), (9, 10), (1, 15), (1, 16), (1000, 147_456)]
] + [Gaps(4096, 2**24), Gaps(1, 2**31), Gaps(1, 2**50)]


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def asked(runs: Runs) -> list[tuple[int, Model]]:
    return [(symbols.numel(), model) for symbols, model in runs]


def plain(model: Model) -> coded.Table:
    """A model's table, for the decoder that is written from the docstring."""
    table = entropy._table(model)
    return coded.Table(table.frequencies.tolist(), table.last, table.signed, table.low)


def deviation(scale: int) -> float:
    return 0.15 * (40 / 0.15) ** (scale / 63)


def distribution(model: Gaussian | Laplace) -> Callable[[float], float]:
    """P(symbol <= x)."""
    s = deviation(model.scale)
    if isinstance(model, Gaussian):
        return lambda x: math.erfc(-x / s / math.sqrt(2)) / 2
    rate = math.sqrt(2) / s
    return lambda x: math.exp(x * rate) / 2 if x < 0 else 1 - math.exp(-x * rate) / 2


def drawn(model: Model, count: int) -> tuple[Tensor, float]:
    """Symbols of the distribution that a model stands for, and their ideal length in bits."""
    random = np.random.default_rng(count)
    if isinstance(model, Bits):
        return torch.from_numpy(random.integers(0, 2, count, np.int32)), count
    if isinstance(model, Gaps):
        p = model.count / model.total
        gaps = random.geometric(p, count) - 1
        ideal = -count * math.log2(p) - gaps.sum() * math.log2(1 - p) if p < 1 else 0.0
        return torch.from_numpy(gaps.astype(np.int32)), ideal
    s = deviation(model.scale)
    real = random.normal if isinstance(model, Gaussian) else random.laplace
    spread = s if isinstance(model, Gaussian) else s / math.sqrt(2)
    symbols = np.rint(real(0, spread, count)).astype(np.int32)
    below = distribution(model)
    values, counts = np.unique(np.abs(symbols), return_counts=True)
    masses = [below(0.5 - x) - below(-0.5 - x) for x in values.tolist()]  # exact in the tail
    return torch.from_numpy(symbols), -float(counts @ np.log2(masses))


models = st.one_of(
    st.builds(Gaussian, st.integers(0, 63)),
    st.builds(Laplace, st.integers(0, 63)),
    st.builds(lambda a, b: Gaps(min(a, b), max(a, b)), st.integers(0, 2**40), st.integers(0, 9999)),
    st.builds(Bits),
)


@st.composite
def run(draw: st.DrawFn) -> tuple[Tensor, Model]:
    model = draw(models)
    least = LEAST if isinstance(model, Gaussian | Laplace) else 0
    most = 1 if isinstance(model, Bits) else MOST
    near = st.integers(max(least, -300), min(most, 300))
    one = st.one_of(near, near, st.integers(least, most), st.sampled_from([least, most, 0]))
    symbols = draw(st.lists(one, max_size=30)) * draw(st.sampled_from([1, 1, 20]))
    return torch.tensor(symbols, dtype=torch.int32), model


runs = st.lists(run(), max_size=8)


@quick
@given(runs)
def test_any_runs_round_trip_at_their_code_length(given_: Runs) -> None:
    stream = encode(given_)
    assert stream.dtype == torch.uint8
    found = decode(stream, asked(given_))
    assert len(found) == len(given_)
    for (symbols, _), each in zip(given_, found, strict=True):
        assert each.dtype == torch.int32
        assert torch.equal(each, symbols)
    expected = sum(code_length(symbols, model) for symbols, model in given_)
    assert expected - 17 <= 8 * len(stream) <= expected * 1.0001 + 32


@pytest.mark.parametrize("model", [*SCALED[::21], *GAPS, Bits()], ids=str)
def test_every_single_symbol_of_a_model(model: Model) -> None:
    """Around each end of the table, of the escapes' lengths, and of an int32."""
    table = entropy._table(model)
    ends = [(table.last + 2**k) << table.low for k in range(32)]
    values = {0, 1, MOST} | {end + more for end in ends for more in range(-2, 3)}
    values |= {-value for value in values} | {LEAST} if table.signed else set()
    most = 1 if isinstance(model, Bits) else MOST
    least = LEAST if table.signed else 0
    for value in sorted(value for value in values if least <= value <= most):
        stream = encode([(ints(value), model)])
        assert decode(stream, [(1, model)])[0].tolist() == [value]
        assert 8 * len(stream) <= code_length(ints(value), model) + 32


@pytest.mark.parametrize("model", [*SCALED[::9], *GAPS[2:-2], Bits()], ids=str)
def test_a_stream_is_as_long_as_the_symbols_ideal_code(model: Model) -> None:
    symbols, ideal = drawn(model, 20_000)
    stream = encode([(symbols, model)])
    assert len(stream) <= 1.005 * ideal / 8 + 4
    assert abs(code_length(symbols, model) / 8 - len(stream)) < 4 + 1e-5 * len(stream)
    assert torch.equal(decode(stream, [(len(symbols), model)])[0], symbols)


def test_nothing_takes_no_bytes() -> None:
    assert encode([]).tolist() == []
    assert encode([(ints(), Gaussian(3)), (ints(), Bits())]).tolist() == []
    assert decode(encode([]), []) == []
    found = decode(encode([]), [(0, Gaussian(3)), (0, Bits())])
    assert [each.shape for each in found] == [(0,), (0,)]


def test_symbols_and_streams_may_be_strided() -> None:
    matrix = torch.arange(-60, 60, dtype=torch.int32).view(30, 4)
    model = Laplace(40)
    stream = encode([(matrix[:, 1], model)])
    assert torch.equal(stream, encode([(matrix[:, 1].clone(), model)]))
    spread = torch.stack([stream, stream], 1)[:, 0]
    assert torch.equal(decode(spread, [(30, model)])[0], matrix[:, 1])
    odd = torch.cat([stream[:1], stream])[1:]  # words at odd addresses
    assert torch.equal(decode(odd, [(30, model)])[0], matrix[:, 1])


# The models


@pytest.mark.parametrize("model", SCALED, ids=str)
def test_tables_are_the_distributions(model: Gaussian | Laplace) -> None:
    below, table = distribution(model), entropy._table(model)
    assert table.frequencies.sum() == 2**16
    assert table.frequencies.min() >= 1
    inner = table.frequencies[1:]
    assert np.array_equal(inner, inner[::-1])
    ideal = [2**16 * (below(0.5 - x) - below(-0.5 - x)) for x in range(1, table.last + 2)]
    for frequency, wanted in zip(inner[table.last + 1 :], ideal, strict=False):
        assert abs(frequency - wanted) <= 0.5 or (frequency == 1 and wanted < 1)
    assert ideal[-1] < 0.5  # what has no index would have no frequency either
    assert table.frequencies[0] == pytest.approx(2**17 * below(-table.last - 0.5), abs=1)


@pytest.mark.parametrize("model", GAPS, ids=str)
def test_tables_of_gaps(model: Gaps) -> None:
    table = entropy._table(model)
    assert table.frequencies.sum() == 2**16
    assert table.frequencies.min() >= 1
    assert len(table.frequencies) == table.last + 2 <= 256
    if model.count and table.low < 27:
        q = (1 - model.count / model.total) ** (1 << table.low)
        ideal = 2**16 * (1 - q) * q ** np.arange(1, table.last + 1)
        assert np.abs(table.frequencies[2:] - ideal).max(initial=0) <= 0.5 + 1e-6


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Gaussian(64), "expected a scale from 0 to 63, got 64"),
        (lambda: Laplace(-1), "expected a scale from 0 to 63, got -1"),
        (lambda: Gaps(3, 2), "expected 0 <= count <= total, got 3 and 2"),
        (lambda: Gaps(-1, 2), "expected 0 <= count <= total, got -1 and 2"),
    ],
)
def test_models_that_cannot_be(make: Callable[[], Model], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_cost_is_a_logarithm_rounded_up() -> None:
    every = np.arange(1, 2**16 + 1)
    exact = np.log2(every.astype(np.float64)) * 2**20
    assert (tables._log2(every) <= exact + 1e-6).all()
    assert (tables._log2(every) > exact - 1.01).all()


@pytest.mark.parametrize("call", [lambda x, m: encode([(x, m)]), code_length])
def test_symbols_that_a_model_cannot_take(call: Callable[[Tensor, Model], object]) -> None:
    with pytest.raises(ValueError, match=r"Gaps\(count=2, total=9\) can't code -3"):
        call(ints(4, -3), Gaps(2, 9))
    with pytest.raises(ValueError, match=r"Bits\(\) can't code 2"):
        call(ints(0, 2), Bits())
    with pytest.raises(ValueError, match=r"expected int32 symbols of one dimension, got torch.int"):
        call(ints(0).long(), Gaussian(0))
    with pytest.raises(ValueError, match=r"of one dimension, got torch.int32 \(1, 1\)"):
        call(ints(0)[None], Gaussian(0))


@quick
@given(st.lists(st.one_of(st.integers(-50, 50), st.integers(LEAST, MOST)), max_size=50))
def test_best_is_the_shortest(values: list[int]) -> None:
    symbols = ints(*values)
    lengths = [code_length(symbols, model) for model in SCALED]
    assert best(symbols) == SCALED[int(np.argmin(lengths))]


@pytest.mark.parametrize("model", [Gaussian(30), Gaussian(60), Laplace(30), Laplace(60)], ids=str)
def test_best_finds_the_distribution(model: Gaussian | Laplace) -> None:
    found = best(drawn(model, 100_000)[0])
    assert type(found) is type(model)
    assert abs(found.scale - model.scale) <= 1


# The format


@quick
@given(runs)
def test_the_docstring_suffices_to_write_another_decoder(given_: Runs) -> None:
    wanted = [(count, plain(model)) for count, model in asked(given_)]
    found = coded.decode(bytes(encode(given_).tolist()), wanted)
    assert found == [symbols.tolist() for symbols, _ in given_]


def digest(array: np.ndarray) -> str:
    return hashlib.sha256(array.astype("<i8").tobytes()).hexdigest()[:16]


def test_tables_are_the_same_for_ever() -> None:
    def all_of(some: list[Model]) -> str:
        found = [entropy._table(model) for model in some]
        numbers = [[t.last, t.signed, t.low, *t.frequencies] for t in found]
        return digest(np.concatenate([np.array(each, np.int64) for each in numbers]))

    assert all_of(SCALED[:64]) == "dc36992a0b027243"
    assert all_of(SCALED[64:]) == "07326632cbca25a8"
    assert all_of(GAPS) == "1430fd2052bdd3a9"


def numbers(count: int, below: int) -> Tensor:
    """The same on every machine."""
    state, found = 1, []
    for _ in range(count):
        state = (6364136223846793005 * state + 1442695040888963407) % 2**64
        found.append((state >> 33) % below)
    return torch.tensor(found, dtype=torch.int32)


def golden() -> Runs:
    return [
        (numbers(500, 9) - 4, Gaussian(35)),
        (numbers(300, 30) - 15, Laplace(45)),
        (numbers(40, 2**31 - 1) - 2**30, Laplace(10)),
        (ints(), Gaussian(0)),
        (numbers(200, 1000), Gaps(200, 100_000)),
        (numbers(200, 2), Bits()),
    ]


def test_streams_are_the_same_for_ever() -> None:
    assert encode([(ints(0, -1, 2, 77), Gaussian(20)), (ints(1, 1), Bits())]).tolist() == [
        105,
        175,
        7,
        9,
        57,
        0,
        0,
        0,
    ]
    stream = encode(golden())
    assert (len(stream), digest(stream.numpy())) == (964, "bf2a49e2596fdfe2")


# Hostile bytes


def refused_or_its_own(stream: Tensor, wanted: list[tuple[int, Model]]) -> bool:
    """Whether it was refused; if not, it has to be what `encode` makes of the symbols."""
    try:
        found = decode(stream, wanted)
    except ValueError:
        return True
    models = [model for _, model in wanted]
    assert torch.equal(encode(list(zip(found, models, strict=True))), stream)
    return False


@quick
@given(st.binary(max_size=60), st.lists(st.tuples(st.integers(0, 40), models), max_size=5))
def test_any_bytes_are_refused_or_a_stream(data: bytes, wanted: list[tuple[int, Model]]) -> None:
    refused_or_its_own(torch.tensor(list(data), dtype=torch.uint8), wanted)


def test_altered_streams() -> None:
    stream, wanted = encode(golden()), asked(golden())
    for place in range(0, len(stream), 3):
        for bit in range(8):
            altered = stream.clone()
            altered[place] ^= 1 << bit
            refused_or_its_own(altered, wanted)


def test_streams_cut_short_or_too_long() -> None:
    stream, wanted = encode(golden()), asked(golden())
    for size in range(len(stream)):
        with pytest.raises(ValueError, match=rf"{size} bytes are"):
            decode(stream[:size], wanted)
    for more in range(1, 9):
        for filler in (0, 255):
            longer = torch.cat([stream, torch.full((more,), filler, dtype=torch.uint8)])
            with pytest.raises(ValueError, match="cut short"):
                decode(longer, wanted)
    with pytest.raises(ValueError, match="they are cut short, too long, or altered"):
        decode(stream, wanted[:-1])
    with pytest.raises(ValueError, match="they are cut short, too long, or altered"):
        decode(stream, [*wanted, (1, Bits())])


@pytest.mark.parametrize("model", [*SCALED[::21], *GAPS, Bits()], ids=str)
def test_more_symbols_than_bytes_can_hold(model: Model) -> None:
    with pytest.raises(ValueError, match="5 bytes are too few for 10000000000000 coded symbols"):
        decode(torch.tensor([1, 2, 3, 4, 5], dtype=torch.uint8), [(10**13, model)])
    with pytest.raises(ValueError, match="expected numbers of symbols"):
        decode(torch.tensor([1], dtype=torch.uint8), [(-1, model)])


@pytest.mark.parametrize("model", [*SCALED[::21], *GAPS], ids=str)
def test_many_of_the_cheapest_symbol_are_not_too_many(model: Model) -> None:
    table = entropy._table(model)
    cheapest = int(table.frequencies[1:].argmax()) + 1 - table.offset
    for value in (cheapest << table.low, (table.last + 1) << table.low):
        for count in (1, 100, 50_000):
            symbols = ints(min(value, MOST)).expand(count)
            assert torch.equal(decode(encode([(symbols, model)]), [(count, model)])[0], symbols)


def test_a_false_number_of_symbols_ends_early() -> None:
    """Where the bytes end, not after as many steps as it says."""
    model, count = Gaps(9, 9), 1_000_000
    own = ints(0, 0, 5, 0), model
    state, words = entropy._parts(bytes(encode([own]).tolist()))
    symbols = np.full(count, -7, np.int32)
    numbers, rows, cumulative, first = entropy._models(
        [(count, model)], {model: entropy._table(model)}
    )
    tables_ = (numbers, rows, cumulative, first)
    assert not entropy.kernels.decode(np.int64(state), words, *tables_, symbols)
    assert (symbols[count // 2 :] == -7).all()
    # More bytes may hold so many of the cheapest symbol, and are not these alone.
    stream = encode([own, *golden()[:1]])
    with pytest.raises(ValueError, match=f"bytes are not {count} coded symbols of these models"):
        decode(stream, [(count, model)])
