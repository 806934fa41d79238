"""Cutting a LoRA to a lower rank: by its factors, against SVD of the full product.

    python tests/benchmarks/lora_cut.py [repeats]

One adapter of rank 64 on a matrix of 4096 × 4096, cut to rank 8. The rivals are LAPACK's SVD of
the product (once: it takes its time), and torch's randomised one; they take turns in one process.
"""

import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from fusionkit.checkpoints.adapters.lowrank import LowRank
from fusionkit.codecs.decomposition import svd_exact, svd_product

WIDTH, RANK, CUT = 4096, 64, 8


def main(repeats: int) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    factors = LowRank(torch.randn(WIDTH, RANK), torch.randn(WIDTH, RANK) / RANK)
    shape = torch.Size((WIDTH, WIDTH))

    def randomised() -> Tensor:
        u, s, v = torch.svd_lowrank(factors.dense(shape), CUT + 8)
        return (u[:, :CUT] * s[:CUT]) @ v[:, :CUT].mT

    ways: dict[str, Callable[[], Tensor | LowRank]] = {
        "FusionKit (factors)": lambda: svd_product(factors).cut(CUT),
        "torch.svd_lowrank of the product": randomised,
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    results: dict[str, Tensor] = {}
    for _ in range(repeats + 1):
        for name, way in ways.items():
            started = time.perf_counter()
            result = way()
            times[name].append(time.perf_counter() - started)
            results[name] = result.dense(shape) if isinstance(result, LowRank) else result
    name = "torch.linalg.svd of the product"
    started = time.perf_counter()
    results[name] = svd_exact(factors.dense(shape), CUT).cut(CUT).dense(shape)
    times[name] = [0.0, time.perf_counter() - started]

    product = factors.dense(shape)
    own = statistics.median(times["FusionKit (factors)"][1:])
    print(f"rank {RANK} → {CUT} at d = {WIDTH}, {torch.get_num_threads()} thread")
    for name, its in times.items():
        seconds = statistics.median(its[1:])
        error = float((product - results[name]).norm() / product.norm())
        print(f"{name:34} {1e3 * seconds:9.1f} ms  {seconds / own:8.1f} x  error {error:.4f}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10)
