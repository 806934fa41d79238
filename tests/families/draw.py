"""Draws a small family from a seed: what its tensors are, how its tasks moved, and in what files.

Every draw is labelled with the words that say what is in it, so that a search can say what it
covered.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

Random = np.random.Generator
State = dict[str, Tensor]

DTYPES = (torch.float32, torch.float32, torch.bfloat16, torch.float16)
_PRIMES = (2, 3, 7, 31, 61, 97, 127)
_LARGEST = {torch.float16: 1e3, torch.bfloat16: 1e30, torch.float32: 1e30}
_LEAST = {torch.float16: 1e-2, torch.bfloat16: 1e-30, torch.float32: 1e-30}


@dataclass
class Drawn:
    """A family, as `fusionkit.compress` takes it.

    Attributes:
        base: the base's tensors.
        finetuned: task → its tensors, or the folder of its adapter.
        arguments: `private`, `frozen`, `adapters`.
        words: what is in it.
    """

    base: State
    finetuned: dict[str, Any]
    arguments: dict[str, Any] = field(default_factory=dict)
    words: set[str] = field(default_factory=set)


def draw(seed: int, folder: Path) -> Drawn:
    """A family; adapters are written into the folder."""
    random = np.random.default_rng(seed)
    if random.random() < 0.12:
        return _adapters(random, folder)
    return _models(random)


def _models(random: Random) -> Drawn:
    words: set[str] = set()
    dtype = DTYPES[random.integers(len(DTYPES))]
    of_tasks = dtype if random.random() < 0.7 else DTYPES[random.integers(len(DTYPES))]
    words |= {f"base {_brief(dtype)}", f"tasks {_brief(of_tasks)}"}
    shapes = {}
    for place in range(random.integers(1, 9)):
        kind = list(SHAPES)[random.integers(len(SHAPES))]
        name = f"layer.{place}.{'experts.w' if kind == 'experts' else 'weight'}"
        shapes[name] = tuple(int(n) for n in SHAPES[kind](random))
        words.add(kind)
    least, most = max(_LEAST[dtype], _LEAST[of_tasks]), min(_LARGEST[dtype], _LARGEST[of_tasks])
    scale = float(np.clip(0.05 * 10.0 ** random.normal(0, 0.5), least, most))
    if random.random() < 0.25:
        scale = float(10.0 ** random.uniform(np.log10(least), np.log10(most)))
        words.add("tiny scale" if scale < 1e-8 else "huge scale" if scale > 1e8 else "odd scale")
    zero = random.random() < 0.1
    words |= {"base of zeros"} & ({"base of zeros"} if zero else set())
    base = {n: (torch.zeros(s) if zero else scale * _normal(random, s)) for n, s in shapes.items()}
    base = {name: tensor.to(dtype) for name, tensor in base.items()}
    tasks = int(random.choice([1, 2, 3, 5, 12], p=[0.3, 0.25, 0.2, 0.15, 0.1]))
    words.add(f"{tasks} tasks")
    wide = random.random() < 0.2  # ratios between tensors, and between tasks
    if wide:
        words.add("huge ratios")
    moved = 10.0 ** random.uniform(-3, 0.7)
    of_tensors = {n: 10.0 ** random.uniform(-4 * wide, 4 * wide) for n in shapes}
    finetuned = {}
    for task in range(tasks):
        own = scale * moved * 10.0 ** (random.uniform(-3, 3) if wide else random.normal(0, 0.2))
        state = {}
        for name, tensor in base.items():
            kind = list(SPECTRA)[random.integers(len(SPECTRA))]
            words.add(kind)
            size = float(np.clip(own * of_tensors[name], -most, most))
            delta = size * SPECTRA[kind](random, tuple(tensor.shape))
            state[name] = (tensor.to(torch.float32) + delta).to(of_tasks)
            if kind == "zeros":
                state[name] = tensor.clone()
        finetuned[f"t{task}"] = state
    drawn = Drawn(base, finetuned, words=words)
    _others(random, drawn)
    return drawn


def _others(random: Random, drawn: Drawn) -> None:
    """Tensors that no codec sees: private, frozen, exact."""
    arguments: dict[str, Any] = {}
    if random.random() < 0.3:
        arguments["private"] = ["head.*"]
        drawn.words.add("private")
        for place, state in enumerate(drawn.finetuned.values()):
            state["head.weight"] = _normal(random, (place + 2, 17))
    if random.random() < 0.3:
        arguments["frozen"] = ["still"]
        drawn.words.add("frozen")
        for state in (drawn.base, *drawn.finetuned.values()):
            state["still"] = torch.ones(5, 40)
    if random.random() < 0.3:
        drawn.words.add("exact")
        for place, state in enumerate((drawn.base, *drawn.finetuned.values())):
            state["steps"] = torch.tensor([place // 2, 7])
    drawn.arguments = arguments


def _adapters(random: Random, folder: Path) -> Drawn:
    """LoRAs of one base; as the weights that they make, or as their own tensors."""
    words = {"LoRA"}
    base = {
        f"layer.{place}.weight": 0.05 * _normal(random, tuple(random.integers(8, 120, 2)))
        for place in range(random.integers(1, 5))
    }
    rank, own = int(random.integers(1, 6)), random.random() < 0.5
    config = {
        "peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "bias": "none",
        "target_modules": [name.removesuffix(".weight") for name in base],
    }  # fmt: skip
    start = {}
    for name, tensor in base.items():
        module = name.removesuffix(".weight")
        start[f"{module}.lora_A.weight"] = 0.1 * _normal(random, (rank, tensor.shape[1]))
        start[f"{module}.lora_B.weight"] = torch.zeros(tensor.shape[0], rank)
    finetuned = {}
    for task in range(int(random.integers(1, 5))):
        path = folder / f"adapter{task}"
        path.mkdir(parents=True)
        state = {
            f"base_model.model.{name}": tensor + 0.03 * _normal(random, tuple(tensor.shape))
            for name, tensor in start.items()
        }
        save_file(state, path / "adapter_model.safetensors")
        (path / "adapter_config.json").write_text(json.dumps(config))
        if own:
            save_file(start, path / "start.safetensors")
            (path / "fusionkit.json").write_text('{"start": {"file": "start.safetensors"}}')
        finetuned[f"t{task}"] = str(path)
    words.add("LoRA's own tensors" if own else "LoRA, merged")
    return Drawn(base, finetuned, {"adapters": "modules" if own else "merged"}, words)


def _normal(random: Random, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(random.standard_normal(tuple(map(int, shape)), np.float32)).view(
        tuple(map(int, shape))
    )


def _sides(shape: tuple[int, ...]) -> tuple[int, int]:
    rows = shape[0] if len(shape) > 1 and shape[0] else 1
    return rows, int(np.prod(shape)) // rows


def _product(random: Random, shape: tuple[int, ...], weights: Tensor) -> Tensor:
    """Random directions, so weighted."""
    rows, columns = _sides(shape)
    left, right = (_normal(random, (n, len(weights))) for n in (rows, columns))
    return ((left * weights) @ right.mT).view(shape)


def _spikes(random: Random, shape: tuple[int, ...], count: int) -> Tensor:
    delta = torch.zeros(int(np.prod(shape)))
    if len(delta):
        places = torch.from_numpy(random.integers(0, len(delta), count))
        delta[places] = 10 * _normal(random, (count,))
    return delta.view(shape)


def _decaying(random: Random, shape: tuple[int, ...]) -> Tensor:
    count = max(min(_sides(shape)), 1)
    return _product(random, shape, torch.arange(1, count + 1.0) ** -float(random.uniform(0.3, 2)))


def _strong(random: Random, shape: tuple[int, ...]) -> Tensor:
    few = torch.ones(max(min(int(random.integers(1, 5)), *_sides(shape)), 1))
    return _normal(random, shape) + float(random.uniform(0.5, 5)) * _product(random, shape, few)


def _brief(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


SHAPES: dict[str, Callable[[Random], Any]] = {
    "vector": lambda r: [r.integers(1, 3000)],
    "scalar": lambda r: [],
    "empty": lambda r: [[0], [0, 5], [4, 0]][r.integers(3)],
    "one row": lambda r: [1, r.integers(1, 500)],
    "one column": lambda r: [r.integers(1, 500), 1],
    "tall": lambda r: [r.integers(100, 600), r.integers(2, 9)],
    "wide": lambda r: [r.integers(2, 9), r.integers(100, 600)],
    "square": lambda r: [2 ** r.integers(1, 8)] * 2,
    "any matrix": lambda r: r.integers(2, 200, 2),
    "prime sides": lambda r: r.choice(_PRIMES, 2),
    "convolution, 3-D": lambda r: [r.integers(2, 48), r.integers(1, 32), 3],
    "convolution, 4-D": lambda r: [r.integers(1, 32), r.integers(1, 16), 3, 3],
    "embedding": lambda r: [r.integers(300, 1500), r.integers(8, 40)],
    "experts": lambda r: [r.integers(1, 5), *r.integers(2, 60, 2)],
}
SPECTRA: dict[str, Callable[[Random, tuple[int, ...]], Tensor]] = {
    "flat": _normal,
    "decaying": _decaying,
    "strong and flat": _strong,
    "rank 1": lambda r, s: _product(r, s, torch.ones(1)),
    "spikes": lambda r, s: _spikes(r, s, 9),
    "a single entry": lambda r, s: _spikes(r, s, 1),
    "constant": lambda r, s: torch.ones(s),
    "identical rows": lambda r, s: _normal(r, (1, _sides(s)[1])).expand(_sides(s)).reshape(s),
    "heavy tails": lambda r, s: _normal(r, s) ** 3,
    "zeros": lambda r, s: torch.zeros(s),
}
