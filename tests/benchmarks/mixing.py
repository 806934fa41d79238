"""`fusionkit.codecs.mixing` and `trellis`: weights rebuilt a second, the search, and the noise.

    python tests/benchmarks/mixing.py [rebuild search noise]

**rebuild**: matrices coded at 0.07 bits a number, with a base and a product of rank 3 added, as
decoding does: the 36 of a MiniLM-L6's layers, with two threads a matrix each, and one of
4096 × 14336. In turns, the best of each; GB/s of weights, counted as fp16, and `copy` says what
copying the float32 base takes.
**search**: Viterbi's algorithm on a million Gaussian numbers; nanoseconds a number, one thread.
**noise**: of a million Gaussian numbers, ‖x̂ − x‖² / ‖x‖² at ⟨x̂, x⟩ = ‖x‖², times the bits a number:
of the trellis, measured; of signs of the share ρ of numbers that are largest, with where these are,
entropy coded in H(ρ) + ρ bits, ρ / (2 φ(t))² − 1; of integers, rounded and entropy coded; and the
least that theory allows, R / (4^R − 1).

Measured on two virtual cores (Xeon with AVX-512), one of them and more busy otherwise; each line of
speeds in one run.

    GB/s as fp16, one thread; two (copy)    36 matrices    1.3; 1.4 (3.2; 4.2)
                                            4096 × 14336   1.2; 1.3 (3.3; 3.1)

    bits a number      0.02   0.05   0.07   0.1    0.25   0.5    1.0    1.5
    ns a number        39            49            92            315
    noise × bits
        trellis        0.808  0.791  0.781  0.766  0.692  0.581  0.397  0.265
        signs          0.981  0.996  0.997  0.993  0.937  0.807  0.534  0.357
        integers       0.982  0.993  0.998  0.992  0.939  0.809  0.535  0.324
        limit          0.711  0.697  0.687  0.673  0.604  0.500  0.333  0.214
"""

import math
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from statistics import NormalDist

import torch
from torch import Tensor

from fusionkit.checkpoints.adapters.lowrank import LowRank
from fusionkit.codecs import mixing, trellis
from fusionkit.codecs.entropy import code_length
from fusionkit.codecs.mixing import Coded
from fusionkit.codecs.rounded_sketch import integers

ZOO = [(384, 384)] * 24 + [(1536, 384)] * 6 + [(384, 1536)] * 6
LARGE = [(4096, 14336)]
RATE = 0.07
ROUNDS = 7
NUMBERS = 1 << 20
NORMAL = NormalDist()


def coded(shape: tuple[int, int], place: int) -> Coded:
    """Gaussian numbers as a matrix, coded."""
    found = mixing.levelled(torch.randn(shape), 0, place)
    assert found is not None
    steps = trellis.steps_in(RATE * len(found.numbers), len(found.numbers))
    stream, _ = trellis.search(found.numbers, steps, found.groups)
    return mixing.read(found.levels, steps, stream, *shape)


def rebuild() -> None:
    for title, shapes in (("36 matrices of a MiniLM-L6", ZOO), ("4096 × 14336", LARGE)):
        given = [coded(shape, place) for place, shape in enumerate(shapes)]
        products = [LowRank(torch.randn(m, 3), torch.randn(n, 3)) for m, n in shapes]
        bases, outs = ([torch.randn(shape) for shape in shapes] for _ in range(2))
        ones = {
            "copy": partial(copy, bases, outs),
            "rebuild": partial(one, given, products, bases, outs),
        }
        size = sum(m * n for m, n in shapes) * 2e-9
        print(f"\n{title}: {size:.3f} GB")
        for name, seconds in best(ones, len(shapes)).items():
            print(f"{name:24}{seconds * 1e3:>9.1f} ms {size / seconds:>8.2f} GB/s")


def copy(bases: list[Tensor], outs: list[Tensor], i: int) -> None:
    outs[i].copy_(bases[i])


