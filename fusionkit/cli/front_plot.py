"""What codecs keep against what they take: one colour a method, one marker a dtype, the front."""

import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fusionkit.cli.report import blank_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's, told apart by the colour-blind, then others; neighbours differ in lightness.
COLOURS = (
    *("#000000", "#E69F00", "#0072B2", "#56B4E9", "#D55E00", "#009E73", "#CC79A7", "#7A5C00"),
    *("#7F7F7F", "#4B0082", "#66A61E", "#B2182B", "#1B7F8C", "#E7298A"),
)
MARKERS = {
    "": "o",
    "fp32": "h",
    "fp16": "s",
    "bf16": "P",
    "int8": "D",
    "int4": "^",
    "int3": "<",
    "int2": "v",
}
_DASHES: tuple[Any, ...] = ("-", "--", "-.", ":")
_CROWDED = 0.95
"""Share from which on codecs are so near to the fine-tuned models that losses are drawn."""
_ABOVE = 1.01
"""Share above which none may be for that."""
_ROOM = 0.25
"""How far above the highest share, in percent, the axis of losses ends."""
_TICKS = (0, 50, 80, 90, 95, 98, 99, 99.5, 99.8, 100)


_PUBLISHED: dict[str, Any] = {
    "marker": "*",
    "markersize": 11,
    "color": "0.25",
    "linestyle": "",
    "markerfacecolor": "none",
    "zorder": 3,
}
"""How what is published is drawn."""


@dataclass(frozen=True)
class Mark:
    """One codec in the plot.

    Attributes:
        name: its label; empty: it has none.
        settings: the codec as it would be constructed: `SVD(rank=16, dtype='int4')`.
        bits: per parameter.
        value: what it keeps, a share (1 is all) or a mean score.
        low: the lower end of the value's interval, None where it isn't known.
        high: the upper end.
        calibrated: it has seen data; such marks are hollow.
    """

    name: str
    settings: str
    bits: float
    value: float
    low: float | None = None
    high: float | None = None
    calibrated: bool = False

    @property
    def method(self) -> str:
        """The codec's class; its colour."""
        return re.match(r"\w*", self.settings)[0] or self.name  # type: ignore[index]

    @property
    def dtype(self) -> str:
        """In what its values are stored, the first of several; its marker."""
        found = re.search(r"dtype='(\w+)'", self.settings)
        return found[1] if found else ""

    @property
    def marker(self) -> str:
        """Matplotlib's, of its dtype."""
        return MARKERS.get(self.dtype, "X")

    @property
    def line(self) -> tuple[str, bool]:
        """What marks of one line have in common: all settings but numbers, which say the size."""
        return re.sub(r"(?<![\w'])-?\d[\w.+-]*", "#", self.settings), self.calibrated


@dataclass(frozen=True)
class Axis:
    """What the plot's height means.

    Attributes:
        label: what it says.
        percent: whether values are told in percent.
        losses: whether the distance from what is whole is drawn, logarithmic.
        least: the least value that is drawn; by default, all are.
        whiskers: what the whiskers span.
    """

    label: str
    percent: bool = True
    losses: bool = False
    least: float | None = None
    whiskers: str = "95%, rows resampled"


def outer(marks: Iterable[Mark]) -> list[Mark]:
    """The Pareto front: those that nothing smaller outdoes, the smallest first."""
    found: list[Mark] = []
    for mark in sorted(marks, key=lambda each: (each.bits, -each.value)):
        if not found or mark.value > found[-1].value:
            found.append(mark)
    return found


def crowded(values: Sequence[float]) -> bool:
    """Whether shares crowd near that of the fine-tuned models, so that losses are to be drawn.

    Not so where one is well above it: losses, counted from there, would tell no others apart.
    """
    if any(value > _ABOVE for value in values):
        return False
    near = sum(value >= _CROWDED for value in values)
    return near >= 3 or 2 * near > len(values)


def mark_styles(marks: Sequence[Mark]) -> dict[str, tuple[str, Any]]:
    """Method → its colour and how its lines are dashed."""
    methods = list(dict.fromkeys(mark.method for mark in marks))
    return {m: (COLOURS[k % len(COLOURS)], _DASHES[k % 4]) for k, m in enumerate(methods)}


