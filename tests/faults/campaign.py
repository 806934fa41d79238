"""What campaigns of random trials share: drawing them, counting how they end, and the table."""

import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple


class Ended(NamedTuple):
    """How a trial ended: its row of the table, its column, and of a fault where, and what."""

    row: str
    end: str
    where: str
    what: str


def campaign(
    trials: int,
    seed: int,
    rows: Iterable[str],
    ends: Sequence[str],
    one: Callable[[random.Random, random.Random], Ended],
) -> int:
    """All trials, each fault as it comes, and a table; how many faults there were.

    Args:
        trials: how many.
        seed: of what is drawn.
        rows: of the table.
        ends: its columns; the last is "fault".
        one: a trial, given what draws all of them, and what draws it alone.
    """
    draw, begun = random.Random(seed), time.perf_counter()
    table: dict[str, Counter[str]] = {row: Counter() for row in rows}
    for number in range(trials):
        found = one(draw, random.Random(f"{seed} {number}"))
        table[found.row][found.end] += 1
        if found.what:
            print(f"  {number}, {found.where}: {found.what[:400]}", flush=True)
    whole: Counter[str] = sum(table.values(), Counter())
    for row, counts in {**table, "together": whole}.items():
        columns = [f"{end} {counts[end]:6}" for end in ends]
        print(f"{row:18} {counts.total():6} trials: {', '.join(columns)}")
    print(f"{time.perf_counter() - begun:.0f} s, seed {seed}", flush=True)
    return whole["fault"]
