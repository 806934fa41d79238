"""A comparison as one page that needs nothing from outside: plot to explore, table, heat map.

plotly draws the plot, and its script is in the page. What the plot shows is said in words before
it, and is in the table after it, so that a screen reader leaves nothing out.
"""

from collections.abc import Sequence
from html import escape
from importlib.util import find_spec
from typing import Any

from fusionkit.cli.comparison import Comparison, ComparisonReport
from fusionkit.cli.front_plot import Mark, mark_styles, outer, scale_of
from fusionkit.cli.heat_map import is_worst, least_of, lightness
from fusionkit.cli.report import percent, score_text
from fusionkit.cli.table import Table
from fusionkit.errors import size

WITHOUT_PLOTLY = (
    "for a page to explore beside them: pip install 'fusionkit[report]', and the same command again"
)
_SYMBOLS = {
    "o": "circle",
    "h": "hexagon",
    "s": "square",
    "P": "cross",
    "D": "diamond",
    "^": "triangle-up",
    "<": "triangle-left",
    "v": "triangle-down",
    "X": "x",
}
_DASHES = {"-": "solid", "--": "dash", "-.": "dashdot", ":": "dot"}
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; margin: 2rem auto;
  max-width: 76rem; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.85rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-style: italic; padding-bottom: 0.4rem; }
