"""A table that terminals and notebooks show: by rich, and as HTML of its own."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

from rich import markup
from rich.table import Table as RichTable


@dataclass
class Table:
    """Rows of text under a title.

    `rich`'s console prints it, a notebook shows it.

    Args:
        title: what is shown.
        columns: the columns' names.
        words: how many columns, the first, hold words; the others hold numbers, set to the right.
        footer: how many rows, the last, are set off from the others.
        rows: a cell for each column, empty where there is nothing to say.
        note: what is to be known of it, below.
    """

    title: str
    columns: Sequence[str]
    words: int = 1
    footer: int = 0
    rows: list[tuple[str, ...]] = field(default_factory=list)
    note: str = ""

    def add(self, *cells: str) -> None:
        """Add a row; cells that are left out at its end are empty."""
        self.rows.append(cells + ("",) * (len(self.columns) - len(cells)))

    def __rich__(self) -> RichTable:
        """The table as rich draws it."""
        note = markup.escape(self.note) or None
        table = RichTable(title=markup.escape(self.title), caption=note, caption_justify="left")
        for place, column in enumerate(self.columns):
            table.add_column(
                markup.escape(column), justify="left" if place < self.words else "right"
            )
        for place, row in enumerate(self.rows):
            last = place == len(self.rows) - self.footer - 1
            table.add_row(*map(markup.escape, row), end_section=last)
        return table

    def _repr_html_(self) -> str:
        """The table as HTML: escaped, its style with it, in the colours of where it is shown."""
        line = "1px solid currentColor"
        head = _row(self.columns, self.words, f"border-bottom: {line}; ", heading=True)
        body = []
        first_below = len(self.rows) - self.footer
        for place, row in enumerate(self.rows):
            above = f"border-top: {line}; " if self.footer and place == first_below else ""
            body.append(_row(row, self.words, above))
        caption = f'<caption style="font-style: italic">{escape(self.title)}</caption>'
        style = "border-collapse: collapse; font-variant-numeric: tabular-nums"
        note = f"\n<p>{escape(self.note)}</p>" if self.note else ""
        rows = "\n".join(body)
        return (
            f'<table style="{style}">\n{caption}\n<thead>\n{head}\n</thead>\n'
            f"<tbody>\n{rows}\n</tbody>\n</table>{note}"
        )


def _row(cells: Sequence[str], words: int, style: str, heading: bool = False) -> str:
    """One row; the first cell heads it. The style of a notebook's own cells is set aside."""
    found = []
    for place, cell in enumerate(cells):
        tag = "th" if heading or place == 0 else "td"
        scope = ' scope="col"' if heading else ' scope="row"' if place == 0 else ""
        own = f"{style}padding: 0.2em 0.8em; text-align: {'left' if place < words else 'right'}"
        own += "" if heading or place else "; font-weight: normal"
        found.append(f'<{tag}{scope} style="{own}">{escape(cell)}</{tag}>')
    return f"<tr>{''.join(found)}</tr>"