def scale_of(
    marks: Sequence[Mark], axis: Axis
) -> tuple[Callable[[float], float], list[float] | None]:
    """Where a value is on an axis that is even, and the ticks of one that is not, in percent."""
    times = 100 if axis.percent else 1
    if not axis.losses:
        return (lambda value: times * value), None
    top = _top(marks, times)
    least = min((100 * mark.value for mark in marks), default=0.0)
    first = max((tick for tick in _TICKS if tick <= least), default=0)
    loss = _loss(top)
    highest = top - _ROOM / 2  # a whisker that goes on from there is cut
    place = lambda value: float(loss(min(100 * value, highest)))  # noqa: E731
    return place, [tick for tick in _TICKS if tick >= first]


def draw_front(
    marks: Sequence[Mark],
    axis: Axis,
    title: str,
    lines: Mapping[str, float] | None = None,
    bits: tuple[float, float] | None = None,
    published: Sequence[Mark] = (),
) -> "Figure":
    """The plot.

    Args:
        marks: of codecs, each more than 0 bits.
        axis: what height means.
        title: above it.
        lines: a name → a value across the whole plot: the base's, the fine-tuned models'.
        bits: the sizes that are drawn; by default, all.
        published: what was not measured here: hollow stars, apart from the front and its lines.
    """
    from matplotlib.ticker import LogLocator

    figure, axes = blank_figure(11.5, 7 if len(marks) > 12 else 6)
    times = 100 if axis.percent else 1
    every = [*marks, *published]
    top = _top(every, times)
    if axis.losses:
        axes.set_yscale("function", functions=(_loss(top), _kept(top)))
    axes.set_xscale("log", base=2)
    front = outer(marks)
    _front(axes, front, times)
    styles = mark_styles(marks)
    for line in dict.fromkeys(mark.line for mark in marks):
        own = sorted((m for m in marks if m.line == line), key=lambda m: m.bits)
        _joined(axes, own, styles[own[0].method], times)
    for mark in published:
        axes.plot(mark.bits, times * mark.value, **_PUBLISHED)
    _limits(axes, every, axis, top, bits)
    _across(axes, lines or {}, times, axis.percent)
    low, high = axes.get_xlim()
    between = (1, 1.25, 1.5, 1.75) if high < 4 * low else (1,)  # one tick tells no scale
    axes.xaxis.set_major_locator(LogLocator(base=2, subs=between, numticks=20))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("bits per parameter on disk, shared parts spread over the tasks (log scale)")
    axes.set_ylabel(textwrap.fill(axis.label, 70))
    axes.set_title(title)
    axes.grid(alpha=0.25)
    figure.legend(
        handles=_legend(marks, styles, axes, axis.whiskers, bool(published)),
        loc="outside right upper",
        fontsize=8,
        frameon=False,
        handlelength=2.6,
    )
    theirs = {mark.name for mark in published}
    _label(figure, axes, every, {mark.name for mark in front}, theirs, times)
    return figure


def _front(axes: Any, front: Sequence[Mark], times: float) -> None:
    """The front, wide and pale, below all else."""
    if front:
        axes.step(
            [mark.bits for mark in front],
            [times * mark.value for mark in front],
            where="post",
            color="0.85",
            linewidth=7,
            solid_capstyle="round",
            zorder=0,
            label="front: nothing smaller keeps more",
        )


def _joined(axes: Any, own: Sequence[Mark], style: tuple[str, str], times: float) -> None:
    """Marks of one line, which joins them, with whiskers."""
    colour, dash = style
    bits, values = [m.bits for m in own], [times * m.value for m in own]
    axes.plot(bits, values, color=colour, linestyle=dash, linewidth=1, alpha=0.7, zorder=2)
    for mark in own:
        if mark.low is not None and mark.high is not None:
            ends = [times * mark.low, times * mark.high]
            axes.plot([mark.bits] * 2, ends, color=colour, linewidth=0.9, alpha=0.55, zorder=1)
        axes.plot(
            mark.bits,
            times * mark.value,
            marker=mark.marker,
            markersize=6.5,
            color=colour,
            markerfacecolor="white" if mark.calibrated else colour,
            zorder=3,
        )


