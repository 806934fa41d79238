"""Tasks by codecs: what each keeps of each task, as a picture."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from fusionkit.cli.report import blank_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TOP = 100.5
"""Percent from which losses are counted, so that none is 0."""


def draw_heat_map(
    codecs: Sequence[str], tasks: Sequence[str], shares: Sequence[Sequence[float | None]]
) -> "Figure":
    """A cell for each codec and task, darker where less is kept; a codec's worst task is bold.

    Args:
        codecs: the rows' names.
        tasks: the columns' names.
        shares: a row for each codec, a share for each task; None where it is not known.
    """
    width = 3.2 + 0.85 * max(len(tasks), 3)
    figure, axes = blank_figure(width, 1.6 + 0.3 * max(len(codecs), 3))
    least = least_of(shares)
    light = [[np.nan if s is None else lightness(100 * s, least) for s in row] for row in shares]
    values = np.array(light, float).reshape(len(codecs), len(tasks))
    axes.imshow(values, cmap="cividis", vmin=0.0, vmax=1.0, aspect="auto")
    for place, row in enumerate(shares):
        for column, share in enumerate(row):
            if share is None:
                continue
            axes.text(
                column,
                place,
                f"{100 * share:.1f}",
                ha="center",
                va="center",
                fontsize=7,
                color="white" if values[place, column] < 0.5 else "black",
                fontweight="bold" if is_worst(share, row) else "normal",
            )
    axes.set_xticks(range(len(tasks)), tasks, rotation=35, ha="right", fontsize=8)
    axes.set_yticks(range(len(codecs)), codecs, fontsize=8)
    axes.set_title("Kept of each task (%), worst task in bold")
    return figure


def least_of(shares: Sequence[Sequence[float | None]]) -> float:
    """The percent that is told as the darkest: the least share, but no less than half."""
    known = [100 * share for row in shares for share in row if share is not None]
    return max(min([*known, 99.0]), 50.0)


def lightness(kept: float, least: float) -> float:
    """How light a cell is, from 0 to 1: by the loss, logarithmic, so that near 100% it shows.

    Args:
        kept: percent.
        least: percent of what is darkest.
    """
    ends = [math.log10(_TOP - min(each, 100.0)) for each in (least, kept, 100.0)]
    return min(max((ends[0] - ends[1]) / (ends[0] - ends[2]), 0.0), 1.0)


def is_worst(share: float | None, row: Sequence[float | None]) -> bool:
    """Whether a share is the least of a codec's, where they differ as they are written."""
    known = [f"{100 * each:.1f}" for each in row if each is not None]
    least = min((each for each in row if each is not None), default=None)
    return share is not None and share == least and len(set(known)) > 1
