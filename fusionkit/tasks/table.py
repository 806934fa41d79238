"""Rows by column: what a file, or a data set, of texts or paths comes to."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusionkit.errors import DataError, meant

HEADLESS = (".tsv.gz", ".txt")
"""Files of `label<TAB>text` lines: no header, no quotes."""
_NOTHING = "has nothing in column '{}'; mend the row, or leave it out"


class MissingSplitError(DataError):
    """A task has rows, but none of this split."""


@dataclass(frozen=True)
class Table:
    """The rows of one split.

    Attributes:
        where: how messages call it.
        columns: the columns' names.
        rows: a sequence of mappings by column; or a `datasets.Dataset`.
        lines: of a file, the line of each row.
        classes: column of class numbers → what the data set calls the classes.
        folder: where paths in it start.
    """

    where: str
    columns: tuple[str, ...]
    rows: Any
    lines: Sequence[int] | None = None
    classes: Mapping[str, list[str]] | None = None
    folder: Path | None = None

    @property
    def headless(self) -> bool:
        """Whether its rows are `label<TAB>text` lines."""
        return self.where.endswith(HEADLESS)

    def at(self, row: int) -> str:
        """How messages call a row."""
        return f"{self.where}, " + (f"line {self.lines[row]}" if self.lines else f"row {row + 1}")

    def column(self, name: str) -> list[Any]:
        """A column's values.

        Raises:
            DataError: a row has none.
        """
        values = list(self.rows[name] if self.lines is None else (r.get(name) for r in self.rows))
        if None in values:
            raise DataError(f"{self.at(values.index(None))}: {_NOTHING.format(name)}")
        return values

    def labels(self, name: str) -> list[Any]:
        """A column's labels: names or numbers; of classes that the data set names, their names.

        Raises:
            DataError: a row has none.
        """
        names = (self.classes or {}).get(name)
        labels = self.column(name)
        for row, label in enumerate(labels):
            if label == "" or (names and label < 0):
                hidden = " (-1: hidden, as of a contest's test rows)" if names else ""
                raise DataError(
                    f"{self.at(row)}: {_NOTHING.format(name)}{hidden}; `splits` chooses another "
                    "split: {test: validation}, say"
                )
        return [names[label] for label in labels] if names else labels

    def check_column(self, name: str, setting: str) -> str:
        """Check that there is such a column; returns its name.

        Args:
            name: the column's.
            setting: what chose it.

        Raises:
            DataError: there is none.
        """
        if name not in self.columns:
            hint = meant(name, self.columns)
            raise DataError(
                f"{self.where}: has no column '{name}' (`{setting}`){hint or ';'} it has "
                f"{quoted(self.columns)}"
            )
        return name


def quoted(names: Iterable[str]) -> str:
    """Names as messages list them."""
    return ", ".join(f"'{name}'" for name in names)
