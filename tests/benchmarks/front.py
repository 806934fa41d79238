"""Draws a front from tables: what is kept of the fine-tuned score against bits per parameter.

    python tests/benchmarks/front.py PICTURE TABLE.csv … [--title T] [--least 80] [--bits 0.03 16]

The tables are `compare.csv`s of `fusionkit compare` or of `front_lm.py`, or others with their
columns name, settings, bits_per_parameter and share. Codecs of one kind share a marker, and a line
joins those that no smaller one of their kind outdoes; hollow ones saw data (calibrated). Rows that
differ in nothing but their seed are one point, with a bar from the least to the greatest.

It also prints, of each number of bits, the best that Sketch and that all others keep.
"""

import argparse
import csv
import re
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fusionkit.cli.report import blank_figure

STYLES = {  # kind: marker, colour (Okabe and Ito's, told apart by the colour-blind)
    "Sketch": ("o", "#000000"),
    "Sketch, directions alone": ("D", "#0072B2"),
    "SVD": ("s", "#56B4E9"),
    "DARE": ("^", "#D55E00"),
    "ComPEFT": ("v", "#009E73"),
    "BitDelta": ("P", "#CC79A7"),
    "pruning": ("X", "#E69F00"),
    "EMR": ("*", "#8C6D1F"),
    "TALL-masks": ("<", "#7F7F7F"),
    "TSV-Compress": (">", "#7F7F7F"),
    "DBMS": ("h", "#7F7F7F"),
    "one merged model": ("d", "#7F7F7F"),
    "lossless": ("p", "#7F7F7F"),
}
KINDS = {
    "TALLMask": "TALL-masks",
    "TSVCompress": "TSV-Compress",
    "MagnitudePrune": "pruning",
    "Merged": "one merged model",
    "Lossless": "lossless",
}
LEFT_OUT = ("Dense", "")
SIZES = (0.03, 0.05, 0.1, 0.25, 0.5, 1, 2)
TICKS = (0, 50, 80, 90, 95, 98, 99, 99.5, 99.8, 100)
TOP = 100.25
"""Where the axis of shares ends: towards it a share's distance from it is what is drawn."""


class Point(NamedTuple):
    """A row of a table; its share, in percent, is the mean of several where seeds differ."""

    name: str
    kind: str
    calibrated: bool
    bits: float
    share: float
    least: float
    greatest: float


def points(tables: Iterable[Path]) -> list[Point]:
    """The rows of tables that are drawn."""
    alike: dict[tuple[str, bool, str], list[dict[str, str]]] = defaultdict(list)
    for table in tables:
        with table.open(newline="") as file:
            for row in csv.DictReader(file):
                codec = re.match(r"\w*", row["settings"])[0]  # type: ignore[index]
                if codec in LEFT_OUT:
                    continue
                kind = KINDS.get(codec, codec)
                if "sketch=False" in row["settings"]:
                    kind = "Sketch, directions alone"
                calibrated = codec == "DBMS" or row["name"].endswith(", calibrated")
                without_seed = re.sub(r"\bseed=\d+", "", row["settings"])
                alike[kind, calibrated, without_seed or row["name"]].append(row)
    found = []
    for (kind, calibrated, _), rows in alike.items():
        shares = [100 * float(row["share"]) for row in rows]
        bits = statistics.fmean(float(row["bits_per_parameter"]) for row in rows)
        share = statistics.fmean(shares)
        name = rows[0]["name"]
        found.append(Point(name, kind, calibrated, bits, share, min(shares), max(shares)))
    return found


def outer(candidates: Iterable[Point]) -> list[Point]:
    """Those that nothing smaller outdoes, the smallest first."""
    found: list[Point] = []
    for point in sorted(candidates, key=lambda each: (each.bits, -each.share)):
        if not found or point.share > found[-1].share:
            found.append(point)
    return found


def draw(found: Sequence[Point], title: str, least: float, bits: tuple[float, float]) -> Any:
    """The figure."""
    figure, axes = blank_figure(8.5, 5.2)
    axes.set_xscale("log", base=2)
    low = -np.log10(TOP - least)
    top = -np.log10(TOP - 100)
    axes.set_ylim(low - 0.03 * (top - low), top + 0.04 * (top - low))
    axes.set_xlim(*bits)
    others = outer(p for p in found if not p.kind.startswith("Sketch") and not p.calibrated)
    axes.step(
        [*(p.bits for p in others), bits[1]],
        _heights([*(p.share for p in others), others[-1].share]),
        where="post",
        color="0.85",
        linewidth=7,
        label="best of all others, no data",
        zorder=0,
    )
    for kind, (marker, colour) in STYLES.items():
        for calibrated in (False, True):
            own = [p for p in found if p.kind == kind and p.calibrated == calibrated]
            if own:
                _kind(axes, own, kind + ", with data" * calibrated, marker, colour, calibrated)
    ticks = [tick for tick in TICKS if tick >= least]
    axes.set_yticks(_heights(ticks), [f"{tick:g}" for tick in ticks])
    axes.set_xticks([x for x in (*SIZES, 4, 8, 16) if bits[0] <= x <= bits[1]])
    axes.xaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.set_xlabel("bits per parameter, all files counted (log scale)")
    axes.set_ylabel("kept of the fine-tuned score (%)")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    return figure


def _kind(
    axes: Any, own: Sequence[Point], label: str, marker: str, colour: str, hollow: bool
) -> None:
    strong = label.startswith("Sketch")
    front = outer(own)
    size = 6.5 if strong else 6
    fill = "white" if hollow else colour
    style = {"marker": marker, "markersize": size, "color": colour, "markerfacecolor": fill}
    line = {"linestyle": ":" if hollow else "-", "linewidth": 2.2 if strong else 1}
    layer = 4 if strong else 3
    axes.plot(
        [p.bits for p in front],
        _heights([p.share for p in front]),
        **style,
        **line,
        label=label,
        zorder=layer,
    )
    rest = [p for p in own if p not in front]
    axes.plot(
        [p.bits for p in rest],
        _heights([p.share for p in rest]),
        **style,
        linestyle="",
        alpha=0.6,
        zorder=layer,
    )
    for p in own:
        if p.greatest > p.least:
            axes.plot([p.bits] * 2, _heights([p.least, p.greatest]), color=colour, linewidth=1)


def _heights(shares: Sequence[float]) -> Any:
    """Where shares are on the axis: their distances from the top, logarithmic."""
    return -np.log10(TOP - np.minimum(np.asarray(shares, float), 100))


def best(found: Sequence[Point]) -> list[str]:
    """By number of bits, the best of Sketch and of all others that are no larger; without data."""
    lines = []
    for bits in (*SIZES, 4, 16):
        cells = []
        for ours in (True, False):
            small = [
                p
                for p in found
                if p.bits <= 1.02 * bits
                and not p.calibrated
                and p.kind.startswith("Sketch") == ours
            ]
            top = max(small, key=lambda p: p.share, default=None)
            cells.append(f"{top.share:6.2f}% {top.name} ({top.bits:.3f})" if top else "none")
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
    figure = draw(found, arguments.title, arguments.least, tuple(arguments.bits))
    figure.savefig(arguments.picture, dpi=110)
    hidden = [p.name for p in found if p.share < arguments.least]
    print("\n".join(best(found)))
    print(f"{arguments.picture}: below it {', '.join(hidden) or 'nothing'}")


if __name__ == "__main__":
    main()
