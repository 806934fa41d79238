"""Draws a front from tables: what is kept of the fine-tuned score against bits per parameter.

    python tests/benchmarks/front.py PICTURE TABLE.csv … [--title T] [--least 80] [--bits 0.03 16]

The tables are `compare.csv`s of `fusionkit compare` or of `front_lm.py`, or others with their
columns name, settings, bits_per_parameter and share. The plot is that of `fusionkit compare`, with
names at the front alone. Rows that differ in nothing but their seed are one mark, their whiskers
from the least to the greatest.

It also prints, of each number of bits, the best that Sketch and that all others keep.
"""

import argparse
import csv
import re
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from fusionkit.cli.front_plot import Axis, Mark, draw_front, outer

LEFT_OUT = ("Dense", "")
SIZES = (0.03, 0.05, 0.1, 0.25, 0.5, 1, 2, 4, 16)


def points(tables: Iterable[Path]) -> list[Mark]:
    """The rows of tables that are drawn."""
    alike: dict[tuple[str, bool], list[dict[str, str]]] = defaultdict(list)
    for table in tables:
        with table.open(newline="") as file:
            for row in csv.DictReader(file):
                codec = re.match(r"\w*", row["settings"])[0]  # type: ignore[index]
                if codec in LEFT_OUT:
                    continue
                of_dbms = codec == "DBMS" and "grid=(1.0,)" not in row["settings"]
                calibrated = of_dbms or row["name"].endswith(", calibrated")
                without_seed = re.sub(r"\bseed=\d+", "seed=0", row["settings"])
                alike[without_seed, calibrated].append(row)
    found = []
    for (settings, calibrated), rows in alike.items():
        shares = [float(row["share"]) for row in rows]
        bits = statistics.fmean(float(row["bits_per_parameter"]) for row in rows)
        ends = (min(shares), max(shares)) if len(rows) > 1 else (None, None)
        share = statistics.fmean(shares)
        found.append(Mark(rows[0]["name"], settings, bits, share, *ends, calibrated))
    return found


def best(found: Sequence[Mark]) -> list[str]:
    """By number of bits, the best of Sketch and of all others that are no larger; without data."""
    lines = []
    for bits in SIZES:
        cells = []
        for ours in (True, False):
            small = [
                p
                for p in found
                if p.bits <= 1.02 * bits and not p.calibrated and (p.method == "Sketch") == ours
            ]
            top = max(small, key=lambda p: p.value, default=None)
            cells.append(f"{100 * top.value:6.2f}% {top.name} ({top.bits:.3f})" if top else "none")
        lines.append(f"{bits:5g} bits: {cells[0]:42} others {cells[1]}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("picture", type=Path)
    parser.add_argument("tables", type=Path, nargs="+")
    parser.add_argument("--title", default="Score against size")
    parser.add_argument("--least", type=float, default=80.0)
    parser.add_argument("--bits", type=float, nargs=2, default=(0.025, 20.0))
    arguments = parser.parse_args()
    found = points(arguments.tables)
    named = {mark.name for mark in outer(found)}
    marks = [mark if mark.name in named else replace(mark, name="") for mark in found]
    label = "kept of the fine-tuned score (%), loss on a log scale"
    axis = Axis(label, losses=True, least=arguments.least / 100, whiskers="seeds")
    figure = draw_front(marks, axis, arguments.title, bits=tuple(arguments.bits))
    figure.savefig(arguments.picture, dpi=110)
    hidden = [p.name for p in found if 100 * p.value < arguments.least]
    print("\n".join(best(found)))
    print(f"{arguments.picture}: below it {', '.join(hidden) or 'nothing'}")


if __name__ == "__main__":
    main()
