"""The plot: what is drawn how, at 5 and at 35 codecs."""

import csv
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fusionkit.cli.front_plot import COLOURS, Axis, Mark, crowded, draw_front, outer
from fusionkit.cli.report import write_figure

FIELD = Path(__file__).parents[2] / "docs" / "figures" / "text_field.csv"
LOSSES = Axis("kept (%)", losses=True)


def field(count: int) -> list[Mark]:
    """Codecs of a table that was measured on eight text classifiers."""
    with FIELD.open() as file:
        rows = [row for row in csv.DictReader(file) if row["settings"]]
    return [
        Mark(
            row["name"],
            row["settings"],
            float(row["bits_per_parameter"]),
            float(row["share"]),
            float(row["share"]) - 0.004,
            float(row["share"]) + 0.004,
            row["name"].endswith(", calibrated"),
        )
        for row in rows[:: max(len(rows) // count, 1)][:count]
    ]


def drawn(marks: list[Mark], axis: Axis = LOSSES, lines: Any = None) -> Any:
    figure = draw_front(marks, axis, "title", lines)
    figure.draw_without_rendering()
    return figure


@pytest.mark.parametrize("count", [5, 35])
def test_labels_do_not_collide(count: int) -> None:
    marks = field(count)
    assert len(marks) == count
    figure = drawn(marks)
    (axes,) = figure.axes
    boxes = {each.get_text(): each.get_window_extent() for each in axes.texts}
    assert boxes.keys() == {mark.name for mark in marks}
    touching = [
        (one, other)
        for one, other in combinations(boxes, 2)
        if boxes[one].shrunk(0.98, 0.9).overlaps(boxes[other].shrunk(0.98, 0.9))
    ]
    assert not touching
    whole = axes.get_window_extent()
    assert all(whole.containsx(box.x0) and whole.containsx(box.x1) for box in boxes.values())


def test_a_colour_a_method_a_marker_a_dtype_a_line_a_grid() -> None:
    marks = [
        Mark("SVD 16", "SVD(rank=16, energy=None, dtype='fp16')", 2, 0.99),
        Mark("SVD 32", "SVD(rank=32, energy=None, dtype='fp16')", 4, 0.999),
        Mark("SVD 16 int4", "SVD(rank=16, energy=None, dtype='int4')", 0.5, 0.98),
        Mark("EMR", "EMR(rescale='l1')", 1, 0.97),
    ]
    assert len({mark.line for mark in marks}) == 3
    (axes,) = drawn(marks).axes
    points = {
        (line.get_xdata()[0], line.get_marker(), line.get_color())
        for line in axes.lines
        if line.get_marker() not in ("None", "")
    }
    assert points == {
        (2, "s", COLOURS[0]),
        (4, "s", COLOURS[0]),
        (0.5, "^", COLOURS[0]),
        (1, "o", COLOURS[1]),
    }
    joined = [list(line.get_xdata()) for line in axes.lines if len(line.get_xdata()) == 2]
    assert [2, 4] in joined


def test_the_front_is_what_nothing_smaller_outdoes() -> None:
    marks = [Mark(str(bits), "X()", bits, value) for bits, value in ((1, 0.5), (2, 0.4), (3, 0.6))]
    assert [mark.name for mark in outer(reversed(marks))] == ["1", "3"]
    (axes,) = drawn(marks, Axis("kept (%)")).axes
    bold = {each.get_text() for each in axes.texts if each.get_fontweight() == "bold"}
    assert bold == {"1", "3"}
    front = next(line for line in axes.lines if line.get_label().startswith("front"))
    assert np.allclose(front.get_ydata(), [50, 60])


def test_losses_are_drawn_where_shares_crowd() -> None:
    assert crowded([0.99, 0.97, 0.96, 0.5, 0.4, 0.3, 0.2])
    assert not crowded([0.99, 0.6, 0.7, 0.8])
    assert not crowded([0.99, 0.97, 0.96, 1.06])  # from 106% on, 99 and 100 would be one tick
    figure = drawn(field(35))
    (axes,) = figure.axes
    place = axes.transData.transform([[1, 98], [1, 99], [1, 99.5], [1, 99.8]])[:, 1]
    gaps = np.diff(place)
    assert (gaps > 20).all()  # pixels, where a linear axis would have the last within 3


def test_lines_of_base_and_fine_tuned_models() -> None:
    figure = drawn(field(5), lines={"fine-tuned": 1.0, "base": 0.41})
    told = [each.get_text() for each in figure.legends[0].get_texts()]
    assert "fine-tuned: 100.0%" in told
    assert "base: 41.0% (below the plot)" in told


def test_a_file_of_the_same_bytes_with_text_in_it(tmp_path: Path) -> None:
    for name in ("a.svg", "b.svg"):
        write_figure(drawn(field(5)), tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert "dense fp16</text>" in (tmp_path / "a.svg").read_text()


def test_what_height_means_is_read_whole() -> None:
    """Where shares of scores and of gaps are in one plot, that takes two lines."""
    said = "kept of the fine-tuned score; of errors, part of the base's gap closed (%)"
    said += ", loss on a log scale"
    figure = drawn(field(3), Axis(said, True, True))
    box = figure.axes[0].yaxis.label.get_window_extent()
    assert box.y0 >= 0
    assert box.y1 <= figure.bbox.height
    assert box.x0 >= 0


@pytest.mark.parametrize("bits", [(1.1, 1.9), (0.3, 4.0)])
def test_sizes_have_a_scale(bits: tuple[float, float]) -> None:
    marks = [Mark(f"SVD {b}", "SVD()", b, 0.9) for b in bits]
    axis = drawn(marks, Axis("kept (%)")).axes[0].xaxis
    low, high = axis.get_view_interval()
    ticks = [tick for tick in axis.get_ticklocs() if low <= tick <= high]
    assert 3 <= len(ticks) <= 12


def test_no_codec() -> None:
    assert drawn([], Axis("kept (%)"), {"fine-tuned": 1.0}).axes