th, td { padding: 0.25rem 0.6rem; text-align: right; white-space: nowrap; }
th[scope=row], thead th:first-child { text-align: left; }
thead th { border-bottom: 1px solid #555; }
tbody tr:nth-child(even) { background: #f4f4f4; }
.front th { font-weight: bold; } tbody th { font-weight: normal; }
.worst { font-weight: bold; text-decoration: underline; }
.dark { color: #fff; }
figure { margin: 0; }
"""


def plotly_is_there() -> bool:
    """Whether plotly is installed."""
    return find_spec("plotly") is not None


def page(results: ComparisonReport) -> str:
    """The page, whole.

    Args:
        results: the rows.
    """
    title = "Codecs compared: what they keep, and what they take"
    front = {mark.name for mark in outer(results.marks())}
    parts = [
        f"<h1>{title}</h1>",
        f"<p>{escape(_summary(results))}</p>",
        '<h2 id="plot">What is kept against size</h2>',
        '<figure role="group" aria-labelledby="plot" aria-describedby="plot-text">',
        _plot(results),
        f'<figcaption id="plot-text">{escape(_in_words(results))}</figcaption></figure>',
        "<h2>All numbers</h2>",
        f'<div class="wide">{_table(results.table(), front)}</div>',
        "<h2>By task</h2>",
        f'<div class="wide">{_tasks(results)}</div>',
        "<h2>Settings</h2>",
        f"<dl>{_settings(results.codecs)}</dl>",
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(parts)
        + "\n</main>\n</body>\n</html>\n"
    )


def _summary(results: ComparisonReport) -> str:
    """The result in some sentences."""
    best, finetuned, base = results.best, results.row("fine-tuned"), results.row("base")
    said = []
    if finetuned and base:
        tasks = len(finetuned.scores.values)
        said.append(
            f"{tasks} task{'s' * (tasks > 1)}; the fine-tuned models take "
            f"{size(finetuned.nbytes)}, the base {size(base.total_nbytes)}."
        )
        if finetuned.scores.alike:
            said.append(
                f"Their mean score is {_score(finetuned)}, the base's, with their heads, "
                f"{_score(base)}."
            )
    if best is not None:
        kept = f"{percent(best.scores.share)} of the fine-tuned score"
        kept = kept if results.by_share else f"a mean score of {_score(best)}"
        said.append(f"Most is kept by {best.name}: {kept}, in {size(best.nbytes)}.")
        near = [row for row in results.codecs if results.within_noise(row)]
        if near:
            least = min(near, key=lambda row: row.nbytes)
            said.append(
                f"Within noise of it {'is' if len(near) == 1 else 'are'} "
                f"{', '.join(row.name for row in near)}; the smallest of these, {least.name}, "
                f"takes {size(least.nbytes)}."
            )
    return " ".join(said)


def _score(row: Comparison) -> str:
    return score_text(row.scores.mean, row.scores.percent)


def _in_words(results: ComparisonReport) -> str:
    """What the plot shows, for whoever does not see it."""
    front = outer(results.marks())
    if not front:
        return "No codec was compared."
    steps = "; ".join(f"{mark.name} ({mark.bits:.3g} bits)" for mark in front)
    return (
        f"A point for each codec: across, bits per parameter on a log scale; up, "
        f"{results.axis.label}. Colours are methods, shapes are dtypes, hollow points saw data. "
        f"On the front, where nothing smaller keeps more, from the smallest: {steps}."
        + " Hollow stars are published figures, not measured here."
        * bool(results.published_marks())
    )


def _plot(results: ComparisonReport) -> str:
    """The plot as plotly draws it, and its script."""
    from plotly.graph_objects import Figure, Layout
    from plotly.io import to_html

    marks, axis = results.marks(), results.axis
    place, ticks = scale_of([*marks, *results.published_marks()], axis)
    rows = {row.name: row for row in results.codecs}
    styles = mark_styles(marks)
    traces: list[dict[str, Any]] = [_front(outer(marks), place)]
    seen: set[str] = set()
    for line in dict.fromkeys(mark.line for mark in marks):
        own = sorted((m for m in marks if m.line == line), key=lambda m: m.bits)
        method = own[0].method
        traces.append(_trace(results, own, rows, styles[method], place, method not in seen))
        seen.add(method)
    if theirs := results.published_marks():
        traces.append(_published(theirs, results, place))
    height: dict[str, Any] = {"title": {"text": axis.label}, "zeroline": False}
    if ticks is not None:
        height["tickvals"] = [place(tick / 100) for tick in ticks]
        height["ticktext"] = [f"{tick:g}" for tick in ticks]
    sizes = [2.0**power for power in range(-6, 7)]
    across = {"text": "bits per parameter on disk (log scale)"}
    layout = Layout(
        template="plotly_white",
        height=620,
        margin={"t": 20, "r": 10},
        xaxis={"title": across, "type": "log", "tickvals": sizes, "tickformat": "~g"},
        yaxis=height,
        shapes=[_across(results, kind, place) for kind in ("fine-tuned",) if results.row(kind)],
        hoverlabel={"align": "left"},
    )
    figure = Figure(data=traces, layout=layout)
    uploads = ["sendChartToCloud", "sendDataToCloud"]
    config = {"displaylogo": False, "responsive": True, "modeBarButtonsToRemove": uploads}
    return str(
        to_html(figure, config=config, include_plotlyjs=True, full_html=False, div_id="front")
    )


def _front(front: Sequence[Mark], place: Any) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "lines",
        "name": "front",
        "x": [mark.bits for mark in front],
        "y": [place(mark.value) for mark in front],
        "line": {"shape": "hv", "width": 9, "color": "#d9d9d9"},
        "hoverinfo": "skip",
    }


def _published(marks: Sequence[Mark], results: ComparisonReport, place: Any) -> dict[str, Any]:
    """What is published, and who says so on hovering."""
    sources = {
        row.title: f"{escape(row.source)}<br>{escape(row.setting)}" for row in results.published
    }
    return {
        "type": "scatter",
        "mode": "markers",
        "name": "†: published, not measured here",
        "x": [mark.bits for mark in marks],
        "y": [place(mark.value) for mark in marks],
        "marker": {"symbol": "star-open", "size": 12, "color": "#404040"},
        "text": [
            f"<b>{escape(mark.name)}</b><br>{percent(mark.value)}<br>{sources[mark.name]}"
            for mark in marks
        ],
        "hovertemplate": "%{text}<extra></extra>",
    }


def _trace(
    results: ComparisonReport,
    own: Sequence[Mark],
    rows: dict[str, Comparison],
    style: tuple[str, Any],
    place: Any,
    told: bool,
) -> dict[str, Any]:
    """Marks that a line joins, with whiskers, and what is shown of each on hovering."""
    colour, dash = style
    ends = [
        (m.value if m.low is None else m.low, m.value if m.high is None else m.high) for m in own
    ]
    heights = [place(mark.value) for mark in own]
    symbols = [_SYMBOLS[mark.marker] + "-open" * mark.calibrated for mark in own]
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": own[0].method,
        "legendgroup": own[0].method,
        "showlegend": told,
        "x": [mark.bits for mark in own],
        "y": heights,
        "line": {"color": colour, "dash": _DASHES[dash], "width": 1},
        "marker": {"symbol": symbols, "size": 9, "color": colour},
        "error_y": {
            "type": "data",
            "symmetric": False,
            "array": [place(high) - at for (_, high), at in zip(ends, heights, strict=True)],
            "arrayminus": [at - place(low) for (low, _), at in zip(ends, heights, strict=True)],
            "thickness": 0.8,
            "width": 0,
        },
        "text": [_hover(results, rows[mark.name]) for mark in own],
        "hovertemplate": "%{text}<extra></extra>",
    }


def _hover(results: ComparisonReport, row: Comparison) -> str:
    worst = row.scores.worst
    lines = [
        f"<b>{escape(row.name)}</b>",
        f"share {percent(row.scores.share)}" if results.by_share else f"score {_score(row)}",
        f"95%: {results.interval_text(row)}" if results.interval(row) else "",
        f"worst: {escape(worst[0])}, {percent(worst[1])}" if worst else "",
        f"{row.bits_per_parameter:.3f} bits per parameter",
        f"{size(row.nbytes)}, with the base {size(row.total_nbytes)}",
        escape(row.settings),
    ]
    return "<br>".join(filter(None, lines))


def _across(results: ComparisonReport, kind: Any, place: Any) -> dict[str, Any]:
    row = results.row(kind)
    at = place(results.value(row)) if row else 0.0
    line = {"color": "#555", "dash": "dash", "width": 1}
    return {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": at, "y1": at, "line": line}


def _table(table: Table, front: set[str]) -> str:
    """A table with a caption, and headings that say of what they are."""
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in table.columns)
    body = []
    for first, *rest in table.rows:
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in rest)
        kind = ' class="front"' if first in front else ""
        body.append(f'<tr{kind}><th scope="row">{escape(first)}</th>{cells}</tr>')
    caption = f"{table.title}; codecs of the front in bold. {table.note}"
    return _whole(caption, head, body)


def _tasks(results: ComparisonReport) -> str:
    """The heat map as a table: what is kept of each task."""
    tasks = list(results.rows[0].scores.values) if results.rows else []
    rows = [row for row in results.rows if row.kind != "fine-tuned"]
    shares = [[row.scores.share_of(task) for task in tasks] for row in rows]
    low = least_of(shares)
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in ("codec", *tasks))
    body = []
    for row, own in zip(rows, shares, strict=True):
        cells = [_cell(share, low, is_worst(share, own)) for share in own]
        body.append(f'<tr><th scope="row">{escape(row.name)}</th>{"".join(cells)}</tr>')
    return _whole("Kept of each task (%); the worst task underlined", head, body)


def _cell(share: float | None, low: float, worst: bool) -> str:
    """A share, on a colour from dark, little, to light, all."""
    if share is None:
        return "<td></td>"
    part = lightness(100 * share, low)
    red, green, blue = (round(a + part * (b - a)) for a, b in ((20, 253), (45, 231), (95, 180)))
    names = " ".join(["dark"] * (part < 0.5) + ["worst"] * worst)
    kind = f' class="{names}"' if names else ""
    return f'<td{kind} style="background: rgb({red},{green},{blue})">{100 * share:.1f}</td>'


def _whole(caption: str, head: str, body: Sequence[str]) -> str:
    rows = "\n".join(body)
    return (
        f"<table>\n<caption>{escape(caption.strip())}</caption>\n<thead><tr>{head}</tr></thead>\n"
        f"<tbody>\n{rows}\n</tbody>\n</table>"
    )


def _settings(rows: Sequence[Comparison]) -> str:
    return "\n".join(
        f"<dt>{escape(row.name)}</dt><dd><code>{escape(row.settings)}</code></dd>" for row in rows
    )
