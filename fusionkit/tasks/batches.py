"""Rows of a batch: counted, compared, sliced. The rows are the first axis of all of its tensors."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def count(batch: Any) -> int:
    """How many rows a batch has."""
    return len(_tensors(batch)[0])


def first(batch: Any, rows: int) -> Any:
    """A batch's first rows; what is no tensor comes along as it is."""
    if isinstance(batch, Mapping):
        return {name: _first(value, rows) for name, value in batch.items()}
    return [_first(value, rows) for value in batch]


def same(one: Any, other: Any) -> bool:
    """Whether two batches have the same tensors, wherever they are."""
    pairs = zip(_tensors(one), _tensors(other), strict=True)
    return all(a.shape == b.shape and torch.equal(a.to(b.device), b) for a, b in pairs)


def _first(value: Any, rows: int) -> Any:
    if isinstance(value, Tensor):
        return value[:rows]
    return first(value, rows) if isinstance(value, Mapping | list | tuple) else value


def _tensors(batch: Any) -> list[Tensor]:
    values = batch.values() if isinstance(batch, Mapping) else batch
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, Mapping | list | tuple):
            found.extend(_tensors(value))
    return found
