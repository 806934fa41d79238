"""The rotation of `fusionkit.codecs.rotation`: how fast it rebuilds weights, and how it mixes.

    python tests/benchmarks/rotation.py [rounds]     # seconds, GB/s
    python tests/benchmarks/rotation.py kurtosis

Speed: integers are rotated back, as decoding does of a sketch above 1.5 bits an entry: of the 37
matrices of a MiniLM-L6, and of one of 4096 × 14336. FusionKit's own, with one thread and with two
(on the small ones a matrix each); the same rotation in plain PyTorch; and the way that a quick
script goes, over blocks of the largest power of two that divides the size. In turns, the best of
each, but the last two only once on the large matrix. GB/s are of float32 weights rebuilt, and
`copy` says what copying them takes. Below 1.5 bits a matrix is mixed: see `mixing.py`.

Kurtosis of one side, over 20 seeds, mean and largest: of a single entry, of a constant, of an
alternating vector, and of a ramp; 3n / (n + 2) is that of a rotation drawn uniformly from all. And
of both sides: of a diagonal matrix. The same of the quick script's way, for comparison.
"""

import math
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from fusionkit.codecs import rotation
from fusionkit.codecs.rotation import rotate
from fusionkit.codecs.rotation_sides import side_of

LAYER = [(384, 384)] * 4 + [(1536, 384), (384, 1536)]
ZOO = LAYER * 6 + [(384, 384)]
LARGE = [(4096, 14336)]
SIZES = [1, 2, 3, 5, 7, 31, 97, 128, 384, 1000, 1536, 4095, 4096, 14336, 65521]


def quick(x: Tensor, seed: int, inverse: bool) -> Tensor:
    """Signs, blocks of Hadamard and a reflection among them, a permutation, and again."""
    n = x.shape[-1]
    generator = torch.Generator().manual_seed(seed + n)
    s1, s2 = torch.randint(0, 2, (2, n), generator=generator).float() * 2 - 1
    order = torch.randperm(n, generator=generator)
    if not inverse:
        return blocks(blocks(x * s1)[..., order] * s2)
    y = torch.empty_like(x)
    y[..., order] = blocks(x) * s2
    return blocks(y) * s1


def blocks(x: Tensor) -> Tensor:
    n = x.shape[-1]
    power, stride = n & -n, 1
    odd, y = n // power, x
    while stride < power:
        a, b = y.reshape(-1, odd, power // (2 * stride), 2, stride).unbind(3)
        y, stride = torch.stack((a + b, a - b), 3), 2 * stride
    y = y.reshape(-1, odd, power) / math.sqrt(power)
    return (y - 2 / odd * y.sum(1, keepdim=True) if odd > 1 else y).reshape(x.shape)


def by_script(values: Tensor) -> None:
    half = quick(values, 0, True)
    quick(half.mT.contiguous(), 0, True).mT.contiguous()


def by_torch(values: Tensor) -> None:
    sides = rotation._sides(values.shape, 0, True)
    rotation._on_device(values, *sides)


def speed(title: str, shapes: list[tuple[int, int]], rounds: int) -> None:
    given = [torch.randn(shape).round_() for shape in shapes]
    outs = [torch.zeros(shape) for shape in shapes]
    ways: dict[str, tuple[int, Callable[[int], object]]] = {
        "copy": (1, lambda i: outs[i].copy_(given[i])),
        "a quick script's, 1 thread": (1, lambda i: by_script(given[i])),
        "plain PyTorch, 1 thread": (1, lambda i: by_torch(given[i])),
        "plain PyTorch, 2 threads": (2, lambda i: by_torch(given[i])),
        "fusionkit, 1 thread": (1, lambda i: rotate(given[i], 0, True)),
        "fusionkit, 1 thread, out=": (1, lambda i: rotate(given[i], 0, True, out=outs[i])),
        "fusionkit, 2 threads": (2, lambda i: rotate(given[i], 0, True)),
        "fusionkit, 2 threads, out=": (2, lambda i: rotate(given[i], 0, True, out=outs[i])),
    }
    best = dict.fromkeys(ways, math.inf)
    for turn in range(rounds):
        for way, (threads, one) in ways.items():
            if turn and shapes == LARGE and not way.startswith(("copy", "fusionkit")):
                continue
            pooled = threads > 1 and len(shapes) > 1
            torch.set_num_threads(1 if pooled else threads)
            with ThreadPoolExecutor(threads) as pool:
                started = time.perf_counter()
                list((pool.map if pooled else map)(one, range(len(shapes))))
                best[way] = min(best[way], time.perf_counter() - started)
    size = sum(m * n for m, n in shapes) * 4e-9
    print(f"\n{title}: {size:.3f} GB")
    for way, seconds in best.items():
        print(f"{way:34}{seconds * 1e3:>9.1f} ms {size / seconds:>8.2f} GB/s")


def kurtosis(values: Tensor) -> float:
    values = values.double()
    return float(values.pow(4).mean() / values.pow(2).mean() ** 2)


def kurtoses() -> None:
    titles = ("one entry", "constant", "alternating", "ramp")
    print(f"{'n':>6}{'uniform':>9}" + "".join(f"{t:>16}" for t in titles) + f"{'diagonal':>10}")
    for n in SIZES:
        place = torch.arange(n)
        rows = torch.stack(
            [(place == n // 3).float(), torch.ones(n), 1 - 2.0 * (place % 2), place + 1.0]
        )
        ours = [
            rotation._turned(rows[:, :, None], side_of(seed, 1, n, False))[:, :, 0]
            for seed in range(20)
        ]
        theirs = [quick(rows, 1000 * seed, False) for seed in range(20)]
        diagonals = ("", "")
        if n <= 4096:
            eye = torch.eye(n)
            turned = quick(quick(eye, 0, False).mT.contiguous(), 0, False)
            diagonals = (f"{kurtosis(rotate(eye, 0)):>10.2f}", f"{kurtosis(turned):>10.2f}")
        for name, drawn, last in zip(("", "script"), (ours, theirs), diagonals, strict=True):
            found = torch.tensor([[kurtosis(row) for row in each] for each in drawn])
            uniform = f"{3 * n / (n + 2):>9.2f}" if not name else f"{'':9}"
            cells = [
                f"{mean:>9.2f}{most:>7.1f}"
                for mean, most in zip(found.mean(0), found.amax(0), strict=True)
            ]
            print(f"{name or n:>6}{uniform}{''.join(cells)}{last}")


if __name__ == "__main__":
    torch.manual_seed(0)
    if sys.argv[1:2] == ["kurtosis"]:
        kurtoses()
    else:
        turns = int(sys.argv[1]) if len(sys.argv) > 1 else 5
        speed("37 matrices of a MiniLM-L6", ZOO, turns)
        speed("4096 × 14336", LARGE, turns)
