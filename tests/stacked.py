"""Families as stacked flat vectors: the plain setting in which the papers write their equations."""

from collections.abc import Mapping

import torch
from torch import Tensor

from fusionkit import Bundle

State = Mapping[str, Tensor]
States = Mapping[str, State]


def stack(base: State, finetuned: States, names: list[str]) -> Tensor:
    """Task vectors of the whole model: float32 `(T, P)`."""
    return torch.stack(
        [
            torch.cat([(state[name].float() - base[name].float()).flatten() for name in names])
            for state in finetuned.values()
        ]
    )


def decoded(bundle: Bundle, task: str, names: list[str]) -> Tensor:
    """One task's decoded delta of the whole model: float32 `(P,)`."""
    flat = []
    for name in names:
        delta = bundle.delta(task, name)
        shape = torch.Size(bundle.manifest.base.tensors[name].shape)
        flat.append(torch.zeros(shape.numel()) if delta is None else delta.flatten())
    return torch.cat(flat)


def keep_largest(values: Tensor, count: int) -> Tensor:
    """All but the `count` largest magnitudes set to zero; of equal ones the first stay."""
    kept = torch.zeros_like(values)
    order = sorted(range(values.numel()), key=lambda i: -abs(float(values[i])))  # stable
    for place in order[:count]:
        kept[place] = values[place]
    return kept


def random_family(
    shapes: Mapping[str, tuple[int, ...]], tasks: int, seed: int = 0, scale: float = 0.1
) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """A base and fine-tuned models with normal values, as mappings."""
    generator = torch.Generator().manual_seed(seed)
    base = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    finetuned = {
        f"task{t}": {
            name: tensor + scale * torch.randn(tensor.shape, generator=generator)
            for name, tensor in base.items()
        }
        for t in range(tasks)
    }
    return base, finetuned
