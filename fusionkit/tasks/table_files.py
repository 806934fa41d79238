"""A task's rows, a split at a time: files of text, Parquet, Arrow, Hugging Face data sets.

A file of text is read by Python's own `csv` and `json`; everything else by `datasets`, which is
imported when it is needed.
"""

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fusionkit.errors import DataError
from fusionkit.tasks.data import Split
from fusionkit.tasks.table import HEADLESS, MissingSplitError, Table, quoted

TEXT_FILES = (*HEADLESS, ".csv", ".tsv", ".jsonl", ".json", ".csv.gz", ".jsonl.gz")
BINARY_FILES = (".parquet", ".arrow")
NAMES: dict[Split, tuple[str, ...]] = {
    "train": ("train", "training"),
    "test": ("test", "testing", "validation", "valid", "val", "dev"),
}
"""What a split is called; of several that are there, the first counts."""

SAVED = ("dataset_dict.json", "state.json")
"""Files of a folder that `save_to_disk` of `datasets` wrote."""


def read_table(path: Path, split: Split, called: Mapping[str, str] | None = None) -> Table:
    """Read one split of a task.

    Args:
        path: a file, whose rows are test rows; `rows-{split}.csv`, a file for each split; a folder
            of `train.csv`, `test.csv` and so on, or what `datasets` saved or would load; or, where
            nothing lies at `path`, the name of a data set on the Hugging Face hub,
            `ORG/NAME` or `ORG/NAME:CONFIG`.
        split: which.
        called: `train` and `test` → what they are called; by default as in `NAMES`.

    Raises:
        MissingSplitError: there is no such split.
        DataError: it can't be read.
    """
    names = names_of_split(split, called)
    if "{split}" in path.name:
        return _read_file(_file_of(path, names))
    if path.is_file():
        if split == "train":
            raise MissingSplitError(
                f"{path}: is one file, and its rows are test rows; put training rows beside them: "
                f"a folder with train{path.suffix} and test{path.suffix}"
            )
        return _read_file(path)
    if path.is_dir():
        if found := file_in(path, names):
            return _read_file(found)
        if not holds_dataset(path):
            raise MissingSplitError(
                f"{path}: no {split} rows there: expected a file {' or '.join(names)}, with one of "
                f"the endings {', '.join((*TEXT_FILES, *BINARY_FILES))}; it holds "
                f"{_content(path)}. `splits` says how else they are called"
            )
    else:
        _check_hub_name(path)
    from fusionkit.tasks.hub_datasets import read_dataset

    return read_dataset(path, split, names, any((path / name).is_file() for name in SAVED))


def names_of_split(split: Split, called: Mapping[str, str] | None) -> tuple[str, ...]:
    """What a split may be called.

    Raises:
        DataError: `called` names others than the two that there are.
    """
    if unknown := sorted(set(called or {}) - set(NAMES)):
        raise DataError(
            f"`splits` says what 'train' and 'test' are called; there is no '{unknown[0]}'"
        )
    return (called[split],) if called and split in called else NAMES[split]


def file_in(folder: Path, names: Iterable[str]) -> Path | None:
    """The file of text of a folder that has one of some names, the first that is there."""
    paths = [folder / f"{name}{suffix}" for name in names for suffix in TEXT_FILES]
    return next((path for path in paths if path.is_file()), None)


def holds_dataset(folder: Path) -> bool:
    """Whether a folder, or one in it, has files that `datasets` alone reads."""
    return any(
        each.name.endswith(BINARY_FILES)
        or each.name in SAVED
        or (each.is_dir() and holds_dataset(each))
        for each in folder.iterdir()
    )


