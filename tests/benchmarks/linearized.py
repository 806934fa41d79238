"""L-LoRA's cost in training: forward and backward, against a plain LoRA and against the jvp.

    python tests/benchmarks/linearized.py [repeats]

Six linear layers of 768 × 768 with a nonlinearity between, LoRA of rank 16 on each, 2,048 rows.
"""

import statistics
import sys
import time
import warnings

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from fusionkit.tasks.linearize import linearize

WIDTH, DEPTH, ROWS, RANK = 768, 6, 32 * 64, 16


def adapted(start_at_zero: bool = True) -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(DEPTH):
        layers += [nn.Linear(WIDTH, WIDTH), nn.GELU()]
    config = LoraConfig(
        r=RANK,
        target_modules=[str(2 * place) for place in range(DEPTH)],
        init_lora_weights=start_at_zero,
    )
    return get_peft_model(nn.Sequential(*layers), config).train()


def step(model: nn.Module, x: Tensor) -> None:
    model(x).square().mean().backward()
    for parameter in model.parameters():
        parameter.grad = None


def main(repeats: int) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rivals = {
        "plain LoRA": adapted(),
        "closed form, B0 = 0": adapted(),
        "closed form, B0 != 0": adapted(start_at_zero=False),
        "jvp": adapted(),
    }
    linearize(rivals["closed form, B0 = 0"])
    linearize(rivals["closed form, B0 != 0"])
    linearize(rivals["jvp"], "jvp")
    x = torch.randn(ROWS, WIDTH, requires_grad=True)  # as inside a network
    times: dict[str, list[float]] = {name: [] for name in rivals}
    for _ in range(repeats + 1):
        for name, model in rivals.items():
            started = time.perf_counter()
            step(model, x)
            times[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(its[1:]) for name, its in times.items()}
    print(f"forward + backward, {torch.get_num_threads()} thread, median of {repeats}")
    for name, seconds in medians.items():
        ratio = seconds / medians["plain LoRA"]
        print(f"{name:22} {1e3 * seconds:7.1f} ms   {ratio:5.2f} x plain LoRA")
    for name in ("closed form, B0 = 0", "closed form, B0 != 0"):
        print(f"jvp / {name}: {medians['jvp'] / medians[name]:.2f}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10)
