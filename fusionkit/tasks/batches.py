"""Rows of a batch: counted, compared, sliced. The rows are the first axis of all of its tensors."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def count(batch: Any) -> int:
    """How many rows a batch has."""
    return len(_tensors(batch)[0])


def first(batch: Any, rows: int, of: int) -> Any:
    """A batch's first rows.

    Args:
        batch: a mapping or sequence of tensors, and of others.
        rows: how many.
        of: how many rows it has; what is no tensor with so many comes along as it is.
    """
    if isinstance(batch, Mapping):
        return {name: _first(value, rows, of) for name, value in batch.items()}
    return [_first(value, rows, of) for value in batch]


def same(one: Any, other: Any) -> bool:
    """Whether two batches have the same tensors, wherever they are."""
    pairs = zip(_tensors(one), _tensors(other), strict=True)
    return all(a.shape == b.shape and torch.equal(a.to(b.device), b) for a, b in pairs)


def _first(value: Any, rows: int, of: int) -> Any:
    if isinstance(value, Tensor):
        return value[:rows] if value.ndim and len(value) == of else value
    return first(value, rows, of) if isinstance(value, Mapping | list | tuple) else value


def _tensors(batch: Any) -> list[Tensor]:
    values = batch.values() if isinstance(batch, Mapping) else batch
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, Mapping | list | tuple):
            found.extend(_tensors(value))
    return found
