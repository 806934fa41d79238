"""Rows of a batch: counted, compared, sliced."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def _tensors(batch: Any) -> list[Tensor]:
    values = batch.values() if isinstance(batch, Mapping) else batch
    return [value for value in values if isinstance(value, Tensor)]


def _count(batch: Any) -> int:
    return len(_tensors(batch)[0])


def _same(one: Any, other: Any) -> bool:
    pairs = zip(_tensors(one), _tensors(other), strict=True)
    return all(a.shape == b.shape and torch.equal(a.to(b.device), b) for a, b in pairs)
