"""The next token of each row: the likeliest, or one that is drawn by the row's own generator."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_COLD = 1e-5
"""Temperatures up to which the likeliest token is taken: below, logits would leave their range."""


@dataclass(frozen=True)
class Draw:
    """How a row's tokens are drawn; see `Generate`.

    Attributes:
        temperature: 0: the likeliest.
        top_p: the share that is drawn from.
        generator: the row's own, on the CPU.
    """

    temperature: float
    top_p: float
    generator: torch.Generator


def generator(seed: int | None) -> torch.Generator:
    """A row's own; without a seed any."""
    made = torch.Generator()
    if seed is None:
        made.seed()
    else:
        made.manual_seed(seed % 2**63)
    return made


def next_tokens(logits: Tensor, draws: Sequence[Draw]) -> list[int]:
    """A token for each row.

    A row's draw takes one number of its generator, and depends on no other row.

    Args:
        logits: `(rows, vocabulary)`, of any floating dtype.
        draws: one a row.
    """
    found: list[int] = logits.argmax(-1).tolist()
    drawn = [row for row, draw in enumerate(draws) if draw.temperature > _COLD]
    for whole in (True, False):
        rows = [row for row in drawn if (draws[row].top_p == 1) is whole]
        if rows:
            tokens = _drawn(logits[rows], [draws[row] for row in rows], whole)
            for row, token in zip(rows, tokens, strict=True):
                found[row] = token
    return found


def _drawn(logits: Tensor, draws: Sequence[Draw], whole: bool) -> list[int]:
    """By the inverse of the cumulated probabilities, of the likeliest first unless all count."""

    def column(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=logits.device).unsqueeze(1)

    chances = (logits.double() / column([draw.temperature for draw in draws])).softmax(-1)
    order = None
    if not whole:
        chances, order = chances.sort(dim=-1, descending=True, stable=True)
        before = chances.cumsum(-1) - chances
        chances = chances.masked_fill(before >= column([draw.top_p for draw in draws]), 0)
    reached = chances.cumsum(-1)
    uniform = [float(torch.rand((), dtype=torch.float64, generator=d.generator)) for d in draws]
    total = reached[:, -1:].contiguous()
    places = torch.searchsorted(reached, column(uniform) * total, right=True)
    places = places.minimum(torch.searchsorted(reached, total))  # rounded up, it would be no token
    found: list[int] = (places if order is None else order.gather(-1, places)).squeeze(1).tolist()
    return found