def one(
    given: list[Coded], products: list[LowRank], bases: list[Tensor], outs: list[Tensor], i: int
) -> None:
    mixing.rebuild(
        given[i], bases[i].shape, 0, 0.1, place=i, product=products[i], base=bases[i], out=outs[i]
    )


def best(ones: Mapping[str, Callable[[int], None]], count: int) -> dict[str, float]:
    """Seconds for all matrices, in turns; a matrix a thread where there are several."""
    found: dict[str, float] = {}
    for _ in range(ROUNDS):
        for threads in (1, 2):
            pooled = threads > 1 and count > 1
            torch.set_num_threads(1 if pooled else threads)
            for name, way in ones.items():
                with ThreadPoolExecutor(threads) as pool:
                    started = time.perf_counter()
                    list((pool.map if pooled else map)(way, range(count)))
                    seconds = time.perf_counter() - started
                key = f"{name}, {threads} thread(s)"
                found[key] = min(found.get(key, math.inf), seconds)
    return found


def search() -> None:
    torch.set_num_threads(1)
    numbers = torch.randn(NUMBERS)
    trellis.search(numbers[:1000], 100)
    print(f"\n{'bits a number':>14}{'ns a number':>14}")
    for rate in (0.02, 0.07, 0.25, 1.0):
        started = time.perf_counter()
        trellis.search(numbers, round(rate * NUMBERS))
        print(f"{rate:>14}{(time.perf_counter() - started) / NUMBERS * 1e9:>14.0f}")


def noise() -> None:
    numbers = torch.randn(NUMBERS)
    titles = ("trellis", "signs", "integers", "limit", "trellis / limit")
    print(f"\n{'bits a number':>14}" + "".join(f"{title:>17}" for title in titles))
    for rate in (0.02, 0.05, 0.07, 0.1, 0.25, 0.5, 1.0, 1.5):
        own, least = of_trellis(numbers, rate), rate / (4**rate - 1)
        cells = (own, of_signs(rate), of_integers(numbers, rate), least, own / least)
        print(f"{rate:>14}" + "".join(f"{cell:>17.3f}" for cell in cells))


def of_trellis(numbers: Tensor, rate: float) -> float:
    steps = round(rate * NUMBERS)
    stream, product = trellis.search(numbers, steps)
    values = trellis.look_up(stream, steps, NUMBERS, 0, NUMBERS)
    return rate * unbiased(numbers, values, product)


def of_signs(rate: float) -> float:
    """Of the share ρ of numbers beyond t, at H(ρ) + ρ bits."""
    low, high = 0.0, 2 / 3
    for _ in range(60):
        share = (low + high) / 2
        entropy = -share * math.log2(share) - (1 - share) * math.log2(1 - share)
        low, high = (low, share) if entropy + share > rate else (share, high)
    return rate * (share / (2 * NORMAL.pdf(NORMAL.inv_cdf(1 - share / 2))) ** 2 - 1)


def of_integers(numbers: Tensor, rate: float) -> float:
    """At about this rate: what they take is what counts."""
    found = integers(numbers, rate * NUMBERS)
    assert found is not None
    [(symbols, model)] = found.runs
    values = symbols.float()
    product = float(values.double() @ numbers.double())
    return code_length(symbols, model) / NUMBERS * unbiased(numbers, values, product)


def unbiased(numbers: Tensor, values: Tensor, product: float) -> float:
    """The noise of values once they are scaled so that ⟨x̂, x⟩ = ‖x‖²."""
    energies = [float(part.double().square().sum()) for part in (numbers, values)]
    return energies[0] * energies[1] / product**2 - 1


PARTS = {"rebuild": rebuild, "search": search, "noise": noise}

if __name__ == "__main__":
    torch.manual_seed(0)
    for part in sys.argv[1:] or PARTS:
        PARTS[part]()
