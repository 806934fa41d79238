"""Keys and values of rows that join and leave."""

import random

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from fusionkit.serving.row_cache import RowCache

LAYERS = 2


def states(tokens: list[int], layer: int) -> tuple[Tensor, Tensor]:
    """What a layer makes of tokens: keys `(1, 2, n, 3)` and values of another size."""
    base = torch.tensor(tokens, dtype=torch.float)[None, None, :, None] + 1000 * layer
    return base.expand(1, 2, -1, 3), -base.expand(1, 2, -1, 4)


def filled(rows: list[list[int]]) -> DynamicCache:
    """A cache of prompts, padded on the left."""
    width = max(map(len, rows))
    cache = DynamicCache()
    for layer in range(LAYERS):
        each = [states([-7] * (width - len(row)) + row, layer) for row in rows]
        keys, values = (torch.cat(parts) for parts in zip(*each, strict=True))
        cache.update(keys, values, layer)
    return cache


def check_step(cache: RowCache, rows: list[list[int]], new: list[int]) -> None:
    """What a step looks at is each row's own tokens, and nothing else."""
    mask = cache.prepare(torch.device("cpu")).bool()
    for layer in range(LAYERS):
        pairs = [states([token], layer) for token in new]
        keys, values = cache.update(*(torch.cat(each) for each in zip(*pairs, strict=True)), layer)
        assert keys.shape[:1] + keys.shape[2:3] == mask.shape
        assert cache.get_mask_sizes(1, layer) == (mask.shape[1], 0)
        for row, tokens in enumerate(rows):
            own = states([*tokens, new[row]], layer)
            assert torch.equal(keys[row][:, mask[row]], own[0][0])
            assert torch.equal(values[row][:, mask[row]], own[1][0])
        assert keys.isfinite().all()


@pytest.mark.parametrize("seed", range(8))
def test_each_row_keeps_its_own(seed: int) -> None:
    """While rows join, leave, change places, and steps fail."""
    draw = random.Random(seed)
    cache, rows = RowCache(), list[list[int]]()
    for _ in range(150):
        if draw.random() < 0.3 or not rows:
            new = [
                [draw.randrange(1000) for _ in range(draw.choice([1, 2, 5, 40, 90]))]
                for _ in range(draw.randrange(1, 4))
            ]
            cache.join(filled(new), [len(row) for row in new])
            rows += new
        if draw.random() < 0.3:
            order = draw.sample(range(len(rows)), draw.randrange(len(rows) + 1))
            cache.arrange(order)
            rows = [rows[place] for place in order]
        if rows:
            tokens = [draw.randrange(1000) for _ in rows]
            check_step(cache, rows, tokens)
            if draw.random() < 0.9:  # else the step failed, and is done again
                cache.advance()
                rows = [[*row, token] for row, token in zip(rows, tokens, strict=True)]


def test_a_part_is_a_copy() -> None:
    cache = RowCache()
    rows = [[1, 2, 3], [4], [5, 6]]
    cache.join(filled(rows), [3, 1, 2])
    part = cache.part([2, 0])
    check_step(part, [rows[2], rows[0]], [8, 9])
    part.advance()
    check_step(part, [[5, 6, 8], [1, 2, 3, 9]], [1, 2])
    check_step(cache, rows, [7, 8, 9])


def test_memory_follows_the_rows_that_run() -> None:
    """However many came and went."""
    cache = RowCache()
    cache.join(filled([[0] * 30]), [30])
    sizes = set()
    for _ in range(40):
        for _ in range(20):
            cache.prepare(torch.device("cpu"))
            for layer in range(LAYERS):
                cache.update(*states([0], layer), layer)
            cache.advance()
        cache.join(filled([[0] * 30]), [30])
        cache.arrange([1])
        sizes.add(cache.nbytes)
    assert max(sizes) <= 4 * min(sizes)