def _limits(
    axes: Any, marks: Sequence[Mark], axis: Axis, top: float, bits: tuple[float, float] | None
) -> None:
    """Where the axes begin and end, and their ticks."""
    axes.margins(x=0.12, y=0.1)
    if bits:
        axes.set_xlim(*bits)
    if not axis.losses:
        if axis.least is not None:
            axes.set_ylim(bottom=axis.least * (100 if axis.percent else 1))
        return
    lows = [100 * (mark.value if mark.low is None else mark.low) for mark in marks]
    least = min(lows, default=90.0) if axis.least is None else 100 * axis.least
    forward, back = _loss(top), _kept(top)
    ends = forward(np.array([least, top - _ROOM]))
    room = 0.06 * (ends[1] - ends[0])
    axes.set_ylim(*back(np.array([ends[0] - room, ends[1] + room])))
    axes.set_yticks([tick for tick in _TICKS if tick >= axes.get_ylim()[0]])
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(_none())


def _across(axes: Any, lines: Mapping[str, float], times: float, percent: bool) -> None:
    """Lines across the plot; those below it are only told."""
    low, high = axes.get_ylim()
    for place, (name, value) in enumerate(lines.items()):
        told = f"{name}: {times * value:.1f}%" if percent else f"{name}: {value:.4g}"
        inside = low <= times * value <= high
        axes.axhline(
            times * value if inside else low,
            linestyle=("--", ":")[place % 2],
            color="0.35",
            linewidth=1.2 if inside else 0,
            label=told if inside else f"{told} (below the plot)",
        )
    axes.set_ylim(low, high)


def _legend(
    marks: Sequence[Mark],
    styles: Mapping[str, tuple[str, Any]],
    axes: Any,
    whiskers: str,
    published: bool,
) -> list[Any]:
    """Methods by colour, dtypes by marker, and what else there is."""
    from matplotlib.lines import Line2D

    found = [
        Line2D([], [], color=colour, linestyle=dash, marker="o", markersize=5, label=method)
        for method, (colour, dash) in styles.items()
    ]
    shapes: dict[str, Any] = {"color": "0.3", "linestyle": "", "markersize": 6}
    dtypes = [dtype for dtype in MARKERS if any(mark.dtype == dtype for mark in marks)]
    found += [
        Line2D([], [], marker=MARKERS[dtype], label=dtype or "no dtype", **shapes)
        for dtype in dtypes
    ]
    if any(mark.calibrated for mark in marks):
        hollow = {**shapes, "markerfacecolor": "white"}
        found.append(Line2D([], [], marker="o", label="hollow: saw data", **hollow))
    if published:
        found.append(Line2D([], [], label="†: published, not measured here", **_PUBLISHED))
    if any(mark.low is not None for mark in marks):
        found.append(Line2D([], [], color="0.3", linewidth=0.9, label=f"whiskers: {whiskers}"))
    return found + [each for each in axes.lines if not each.get_label().startswith("_")]


def _label(
    figure: Any,
    axes: Any,
    marks: Sequence[Mark],
    bold: set[str],
    italic: set[str],
    times: float,
) -> None:
    """Names beside the marks, moved apart; those of the front are bold, published ones italic."""
    from adjustText import adjust_text

    behind = {"facecolor": "white", "alpha": 0.6, "edgecolor": "none", "pad": 0.4}
    low, high = axes.get_ylim()
    shown = [mark for mark in marks if mark.name and low <= times * mark.value <= high]
    if not shown:
        return
    x, y = [mark.bits for mark in shown], [times * mark.value for mark in shown]
    labels = [
        axes.text(
            *at,
            mark.name,
            fontsize=8 if len(shown) <= 12 else 6.5,
            fontweight="bold" if mark.name in bold else "normal",
            fontstyle="italic" if mark.name in italic else "normal",
            color=_PUBLISHED["color"] if mark.name in italic else "black",
            zorder=2.5,  # above lines, below marks
            bbox=behind,
        )
        for mark, *at in zip(shown, x, y, strict=True)
    ]
    figure.draw_without_rendering()  # labels are moved apart on the final layout
    arrows = {"arrowstyle": "-", "color": "0.5", "linewidth": 0.5}
    adjust_text(labels, x, y, ax=axes, arrowprops=arrows, expand=(1.15, 1.4), iter_lim=2000)


def _top(marks: Sequence[Mark], times: float) -> float:
    """Where the axis of losses ends, in percent."""
    return max([100.0, *(times * mark.value for mark in marks)]) + _ROOM


def _loss(top: float) -> Any:
    """Percent kept → place on the axis of losses."""
    return lambda kept: -np.log10(np.maximum(top - np.asarray(kept, float), 1e-9))


def _kept(top: float) -> Any:
    """The inverse."""
    return lambda place: top - 10.0 ** -np.asarray(place, float)


def _none() -> Any:
    from matplotlib.ticker import NullLocator

    return NullLocator()