def _content(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(names[:8]) + more or "nothing"


def _check_hub_name(path: Path) -> None:
    """Check that what is not here may be a data set of the hub: `ORG/NAME`, and no folder ORG."""
    first, slash, rest = str(path).partition("/")
    file = path.name.endswith((*TEXT_FILES, *BINARY_FILES, ".gz", ".npz", ".zip"))
    if not (first and slash and rest) or "/" in rest or file or Path(first).exists():
        raise DataError(f"{path}: no such file or folder (relative to {Path.cwd()})")


def _file_of(path: Path, names: Iterable[str]) -> Path:
    paths = [path.with_name(path.name.replace("{split}", name)) for name in names]
    for each in paths:
        if each.is_file():
            return each
    raise MissingSplitError(f"{path}: no such file; looked for {', '.join(p.name for p in paths)}")


def _read_file(path: Path) -> Table:
    if path.name.endswith(BINARY_FILES):
        from fusionkit.tasks.hub_datasets import read_dataset_file

        return read_dataset_file(path)
    if not path.name.endswith(TEXT_FILES):
        known = ", ".join((*TEXT_FILES, *BINARY_FILES))
        raise DataError(f"{path}: expected a file of rows, whose name ends in one of {known}")
    text = text_of(path)
    if path.name.endswith(HEADLESS):
        table = _labelled_lines(path, text)
    elif ".json" in path.name:
        table = _json_rows(path, text)
    else:
        table = _csv_rows(path, text)
    if not table.rows:
        raise DataError(f"{path}: has no rows")
    return replace(table, folder=path.parent)


def text_of(path: Path) -> str:
    """A file's text, unpacked where it is gzipped.

    Raises:
        DataError: it is not UTF-8.
    """
    try:
        content = path.read_bytes()
        return (gzip.decompress(content) if path.suffix == ".gz" else content).decode("utf-8-sig")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        kind = "a whole gzip file of UTF-8 text" if path.suffix == ".gz" else "UTF-8 text"
        raise DataError(f"{path}: not {kind} ({error})") from error


def _labelled_lines(path: Path, text: str) -> Table:
    """No quoting, so that any text but a line break can stand."""
    rows = []
    for number, line in enumerate(text.removesuffix("\n").split("\n"), start=1):
        label, tab, said = line.removesuffix("\r").partition("\t")
        if not tab:
            raise DataError(f"{path}, line {number}: expected 'label<TAB>text', got no tab")
        rows.append({"label": label, "text": said})
    return Table(str(path), ("label", "text"), rows, range(1, len(rows) + 1))


def _csv_rows(path: Path, text: str) -> Table:
    tabs = ".tsv" in path.name
    reader = csv.reader(io.StringIO(text, newline=""), delimiter="\t" if tabs else ",", strict=True)
    rows: list[dict[str, str]] = []
    lines: list[int] = []
    try:
        header = next(reader, [])
        if len(set(header)) < len(header):
            raise DataError(f"{path}, line 1: names a column twice: {quoted(header)}")
        for cells in filter(None, reader):
            if len(cells) != len(header):
                raise DataError(
                    f"{path}, line {reader.line_num}: has {len(cells)} cells, and the header "
                    f"{len(header)}; a cell with a {'tab' if tabs else 'comma'} needs quotes"
                )
            rows.append(dict(zip(header, cells, strict=True)))
            lines.append(reader.line_num)
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: not CSV ({error})") from error
    return Table(str(path), tuple(header), rows, lines)


def _json_rows(path: Path, text: str) -> Table:
    rows: list[Any] = []
    lines: list[int] = []
    whole = text.lstrip().startswith("[")  # one list, and not an object a line
    for number, line in enumerate([text] if whole else text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}, line {number}: not JSON ({error})") from error
        rows.extend(found if whole else [found])
        lines.append(number)
    for place, row in enumerate(rows):
        if not isinstance(row, dict):
            at = f"item {place + 1}" if whole else f"line {lines[place]}"
            raise DataError(
                f"{path}, {at}: expected an object with a text and a label, got {str(row)[:40]}"
            )
    columns = dict.fromkeys(name for row in rows for name in row)
    return Table(str(path), tuple(columns), rows, range(1, len(rows) + 1) if whole else lines)
